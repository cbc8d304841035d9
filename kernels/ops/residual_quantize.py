"""Residual quantization: every stage quantizes what the stages before it left over."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenzoo.kernels import _native, _reference
from tokenzoo.kernels.nearest import as_rows


class ResidualQuantized(NamedTuple):
    """Ids `(..., Q)` and the sum of the entries `(..., D)`."""

    ids: Tensor
    vectors: Tensor


def residual_quantize(x: Tensor, codebooks: Tensor) -> ResidualQuantized:
    """Quantizes vectors in Q stages (SoundStream, https://arxiv.org/abs/2107.03312); no gradients.

    Args:
        x: Vectors, `(..., D)`, any float dtype; computed in float32.
        codebooks: Entries of the stages, `(Q, K, D)`.

    Returns:
        Ids int64 `(..., Q)` and summed entries float32 `(..., D)`; ties and non-finite vectors as in `nearest`.

    Raises:
        ValueError: If the widths differ or a codebook is empty.
    """
    if codebooks.dim() != 3 or not codebooks.shape[1] or x.dim() < 1 or x.shape[-1] != codebooks.shape[2]:
        raise ValueError(f"expected x (..., D) and codebooks (Q, K, D) with K > 0, got {x.shape = } and {codebooks.shape = }")
    ids, vectors = torch.ops.tokenzoo.residual_quantize(x, codebooks)
    return ResidualQuantized(ids, vectors)


@torch.library.custom_op("tokenzoo::residual_quantize", mutates_args=())
def _residual_op(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    rows, entries = as_rows(x), codebooks.detach().float().contiguous()
    native = _native.library() if rows.device.type == "cpu" else None
    if native is None:
        ids, vectors = _reference.residual_quantize(rows, entries)
    else:
        ids, vectors = native.residual_quantize(rows, [native.pack(codebook, False) for codebook in entries], entries)
    return ids.reshape(*x.shape[:-1], len(codebooks)), vectors.reshape(x.shape)


@_residual_op.register_fake
def _(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], len(codebooks)), dtype=torch.long), x.new_empty(x.shape, dtype=torch.float32)
