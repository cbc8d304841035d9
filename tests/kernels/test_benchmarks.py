"""What the benchmark reports: contenders that do the same thing, paired rounds, merged reports, goals. No timings."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenzoo.kernels import nearest

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a file of the benchmarks as its neighbours do, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = {path.stem for path in FOLDER.glob("*.py")}
    for name in names & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_every_contender_finds_the_same_entries(module):
    peers = module("peers")
    x, codebook = peers.data((70, 50, 8))
    quick = {name: factory for name, factory in {**peers.OURS, **peers.PEERS}.items() if name != "torch.compile"}
    with torch.no_grad():
        answers = {name: run() for name, run in peers.contenders(x, codebook, quick).items()}
    assert {"tokenzoo", "ids alone", "and EMA", "fallback", "addmm + argmin", "chunked addmm", "cdist + argmin"} <= set(answers)
    for name, answer in answers.items():
        integers = [torch.as_tensor(part).flatten() for part in leaves(answer) if not torch.as_tensor(part).is_floating_point()]
        assert [part.tolist() for part in integers] == [nearest(x, codebook).tolist()], name


def leaves(answer):
    if isinstance(answer, tuple):
        return [leaf for part in answer for leaf in leaves(part)]
    return [] if answer is None else [answer]


def test_rounds_are_paired_and_take_turns(module):
    timing = module("timing")
    calls = []
    found = timing.measure({name: lambda name=name: calls.append(name) for name in "abc"}, budget=0)
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == dict.fromkeys("abc", timing.ROUNDS[0])
    order = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert "".join(order).endswith("abcbcacababcbca")
    assert timing.ratio([2, 30, 4], [1, 10, 1]) == 3


def test_the_peak_is_measured_around_ours_with_all_threads(module):
    timing = module("timing")
    threads = []
    peak = argparse.Namespace(measure=lambda: threads.append(torch.get_num_threads()) or 7.0)
    found = timing.measure({"tokenzoo": lambda: None, "one": lambda: None}, 0, threads={"one": 1}, peak=peak)
    assert found.peak == [7.0] * timing.ROUNDS[0]
    assert set(threads) == {torch.get_num_threads()}
    assert len(threads) == 2 * timing.ROUNDS[0]


def test_merging_replaces_the_same_shape_and_drops_other_machines(module, tmp_path, monkeypatch):
    report, path = module("report"), tmp_path / "report.json"
    monkeypatch.setattr(report, "machine", lambda: {"cpu": "one"})
    order = [[1, 2, 3], [4, 5, 6]]
    report.merge(path, [{"shape": [4, 5, 6], "ms": 1, "packed": 9}], "shape", order)
    report.merge(path, [{"shape": [1, 2, 3], "ms": 2}, {"shape": [4, 5, 6], "ms": 3}], "shape", order)
    rows = json.loads(path.read_text())["rows"]
    assert rows == [{"shape": [1, 2, 3], "ms": 2}, {"shape": [4, 5, 6], "ms": 3, "packed": 9}]
    monkeypatch.setattr(report, "machine", lambda: {"cpu": "another"})
    report.merge(path, [{"shape": [1, 2, 3], "ms": 4}], "shape", order)
    assert json.loads(path.read_text()) == {"machine": {"cpu": "another"}, "rows": [{"shape": [1, 2, 3], "ms": 4}]}


def test_nothing_is_reported_while_a_test_fails(module, tmp_path, monkeypatch):
    lookup, runs = module("lookup"), []

    def run(command, **_):
        runs.append(command)
        return subprocess.CompletedProcess(command, returncode=len(runs) == 1)

    monkeypatch.setattr(lookup.subprocess, "run", run)
    monkeypatch.setenv("TOKENZOO_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="nothing to report"):
        lookup.require_green_tests()
    lookup.require_green_tests()
    lookup.require_green_tests()
    assert len(runs) == 2  # what passed is not run again
    assert any(part.endswith("test_nearest.py") for part in runs[0])


def test_shapes_are_read_from_the_command_line(module):
    parse = module("lookup").parse_shape
    assert parse("4096x16384x8") == (4096, 16384, 8)
    for text in ("4096x12", "4096x0x12", "axbxc", "1x2x3x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NxKxD"):
            parse(text)


def test_tables_say_which_goals_are_met(module):
    tables = module("tables")
    row = {"shape": [4096, 4096, 12], "ms": 2.5, "of peak": 0.81, "ratio": {"addmm + argmin": 14.0, "cdist + argmin": 20.0},
           "entries and loss": 0.031, "EMA": 0.1, "threads against one": 1.9, "fallback beside addmm": 6.0,
           "memory": {"tokenzoo": 0.4, "addmm + argmin": 64.0}, "packed": 0.2}  # fmt: skip
    report = {"machine": {"threads": 2}, "rows": [row]}
    assert "| 4096, 4096, 12 | 2.5 | 81 % ≥ 80 % | **14.0 < 15.0** |" in tables.lookup_table(report)
    assert "| **3.1 % > 3 %** | 10 % ≤ 15 % | 1.90 ≥ 1.85 | 6.00 ≥ 5.00 |" in tables.cost_table(report)
    assert "| 0.4 ≤ 2 | 0.2 |" in tables.memory_table(report)
    assert "| 0.4 / 64 |" in tables.short_table(report)
    other = {"rows": [{"what": "LFQ, 18 bits", "ms": 1.0, "ratio": {"eager": 5.5, "torch.compile": 2.0}}]}
    assert "| LFQ, 18 bits | 1 | eager | 5.50 ≥ 5.00 |" in tables.relatives_table(other)
    assert "| LFQ, 18 bits | 1 | torch.compile | 2.00 |" in tables.relatives_table(other)
