"""Writes the README's tables from the cards and the benchmark reports, so that no number in it is typed by hand.

python benchmarks/readme.py            # rewrites README.md
python benchmarks/readme.py --check    # exits with 1 if it is out of date
"""

import argparse
import json
import re
import sys
from pathlib import Path

from tokenzoo.registry import cards

ROOT = Path(__file__).parents[1]
NANO = "one_d_piece_nano.photos"


def models() -> str:
    """One row per card."""
    lines = ["| name | size | licence of the weights | commercial use |", "|---|---|---|---|"]
    for card in cards().values():
        size = "bundled" if card.bundled else f"{card.size_mb:,.0f} MB" if card.size_mb else "not known"
        lines.append(
            f"| [`{card.name}`](cards/{card.name}.md) | {size} | {card.license} | {'yes' if card.commercial else 'no'} |"
        )
    return "\n".join(lines)


def nano() -> str:
    """The rate-distortion table of the bundled tokenizer's card."""
    return block(cards()[NANO].body, "measured")


def lookup() -> str:
    """The lookup benchmark's report."""
    report = json.loads((ROOT / "kernels" / "benchmarks" / "report.json").read_text())
    rows = report["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in rows]
    machine = report["machine"]
    return "\n".join(
        [*lines, "", f"{machine['cpu']}, {machine['threads']} threads, {machine['kernels']}; medians of paired rounds."]
    )


def encode() -> str:
    """The encode benchmark's report: how many times longer the reference implementation takes."""
    lines = ["| tokenizer | one batch of 8 | a list of 8, one by one |", "|---|---|---|"]
    for row in json.loads((ROOT / "benchmarks" / "report.json").read_text()):
        clock = {name: f"{ratios[0]:.2f}" for name, ratios in row["ratio"].items()}
        lines.append(f"| `{row['name']}` | {clock['_encode(batch)']} | {clock['encode(list)']} |")
    return "\n".join(lines)


def block(text: str, name: str) -> str:
    """What stands between the markers of this name."""
    match = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    if match is None:
        raise SystemExit(f"expected the markers <!-- {name} --> and <!-- /{name} -->")
    return match[1].strip()


def render(text: str) -> str:
    """The README with its tables filled in."""
    for name, make in (("models", models), ("nano", nano), ("encode", encode), ("lookup", lookup)):
        block(text, name)
        filled = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, filled=filled: filled, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text()
    after = render(before)
    if options.check and after != before:
        sys.exit("README.md is out of date: run python benchmarks/readme.py")
    path.write_text(after)


if __name__ == "__main__":
    main()
