"""Paired rounds, and how fast the machine is while they run.

On a shared machine a core has less to give at some times than at others, so nothing is compared across moments: every round
times each contender once, in turning order, and what is reported is the median over rounds of a ratio within the round.
"""

import contextlib
import ctypes
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tokenzoo.kernels import _native

Contender = Callable[[], object]
SAMPLE_SECONDS = 0.02
PEAK_SECONDS = 0.01
ROUNDS = (5, 31)


class Timings(NamedTuple):
    """Seconds of every contender in every round, and GFLOP/s of multiply-adds around ours (empty without a compiler)."""

    seconds: dict[str, list[float]]
    peak: list[float]


class Peak:
    """Multiply-add rate of this machine at the moment, in the widest vectors it has, all threads at once."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        if compiler := _native.compiler():
            with tempfile.TemporaryDirectory() as folder:
                built, source = Path(folder) / "peak.so", Path(__file__).with_name("peak.cpp")
                flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
                subprocess.run([*compiler, *flags, str(source), "-o", str(built)], check=True)
                self._library = ctypes.CDLL(str(built))
            self._library.peak.restype = ctypes.c_double

    def measure(self) -> float | None:
        """GFLOP/s, or `None` without a compiler."""
        return self._library and self._library.peak(torch.get_num_threads(), ctypes.c_double(PEAK_SECONDS))


def measure(
    named: Mapping[str, Contender],
    budget: float,
    *,
    threads: Mapping[str, int] | None = None,
    peak: Peak | None = None,
    ours: str = "tokenzoo",
) -> Timings:
    """Times contenders in paired rounds.

    Args:
        named: What is timed. Each is run twice to warm up, then in every round often enough to fill 20 ms.
        budget: Seconds the rounds may take; there are 5 of them at least, and 31 at most.
        threads: Number of threads for contenders that are not to have all.
        peak: If given, measured right before and right after `ours` in every round.
        ours: Name of the contender that `peak` is measured beside.
    """
    threads = threads or {}
    once = {}
    for name, run in named.items():
        with thread_count(threads.get(name)):
            once[name] = warm(run)
    repeats = {name: max(1, int(SAMPLE_SECONDS / seconds)) for name, seconds in once.items()}
    per_round = sum(repeats[name] * seconds for name, seconds in once.items())
    rounds = min(max(int(budget / per_round), ROUNDS[0]), ROUNDS[1])
    timings = Timings({name: [] for name in named}, [])
    names = list(named)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            before = peak.measure() if peak and name == ours else None
            with thread_count(threads.get(name)):
                timings.seconds[name].append(_sample(named[name], repeats[name]))
            after = peak.measure() if peak and name == ours else None
            if before and after:
                timings.peak.append((before + after) / 2)
    return timings


@contextlib.contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """So many threads inside; `None` changes nothing."""
    before = torch.get_num_threads()
    if count and count != before:
        torch.set_num_threads(count)
    yield
    if count and count != before:
        torch.set_num_threads(before)


def warm(run: Contender) -> float:
    """Seconds of the second of two runs; the first wakes threads and fills caches."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    return max(seconds, 1e-7)


def _sample(run: Contender, repeats: int) -> float:
    if repeats > 1:
        run()  # whatever ran before has taken the caches and the threads
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of how many times longer they take."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
