"""The lookup's relatives beside the usual PyTorch: residual stages, folded projections, scalar quantization, overheads.

    python kernels/benchmarks/relatives.py --out report.json

Measured as in `lookup.py`; the ratio is peer time / our time.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lookup import measure
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.kernels import (
    PackCache,
    Projections,
    code_sums,
    fsq_quantize,
    lfq_quantize,
    nearest,
    projected_residual_quantize,
    quantize,
    residual_quantize,
)

LEVELS = (8, 8, 8, 5, 5, 5)


def residual_loop(x: Tensor, codebooks: Tensor) -> Tensor:
    """EnCodec's stages as transformers writes them."""
    residual, ids = x, []
    for codebook in codebooks:
        scores = -(residual.square().sum(1, keepdim=True) - 2 * residual @ codebook.T + codebook.T.square().sum(0))
        ids.append(scores.max(-1).indices)
        residual = residual - F.embedding(ids[-1], codebook)
    return torch.stack(ids, -1)


def projected_loop(x: Tensor, codebooks: Tensor, maps: Projections) -> Tensor:
    """DAC's stages as published: 1x1 convolutions, and distances of normalised vectors."""
    residual, ids = x.T[None], []
    for q, codebook in enumerate(codebooks):
        narrow = F.conv1d(residual, maps.in_weight[q][..., None], maps.in_bias[q])[0].T
        a, b = F.normalize(narrow), F.normalize(codebook)
        distances = a.pow(2).sum(1, keepdim=True) - 2 * a @ b.T + b.pow(2).sum(1, keepdim=True).T
        ids.append((-distances).max(1)[1])
        step = F.conv1d(F.embedding(ids[-1], codebook).T[None], maps.out_weight[q][..., None], maps.out_bias[q])
        residual = residual - step
    return torch.stack(ids, -1)


def eager_fsq(z: Tensor) -> tuple[Tensor, Tensor]:
    """Finite scalar quantization as its paper writes it."""
    count = torch.tensor(LEVELS, dtype=torch.float32)
    half, offset = (count - 1) * 1.001 / 2, torch.where(count % 2 == 0, 0.5, 0.0)
    width = count // 2
    codes = ((z + (offset / half).atanh()).tanh() * half - offset).round() / width
    basis = torch.cumprod(torch.tensor([1, *LEVELS[:-1]]), 0)
    return codes, ((codes * width + width) * basis).sum(-1).to(torch.int64)


def eager_lfq(x: Tensor) -> tuple[Tensor, Tensor]:
    """Lookup-free quantization as vector-quantize-pytorch writes it."""
    codes = torch.where(x > 0, 1.0, -1.0)
    return codes, ((x > 0).int() * 2 ** torch.arange(x.shape[-1] - 1, -1, -1)).sum(-1)


def contests() -> dict[str, dict[str, Callable[[], object]]]:
    """By name, what is timed: ours under `tokenzoo`, and the others."""
    torch.manual_seed(0)
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for name, count, width, stages, size in (
        ("EnCodec, 8 stages", 6000, 128, 8, 1024),
        ("Mimi, 8 stages", 1500, 256, 8, 2048),
        ("9 stages, D = 8", 4096, 8, 9, 1024),
    ):
        x, codebooks = torch.randn(count, width), torch.randn(stages, size, width)
        found[name] = {
            "tokenzoo": lambda x=x, c=codebooks: residual_quantize(x, c),  # type: ignore[misc]
            "transformers loop": lambda x=x, c=codebooks: residual_loop(x, c),  # type: ignore[misc]
        }
    x, codebooks = torch.randn(2048, 1024), torch.randn(9, 1024, 8)
    maps = Projections(torch.randn(9, 8, 1024) / 32, torch.randn(9, 8), torch.randn(9, 1024, 8) / 3, torch.randn(9, 1024))
    found["DAC, 9 stages"] = {
        "tokenzoo": lambda: projected_residual_quantize(x, codebooks, maps),
        "conv1d loop": lambda: projected_loop(x, codebooks, maps),
    }
    z, bits = torch.randn(65536, 6), torch.randn(65536, 18)
    fsq, lfq = torch.compile(eager_fsq), torch.compile(eager_lfq)
    found["FSQ 64000, N = 65536"] = {
        "tokenzoo": lambda: fsq_quantize(z, LEVELS), "eager": lambda: eager_fsq(z), "torch.compile": lambda: fsq(z),
    }  # fmt: skip
    found["LFQ 18 bits, N = 65536"] = {
        "tokenzoo": lambda: lfq_quantize(bits), "eager": lambda: eager_lfq(bits), "torch.compile": lambda: lfq(bits),
    }  # fmt: skip
    return {**found, **overheads()}


def overheads() -> dict[str, dict[str, Callable[[], object]]]:
    """What entries and loss, and EMA statistics, add to the ids alone."""
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for count, size, width in ((4096, 4096, 12), (8192, 1024, 8), (4096, 8192, 64), (8192, 1024, 128)):
        x, codebook, cache = torch.randn(count, width), torch.randn(size, width), PackCache()
        ids = nearest(x, codebook)

        def both(x: Tensor = x, codebook: Tensor = codebook, cache: PackCache = cache, ids: Tensor = ids) -> object:
            return quantize(x, codebook, cache=cache), code_sums(x, ids, len(codebook))

        found[f"ids alone, {count} x {size} x {width}"] = {
            "tokenzoo": lambda x=x, c=codebook, k=cache: nearest(x, c, cache=k),  # type: ignore[misc]
            "and entries, loss": lambda x=x, c=codebook, k=cache: quantize(x, c, cache=k),  # type: ignore[misc]
            "and EMA": both,
        }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, contenders in contests().items():
        seconds = measure(contenders, options.rounds)
        ours = seconds.pop("tokenzoo")
        row: dict[str, Any] = {"what": name, "ms": round(1000 * statistics.median(ours), 3)}
        for peer, theirs in seconds.items():
            row[peer] = round(statistics.median(t / o for t, o in zip(theirs, ours, strict=True)), 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
