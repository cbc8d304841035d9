"""Wrong ids of the lookup and of what people use instead, on kinds of data that are hard on float32.

    python kernels/benchmarks/exactness.py --out kernels/benchmarks/exactness.json

An id is wrong if the float64 distance of its entry is not the smallest. Where several entries are equally near, each of them is
right; that ours is the lowest is for the tests to show.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.kernels import _native, nearest

SHAPES = [(16384, 4096, 12), (4096, 2048, 64), (2048, 1024, 256)]
Search = Callable[[Tensor, Tensor], Tensor]


def random(count: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    """Normal vectors and entries."""
    return torch.randn(count, width), torch.randn(size, width)


def l2_normalised(count: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    """On the unit sphere, where distances differ less."""
    x, codebook = random(count, size, width)
    return F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)


def clustered(count: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    """A hundredth as wide around 64 centres, entries and vectors alike."""
    centres = torch.randn(64, width)
    return tuple(centres[torch.randint(64, (n,))] + 0.01 * torch.randn(n, width) for n in (count, size))  # type: ignore[return-value]


def duplicated(count: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    """Every entry twice, so that every vector has a tie."""
    x, codebook = random(count, size // 2, width)
    return x, codebook.repeat(2, 1)


def offset(count: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    """A mean of 10 and a deviation of 0.1: an expanded square loses its digits."""
    x, codebook = random(count, size, width)
    return 10 + 0.1 * x, 10 + 0.1 * codebook


KINDS = {"random": random, "l2-normalised": l2_normalised, "clustered": clustered, "every entry twice": duplicated,
         "large offset": offset}  # fmt: skip


def fallback(x: Tensor, codebook: Tensor) -> Tensor:
    """Ours where there is no compiler."""
    native, _native.library = _native.library, lambda: None  # type: ignore[assignment]
    try:
        return nearest(x, codebook)
    finally:
        _native.library = native


def addmm(x: Tensor, codebook: Tensor) -> Tensor:
    """The expanded square, its |x|^2 left out."""
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    """PyTorch's distances as called by default: an expanded square beyond 25 rows."""
    return torch.cdist(x, codebook).argmin(1)


def direct_cdist(x: Tensor, codebook: Tensor) -> Tensor:
    """PyTorch's distances from differences."""
    return torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


SEARCHES: dict[str, Search] = {"tokenzoo": nearest, "fallback": fallback, "cdist": cdist, "cdist, no products": direct_cdist,
                               "addmm": addmm}  # fmt: skip


def wrong_ids(kind: str, shape: tuple[int, int, int], searches: dict[str, Search] = SEARCHES) -> dict[str, Any]:
    """Rows for which each search is wrong, and rows that have a tie; the data are always the same."""
    torch.manual_seed(0)
    x, codebook = KINDS[kind](*shape)
    found = {name: search(x, codebook) for name, search in searches.items()}
    wrong, ties = dict.fromkeys(found, 0), 0
    for part in torch.arange(len(x)).split(512):
        rows, entries = x[part].double(), codebook.double()
        distances = torch.cdist(rows, entries, compute_mode="donot_use_mm_for_euclid_dist")
        nearest_of_all = distances.amin(1, keepdim=True)
        ties += int(((distances == nearest_of_all).sum(1) > 1).sum())
        for name, ids in found.items():
            wrong[name] += int((distances.gather(1, ids[part, None]) > nearest_of_all).sum())
    return {"kind": kind, "shape": list(shape), "ties": ties, "wrong": wrong}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    rows = []
    for kind in KINDS:
        for shape in SHAPES:
            rows.append(wrong_ids(kind, shape))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"kernels": _native.status(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
