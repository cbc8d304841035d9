"""Grouped (product) quantization: a vector is cut into groups, and every group has a codebook of its own.

Product quantization is from https://doi.org/10.1109/TPAMI.2010.57 (Jegou, Douze and Schmid, 2011).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenzoo.kernels.nearest import PackCache, each_cache, nearest
from tokenzoo.kernels.quantize import quantize


class GroupedQuantized(NamedTuple):
    """Ids int64 `(..., G)`, entries float32 `(..., G * D)` and the mean squared distance to them (a scalar)."""

    ids: Tensor
    vectors: Tensor
    loss: Tensor


def grouped_nearest(x: Tensor, codebooks: Tensor, *, metric: str = "l2", caches: Sequence[PackCache] | None = None) -> Tensor:
    """Index of the nearest entry in every group.

    Args:
        x: Vectors, `(..., G * D)`, any float dtype; compared in float32.
        codebooks: Entries of the groups, `(G, K, D)`.
        metric: As in `nearest`; `"cosine"` normalises every group.
        caches: One `PackCache` for each group, for codebooks that do not change.

    Returns:
        int64 indices, `(..., G)`, as `nearest` gives them.

    Raises:
        ValueError: If the widths differ, a codebook is empty, the metric is unknown, or there is not one cache a group.
    """
    parts = zip(_split(x, codebooks), codebooks.unbind(0), each_cache(caches, len(codebooks)), strict=True)
    return torch.stack([nearest(part, codebook, metric=metric, cache=cache) for part, codebook, cache in parts], -1)


def grouped_quantize(
    x: Tensor, codebooks: Tensor, *, metric: str = "l2", caches: Sequence[PackCache] | None = None
) -> GroupedQuantized:
    """Quantizes every group; gradients as in `quantize`.

    Args:
        x: Vectors, `(..., G * D)`, any float dtype; computed in float32.
        codebooks: Entries of the groups, `(G, K, D)`.
        metric: As in `quantize`; `"cosine"` normalises every group, and normalised entries are returned.
        caches: One `PackCache` for each group, for codebooks that do not change.

    Raises:
        ValueError: As `grouped_nearest`.
    """
    parts = zip(_split(x, codebooks), codebooks.unbind(0), each_cache(caches, len(codebooks)), strict=True)
    found = [quantize(part, codebook, metric=metric, cache=cache) for part, codebook, cache in parts]
    ids, vectors = torch.stack([one.ids for one in found], -1), torch.cat([one.vectors for one in found], -1)
    return GroupedQuantized(ids, vectors, torch.stack([one.loss for one in found]).mean())


def _split(x: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    if codebooks.dim() != 3 or not codebooks.numel() or x.dim() < 1 or x.shape[-1] != codebooks.shape[0] * codebooks.shape[2]:
        raise ValueError(
            f"expected x (..., G * D) and codebooks (G, K, D), none of them 0, got {x.shape = } and {codebooks.shape = }"
        )
    return x.unflatten(-1, (len(codebooks), codebooks.shape[2])).unbind(-2)
