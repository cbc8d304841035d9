"""Entries of ids: the gather that decoding starts with, and a backward that adds up in one fixed order."""

from typing import Any

import torch
from torch import Tensor

from tokenzoo.kernels.nearest import needs_op
from tokenzoo.kernels.quantize import code_sums

_MANY_CODES = 8


def lookup(ids: Tensor, codebook: Tensor) -> Tensor:
    """Entries of ids, `codebook[ids]`.

    The gradient of the codebook is summed in float32 in the order of the ids, whatever the number of threads.

    Args:
        ids: Integers, `(...)`, in `[0, K)`.
        codebook: Entries, `(K, D)`, any float dtype.

    Returns:
        Entries, `(..., D)`, in the codebook's dtype.

    Raises:
        ValueError: If the shapes or dtypes are wrong or, on the CPU, an id is out of range; a GPU stops with an assertion.
    """
    if codebook.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"expected integer ids and a codebook (K, D), got {ids.dtype} ids and {codebook.shape = }")
    if ids.dtype is not torch.long:
        ids = ids.long()
    return torch.ops.tokenzoo.lookup(ids, codebook) if needs_op(codebook) else _gather(ids, codebook)


def _gather(ids: Tensor, codebook: Tensor) -> Tensor:
    try:
        return torch.embedding(codebook, ids)
    except IndexError as error:
        low, high = (int(bound) for bound in ids.aminmax())
        raise ValueError(f"expected ids in [0, {len(codebook)}), got {low} to {high}") from error


@torch.library.custom_op("tokenzoo::lookup", mutates_args=())
def _lookup_op(ids: Tensor, codebook: Tensor) -> Tensor:
    return _gather(ids, codebook)


@_lookup_op.register_fake
def _(ids: Tensor, codebook: Tensor) -> Tensor:
    return codebook.new_empty((*ids.shape, codebook.shape[1]))


@torch.library.custom_op("tokenzoo::code_totals", mutates_args=())
def _totals_op(x: Tensor, ids: Tensor, size: int) -> Tensor:
    """Sums float32 `(size, D)` of the vectors `(..., D)` that have each id `(...)`: the transpose of the lookup."""
    if x.is_cpu and _MANY_CODES * ids.numel() < size:
        # The same sums in the same order; it passes over the ids, not over the codes.
        return torch.ops.aten.embedding_dense_backward(x.float(), ids, size, -1, False)
    return code_sums(x, ids, size)[1]


@_totals_op.register_fake
def _(x: Tensor, ids: Tensor, size: int) -> Tensor:  # noqa: ARG001 (a schema)
    return x.new_empty((size, x.shape[-1]), dtype=torch.float32)


def _setup_lookup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001 (a schema)
    ids, codebook = inputs
    ctx.save_for_backward(ids)
    ctx.size, ctx.dtype = len(codebook), codebook.dtype


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
    return None, torch.ops.tokenzoo.code_totals(grad, ctx.saved_tensors[0], ctx.size).to(ctx.dtype)


def _setup_totals(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:  # noqa: ARG001 (a schema)
    x, ids, _ = inputs
    ctx.save_for_backward(ids)
    ctx.dtype = x.dtype


def _totals_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.tokenzoo.lookup(ctx.saved_tensors[0], grad).to(ctx.dtype), None, None


_lookup_op.register_autograd(_lookup_backward, setup_context=_setup_lookup)
_totals_op.register_autograd(_totals_backward, setup_context=_setup_totals)
