"""The command line: `tokenzoo list | info | encode | decode | roundtrip | complexity | convert | train | demo`.

Exit codes: 0 all went well; 1 some files failed, the rest is done; 2 nothing could be done; 130 interrupted.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tokenzoo.reporting import Row, err, make_room, out, places, print_json, print_rows, printable, run_files, work_through

if TYPE_CHECKING:
    from tokenzoo.tokenizers import Tokenizer, Tokens

DEFAULT_MODEL = "one_d_piece_nano"
FILES_AT_ONCE = 16

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Media to tokens and back. Exit codes: 0 done, 1 some files failed, 2 nothing could be done, 130 interrupted.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Card name, hf-hub:org/repo, or a folder.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")]
Inputs = Annotated[list[Path], typer.Argument(help="Files, or folders to search.", show_default=False)]
Length = Annotated[int | None, typer.Option("--length", "-n", help="Tokens (or codebooks) per item.")]
Target = Annotated[list[str] | None, typer.Option("--target", "-t", help="What to reach, such as psnr=28, ssim=0.9 or kbps=6.")]


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose errors that a user can act on become one line and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            from tokenzoo.tokenizers.errors import TokenizerError

            try:
                function(*args, **kwargs)
            except (TokenizerError, OSError) as error:
                err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                err.print("interrupted: what was finished is kept")
                raise typer.Exit(130) from None

        return app.command(name)(wrapped)

    return register


@_command("list")
def list_(
    pattern: Annotated[str | None, typer.Argument(help="Names to show; * stands for anything.")] = None,
    modality: Annotated[str | None, typer.Option(help="image, video, audio or text.")] = None,
    commercial: Annotated[bool, typer.Option("--commercial", help="Only weights whose licence allows commercial use.")] = False,
    as_json: Json = False,
) -> None:
    """List the tokenizers."""
    from tokenzoo.loading import info, list_models

    cards = [info(name) for name in list_models(pattern, modality=modality, commercial=commercial or None)]
    if as_json:
        print_json([card.summary() for card in cards])
        return
    table = Table("name", "modality", "licence", "size", "offline")
    for card in cards:
        size = f"{card.size_mb:,.4g} MB" if card.size_mb else ""
        table.add_row(card.name, card.modality, card.license, size, "yes" if card.bundled else "")
    out.print(table if cards else "no tokenizer has such a name")


@_command("info")
def info(
    name: Annotated[str | None, typer.Argument(help="Card name.")] = None,
    system: Annotated[bool, typer.Option("--system", help="Describe this machine and installation.")] = False,
    as_json: Json = False,
) -> None:
    """Show a tokenizer's card, or this machine."""
    if system or name is None:
        from tokenzoo.system import describe

        facts = describe()
        if as_json:
            print_json(facts)
        else:
            out.print("\n".join(f"{key}: {value}" for key, value in facts.items()), markup=False, highlight=False)
        return
    from tokenzoo.loading import info as card_of

    card = card_of(name)
    if as_json:
        print_json(card.summary())
    else:
        out.print(card.text, markup=False, highlight=False, soft_wrap=True)


