"""Draws the lookup's report: how many times longer the others take, on a logarithmic scale.

    python kernels/benchmarks/plot.py

Needs matplotlib. Ground and text suit light pages and dark ones.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from tables import FOLDER, MIDDLE_OF_FEW

mpl.use("svg")
from matplotlib import pyplot as plt

INK, FAINT = "#7a7a7a", "#9a9a9a55"
# Okabe and Ito's colours, told apart by colour-blind readers too; the shapes tell them apart without colour.
MARKS = {
    "FAISS at its best": ("#D55E00", "o"),
    "torch.compile": ("#CC79A7", "D"),
    "addmm + argmin": ("#0072B2", "s"),
    "transformers EnCodec": ("#009E73", "^"),
    "vector-quantize-pytorch": ("#E69F00", "v"),
}
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def draw(report: dict, path: Path) -> None:
    """Writes the picture; nothing in it depends on the day."""
    rows = [row for row in report["rows"] if row["shape"][0] not in MIDDLE_OF_FEW]
    mpl.rcParams.update({"svg.hashsalt": "lookup", "svg.fonttype": "path", "font.size": 10, "text.color": INK,
                         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})  # fmt: skip
    figure, axes = plt.subplots(figsize=(8.2, 0.8 + 0.36 * len(rows)), layout="constrained")
    for name, (color, marker) in MARKS.items():
        places = [(row["ratio"][name], y) for y, row in enumerate(rows) if name in row["ratio"]]
        if places:
            axes.plot(*zip(*places, strict=True), marker, color=color, markersize=6.5, label=name, markeredgewidth=0, zorder=3)
    axes.axvline(1, color=INK, linewidth=1.4, zorder=2)
    for y, row in enumerate(rows):
        reach = [value for name, value in row["ratio"].items() if name in MARKS]
        axes.plot([min(1, *reach), max(reach)], [y, y], color=FAINT, linewidth=1.2, zorder=1)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [" x ".join(f"{number:,}" for number in row["shape"]) for row in rows])
    axes.invert_yaxis()
    axes.set_ylabel("N x K x D")
    axes.set_xlabel("time, as a multiple of tokenzoo's (the line at 1x)")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(MARKS), frameon=False, handletextpad=0.1, columnspacing=1.2, fontsize=9)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", type=Path, default=FOLDER / "report.json", help="what lookup.py wrote")
    parser.add_argument("--out", type=Path, default=FOLDER / "lookup.svg")
    options = parser.parse_args()
    draw(json.loads(options.report.read_text()), options.out)


if __name__ == "__main__":
    main()
