"""The lookup's relatives beside what people use instead: residual stages, folded projections, scalar quantization.

    python kernels/benchmarks/relatives.py --out kernels/benchmarks/relatives.json
    python kernels/benchmarks/relatives.py --only FSQ LFQ --merge kernels/benchmarks/relatives.json

Measured as in `lookup.py`; the ratio is peer time / our time. The modules of transformers are those that its models run.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lookup import require_green_tests
from report import merge, rounded, sources
from tables import relatives_table
from timing import Contender, measure, ratio
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.kernels import (
    PackCache,
    Projections,
    fsq_quantize,
    grouped_quantize,
    lfq_quantize,
    lookup,
    projected_residual_quantize,
    residual_quantize,
)

LEVELS = (8, 8, 8, 5, 5, 5)
Contest = dict[str, Contender]


def residual(count: int, width: int, stages: int, size: int) -> Contest:
    """Residual stages; ours also returns the sum of the entries, the others ids alone."""
    from transformers import EncodecConfig, MimiConfig
    from transformers.models.encodec import modeling_encodec as encodec
    from transformers.models.mimi import modeling_mimi as mimi

    x, codebooks, caches = torch.randn(count, width), torch.randn(stages, size, width), [PackCache() for _ in range(stages)]
    columns = x.T[None].contiguous()
    config = EncodecConfig(codebook_size=size, codebook_dim=width)
    as_encodec = encodec.EncodecResidualVectorQuantizer(config)
    as_encodec.layers = nn.ModuleList(encodec.EncodecVectorQuantization(config) for _ in codebooks)
    sizes = {"codebook_dim": width, "hidden_size": width, "vector_quantization_hidden_dimension": width}
    as_mimi = mimi.MimiResidualVectorQuantizer(MimiConfig(codebook_size=size, **sizes), stages)
    for q, codebook in enumerate(codebooks):
        as_encodec.layers[q].codebook.embed.copy_(codebook)
        as_mimi.layers[q].codebook.embed_sum.copy_(codebook)
    return {
        "tokenzoo": lambda: residual_quantize(x, codebooks, caches=caches),
        "transformers EnCodec": lambda: as_encodec.encode(columns),
        "transformers Mimi": lambda: as_mimi.encode(columns),
    }


def grouped(count: int, width: int, groups: int, size: int) -> Contest:
    """A codebook per group, beside `torch.cdist` for all groups at once and vector-quantize-pytorch's heads."""
    x, codebooks = torch.randn(count, groups * width), torch.randn(groups, size, width)
    caches = [PackCache() for _ in codebooks]

    def distances() -> Tensor:
        parts = x.reshape(count, groups, width).transpose(0, 1).contiguous()
        return torch.cdist(parts, codebooks).argmin(-1)

    contest = {"tokenzoo": lambda: grouped_quantize(x, codebooks, caches=caches), "cdist + argmin": distances}
    heads = {"heads": groups, "separate_codebook_per_head": True, "codebook_dim": width}
    return contest | _module("VectorQuantize", x, dim=groups * width, codebook_size=size, **heads)


def gather(count: int, width: int, size: int) -> Contest:
    """Entries of ids, and their gradient, beside PyTorch's embedding."""
    ids, upstream = torch.randint(size, (count,)), torch.randn(count, width)

    def both(entries: Callable[[Tensor, Tensor], Tensor]) -> Contender:
        codebook = torch.randn(size, width, requires_grad=True)

        def run() -> object:
            with torch.enable_grad():
                return torch.autograd.grad(entries(ids, codebook), codebook, upstream)

        return run

    return {"tokenzoo": both(lookup), "F.embedding": both(F.embedding)}


def projected(count: int, wide: int, narrow: int, stages: int, size: int) -> Contest:
    """DAC's stages, each between two projections."""
    from transformers import DacConfig
    from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

    x = torch.randn(count, wide)
    columns = x.T[None].contiguous()
    config = DacConfig(n_codebooks=stages, codebook_size=size, codebook_dim=narrow)
    config.hidden_size = wide
    as_dac = DacResidualVectorQuantizer(config).eval()
    layers = as_dac.quantizers
    maps = Projections(
        torch.stack([layer.in_proj.weight[..., 0] for layer in layers]),
        torch.stack([layer.in_proj.bias for layer in layers]),
        torch.stack([layer.out_proj.weight[..., 0] for layer in layers]),
        torch.stack([layer.out_proj.bias for layer in layers]),
    )
    codebooks = torch.stack([layer.codebook.weight for layer in layers])
    return {
        "tokenzoo": lambda: projected_residual_quantize(x, codebooks, maps),
        "transformers DAC": lambda: as_dac(columns),
    }


