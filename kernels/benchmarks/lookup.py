"""The codebook lookup beside what people use instead, in paired rounds.

    python kernels/benchmarks/lookup.py --out report.json

Every round times each contender once, in turning order; ratios are medians over rounds of peer time / our time. Ours is the
whole operation (ids, entries and loss, with the codebook packed beforehand as in eval); peers answer with ids alone, except
vector-quantize-pytorch, whose forward is timed. The operation's tests run first, and nothing is reported if they fail.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenzoo.kernels import PackCache, _native, _reference, quantize

ROOT = Path(__file__).parents[2]
SHAPES = [
    (256, 4096, 12), (4096, 4096, 12), (4096, 16384, 8), (8192, 1024, 8), (4096, 16384, 16), (4096, 8192, 64),
    (8192, 1024, 128), (4096, 2048, 256), (1024, 4096, 512), (256, 262144, 256), (1, 2048, 256), (16, 2048, 256),
]  # fmt: skip
Contender = Callable[[], object]


def contenders(x: Tensor, codebook: Tensor) -> dict[str, Contender]:
    """What is timed, ours first; peers that are not installed are left out."""
    norms, cache = codebook.square().sum(1), PackCache()
    found: dict[str, Contender] = {
        "tokenzoo": lambda: quantize(x, codebook, cache=cache),
        "fallback": lambda: _reference.nearest(x, codebook, dot=False),
        "addmm+argmin": lambda: torch.addmm(norms, x, codebook.T, alpha=-2).argmin(1),
    }
    if x.shape[0] * codebook.shape[0] <= 1 << 27:
        found["cdist+argmin"] = lambda: torch.cdist(x, codebook).argmin(1)
        found["EnCodec form"] = lambda: (-(x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + norms)).max(-1).indices
    return {**found, **_faiss(x, codebook), **_vector_quantize_pytorch(x, codebook)}


def _faiss(x: Tensor, codebook: Tensor) -> dict[str, Contender]:
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    index, queries = faiss.IndexFlatL2(codebook.shape[1]), x.numpy()
    index.add(codebook.numpy())
    default = faiss.cvar.distance_compute_blas_threshold

    def search(threshold: int) -> object:
        faiss.cvar.distance_compute_blas_threshold = threshold
        return index.search(queries, 1)

    return {"FAISS": lambda: search(default), "FAISS (BLAS)": lambda: search(1)}


def _vector_quantize_pytorch(x: Tensor, codebook: Tensor) -> dict[str, Contender]:
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return {}
    if x.shape[0] * codebook.shape[0] > 1 << 26:
        return {}
    module = VectorQuantize(dim=codebook.shape[1], codebook_size=codebook.shape[0]).eval()
    module._codebook.embed.data.copy_(codebook[None])
    return {"vector-quantize-pytorch": lambda: module(x[None])}


def measure(named: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    repeats = {name: _repeats(run) for name, run in named.items()}
    seconds: dict[str, list[float]] = {name: [] for name in named}
    names = list(named)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                named[name]()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def _repeats(run: Contender, at_least: float = 0.02) -> int:
    run()
    start = time.perf_counter()
    run()
    return max(1, int(at_least / max(1e-7, time.perf_counter() - start)))


class Peak:
    """Multiply-add rate of this machine at the moment, all threads at once; a shared core has less to give at some times."""

    def __init__(self, folder: Path) -> None:
        compiler = _native.compiler()
        self.program = folder / "peak" if compiler else None
        if compiler:
            source = Path(__file__).with_name("peak.cpp")
            subprocess.run([compiler, "-O3", "-march=native", str(source), "-o", str(self.program)], check=True)

    def measure(self) -> float | None:
        """GFLOP/s, or `None` without a compiler."""
        if self.program is None:
            return None
        started = [
            subprocess.Popen([str(self.program)], stdout=subprocess.PIPE, text=True) for _ in range(torch.get_num_threads())
        ]
        return sum(float(process.communicate()[0].split()[0]) for process in started)


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def bench(shapes: Sequence[tuple[int, int, int]], rounds: int) -> list[dict[str, Any]]:
    """One row per shape: our time, our share of the peak, and how many times longer each peer takes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peak = Peak(Path(folder))
        for shape in shapes:
            rows.append(bench_shape(shape, rounds, peak))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def bench_shape(shape: tuple[int, int, int], rounds: int, peak: Peak) -> dict[str, Any]:
    """One row; the peak is measured right before and right after."""
    count, size, width = shape
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(count, width, generator=generator), torch.randn(size, width, generator=generator)
    named = contenders(x, codebook)
    before = peak.measure()
    alone = measure({"tokenzoo": named["tokenzoo"]}, rounds)["tokenzoo"]
    after = peak.measure()
    seconds = measure(named, rounds)
    ours = seconds.pop("tokenzoo")
    row: dict[str, Any] = {"N, K, D": f"{count}, {size}, {width}", "ms": round(1000 * statistics.median(ours), 3)}
    rate = 2 * count * size * width / statistics.median(alone) / 1e9
    row["of peak"] = f"{100 * rate / ((before + after) / 2):.0f} %" if before and after else ""
    for name, theirs in seconds.items():
        row[name] = round(statistics.median(t / o for t, o in zip(theirs, ours, strict=True)), 2)
    return row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The report as a table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in rows])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--skip-tests", action="store_true", help="for work on the benchmark itself")
    options = parser.parse_args()
    if not options.skip_tests:
        tests = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "kernels" / "test_nearest.py")]
        if subprocess.run(tests, cwd=ROOT, check=False).returncode:
            raise SystemExit("the tests of the lookup fail: there is nothing to report")
    rows = bench(SHAPES, options.rounds)
    print(markdown(rows))
    if options.out:
        machine = {"cpu": _cpu(), "kernels": _native.status(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
