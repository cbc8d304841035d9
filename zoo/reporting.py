"""How the command line works through files and says what came of it."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from tokenzoo.tokenizers.errors import MediaError, TokenizerError

Row = dict[str, Any]

out, err = Console(), Console(stderr=True)


def run_files(files: Sequence[Path], work: Callable[[Sequence[Path]], list[Row]], *, at_once: int, as_json: bool) -> None:
    """Works through files in batches, one row of the report for each; a bad file does not stop the others.

    Args:
        files: What to work on.
        work: Does a batch and returns a row per file; a batch that fails is done again file by file.
        at_once: Files in a batch.
        as_json: Print JSON instead of a table.

    Raises:
        typer.Exit: With code 1 if some files failed, 2 if all did.
    """
    rows: list[Row] = []
    failed: list[Row] = []
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=len(files))
        for start in range(0, len(files), at_once):
            for batch in _try(work, files[start : start + at_once]):
                if isinstance(batch, list):
                    rows += batch
                else:
                    failed.append(batch)
            bar.advance(task, at_once)
    if as_json:
        print_json({"done": rows, "failed": failed})
    elif rows:
        print_rows(rows)
    for failure in failed:
        err.print(f"[bold red]failed:[/] {escape(failure['reason'])}", soft_wrap=True)
    if failed:
        raise typer.Exit(1 if rows else 2)


def _try(work: Callable[[Sequence[Path]], list[Row]], files: Sequence[Path]) -> list[list[Row] | Row]:
    """Rows of the whole batch, or of each file by itself with the reason where it failed."""
    try:
        return [work(files)]
    except (TokenizerError, OSError) as error:
        if len(files) == 1:
            return [{"file": str(files[0]), "reason": _named(files[0], error)}]
    return [part for file in files for part in _try(work, [file])]


def _named(file: Path, error: Exception) -> str:
    return str(error) if str(file) in str(error) else f"{file}: {error}"


def places(
    files: Sequence[tuple[Path, Path]], output: Path, suffix: str, file_suffixes: Sequence[str] = ()
) -> dict[Path, Path]:
    """Where the result of each (file, relative path) goes.

    `photo.jpg` becomes `photo.jpg.tok`, so that results do not collide by extension; a single file goes to `output`
    itself where that has one of `file_suffixes`.

    Raises:
        MediaError: If two results would have one name, or a single result's file name has another suffix.
    """
    if len(files) == 1 and output.suffix in file_suffixes:
        return {files[0][0]: output}
    if len(files) == 1 and file_suffixes and output.suffix and not output.is_dir():
        raise MediaError(f"expected a folder, or a file name that ends in {' or '.join(file_suffixes)}, got {output}")
    found = {file: output / relative.with_name(relative.name + suffix) for file, relative in files}
    if len(set(found.values())) < len(files):
        raise MediaError("two inputs have the same name below their folders: take the folders one by one")
    return found


def print_rows(rows: Sequence[Row]) -> None:
    """Prints rows with equal keys as a table."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else escape(str(value)) for value in row.values()))
    out.print(table)


def print_json(value: Any) -> None:
    """Prints JSON, and nothing else, to the standard output."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
