"""Index of the nearest codebook entry, without an [N, K] matrix of distances."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.kernels._backend import backend_for


class PackCache:
    """Keeps a codebook in the form that is searched, from one call to the next.

    The codebook is packed again when its storage, its layout or its version counter changes, and nothing is kept while it is
    being trained (it requires a gradient, and gradients are on). Writing through `codebook.data` or a NumPy view is not
    noticed, so hold a cache only while the codebook is left alone, as the quantizer modules do in eval mode. Threads may
    share a cache; copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._held: tuple[tuple[Any, ...], Tensor, tuple[Tensor, Any]] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PackCache, ()

    def clear(self) -> None:
        """Forgets the packed codebook."""
        self._held = None

    def get(self, codebook: Tensor, metric: str, backend: Any) -> tuple[Tensor, Any]:
        """The entries that are compared, and their packed form."""
        if codebook.is_inference():
            return pack(codebook, metric, backend)
        if codebook.requires_grad and torch.is_grad_enabled():
            self.clear()
            return pack(codebook, metric, backend)
        key = (
            *(codebook.data_ptr(), codebook._version, codebook.shape, codebook.stride(), codebook.dtype),
            *(metric, id(backend)),
        )
        held = self._held
        if held is None or held[0] != key:
            # The codebook is kept alive, so that its address cannot become another one's.
            held = self._held = (key, codebook.detach(), pack(codebook, metric, backend))
        return held[2]


def pack(codebook: Tensor, metric: str, backend: Any, cache: PackCache | None = None) -> tuple[Tensor, Any]:
    """As `PackCache.get`, with or without a cache."""
    if cache is not None:
        return cache.get(codebook, metric, backend)
    entries = as_entries(codebook, metric)
    return entries, backend.pack(entries, metric == "cosine")


def each_cache(caches: Sequence[PackCache] | None, codebooks: int) -> Sequence[PackCache | None]:
    """The cache of each codebook. Raises ValueError if there is not one for each."""
    if caches is not None and len(caches) != codebooks:
        raise ValueError(f"expected a cache for each of {codebooks} codebooks, got {len(caches)}")
    return caches if caches is not None else [None] * codebooks


def nearest(x: Tensor, codebook: Tensor, *, metric: str = "l2", cache: PackCache | None = None) -> Tensor:
    """Index of the nearest codebook entry.

    Args:
        x: Vectors, `(..., D)`, any float dtype; compared in float32.
        codebook: Entries, `(K, D)`.
        metric: `"l2"` (squared Euclidean) or `"cosine"` (both sides are l2-normalised).
        cache: Keeps the packed codebook between calls (not in traced graphs); for a codebook that does not change.

    Returns:
        int64 indices, `(...)`, in `[0, K)`. Ties go to the lowest index; so do vectors that hold a NaN or an infinity.
        Entries that do are never chosen over one that does not.

    Raises:
        ValueError: If the widths differ, `codebook` is empty, or the metric is unknown.
    """
    check(x, codebook, metric)
    if traced(x, codebook):
        return torch.ops.tokenzoo.nearest(x, codebook, metric)
    ids = search(as_rows(x), codebook, metric, cache)
    return ids if x.dim() == 2 else ids.reshape(x.shape[:-1])


def check(x: Tensor, codebook: Tensor, metric: str) -> None:
    """Raises ValueError unless `x` can be searched for in `codebook`."""
    if codebook.dim() != 2 or not codebook.numel() or x.dim() < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(f"expected x (..., D) and a codebook (K, D) with K, D > 0, got {x.shape = } and {codebook.shape = }")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"expected metric 'l2' or 'cosine', got {metric!r}")


def needs_op(*tensors: Tensor) -> bool:
    """Whether a call must go through the registered operator: for gradients, or into a traced graph; it costs 30 us."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return traced(*tensors)


def traced(*tensors: Tensor) -> bool:
    """Whether a graph is being captured, or the tensors are others than plain ones, such as fake tensors."""
    if torch.compiler.is_compiling():
        return True
    return any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)


def as_rows(x: Tensor) -> Tensor:
    """Vectors `(..., D)` as contiguous float32 `(N, D)`, apart from any graph; what needs no change is not touched."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype is not torch.float32:
        x = x.float()
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x.contiguous()


def as_entries(codebook: Tensor, metric: str) -> Tensor:
    """The entries that are compared, contiguous float32, in the codebook's shape."""
    entries = codebook.detach().float()
    return (F.normalize(entries, dim=-1) if metric == "cosine" else entries).contiguous()


def search(rows: Tensor, codebook: Tensor, metric: str, cache: PackCache | None = None) -> Tensor:
    """int64 `(N,)`: nearest entries for rows as `as_rows` gives them, by whichever implementation this machine has."""
    backend = backend_for(rows)
    return backend.nearest(rows, pack(codebook, metric, backend, cache)[1], len(codebook))


@torch.library.custom_op("tokenzoo::nearest", mutates_args=())
def _nearest_op(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return search(as_rows(x), codebook, metric).reshape(x.shape[:-1])


@_nearest_op.register_fake
def _(x: Tensor, codebook: Tensor, metric: str) -> Tensor:  # noqa: ARG001 (a schema)
    return x.new_empty(x.shape[:-1], dtype=torch.long)
