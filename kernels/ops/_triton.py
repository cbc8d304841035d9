"""The codebook lookup and its relatives as Triton kernels: codes stream past a block of rows, and only the best is kept.

Import it only where Triton is installed. `TRITON_INTERPRET=1`, set before the import, runs it on CPU tensors.
The functions without a leading underscore answer as their namesakes in `_reference` do. Every result is summed in a fixed
order, without atomics, so it does not depend on how the blocks of a launch are scheduled.
"""

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tokenzoo.kernels import _reference
from tokenzoo.kernels._triton_scalar import fsq, lfq

__all__ = ["assign", "code_sums", "fsq", "lfq", "nearest", "pack", "quantize", "residual_quantize"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FEW_ROWS, _MANY_ROWS = 256, 16384
_MAX_SPLITS = 64
_SPAN = 256  # codes of a split are a multiple of this, so that every split but the last is whole blocks


def _configs(shapes: list[tuple[int, int, int]]) -> list[triton.Config]:
    """Candidates of rows a block, codes (or dimensions) a block, and warps; the interpreter has small blocks."""
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps)
        for n, k, warps in ([(16, 32, 4)] if _INTERPRETED else shapes)
    ]


_SEARCHES = [(64, 64, 4), (64, 64, 8), (16, 64, 4), (16, 128, 4), (32, 64, 4), (32, 128, 8), (64, 128, 8), (128, 64, 8)]