@_command("encode")
def encode(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder, or a .tok or .safetensors file for one input.")],
    model: Model = DEFAULT_MODEL,
    length: Length = None,
    target: Target = None,
    file_format: Annotated[str, typer.Option("--format", help="tok (packed) or safetensors.")] = "tok",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Encode media into token files."""
    from tokenzoo import load, media
    from tokenzoo.tokenizers.errors import TokensError

    if file_format not in ("tok", "safetensors"):
        raise TokensError(f"expected --format tok or safetensors, got {file_format!r}")
    qualities = _parse_target(target)
    tokenizer = load(model, device=device)
    tokenizer.encode([], length=length, target=qualities)  # no picture has to be read to refuse these
    files = media.find(inputs, tokenizer.modality)
    where = places(files, output, f".{file_format}", (".tok", ".safetensors"))

    def work(batch: Sequence[Path]) -> list[Row]:
        rows = []
        for file, tokens in zip(batch, tokenizer.encode(list(batch), length=length, target=qualities), strict=True):
            tokens.save(where[file])
            rows.append({"file": str(file), "out": str(where[file]), **_sizes(tokens)})
        return rows

    run_files([file for file, _ in files], work, at_once=FILES_AT_ONCE, as_json=as_json)


@_command("decode")
def decode(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder, or a file for one input.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="By default the one that made the tokens.")] = None,
    device: Device = "cpu",
    native: Annotated[bool, typer.Option("--native", help="Keep the network's own resolution or sample rate.")] = False,
    as_json: Json = False,
) -> None:
    """Decode token files into media."""
    from tokenzoo import Tokens, load, media
    from tokenzoo.tokenizers.errors import TokensError

    files = media.find(inputs, "tokens")
    suffixes = (*media.DECODED_SUFFIX.values(), media.FEATURES_SUFFIX)
    where = places(files, output, "", suffixes)
    tokenizer_of = functools.cache(functools.partial(load, device=device))

    def work(batch: Sequence[Path]) -> list[Row]:
        rows = []
        for file in batch:
            tokens = Tokens.load(file)
            if not (model or tokens.spec.name):
                raise TokensError(f"{file} names no card: say with --model which tokenizer made it")
            tokenizer = tokenizer_of(model or tokens.spec.name)
            target = _decoded_name(where[file], tokenizer, given=where[file] == output)
            for i, item in enumerate(tokenizer.decode(tokens, native=native)):
                place = target if len(tokens) == 1 else target.with_stem(f"{target.stem}.{i}")
                media.write(item, place, tokenizer.modality, **_rates(tokenizer, tokens.meta[i], native))
                rows.append({"file": str(file), "out": str(place), **_sizes(tokens[i])})
        return rows

    run_files([file for file, _ in files], work, at_once=1, as_json=as_json)


@_command("roundtrip")
def roundtrip(
    inputs: Inputs,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the reconstructions.")] = None,
    model: Model = DEFAULT_MODEL,
    length: Length = None,
    target: Target = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Encode and decode media, and say how close the result is at the tokenizer's own resolution."""
    from tokenzoo import load, media

    qualities = _parse_target(target)
    tokenizer = load(model, device=device)
    tokenizer.encode([], length=length, target=qualities)
    files = media.find(inputs, tokenizer.modality)
    where = places(files, output, _suffix(tokenizer)) if output else {}

    def work(batch: Sequence[Path]) -> list[Row]:
        rows = []
        for file in batch:
            tokens = tokenizer.encode(file, length=length, target=qualities)
            if output:
                rates = _rates(tokenizer, tokens.meta[0], native=False)
                media.write(tokenizer.decode(tokens)[0], where[file], tokenizer.modality, **rates)
            rows.append({"file": str(file), **_sizes(tokens), **_closeness(tokenizer, file, tokens)})
        return rows

    run_files([file for file, _ in files], work, at_once=1, as_json=as_json)


@_command("complexity")
def complexity(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("complexity.html"),
    model: Model = DEFAULT_MODEL,
    target: Target = None,
    show: Annotated[int, typer.Option(min=1, help="Pictures to show at each end of the report.")] = 12,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Count the tokens that each picture takes to reach a quality, and write a report."""
    from tokenzoo import load, media
    from tokenzoo.survey import TARGET, Survey, Thumbnails, limit_of, measure
    from tokenzoo.survey_page import page, summary
    from tokenzoo.tokenizers.errors import MediaError
    from tokenzoo.tokenizers.files import write_atomically

    qualities = _parse_target(target) or TARGET
    tokenizer = load(model, device=device)
    limit, unit = limit_of(tokenizer)
    tokenizer.encode([], target=qualities)
    files = [file for file, _ in media.find(inputs, "image")]
    make_room(output)
    survey = Survey(tokenizer.name or model, qualities, limit, unit, asked=len(files))
    interrupted = False
    try:
        # One by one on a CPU, which encodes so anyway: a file that fails costs no other its work.
        at_once = 1 if tokenizer.device.type == "cpu" else FILES_AT_ONCE
        for pictures, failed in work_through(files, lambda batch: measure(tokenizer, batch, qualities), at_once=at_once):
            survey.pictures += pictures
            survey.failed += [failure["reason"] for failure in failed]
    except KeyboardInterrupt:
        interrupted = True
    for reason in survey.failed:
        err.print(f"[bold red]failed:[/] {escape(reason)}", soft_wrap=True)
    if survey.pictures:
        images = Thumbnails(tokenizer)
        write_atomically(output, page(survey, images, show=show).encode(errors="replace"))
        interrupted = interrupted or images.interrupted
        if as_json:
            rows = [{"file": str(p.file), "length": p.length, "met": p.met} for p in survey.pictures]
            print_json({"summary": summary(survey), "pictures": rows, "failed": survey.failed, "report": str(output)})
        else:
            print_rows([summary(survey)])
            out.print(f"report: {printable(str(output))}", soft_wrap=True, highlight=False)
    if interrupted:
        raise KeyboardInterrupt
    if not survey.pictures:
        raise MediaError(f"none of {len(files)} files could be read")
    if survey.failed:
        raise typer.Exit(1)


@_command("convert")
def convert(
    file: Annotated[Path, typer.Argument(help="Published weights you have: .safetensors, .bin, .pt, .ckpt.")],
    name: Annotated[str, typer.Argument(help="Card whose weights they are.")],
    folder: Annotated[Path, typer.Argument(help="Where to write what `--model FOLDER` then loads.")],
) -> None:
    """Turn published weights on disk into a folder that loads with no network."""
    from tokenzoo.convert import convert as convert_file

    out.print(f"wrote {convert_file(file, name, folder)}", soft_wrap=True, highlight=False)


@_command("train")
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe (TOML), or the name of one of ours.")],
    data: Annotated[Path | None, typer.Option(help="Folder of media; overrides the recipe.")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for checkpoints and logs; overrides the recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")] = False,
) -> None:
    """Train or fine-tune a tokenizer by a recipe."""
    from tokenzoo.training import run_recipe

    out.print(f"wrote {run_recipe(recipe, data=data, out=output, resume=resume)}", soft_wrap=True, highlight=False)


@_command("demo")
def demo(
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder for the picture sheet.")] = Path("out"),
    as_json: Json = False,
) -> None:
    """Encode and decode bundled photos with bundled weights, offline."""
    from tokenzoo.demo import run

    rows, sheet = run(output)
    if as_json:
        print_json({"rows": rows, "sheet": str(sheet)})
    else:
        print_rows(rows)
        out.print(f"picture sheet: {sheet}", soft_wrap=True, highlight=False)


def _parse_target(target: Sequence[str] | None) -> dict[str, float] | None:
    from tokenzoo.tokenizers.errors import TokensError

    if not target:
        return None
    try:
        values = {name: float(value) for name, value in (text.split("=", 1) for text in target)}
    except ValueError:
        values = {}
    if not values or not all(map(math.isfinite, values.values())):
        raise TokensError(f"expected --target NAME=NUMBER, such as psnr=28, got {' '.join(target)}")
    return values


def _decoded_name(path: Path, tokenizer: "Tokenizer", *, given: bool) -> Path:
    """The name of a decoded item: as it was given, or its token file's with the suffix of what it is decoded to."""
    from tokenzoo.tokenizers.errors import MediaError

    suffix = _suffix(tokenizer)
    if given and path.suffix != suffix and (tokenizer.modality != "video" or path.suffix != ".npy"):
        raise MediaError(f"expected a folder, or a file name that ends in {suffix} for {tokenizer.modality}, got {path}")
    return path if given else path.with_name(path.name + suffix)


def _suffix(tokenizer: "Tokenizer") -> str:
    from tokenzoo import media

    if tokenizer.info.decodes_to == "features":
        return media.FEATURES_SUFFIX
    return media.DECODED_SUFFIX[tokenizer.modality]


def _rates(tokenizer: "Tokenizer", meta: Mapping[str, Any], native: bool) -> dict[str, Any]:
    """Sample rate of decoded audio in Hz, the original's or the network's own, and frames per second of decoded clips."""
    own: int | None = getattr(tokenizer, "sample_rate", None)
    return {"sample_rate": own if native or own is None else int(meta.get("sample_rate", own)), "fps": meta.get("fps")}


def _sizes(tokens: "Tokens") -> Row:
    return {"tokens": int(tokens.counts.sum()), "bytes": int(tokens.num_bytes.sum())}


def _closeness(tokenizer: "Tokenizer", file: Path, tokens: "Tokens") -> Row:
    reconstruction = tokenizer.decode(tokens, native=True)[0]
    if tokenizer.modality == "text":
        return {"exact": reconstruction == file.read_bytes()}
    original, _ = tokenizer.media.read(file)
    names = [name for name in tokenizer.qualities if name != "l1"]
    measured = {name: tokenizer.qualities[name].measure(reconstruction[None], original[None]) for name in names}
    return {name: round(float(value[0]), 3) for name, value in measured.items()}


def main() -> None:
    """Entry point of the `tokenzoo` command."""
    app()
