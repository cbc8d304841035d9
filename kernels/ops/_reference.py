"""What the kernels compute, in plain PyTorch; and the fallback that answers where nothing faster can.

Distances are compared as |c|^2 - 2 x.c after the mean of the codebook is taken off both sides. The fallback scores a chunk
of rows at a time, small enough for the cache, and lets NumPy find the largest: its argmax is vectorised, torch's is not.
"""

import torch
from torch import Tensor

_CHUNK_SCORES = 1 << 19


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
        chunks = [_best(part - mean, entries, bias) for part in x.split(max(16, _CHUNK_SCORES // len(codebook)))]
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.long, device=x.device)


def _best(rows: Tensor, entries: Tensor, bias: Tensor) -> Tensor:
    scores = torch.addmm(bias, rows, entries.T)
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        best = torch.from_numpy(scores.numpy().argmax(1))
    else:
        best = scores.argmax(1)
    return torch.where(rows.isfinite().all(1), best, 0)


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
