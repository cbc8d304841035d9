"""Finite scalar quantization (https://arxiv.org/abs/2309.15505): every dimension is rounded to a few levels.

The published form rounds `tanh(z + s) * h - o`. That is a step function of `z`, so here each dimension's steps are found
once, to the last bit, by bisection on the published form; quantizing is then nothing but comparisons, and exactly equal.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenzoo.kernels._backend import backend_for
from tokenzoo.kernels.nearest import as_rows, needs_op

_SLACK = 1e-3


class ScalarQuantized(NamedTuple):
    """Codes float32 `(..., D)` and ids int64 `(...)`."""

    codes: Tensor
    ids: Tensor


class _Steps(NamedTuple):
    thresholds: Tensor
    scale: Tensor
    shift: Tensor
    basis: Tensor


def fsq_quantize(z: Tensor, levels: Sequence[int]) -> ScalarQuantized:
    """Quantizes vectors; gradients pass straight through the rounding, but not the tanh.

    Args:
        z: Vectors, `(..., D)`, any float dtype; computed in float32. A NaN takes the lowest level.
        levels: Levels of each of the D dimensions, from 2; their product is the size of the codebook, at most 2^31.

    Returns:
        Codes in [-1, 1] and ids in `[0, prod(levels))`, in which the first dimension moves fastest.

    Raises:
        ValueError: If the widths differ or a dimension has fewer than two levels.
    """
    levels = _check(levels)
    if z.dim() < 1 or z.shape[-1] != len(levels):
        raise ValueError(f"expected z (..., {len(levels)}), one value for each of {levels = }, got {z.shape = }")
    op = torch.ops.tokenzoo.fsq_quantize if needs_op(z) else _quantize
    return ScalarQuantized(*op(z, list(levels)))


def fsq_codes(ids: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes float32 `(..., D)` of ids int64 `(...)`; the inverse of `fsq_indices`."""
    scale, shift, basis = _scale(_check(levels), ids.device)
    level = ids[..., None] // basis.long() % torch.tensor(levels, device=ids.device)
    return level * scale + shift


def fsq_indices(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Ids int64 `(...)` of codes `(..., D)` as `fsq_quantize` returns them."""
    scale, shift, basis = _scale(_check(levels), codes.device)
    return (((codes.float() - shift) / scale).round().long() * basis.long()).sum(-1)


def _check(levels: Sequence[int]) -> tuple[int, ...]:
    if not levels or min(levels) < 2 or math.prod(levels) > 2**31:
        raise ValueError(f"expected at least two levels in every dimension, 2^31 codes at most, got {levels = }")
    return tuple(levels)


def _constants(levels: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Half width, offset and shift of the published bound, float32 `(D,)`."""
    count = torch.tensor(levels, dtype=torch.float32)
    half = (count - 1) * (1 + _SLACK) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0).float()
    return half, offset, (offset / half).atanh()


def _scale(levels: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What turns levels into codes, `level * scale + shift`, and into ids, the sum of `level * basis`; each `(D,)`."""
    half_width = torch.tensor([n // 2 for n in levels], dtype=torch.float32, device=device)
    basis = torch.tensor([math.prod(levels[:d]) for d in range(len(levels))], dtype=torch.int32, device=device)
    return 1 / half_width, -torch.ones_like(half_width), basis


@functools.lru_cache(maxsize=64)
def _steps(levels: tuple[int, ...], device: torch.device) -> _Steps:
    half, offset, shift = _constants(levels)
    half_width = torch.tensor([n // 2 for n in levels], dtype=torch.float32)
    most = max(levels) - 1
    wanted = torch.arange(1, most + 1)[:, None] - half_width
    low, high = (_to_ordered(torch.full((most, len(levels)), limit, dtype=torch.float32)) for limit in (-20.0, 20.0))
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        reached = (torch.tanh(_from_ordered(middle) + shift) * half - offset).round() >= wanted
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    exists = torch.arange(1, most + 1)[:, None] < torch.tensor(levels)
    # Not even an infinity reaches a NaN.
    thresholds = torch.where(exists, _from_ordered(high), torch.nan).float().contiguous()
    return _Steps(thresholds.to(device), *_scale(levels, device))


def _to_ordered(x: Tensor) -> Tensor:
    """float32 as integers in the same order, so that bisection takes at most 32 steps."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_ordered(order: Tensor) -> Tensor:
    bits = torch.where(order < 0, (-order) | -0x80000000, order)
    return bits.to(torch.int32).view(torch.float32)


def _quantize(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    rows = as_rows(z)
    codes, ids = backend_for(rows).fsq(rows, *_steps(tuple(levels), z.device))
    return codes.reshape(z.shape), ids.reshape(z.shape[:-1])


@torch.library.custom_op("tokenzoo::fsq_quantize", mutates_args=())
def _fsq_op(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    return _quantize(z, levels)


@_fsq_op.register_fake
def _(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:  # noqa: ARG001 (a schema)
    return z.new_empty(z.shape, dtype=torch.float32), z.new_empty(z.shape[:-1], dtype=torch.long)


def _setup(ctx: Any, inputs: tuple[Tensor, list[int]], output: tuple[Tensor, Tensor]) -> None:
    z, ctx.levels = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z)


def _backward(ctx: Any, grad_codes: Tensor, _: Tensor) -> tuple[Tensor, None]:
    (z,) = ctx.saved_tensors
    half, _offset, shift = (t.to(z.device) for t in _constants(ctx.levels))
    slope = (1 - torch.tanh(z.float() + shift).square()) * half * _scale(ctx.levels, z.device)[0]
    return (grad_codes * slope).to(z.dtype), None


_fsq_op.register_autograd(_backward, setup_context=_setup)
