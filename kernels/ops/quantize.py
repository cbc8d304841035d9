"""Nearest entry, the entry itself, the commitment loss and, on request, what an EMA codebook needs, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.kernels import _native, _reference
from tokenzoo.kernels.nearest import PackCache, as_entries, as_rows, check, needs_op, search


class Quantized(NamedTuple):
    """Ids `(...)`, entries `(..., D)`, and the mean squared distance between vectors and entries (a scalar)."""

    ids: Tensor
    vectors: Tensor
    loss: Tensor


def quantize(x: Tensor, codebook: Tensor, *, metric: str = "l2", cache: PackCache | None = None) -> Quantized:
    """Quantizes vectors; the search, the gather and the loss share one pass over `x`.

    Gradients: `vectors` passes its gradient straight through to `x` and, gathered, to `codebook`; `loss` pulls both.

    Args:
        x: Vectors, `(..., D)`, any float dtype; computed in float32.
        codebook: Entries, `(K, D)`.
        metric: `"l2"`, or `"cosine"`: vectors and entries are l2-normalised first, and normalised entries are returned.
        cache: Keeps the packed codebook between calls; for a codebook that does not change.

    Returns:
        Ids int64 `(...)`, entries float32 `(..., D)`, loss float32 `()`; ties and non-finite vectors as in `nearest`.

    Raises:
        ValueError: As `nearest`.
    """
    check(x, codebook, metric)
    if metric == "cosine":
        x, codebook = F.normalize(x.float(), dim=-1), F.normalize(codebook.float(), dim=-1)
        cache = None
    if needs_op(x, codebook):
        vectors, loss, ids = torch.ops.tokenzoo.quantize(x, codebook)
        return Quantized(ids, vectors, loss)
    ids, vectors, loss = _quantize_rows(as_rows(x), codebook, cache)
    return Quantized(ids.reshape(x.shape[:-1]), vectors.reshape(x.shape), loss)


def code_sums(x: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What an EMA or k-means update needs; the result does not depend on the number of threads.

    Args:
        x: Vectors, `(..., D)`.
        ids: int64 `(...)`, in `[0, size)`.
        size: Number of codes.

    Returns:
        How many vectors have each code, float32 `(size,)`, and their sums, float32 `(size, D)`.

    Raises:
        ValueError: If there is not one id per vector, or an id is out of range.
    """
    rows, flat = as_rows(x), ids.reshape(-1).long()
    if len(flat) != len(rows) or (len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < size):
        raise ValueError(f"expected an id in [0, {size}) for each of {len(rows)} vectors, got {ids.shape = }")
    native = _native.library() if rows.device.type == "cpu" else None
    counts, sums = (native or _reference).code_sums(rows, flat.contiguous(), size)
    return counts, sums


def _quantize_rows(rows: Tensor, codebook: Tensor, cache: PackCache | None) -> tuple[Tensor, Tensor, Tensor]:
    entries = as_entries(codebook, "l2")
    native = _native.library() if rows.device.type == "cpu" else None
    if native is None:
        ids = search(rows, entries, codebook, False, cache)
        vectors = entries[ids]
        return ids, vectors, F.mse_loss(vectors, rows) if rows.numel() else rows.new_zeros(())
    packed = cache.get(entries, codebook, False, native) if cache else native.pack(entries, False)
    return native.quantize(rows, packed, entries)


@torch.library.custom_op("tokenzoo::quantize", mutates_args=())
def _quantize_op(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids, vectors, loss = _quantize_rows(as_rows(x), codebook, None)
    return vectors.reshape(x.shape), loss, ids.reshape(x.shape[:-1])


@_quantize_op.register_fake
def _(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001 (a schema)
    ids = x.new_empty(x.shape[:-1], dtype=torch.long)
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty((), dtype=torch.float32), ids


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    vectors, _, ids = output
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(*inputs, ids, vectors)


def _backward(ctx: Any, grad_vectors: Tensor, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    x, codebook, ids, vectors = ctx.saved_tensors
    pull = (x.float() - vectors) * (2 * grad_loss / max(1, x.numel()))
    to_entries = torch.zeros_like(codebook, dtype=torch.float32)
    to_entries.index_add_(0, ids.reshape(-1), (grad_vectors - pull).reshape(-1, x.shape[-1]))
    return (grad_vectors + pull).to(x.dtype), to_entries.to(codebook.dtype)


_quantize_op.register_autograd(_backward, setup_context=_setup)
