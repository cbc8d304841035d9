"""The codebook lookup as one Triton kernel: codes stream past a block of rows, and only the best so far is kept.

Import it only where Triton is installed. `TRITON_INTERPRET=1`, set before the import, runs it on CPU tensors.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_SHAPES = (
    [(64, 256, 4)] if _INTERPRETED else [(32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 256, 8)]
)


@triton.autotune(
    [triton.Config({"BLOCK_N": n, "BLOCK_K": k, "BLOCK_D": 32}, num_warps=warps) for n, k, warps in _SHAPES], key=["K", "D"]
)
@triton.jit
def _nearest_kernel(  # type: ignore[no-untyped-def]
    x, codes, bias, out, N, K, D, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_N], tl.int64)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K).to(tl.int64)
        scores = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            left = tl.load(x + rows[:, None] * D + dims[None], mask=(rows < N)[:, None] & (dims < D)[None], other=0.0)
            right = tl.load(
                codes + columns[None] * D + dims[:, None], mask=(columns < K)[None] & (dims < D)[:, None], other=0.0
            )
            # ieee: the default, tf32, would change ids.
            scores += tl.dot(left, right, input_precision="ieee")
        scores += tl.load(bias + columns, mask=columns < K, other=float("-inf"))[None]
        top, at = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = top > best
        best = tl.where(better, top, best)
        where = tl.where(better, first + at.to(tl.int64), where)
    tl.store(out + rows, where, mask=rows < N)


@triton_op("tokenzoo::best_score", mutates_args={})
def best_score(rows: Tensor, entries: Tensor, bias: Tensor) -> Tensor:
    """int64 `(N,)`: the first k with the largest `rows @ entries[k] + bias[k]`; float32, contiguous, finite rows."""
    out = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    if len(rows):
        size, width = entries.shape
        wrap_triton(_nearest_kernel)[lambda meta: (triton.cdiv(len(rows), meta["BLOCK_N"]),)](
            rows, entries, bias, out, len(rows), size, width
        )
    return out
