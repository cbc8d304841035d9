"""Lookup-free quantization (https://arxiv.org/abs/2310.05737): one bit a dimension; also the packing of BSQ.

Binary spherical quantization (https://arxiv.org/abs/2406.07548) is the same with l2-normalised vectors and
`scale = 1 / sqrt(D)`.
"""

from typing import Any

import torch
from torch import Tensor

from tokenzoo.kernels._backend import backend_for
from tokenzoo.kernels.fsq import ScalarQuantized
from tokenzoo.kernels.nearest import as_rows, needs_op

MAX_BITS = 62


def lfq_quantize(x: Tensor, *, scale: float = 1.0) -> ScalarQuantized:
    """Quantizes vectors to `scale` where positive and `-scale` elsewhere; gradients pass straight through.

    Args:
        x: Vectors, `(..., D)`, any float dtype, D from 1 to 62. A NaN counts as not positive.
        scale: Magnitude of the codes.

    Returns:
        Codes float32 `(..., D)` and ids int64 `(...)` in `[0, 2^D)`, the first dimension their highest bit.

    Raises:
        ValueError: If D is out of range.
    """
    _check(x.shape[-1] if x.dim() else 0)
    op = torch.ops.tokenzoo.lfq_quantize if needs_op(x) else _quantize
    return ScalarQuantized(*op(x, scale))


def lfq_codes(ids: Tensor, dim: int, *, scale: float = 1.0) -> Tensor:
    """Codes float32 `(..., dim)` of ids int64 `(...)`."""
    _check(dim)
    shifts = torch.arange(dim - 1, -1, -1, device=ids.device)
    return ((ids[..., None] >> shifts & 1) * 2 - 1).float() * scale


def _check(dim: int) -> None:
    if not 1 <= dim <= MAX_BITS:
        raise ValueError(f"expected vectors of 1 to {MAX_BITS} dimensions, got {dim}")


def _quantize(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows = as_rows(x)
    codes, ids = backend_for(rows).lfq(rows, scale)
    return codes.reshape(x.shape), ids.reshape(x.shape[:-1])


@torch.library.custom_op("tokenzoo::lfq_quantize", mutates_args=())
def _lfq_op(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _quantize(x, scale)


@_lfq_op.register_fake
def _(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001 (a schema)
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.long)


def _setup(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_codes: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return grad_codes.to(ctx.dtype), None


_lfq_op.register_autograd(_backward, setup_context=_setup)
