"""What the kernels compute, in plain PyTorch; and the fallback that answers where nothing faster can.

Distances are compared as |c|^2 - 2 x.c after the mean of the codebook is taken off both sides. The fallback scores a block
of rows and codes at a time, so that scores stay in the cache, and lets NumPy find the largest: its argmax is vectorised,
torch's is not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores that are computed at a time, and how many codes they are of at least, where there are so many.
_BLOCK_SCORES = 1 << 20
_BLOCK_CODES = 1 << 12
_FEW_SCORES = 1 << 16  # so few are better computed at once, without the copy that many are worth


def centred(codebook: Tensor, *, dot: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `(D,)`, entries less their mean `(K, D)`, and bias `(K,)`: the nearest k has the largest `(x - mean).c + bias`.

    Taking the mean off both sides changes no distance, and keeps the digits of data with a large common offset; it would
    change products, so for `dot` it is zero. Entries that are not finite get a bias of -inf.
    """
    mean = codebook.new_zeros(codebook.shape[1])
    if not dot:
        finite = codebook.isfinite().all(1, keepdim=True)
        mean = torch.where(finite, codebook, 0).sum(0, dtype=torch.float64).div(finite.sum().clamp_min(1)).to(codebook.dtype)
    entries = codebook - mean
    norms = entries.square().sum(1)
    usable = norms.isfinite()
    bias = torch.where(usable, torch.zeros_like(norms) if dot else -norms / 2, -torch.inf)
    return mean, torch.where(usable[:, None], entries, 0), bias


def full_precision(device: str) -> AbstractContextManager[None]:
    """Products in float32, whatever autocast or `torch.set_float32_matmul_precision` say: coarser ones have other ids."""
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    if torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(device):
        return nullcontext()
    return _full_precision(device)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def pack(entries: Tensor, dot: bool) -> tuple[Tensor, Tensor]:
    """The mean `(D,)` and a table `(D + 1, K)`: the bias rides along as one more dim, so one product gives the scores."""
    mean, codes, bias = centred(entries, dot=dot)
    return mean, torch.cat([codes, bias[:, None]], 1).T.contiguous()


def nearest(x: Tensor, packed: tuple[Tensor, Tensor], size: int) -> Tensor:
    """int64 `(N,)`: the entry with the smallest distance (`dot`: the largest product) for each row of `(N, D)`.

    Ties go to the lowest index, as do rows that are not finite; entries that are not finite are never chosen.
    """
    mean, table = packed
    rows = x - mean
    # The product of a single row may add up in another order for some columns than for others, and so break ties.
    rows = torch.cat([rows, rows]) if len(x) == 1 else rows
    with full_precision(x.device.type):
        ids = (_few(rows, table) if len(x) * size <= _FEW_SCORES else _many(rows, table))[: len(x)]
    # A sum that is finite has finite terms.
    return ids if math.isfinite(float(rows.sum())) else torch.where(x.isfinite().all(1), ids, 0)


def _few(rows: Tensor, table: Tensor) -> Tensor:
    return _first_largest(torch.addmm(table[-1], rows, table[:-1]))


def _many(rows: Tensor, table: Tensor) -> Tensor:
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    codes = min(table.shape[1], max(_BLOCK_CODES, _BLOCK_SCORES // len(rows)))
    parts = rows.tensor_split(max(1, len(rows) * codes // _BLOCK_SCORES))
    scores = rows.new_empty(len(parts[0]), codes)
    return torch.cat([_search(part, table, scores[: len(part)]) for part in parts])


def _search(rows: Tensor, table: Tensor, scores: Tensor) -> Tensor:
    """Ids of a block of rows, by blocks of as many codes as there is room for in `scores`."""
    size, step = table.shape[1], scores.shape[1]
    if step == size:
        return _first_largest(torch.mm(rows, table, out=scores))
    best, ids = rows.new_full((len(rows),), -torch.inf), torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for first in range(0, size, step):
        codes = table[:, first : first + step]
        scores = torch.mm(rows, codes, out=scores[:, : codes.shape[1]])
        chosen = _first_largest(scores)
        score = scores.gather(1, chosen[:, None]).squeeze(1)
        ids = torch.where(score > best, chosen + first, ids)
        best = torch.maximum(score, best)
    return ids


def _first_largest(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return torch.from_numpy(scores.numpy().argmax(1))
    return torch.argmax(scores, 1)


def quantize(x: Tensor, packed: tuple[Tensor, Tensor], entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `(N,)`, their entries `(N, D)`, and the mean squared distance between the two."""
    ids = nearest(x, packed, len(entries))
    vectors = entries[ids]
    return ids, vectors, F.mse_loss(vectors, x) if x.numel() else x.new_zeros(())


def code_sums(x: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many rows have each code, float32 `(size,)`, and the sums of those rows, `(size, D)`, added in row order."""
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=size)
    sums = torch.segment_reduce(x[order], "sum", lengths=counts, axis=0, unsafe=True, initial=0.0)
    return counts.to(x.dtype), sums


def assign(x: Tensor, packed: tuple[Tensor, Tensor], size: int, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `(N,)` and their `code_sums`; or, where `before` is not empty but earlier ids `(N,)`, by how much these changed."""
    ids = nearest(x, packed, size)
    return ids, *changed_sums(x, ids, before, lambda rows, chosen: code_sums(rows, chosen, size))


def changed_sums(
    x: Tensor, ids: Tensor, before: Tensor, sums: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What `assign` returns beside the ids, by any implementation of `code_sums`."""
    if not before.numel():
        return sums(x, ids)
    changed = (ids != before).nonzero()[:, 0]
    rows = x[changed]
    (counts, total), (counts_before, total_before) = sums(rows, ids[changed]), sums(rows, before[changed])
    return counts - counts_before, total - total_before


def residual_quantize(x: Tensor, packed: Sequence[tuple[Tensor, Tensor]], entries: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids `(N, Q)` and summed entries `(N, D)` of Q stages, each of which quantizes what those before it left over.

    Without packed forms, each codebook is packed in its turn.
    """
    residual, total, ids = x, torch.zeros_like(x), []
    for stage, codebook in zip(packed or (pack(codebook, False) for codebook in entries), entries, strict=True):
        chosen = nearest(residual, stage, len(codebook))
        ids.append(chosen)
        residual, total = residual - codebook[chosen], total + codebook[chosen]
    return torch.stack(ids, 1) if ids else torch.zeros(len(x), 0, dtype=torch.long, device=x.device), total


def fsq(x: Tensor, thresholds: Tensor, scale: Tensor, shift: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `(N, D)` and ids `(N,)`: a value's level is how many of its dimension's thresholds `(S, D)` it reaches.

    A code is `level * scale + shift`, an id the sum of `level * basis`.
    """
    level = torch.zeros_like(x, dtype=torch.int32)
    for threshold in thresholds:
        level += x >= threshold
    return level * scale + shift, (level * basis).sum(-1)


def lfq(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Codes `(N, D)`, `scale` where positive and `-scale` elsewhere, and as ids their signs, the first the highest bit."""
    positive = x > 0
    weights = 1 << torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    return torch.where(positive, scale, -scale).float(), (positive * weights).sum(-1)
