"""Finite scalar and lookup-free quantization as Triton kernels: one pass over the vectors.

Import it only where Triton is installed. `TRITON_INTERPRET=1`, set before the import, runs it on CPU tensors.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_CONFIGS = [triton.Config({"BLOCK_N": rows}, num_warps=4) for rows in (64, 32, 128)]
_CONFIGS = _CONFIGS[:1] if os.environ.get("TRITON_INTERPRET") == "1" else _CONFIGS


@triton.autotune(_CONFIGS, key=["D", "STEPS"])
@triton.jit
def _fsq_kernel(  # type: ignore[no-untyped-def]
    z, thresholds, scale, shift, basis, codes, ids, N, D, STEPS, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    at, inside = rows[:, None] * D + dims[None], (rows < N)[:, None] & (dims < D)[None]
    value = tl.load(z + at, mask=inside, other=0.0)
    level = tl.zeros([BLOCK_N, BLOCK_D], tl.int32)
    for step in range(STEPS):
        threshold = tl.load(thresholds + step * D + dims, mask=dims < D, other=float("inf"))
        level += (value >= threshold[None]).to(tl.int32)
    width, low = tl.load(scale + dims, mask=dims < D, other=0.0), tl.load(shift + dims, mask=dims < D, other=0.0)
    tl.store(codes + at, level.to(tl.float32) * width[None] + low[None], mask=inside)
    place = tl.load(basis + dims, mask=dims < D, other=0).to(tl.int64)
    tl.store(ids + rows, tl.sum(level.to(tl.int64) * place[None], axis=1), mask=rows < N)


@triton.autotune(_CONFIGS, key=["D"])
@triton.jit
def _lfq_kernel(  # type: ignore[no-untyped-def]
    x, codes, ids, N, D, scale, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    at, inside = rows[:, None] * D + dims[None], (rows < N)[:, None] & (dims < D)[None]
    positive = tl.load(x + at, mask=inside, other=0.0) > 0
    tl.store(codes + at, tl.where(positive, scale, -scale), mask=inside)
    bit = tl.where(dims < D, D - 1 - dims, 0).to(tl.int64)
    tl.store(ids + rows, tl.sum(positive.to(tl.int64) << bit[None], axis=1), mask=rows < N)


@triton_op("tokenzoo::triton_fsq", mutates_args={})
def fsq(z: Tensor, thresholds: Tensor, scale: Tensor, shift: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float32 `(N, D)` and ids int64 `(N,)`: each value's level is how many of its thresholds, `(S, D)`, it reaches.

    Vectors are contiguous float32 `(N, D)`. A code is `level * scale + shift`, an id the sum of `level * basis`.
    """
    count, width = z.shape
    codes, ids = torch.empty_like(z), torch.empty(count, dtype=torch.long, device=z.device)
    if count:
        wrap_triton(_fsq_kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK_N"]),)](
            z, thresholds, scale, shift, basis, codes, ids, count, width, len(thresholds), BLOCK_D=_padded(width)
        )
    return codes, ids


@triton_op("tokenzoo::triton_lfq", mutates_args={})
def lfq(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Codes float32 `(N, D)`, `scale` where positive and `-scale` elsewhere, and ids int64 `(N,)`; `x` as in `fsq`."""
    count, width = x.shape
    codes, ids = torch.empty_like(x), torch.empty(count, dtype=torch.long, device=x.device)
    if count:
        wrap_triton(_lfq_kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK_N"]),)](
            x, codes, ids, count, width, scale, BLOCK_D=_padded(width)
        )
    return codes, ids


def _padded(width: int) -> int:
    return max(2, triton.next_power_of_2(width))