@triton.jit
def _tile(x, mean, rows, dims, N, D):  # type: ignore[no-untyped-def]
    """Rows less the mean, [rows, dims], and where they are finite; zero outside and where they are not."""
    values = tl.load(x + rows[:, None] * D + dims[None], mask=(rows < N)[:, None] & (dims < D)[None], other=0.0)
    values -= tl.load(mean + dims, mask=dims < D, other=0.0)[None]
    finite = values - values == 0
    return tl.where(finite, values, 0.0), finite


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    x, mean, codes, bias, rows, begin, end, N, D, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Largest score and its first code, in [begin, end), for each row; 0 and 0 for rows that are not finite."""
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_N], tl.int64)
    broken = tl.zeros([BLOCK_N], tl.int32)
    dims = tl.arange(0, BLOCK_D)
    left = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        left, finite = _tile(x, mean, rows, start + dims, N, D)
        broken = tl.maximum(broken, 1 - tl.min(finite.to(tl.int32), axis=1))
    for first in range(begin, end, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K).to(tl.int64)
        scores = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, D, BLOCK_D):
            if not WHOLE:
                left, _ = _tile(x, mean, rows, start + dims, N, D)
            inside = (columns < end)[None] & (start + dims < D)[:, None]
            right = tl.load(codes + columns[None] * D + (start + dims)[:, None], mask=inside, other=0.0)
            # ieee: the default, tf32, would change ids.
            scores += tl.dot(left, right, input_precision="ieee")
        scores += tl.load(bias + columns, mask=columns < end, other=float("-inf"))[None]
        top, at = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = top > best
        best = tl.where(better, top, best)
        where = tl.where(better, first + at.to(tl.int64), where)
    return tl.where(broken > 0, 0.0, best), tl.where(broken > 0, 0, where)


@triton.jit
def _gather(x, entries, rows, where, out, errors, N, D, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores the entry of each row and the squared distance to it."""
    error = tl.zeros_like(where).to(tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (dims < D)[None]
        entry = tl.load(entries + where[:, None] * D + dims[None], mask=inside, other=0.0)
        difference = entry - tl.load(x + rows[:, None] * D + dims[None], mask=inside, other=0.0)
        error += tl.sum(difference * difference, axis=1)
        tl.store(out + rows[:, None] * D + dims[None], entry, mask=inside)
    tl.store(errors + rows, error, mask=rows < N)


@triton.autotune(_configs(_SEARCHES), key=["K", "D", "CROWD"])
@triton.jit
def _search_kernel(  # type: ignore[no-untyped-def]
    x, mean, codes, bias, scores, ids, N, K, D, SPAN, CROWD,  # noqa: ARG001 (a key of the tuning)
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(1) * SPAN
    best, where = _scan(x, mean, codes, bias, rows, begin, tl.minimum(begin + SPAN, K), N, D, BLOCK_N, BLOCK_K, BLOCK_D, WHOLE)
    tl.store(scores + split * N + rows, best, mask=rows < N)
    tl.store(ids + split * N + rows, where, mask=rows < N)


@triton.autotune(_configs(_SEARCHES), key=["K", "D", "CROWD"])
@triton.jit
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x, mean, codes, bias, entries, ids, out, errors, N, K, D, CROWD,  # noqa: ARG001 (a key of the tuning)
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, where = _scan(x, mean, codes, bias, rows, 0, K, N, D, BLOCK_N, BLOCK_K, BLOCK_D, WHOLE)
    tl.store(ids + rows, where, mask=rows < N)
    _gather(x, entries, rows, where, out, errors, N, D, BLOCK_D)


@triton.autotune(_configs([(32, 64, 4), (32, 32, 4), (64, 32, 4)]), key=["D"])
@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    x, entries, ids, out, errors, N, D, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    where = tl.load(ids + rows, mask=rows < N, other=0)
    _gather(x, entries, rows, where, out, errors, N, D, BLOCK_K)


@triton.autotune(_configs(_SEARCHES), key=["K", "D", "CROWD"])
@triton.jit
def _residual_kernel(  # type: ignore[no-untyped-def]
    x, means, codes, biases, entries, residual, ids, out, N, K, D, Q, CROWD,  # noqa: ARG001 (a key of the tuning)
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All stages of a block of rows; what is left over lies in memory that only this block uses."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        at, inside = rows[:, None] * D + dims[None], (rows < N)[:, None] & (dims < D)[None]
        value = tl.load(x + at, mask=inside, other=0.0)
        tl.store(residual + at, value, mask=inside)
        tl.store(out + at, tl.zeros_like(value), mask=inside)
    for q in range(Q):
        stage = tl.cast(q, tl.int64) * K
        # The threads of a block read what others of them wrote.
        tl.debug_barrier()
        _, where = _scan(
            residual, means + q * D, codes + stage * D, biases + stage, rows, 0, K, N, D, BLOCK_N, BLOCK_K, BLOCK_D, WHOLE
        )
        tl.store(ids + rows * Q + q, where, mask=rows < N)
        tl.debug_barrier()
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            at, inside = rows[:, None] * D + dims[None], (rows < N)[:, None] & (dims < D)[None]
            entry = tl.load(entries + (stage + where)[:, None] * D + dims[None], mask=inside, other=0.0)
            tl.store(residual + at, tl.load(residual + at, mask=inside, other=0.0) - entry, mask=inside)
            tl.store(out + at, tl.load(out + at, mask=inside, other=0.0) + entry, mask=inside)


@triton.autotune(_configs([(32, 64, 4), (16, 128, 4), (64, 32, 4)]), key=["D"])
@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    x, order, ends, sums, D, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Sums the rows of one code, BLOCK_N at a time, over BLOCK_K dimensions."""
    code = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = tl.load(ends + code), tl.load(ends + code + 1)
    total = tl.zeros([BLOCK_K], tl.float32)
    for first in range(begin, end, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        rows = tl.load(order + places, mask=places < end, other=0)
        inside = (places < end)[:, None] & (dims < D)[None]
        total += tl.sum(tl.load(x + rows[:, None] * D + dims[None], mask=inside, other=0.0), axis=0)
    tl.store(sums + code * D + dims, total, mask=dims < D)


def _block(width: int) -> dict[str, int | bool]:
    """Dimensions of a block, and whether they are all of them; at least 16, the least that `tl.dot` takes."""
    block = 32 if 16 < width <= 32 else 16
    return {"BLOCK_D": block, "WHOLE": width <= block}


def _crowd(rows: int) -> int:
    """What the best block sizes depend on: few rows, or some, or many."""
    return 0 if rows <= _FEW_ROWS else 1 if rows <= _MANY_ROWS else 2


def _splits(rows: int, size: int) -> tuple[int, int]:
    """Into how many parts the codes are split, so that few rows still keep the device busy, and the codes of a part."""
    wanted = 1 if rows >= _MANY_ROWS else min(_MAX_SPLITS, _MANY_ROWS // max(rows, _FEW_ROWS))
    span = triton.cdiv(triton.cdiv(size, wanted), _SPAN) * _SPAN
    return triton.cdiv(size, span), span


@triton_op("tokenzoo::triton_search", mutates_args={})
def search(x: Tensor, mean: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """int64 `(N,)`: the first k with the largest `(x - mean) @ codes[k] + bias[k]`; all float32 and contiguous."""
    (count, width), size = x.shape, len(codes)
    splits, span = _splits(count, size)
    ids = torch.empty(splits, count, dtype=torch.long, device=x.device)
    if not count:
        return ids[0]
    scores = torch.empty(splits, count, device=x.device)
    wrap_triton(_search_kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK_N"]), splits)](
        x, mean, codes, bias, scores, ids, count, size, width, span, _crowd(count), **_block(width)
    )
    return ids[0] if splits == 1 else torch.where(scores == scores.amax(0), ids, size).amin(0)


@triton_op("tokenzoo::triton_quantize", mutates_args={})
def search_and_gather(x: Tensor, mean: Tensor, codes: Tensor, bias: Tensor, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids as `search` finds them, their `entries`, and each row's squared distance to its entry, `(N,)`."""
    (count, width), size = x.shape, len(codes)
    out, errors = torch.empty_like(x), torch.empty(count, device=x.device)
    ids = torch.empty(count, dtype=torch.long, device=x.device)
    if not count:
        return ids, out, errors
    if _splits(count, size)[0] > 1:
        ids = search(x, mean, codes, bias)
        wrap_triton(_gather_kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK_N"]),)](
            x, entries, ids, out, errors, count, width
        )
        return ids, out, errors
    wrap_triton(_quantize_kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK_N"]),)](
        x, mean, codes, bias, entries, ids, out, errors, count, size, width, _crowd(count), **_block(width)
    )
    return ids, out, errors


@triton_op("tokenzoo::triton_residual", mutates_args={})
def search_stages(x: Tensor, means: Tensor, codes: Tensor, biases: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `(N, Q)` and summed entries `(N, D)`; the codes of all stages are `(Q, K, D)`."""
    (count, width), (stages, size, _) = x.shape, codes.shape
    ids = torch.empty(count, stages, dtype=torch.long, device=x.device)
    out, residual = torch.zeros_like(x), torch.empty_like(x)
    if count and stages:
        wrap_triton(_residual_kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK_N"]),)](
            x, means, codes, biases, entries, residual, ids, out, count, size, width, stages, _crowd(count), **_block(width)
        )
    return ids, out


@triton_op("tokenzoo::triton_segment_sums", mutates_args={})
def segment_sums(x: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """Sums `(K, D)` of `x[order[ends[k]:ends[k + 1]]]`, for `ends` int64 `(K + 1,)`."""
    size, width = len(ends) - 1, x.shape[1]
    sums = torch.empty(size, width, device=x.device)
    wrap_triton(_sums_kernel)[lambda meta: (size, triton.cdiv(width, meta["BLOCK_K"]))](x, order, ends, sums, width)
    return sums


def pack(entries: Tensor, dot: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The mean `(D,)`, the entries less it `(K, D)`, and their bias `(K,)`."""
    mean, codes, bias = _reference.centred(entries, dot=dot)
    return mean, codes.contiguous(), bias


def nearest(x: Tensor, packed: tuple[Tensor, Tensor, Tensor], size: int) -> Tensor:  # noqa: ARG001 (as the others)
    """As `_reference.nearest`."""
    return search(x, *packed)


def quantize(x: Tensor, packed: tuple[Tensor, Tensor, Tensor], entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_reference.quantize`, in one launch."""
    ids, vectors, errors = search_and_gather(x, *packed, entries)
    return ids, vectors, (errors.double().sum() / max(1, x.numel())).float()


def residual_quantize(
    x: Tensor, packed: Sequence[tuple[Tensor, Tensor, Tensor]], entries: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """As `_reference.residual_quantize`, in one launch."""
    packed = packed or [pack(codebook, False) for codebook in entries]
    if not packed:
        return torch.empty(len(x), 0, dtype=torch.long, device=x.device), torch.zeros_like(x)
    means, codes, biases = (torch.stack(parts) for parts in zip(*packed, strict=True))
    return search_stages(x, means, codes, biases, torch.stack(list(entries)))


def assign(x: Tensor, packed: tuple[Tensor, Tensor, Tensor], size: int, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_reference.assign`."""
    ids = nearest(x, packed, size)
    return ids, *_reference.changed_sums(x, ids, before, lambda rows, chosen: code_sums(rows, chosen, size))


def code_sums(x: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `_reference.code_sums`, up to rounding: rows of a code are added in blocks, in their order."""
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=size)
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return counts.to(x.dtype), segment_sums(x, order, ends)
