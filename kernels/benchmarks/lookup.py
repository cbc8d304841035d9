"""The codebook lookup beside what people use instead.

    python kernels/benchmarks/lookup.py --out kernels/benchmarks/report.json
    python kernels/benchmarks/lookup.py --shapes 4096x4096x12 1x2048x256 --merge kernels/benchmarks/report.json

Every round times each contender once (`timing.py`); a shape takes a minute or two, most of it in the slow peers. The tests of
the operations run first, and nothing is reported if they fail. Memory is measured in processes of their own (`memory.py`).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from memory import extra_memory, packed_codebook
from peers import OURS, PEERS, contenders, data
from report import machine, merge, rounded, sources
from tables import GOALS, lookup_table
from timing import Peak, measure, ratio

from tokenzoo.kernels import _native

ROOT = Path(__file__).parents[2]
NOT_OURS = ("test_benchmarks", "test_triton")
TESTS = [str(path) for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")) if path.stem not in NOT_OURS]
FAISS = ("FAISS", "FAISS, BLAS")
FEW_ROWS = 16  # so few are bound by reading the codebook, not by arithmetic
Shape = tuple[int, int, int]
Row = dict[str, Any]


def bench(shape: Shape, budget: float, peak: Peak) -> Row:
    """Times of one shape: ours, our share of the peak, and how many times longer the others take."""
    count, size, width = shape
    x, codebook = data(shape)
    with torch.no_grad():
        named = contenders(x, codebook, {**OURS, **PEERS})
        seconds, rates = measure(named, budget, threads={"one thread": 1}, peak=peak)
    ours, work = seconds["tokenzoo"], 2e-9 * count * size * width
    row: Row = {"shape": list(shape), "sources": sources(), "rounds": len(ours), "ms": rounded(1000 * statistics.median(ours))}
    if rates and count > FEW_ROWS:
        row["of peak"] = rounded(statistics.median(work / s / rate for s, rate in zip(ours, rates, strict=True)))
        row["peak"] = rounded(statistics.median(rates))
    row["ratio"] = {name: rounded(ratio(seconds[name], ours)) for name in PEERS if name in seconds}
    if installed := [row["ratio"][name] for name in FAISS if name in row["ratio"]]:
        row["ratio"]["FAISS at its best"] = min(installed)
    row["fallback beside addmm"] = rounded(ratio(seconds["addmm + argmin"], seconds["fallback"]))
    row["entries and loss"] = rounded(ratio(ours, seconds["ids alone"]) - 1)
    row["EMA"] = rounded(ratio(seconds["and EMA"], seconds["ids alone"]) - 1)
    if torch.get_num_threads() > 1:
        row["threads against one"] = rounded(ratio(seconds["one thread"], ours))
    return row


def memory(shape: Shape) -> Row:
    """Extra MiB of ours and the peers, and of the packed codebook."""
    found = {name: extra_memory(shape, name) for name in ["tokenzoo", *PEERS]}
    return {"memory": {name: mib for name, mib in found.items() if mib is not None}, "packed": packed_codebook(shape)}


def require_green_tests() -> None:
    """Exits unless the operations' tests pass; a run that passed counts until a source or a test of theirs changes."""
    passed = _native._cache_folder() / "tested" / sources()
    if passed.exists():
        return
    tests = [sys.executable, "-m", "pytest", "-q", *TESTS]
    if subprocess.run(tests, cwd=ROOT, check=False).returncode:
        raise SystemExit("the tests of the lookup fail: there is nothing to report")
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()


def parse_shape(text: str) -> Shape:
    """`4096x4096x12` as numbers.

    Raises:
        argparse.ArgumentTypeError: If it is not three positive numbers.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected NxKxD, such as 4096x4096x12, got {text!r}")
    count, size, width = map(int, parts)
    return count, size, width


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxKxD", default=list(GOALS), help="default: all")
    parser.add_argument("--only", choices=["speed", "memory"], help="leave the other part out")
    parser.add_argument("--seconds", type=float, default=25, help="time for the rounds of a shape (5 to 31 rounds)")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--merge", type=Path, help="put the rows into this report, and keep its others")
    options = parser.parse_args()
    require_green_tests()
    if options.out:
        options.out.unlink(missing_ok=True)
    target, rows, peak = options.merge or options.out, [], Peak()
    for shape in options.shapes:
        row: Row = {"shape": list(shape)}
        row |= bench(shape, options.seconds, peak) if options.only != "memory" else {}
        row |= memory(shape) if options.only != "speed" else {}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if target:
            merge(target, [row], "shape", [list(known) for known in GOALS])
    print(lookup_table({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