def finite_scalar(count: int) -> Contest:
    """FSQ beside its paper's formula, the constants made beforehand, and beside vector-quantize-pytorch."""
    z = torch.randn(count, len(LEVELS))
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    half, offset, width = (levels - 1) * 1.001 / 2, torch.where(levels % 2 == 0, 0.5, 0.0), levels // 2
    shift, basis = (offset / half).atanh(), torch.tensor([1, *LEVELS[:-1]]).cumprod(0)

    def eager(z: Tensor) -> tuple[Tensor, Tensor]:
        level = ((z + shift).tanh() * half - offset).round()
        return level / width, ((level + width) * basis).sum(-1).to(torch.int64)

    contest = {"tokenzoo": lambda: fsq_quantize(z, LEVELS), "eager": lambda: eager(z), **_compiled(eager, z)}
    return contest | _module("FSQ", z, levels=list(LEVELS))


def lookup_free(count: int, bits: int) -> Contest:
    """LFQ beside its formula, the constants made beforehand."""
    x, weights = torch.randn(count, bits), 2 ** torch.arange(bits - 1, -1, -1)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(x > 0, 1.0, -1.0), ((x > 0).int() * weights).sum(-1)

    contest = {"tokenzoo": lambda: lfq_quantize(x), "eager": lambda: eager(x), **_compiled(eager, x)}
    return contest | _module("LFQ", x, dim=bits, codebook_size=2**bits)


def _compiled(eager: Callable[[Tensor], object], x: Tensor) -> Contest:
    compiled = torch.compile(eager, dynamic=False)
    return {"torch.compile": lambda: compiled(x)}


def _module(name: str, x: Tensor, **options: object) -> Contest:
    try:
        import vector_quantize_pytorch
    except ImportError:
        return {}
    module = getattr(vector_quantize_pytorch, name)(**options).eval()
    return {"vector-quantize-pytorch": lambda: module(x[None])}


CONTESTS: dict[str, Callable[[], Contest]] = {
    "EnCodec, 8 stages": lambda: residual(6000, 128, 8, 1024),
    "Mimi, 8 stages": lambda: residual(1500, 256, 8, 2048),
    "9 stages, D = 8": lambda: residual(4096, 8, 9, 1024),
    "grouped, 8 x 16": lambda: grouped(4096, 16, 8, 1024),
    "lookup, with backward": lambda: gather(65536, 64, 8192),
    "DAC, 9 stages": lambda: projected(2048, 1024, 8, 9, 1024),
    "FSQ, 64,000 codes": lambda: finite_scalar(65536),
    "LFQ, 18 bits": lambda: lookup_free(65536, 18),
}


def bench(name: str, budget: float) -> dict[str, Any]:
    """One row: our time, and how many times longer the others take."""
    torch.manual_seed(0)
    with torch.no_grad():
        seconds, _ = measure(CONTESTS[name](), budget)
    ours = seconds.pop("tokenzoo")
    return {
        "what": name,
        "sources": sources(),
        "rounds": len(ours),
        "ms": rounded(1000 * statistics.median(ours)),
        "ratio": {peer: rounded(ratio(theirs, ours)) for peer, theirs in seconds.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="operations whose name holds one of these")
    parser.add_argument("--seconds", type=float, default=10, help="time for the rounds of an operation (5 to 31 rounds)")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--merge", type=Path, help="put the rows into this report, and keep its others")
    options = parser.parse_args()
    require_green_tests()
    if options.out:
        options.out.unlink(missing_ok=True)
    target, rows = options.merge or options.out, []
    for name in CONTESTS:
        if any(word in name for word in options.only):
            rows.append(bench(name, options.seconds))
            print(json.dumps(rows[-1]), flush=True)
            if target:
                merge(target, rows[-1:], "what", list(CONTESTS))
    print(relatives_table({"rows": rows}))


if __name__ == "__main__":
    main()
