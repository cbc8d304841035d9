"""Ids against float64 on data that are hard on float32; the kinds of data and the count are the benchmark's."""

import runpy
from pathlib import Path

import pytest
import torch

from tokenzoo.kernels import _native, nearest

EXACTNESS = runpy.run_path(str(Path(__file__).parents[2] / "kernels" / "benchmarks" / "exactness.py"))
SHAPES = [(2048, 1024, 12), (1024, 512, 64)]
MANY = [(8192, 2048, 12), (4096, 2048, 64)]  # rows enough that counts of wrong ids mean something


def wrong_ids(kind, shape):
    searches = {"tokenzoo": nearest, "cdist": EXACTNESS["cdist"]}
    return EXACTNESS["wrong_ids"](kind, shape, searches)


@pytest.mark.parametrize("shape", MANY)
@pytest.mark.parametrize("kind", EXACTNESS["KINDS"])
def test_native_ids_are_no_worse_than_those_of_cdist(kind, shape):
    if _native.library() is None:
        pytest.skip(_native.status())
    found = wrong_ids(kind, shape)["wrong"]
    assert found["tokenzoo"] <= found["cdist"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "l2-normalised", "every entry twice", "large offset"])
def test_no_id_is_wrong(kind, shape, lane):
    found = wrong_ids(kind, shape)
    assert found["wrong"]["tokenzoo"] == 0
    assert found["ties"] == (shape[0] if kind == "every entry twice" else 0)


def test_the_count_sees_what_an_offset_costs_cdist():
    assert wrong_ids("large offset", SHAPES[1])["wrong"]["cdist"] > 0


@pytest.mark.parametrize("kind", EXACTNESS["KINDS"])
def test_ids_do_not_depend_on_the_number_of_threads(kind, lane):
    x, codebook = EXACTNESS["KINDS"][kind](3000, 700, 24)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(nearest(x, codebook))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
