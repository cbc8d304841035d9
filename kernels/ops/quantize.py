"""Nearest entry, the entry itself, the commitment loss and, on request, what an EMA codebook needs, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.kernels._backend import backend_for
from tokenzoo.kernels.nearest import PackCache, as_rows, check, needs_op, pack


class Quantized(NamedTuple):
    """What `quantize` returns.

    Attributes:
        ids: int64 `(...)`.
        vectors: Their entries, float32 `(..., D)`.
        loss: Mean squared distance between vectors and entries, float32 `()`.
        counts: How many vectors have each code, float32 `(K,)`; only when asked for.
        sums: Sums of those vectors, float32 `(K, D)`; only when asked for.
    """

    ids: Tensor
    vectors: Tensor
    loss: Tensor
    counts: Tensor | None = None
    sums: Tensor | None = None


def quantize(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", cache: PackCache | None = None, statistics: bool = False
) -> Quantized:
    """Quantizes vectors; the search, the gather and the loss share one pass over `x`.

    Gradients: `vectors` passes its gradient straight through to `x` and, gathered, to `codebook`; `loss` pulls both.

    Args:
        x: Vectors, `(..., D)`, any float dtype; computed in float32.
        codebook: Entries, `(K, D)`.
        metric: `"l2"`, or `"cosine"`: vectors and entries are l2-normalised first, and normalised entries are returned.
        cache: Keeps the packed codebook between calls; for a codebook that does not change.
        statistics: Return also what an EMA update of the codebook needs, as `code_sums` gives it.

    Returns:
        Ids, entries, loss and statistics; ties and non-finite vectors as in `nearest`.

    Raises:
        ValueError: As `nearest`.
    """
    check(x, codebook, metric)
    if needs_op(x, codebook):
        if metric == "cosine":
            x, codebook = F.normalize(x.float(), dim=-1), F.normalize(codebook.float(), dim=-1)
        vectors, loss, ids, counts, sums = torch.ops.tokenzoo.quantize(x, codebook, statistics)
        return Quantized(ids, vectors, loss, counts, sums) if statistics else Quantized(ids, vectors, loss)
    rows = as_rows(x)
    if metric == "cosine":
        rows = F.normalize(rows, dim=-1)
    found = Quantized(*_quantize_rows(rows, codebook, metric, cache, statistics))
    if x.dim() == 2:
        return found
    return found._replace(ids=found.ids.reshape(x.shape[:-1]), vectors=found.vectors.reshape(x.shape))


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
    rows, flat = as_rows(x), ids.reshape(-1).long().contiguous()
    low, high = (int(bound) for bound in flat.aminmax()) if len(flat) else (0, 0)
    if len(flat) != len(rows) or low < 0 or (len(flat) and high >= size):
        raise ValueError(f"expected an id in [0, {size}) for each of {len(rows)} vectors, got {ids.shape = }, {low} to {high}")
    counts, sums = backend_for(rows).code_sums(rows, flat, size)
    return counts, sums


def _quantize_rows(
    rows: Tensor, codebook: Tensor, metric: str, cache: PackCache | None, statistics: bool
) -> tuple[Tensor, ...]:
    backend = backend_for(rows)
    entries, packed = pack(codebook, metric, backend, cache)
    ids, vectors, loss = backend.quantize(rows, packed, entries)
    return ids, vectors, loss, *(backend.code_sums(rows, ids, len(entries)) if statistics else ())


@torch.library.custom_op("tokenzoo::quantize", mutates_args=())
def _quantize_op(x: Tensor, codebook: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = as_rows(x)
    ids, vectors, loss, *sums = _quantize_rows(rows, codebook, "l2", None, statistics)
    counts, totals = sums or (rows.new_empty(0), rows.new_empty(0, rows.shape[1]))
    return vectors.reshape(x.shape), loss, ids.reshape(x.shape[:-1]), counts, totals


@_quantize_op.register_fake
def _(x: Tensor, codebook: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size, width = codebook.shape
    ids = x.new_empty(x.shape[:-1], dtype=torch.long)
    counts = x.new_empty(size if statistics else 0, dtype=torch.float32)
    sums = x.new_empty(size if statistics else 0, width, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty((), dtype=torch.float32), ids, counts, sums


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, ...]) -> None:
    _, _, ids, counts, sums = output
    ctx.mark_non_differentiable(ids, counts, sums)
    ctx.save_for_backward(inputs[0], inputs[1], ids)


def _backward(ctx: Any, grad_vectors: Tensor, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, codebook, ids = ctx.saved_tensors
    vectors = torch.ops.tokenzoo.lookup(ids, codebook).float()
    pull = (x.float() - vectors) * (2 * grad_loss / max(1, x.numel()))
    to_entries = None
    if ctx.needs_input_grad[1]:
        to_entries = torch.ops.tokenzoo.code_totals(grad_vectors - pull, ids, len(codebook)).to(codebook.dtype)
    return (grad_vectors + pull).to(x.dtype), to_entries, None


_quantize_op.register_autograd(_backward, setup_context=_setup)
