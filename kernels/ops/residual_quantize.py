"""Residual quantization: every stage quantizes what the stages before it left over."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenzoo.kernels._backend import backend_for
from tokenzoo.kernels._reference import full_precision
from tokenzoo.kernels.nearest import PackCache, as_entries, as_rows, each_cache, nearest, pack, traced


class ResidualQuantized(NamedTuple):
    """Ids `(..., Q)` and the sum of the entries `(..., D)`."""

    ids: Tensor
    vectors: Tensor


class Projections(NamedTuple):
    """Linear maps of every stage into its codebook's narrow space and back, as DAC has them.

    Attributes:
        in_weight: `(Q, d, D)`.
        in_bias: `(Q, d)`.
        out_weight: `(Q, D, d)`.
        out_bias: `(Q, D)`.
    """

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def residual_quantize(
    x: Tensor, codebooks: Tensor | Sequence[Tensor], *, caches: Sequence[PackCache] | None = None
) -> ResidualQuantized:
    """Quantizes vectors in Q stages (SoundStream, https://arxiv.org/abs/2107.03312); no gradients.

    Args:
        x: Vectors, `(..., D)`, any float dtype; computed in float32.
        codebooks: Entries of the stages, `(Q, K, D)`, or `(K, D)` of each.
        caches: One `PackCache` for each stage, for codebooks that do not change. Without, one is packed at a time.

    Returns:
        Ids int64 `(..., Q)` and summed entries float32 `(..., D)`; ties and non-finite vectors as in `nearest`.

    Raises:
        ValueError: If the widths or sizes differ, a codebook is empty, or there is not one cache a stage.
    """
    stages = codebooks if isinstance(codebooks, Tensor) else list(codebooks)
    shapes = [tuple(stage.shape) for stage in stages]
    width = x.shape[-1] if x.dim() else 0
    if not width or any(len(shape) != 2 or not shape[0] or shape != (shapes[0][0], width) for shape in shapes):
        raise ValueError(
            "expected x (..., D) and codebooks (Q, K, D) with K, D > 0, "
            f"got {x.shape = } and codebooks of {', '.join(map(str, dict.fromkeys(shapes)))}"
        )
    if traced(x, *stages):
        stacked = stages if isinstance(stages, Tensor) else torch.stack(stages)
        return ResidualQuantized(*torch.ops.tokenzoo.residual_quantize(x, stacked))
    return ResidualQuantized(*_residual(x, stages, caches))


def projected_residual_quantize(
    x: Tensor, codebooks: Tensor, projections: Projections, *, metric: str = "cosine"
) -> ResidualQuantized:
    """As `residual_quantize`, each stage searching in a narrow space of its own (DAC, https://arxiv.org/abs/2306.06546).

    The projections are folded: since a stage sees `in(x - sum out_j(z_j))`, all inputs are one product with `x`, less small
    products of the codes `z_j` chosen so far with `in out_j`, and all outputs are one product with the codes.

    Args:
        x: Vectors, `(..., D)`, any float dtype; computed in float32.
        codebooks: Entries of the stages, `(Q, K, d)`.
        projections: Their maps.
        metric: How entries are compared; the entries themselves are what is projected back.

    Returns:
        Ids int64 `(..., Q)` and the sum of the projected entries, float32 `(..., D)`.

    Raises:
        ValueError: If the shapes do not fit.
    """
    stages, _, narrow = codebooks.shape if codebooks.dim() == 3 else (0, 0, 0)
    wide = x.shape[-1] if x.dim() else 0
    shapes = tuple(tuple(t.shape) for t in projections)
    if shapes != ((stages, narrow, wide), (stages, narrow), (stages, wide, narrow), (stages, wide)):
        raise ValueError(f"expected projections between {wide} and {narrow} for each of {stages} stages, got {shapes}")
    if codebooks.dim() != 3 or 0 in codebooks.shape[1:]:
        raise ValueError(f"expected codebooks (Q, K, d) with K, d > 0, got {codebooks.shape = }")
    with torch.no_grad(), full_precision(x.device.type):
        return _projected(x, codebooks, projections, metric)


def _projected(x: Tensor, codebooks: Tensor, projections: Projections, metric: str) -> ResidualQuantized:
    stages, _, narrow = codebooks.shape
    wide = x.shape[-1]
    rows, entries = as_rows(x), codebooks.detach().float()
    in_weight, in_bias, out_weight, out_bias = (t.detach().float() for t in projections)
    out_stacked = out_weight.permute(0, 2, 1).reshape(stages * narrow, wide)
    offset = torch.einsum("qdw,qw->qd", in_weight, out_bias.cumsum(0) - out_bias)
    inputs = rows @ in_weight.reshape(stages * narrow, wide).T + (in_bias - offset).reshape(-1)
    codes, ids = rows.new_empty(rows.shape[0], stages * narrow), []
    for q in range(stages):
        done = q * narrow
        narrowed = inputs[:, done : done + narrow] - codes[:, :done] @ (out_stacked[:done] @ in_weight[q].T)
        ids.append(nearest(narrowed, entries[q], metric=metric))
        codes[:, done : done + narrow] = entries[q][ids[-1]]
    vectors = codes @ out_stacked + out_bias.sum(0)
    chosen = torch.stack(ids, -1) if ids else torch.zeros(rows.shape[0], 0, dtype=torch.long, device=x.device)
    return ResidualQuantized(chosen.reshape(*x.shape[:-1], stages), vectors.reshape(x.shape))


def _residual(
    x: Tensor, codebooks: Tensor | Sequence[Tensor], caches: Sequence[PackCache] | None = None
) -> tuple[Tensor, Tensor]:
    rows = as_rows(x)
    backend = backend_for(rows)
    if caches is None:
        entries, packed = [as_entries(codebook, "l2") for codebook in codebooks], []
    else:
        both = zip(codebooks, each_cache(caches, len(codebooks)), strict=True)
        stages = [pack(codebook, "l2", backend, cache) for codebook, cache in both]
        entries, packed = [entry for entry, _ in stages], [form for _, form in stages]
    ids, vectors = backend.residual_quantize(rows, packed, entries)
    return ids.reshape(*x.shape[:-1], len(codebooks)), vectors.reshape(x.shape)


@torch.library.custom_op("tokenzoo::residual_quantize", mutates_args=())
def _residual_op(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    return _residual(x, codebooks)


@_residual_op.register_fake
def _(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], len(codebooks)), dtype=torch.long), x.new_empty(x.shape, dtype=torch.float32)
