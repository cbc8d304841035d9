"""How the command line works through files and says what came of it."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from tokenzoo.tokenizers.errors import MediaError, TokenizerError

Row = dict[str, Any]
T = TypeVar("T")

out, err = Console(), Console(stderr=True)


def work_through(
    files: Sequence[Path], work: Callable[[Sequence[Path]], list[T]], *, at_once: int
) -> Iterator[tuple[list[T], list[Row]]]:
    """Works through files in batches under a progress bar: what came of each batch, and which files failed, with the reason.

    Args:
        files: What to work on.
        work: Does a batch and returns one result per file; a batch that fails is done again file by file.
        at_once: Files in a batch.
    """
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=len(files))
        for start in range(0, len(files), at_once):
            done: list[T] = []
            failed: list[Row] = []
            _try(work, files[start : start + at_once], done, failed)
            yield done, failed
            bar.advance(task, at_once)


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
    for done, not_done in work_through(files, work, at_once=at_once):
        rows += done
        failed += not_done
    if as_json:
        print_json({"done": rows, "failed": failed})
    elif rows:
        print_rows(rows)
    for failure in failed:
        err.print(f"[bold red]failed:[/] {escape(failure['reason'])}", soft_wrap=True)
    if failed:
        raise typer.Exit(1 if rows else 2)


def _try(work: Callable[[Sequence[Path]], list[T]], files: Sequence[Path], done: list[T], failed: list[Row]) -> None:
    """Does the whole batch, or each file by itself, noting the reason where that failed."""
    try:
        done += work(files)
    except (TokenizerError, OSError) as error:
        if len(files) == 1:
            failed.append({"file": str(files[0]), "reason": _named(files[0], error)})
            return
        for file in files:
            _try(work, [file], done, failed)


def _named(file: Path, error: Exception) -> str:
    return str(error) if str(file) in str(error) else f"{file}: {error}"


def places(
    files: Sequence[tuple[Path, Path]], output: Path, suffix: str, file_suffixes: Sequence[str] = ()
) -> dict[Path, Path]:
    """Where the result of each (file, relative path) goes; its folder is made.

    `photo.jpg` becomes `photo.jpg.tok`, so that results do not collide by extension; a single file goes to `output`
    itself where that has one of `file_suffixes`.

    Raises:
        MediaError: If two results would have one name, a single result's file name has another suffix, or nothing can be
            written there.
    """
    if len(files) == 1 and output.suffix in file_suffixes:
        make_room(output)
        return {files[0][0]: output}
    if len(files) == 1 and file_suffixes and output.suffix and not output.is_dir():
        raise MediaError(f"expected a folder, or a file name that ends in {' or '.join(file_suffixes)}, got {output}")
    found = {file: output / relative.with_name(relative.name + suffix) for file, relative in files}
    if len(set(found.values())) < len(files):
        raise MediaError("two inputs have the same name below their folders: take the folders one by one")
    _make_folder(output)
    return found


def make_room(file: Path) -> None:
    """Makes the folder of a file that is written at the end, so that what stands in its way is said before the work.

    Raises:
        MediaError: If the file is a folder, or its folder cannot be made or written.
    """
    if file.is_dir():
        raise MediaError(f"expected the name of a file to write, got the folder {file}")
    _make_folder(file.parent)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise MediaError(f"cannot write into the folder {folder}")


def printable(text: str) -> str:
    """A text that any output takes: what of a file name is not UTF-8 is shown as an escape."""
    return text.encode(errors="backslashreplace").decode()


def print_rows(rows: Sequence[Row]) -> None:
    """Prints rows with equal keys as a table."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    out.print(table)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else escape(printable(str(value)))


def print_json(value: Any) -> None:
    """Prints JSON, and nothing else, to the standard output."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
