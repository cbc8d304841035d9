"""Writes the READMEs' tables from the cards and the benchmark reports, so that no number in them is typed by hand.

python benchmarks/readme.py            # rewrites README.md and kernels/benchmarks/README.md
python benchmarks/readme.py --check    # exits with 1 if one is out of date
"""

import argparse
import json
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

from tokenzoo.registry import cards
from tokenzoo.tokenizers.spec import Modality

ROOT = Path(__file__).parents[1]
NANO = "one_d_piece_nano.photos"
KERNELS = runpy.run_path(str(ROOT / "kernels" / "benchmarks" / "tables.py"))


def models() -> str:
    """For every modality a table that folds away, one row per card."""
    parts = []
    for modality in get_args(Modality):
        found = [card for card in cards().values() if card.modality == modality]
        if not found:
            continue
        architectures = dict.fromkeys(card.architecture for card in found)
        parts += [f"<details><summary>{modality}: {len(found)} checkpoints of {', '.join(architectures)}</summary>", ""]
        parts += ["| name | size | licence of the weights | commercial use |", "|---|---|---|---|"]
        for card in found:
            size = "bundled" if card.bundled else f"{card.size_mb:,.0f} MB" if card.size_mb else "not known"
            parts.append(
                f"| [`{card.name}`](cards/{card.name}.md) | {size} | {card.license} | {'yes' if card.commercial else 'no'} |"
            )
        parts += ["", "</details>", ""]
    return "\n".join(parts).strip()


def nano() -> str:
    """The rate-distortion table of the bundled tokenizer's card."""
    return block(cards()[NANO].body, "measured")


def encode() -> str:
    """The encode benchmark's report: how many times longer the reference implementation takes."""
    lines = ["| tokenizer | one batch of 8 | a list of 8, one by one |", "|---|---|---|"]
    for row in json.loads((ROOT / "benchmarks" / "report.json").read_text()):
        clock = {name: f"{ratios[0]:.2f}" for name, ratios in row["ratio"].items()}
        lines.append(f"| `{row['name']}` | {clock['_encode(batch)']} | {clock['encode(list)']} |")
    return "\n".join(lines)


def splitters() -> str:
    """The report of the splitters' benchmark: megabytes of text per second of processor time."""
    report = json.loads((ROOT / "benchmarks" / "text.json").read_text())
    lines = ["| | MB/s | bytes per word |", "|---|---:|---:|"]
    for name, (processor, _) in report["megabytes_per_second"].items():
        mean = report["bytes_per_word"].get(name)
        lines.append(f"| {f'`{name}`' if mean else name} | {processor:.3g} | {f'{mean:.2f}' if mean else ''} |")
    megabytes = f"{report['megabytes']:.0f} MB of code and of ten languages"
    return "\n".join([*lines, "", f"{megabytes}, {report['machine']}, {report['kernels']}."])


def words() -> str:
    """The report of the words' benchmark: megabytes of text encoded per second of the clock."""
    report = json.loads((ROOT / "benchmarks" / "words.json").read_text())
    lines = ["| | MB/s |", "|---|---:|"]
    lines += [f"| {name} | {clock:.3g} |" for name, (_, clock) in report["megabytes_per_second"].items()]
    made = f"{report['bytes'] / 1e6:.1f} MB of code and of ten languages, {report['threads']} threads, by the clock."
    return "\n".join([*lines, "", made])


def audio() -> str:
    """The audio benchmark's report."""
    lines = [
        "| codec | encode | decode | seconds of audio encoded and decoded per second | an hour encoded, decoded, GB at most |",
        "|---|---|---|---|---|",
    ]
    for row in json.loads((ROOT / "benchmarks" / "audio.json").read_text()):
        clock = {name: f"{ratios[0]:.2f}" for name, ratios in row.get("ratio", {}).items()}
        speed = {name: f"{value:.0f}" if value >= 10 else f"{value:.1f}" for name, value in row["speed"].items()}
        memory = row.get("memory", {})
        most = ", ".join(f"{memory[name]:.2f}" for name in ("encode_gb", "decode_gb") if name in memory)
        both = f"{speed['encode']}, {speed['decode']}"
        lines.append(f"| `{row['name']}` | {clock.get('encode', '')} | {clock.get('decode', '')} | {both} | {most} |")
    return "\n".join(lines)


def clips() -> str:
    """The video benchmark's report."""
    lines = ["| tokenizer | encode | decode | frames encoded and decoded per second |", "|---|---|---|---|"]
    for row in json.loads((ROOT / "benchmarks" / "clips.json").read_text()):
        clock = {name: f"{ratios[0]:.2f}" for name, ratios in row["ratio"].items()}
        speed = {name: f"{value:.1f}" for name, value in row["frames_per_second"].items()}
        both = f"{speed['encode']}, {speed['decode']} ({row['size']} x {row['size']} pixels)"
        lines.append(f"| `{row['name']}` | {clock['encode']} | {clock['decode']} | {both} |")
    return "\n".join(lines)


def block(text: str, name: str) -> str:
    """What stands between the markers of this name."""
    match = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    if match is None:
        raise SystemExit(f"expected the markers <!-- {name} --> and <!-- /{name} -->")
    return match[1].strip()


def kernels(table: str, report: str) -> str:
    """One of the kernels' tables, and below the lookup's short one what it was measured on."""
    found = KERNELS["load"](report)
    made: str = KERNELS[table](found)
    return f"{made}\n\n{KERNELS['machine_line'](found)}" if table in ("short_table", "lookup_table") else made


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "models": models,
        "nano": nano,
        "encode": encode,
        "audio": audio,
        "clips": clips,
        "lookup": partial(kernels, "short_table", "report.json"),
        "splitters": splitters,
        "words": words,
    },
    "kernels/benchmarks/README.md": {
        "lookup": partial(kernels, "lookup_table", "report.json"),
        "costs": partial(kernels, "cost_table", "report.json"),
        "memory": partial(kernels, "memory_table", "report.json"),
        "relatives": partial(kernels, "relatives_table", "relatives.json"),
        "exactness": partial(kernels, "exactness_table", "exactness.json"),
    },
}


def render(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """The page with its tables filled in."""
    for name, make in tables.items():
        block(text, name)
        filled = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, filled=filled: filled, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    for page, tables in PAGES.items():
        path = ROOT / page
        before = path.read_text()
        after = render(before, tables)
        if options.check and after != before:
            sys.exit(f"{page} is out of date: run python benchmarks/readme.py")
        path.write_text(after)


if __name__ == "__main__":
    main()
