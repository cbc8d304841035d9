"""What the kernels compute, in plain PyTorch; and the fallback that answers where nothing faster can.

Distances are compared as |c|^2 - 2 x.c after the mean of the codebook is taken off both sides. The fallback scores a chunk
of rows at a time into the same memory, and lets NumPy find the largest: its argmax is vectorised, torch's is not.
"""

import torch
from torch import Tensor

_CHUNK_SCORES = 1 << 20


def centred(codebook: Tensor, *, dot: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `(D,)`, entries less their mean `(K, D)`, and bias `(K,)`: the nearest k has the largest `(x - mean).c + bias`.

    Taking the mean off both sides changes no distance, and keeps the digits of data with a large common offset; it would
    change products, so for `dot` it is zero. Entries that are not finite get a bias of -inf.
    """
    mean = codebook.new_zeros(codebook.shape[1]) if dot else codebook.mean(0)
    mean = torch.where(mean.isfinite(), mean, 0)
    entries = codebook - mean
    norms = entries.square().sum(1)
    usable = norms.isfinite()
    bias = torch.where(usable, torch.zeros_like(norms) if dot else -norms / 2, -torch.inf)
    return mean, torch.where(usable[:, None], entries, 0), bias


def nearest(x: Tensor, codebook: Tensor, *, dot: bool) -> Tensor:
    """int64 `(N,)`: the entry with the smallest distance (`dot`: the largest product) for each row of `(N, D)`.

    Ties go to the lowest index, as do rows that are not finite; entries that are not finite are never chosen.
    """
    with torch.autocast(x.device.type, enabled=False):
        mean, entries, bias = centred(codebook, dot=dot)
        # The bias rides along as one more dim, against ones: one product gives the scores.
        table = torch.cat([entries, bias[:, None]], 1).T.contiguous()
        rows = torch.cat([x - mean, x.new_ones(len(x), 1)], 1)
        chunk = min(max(16, _CHUNK_SCORES // len(codebook)), max(1, len(x)))
        scores = x.new_empty(chunk, len(codebook))
        ids = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for part, into in zip(rows.split(chunk), ids.split(chunk), strict=True):
            _first_largest(torch.mm(part, table, out=scores[: len(part)]), into)
    return torch.where(x.isfinite().all(1), ids, 0)


def _first_largest(scores: Tensor, into: Tensor) -> None:
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        scores.numpy().argmax(1, out=into.numpy())
    else:
        torch.argmax(scores, 1, out=into)


def code_sums(x: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many rows have each code, float32 `(size,)`, and the sums of those rows, `(size, D)`, added in row order."""
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=size)
    sums = torch.segment_reduce(x[order], "sum", lengths=counts, axis=0, unsafe=True, initial=0.0)
    return counts.to(x.dtype), sums


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `(N, Q)` and summed entries `(N, D)` of Q stages, each of which quantizes what those before it left over."""
    residual, total, ids = x, torch.zeros_like(x), []
    for codebook in codebooks:
        chosen = nearest(residual, codebook, dot=False)
        ids.append(chosen)
        residual, total = residual - codebook[chosen], total + codebook[chosen]
    return torch.stack(ids, 1) if ids else torch.zeros(len(x), 0, dtype=torch.long, device=x.device), total
