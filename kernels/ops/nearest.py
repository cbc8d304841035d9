"""Index of the nearest codebook entry, without an [N, K] matrix of distances."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20


def nearest(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """Index of the nearest codebook entry.

    Args:
        x: Vectors, `(..., D)`, any float dtype; compared in float32.
        codebook: Entries, `(K, D)`.
        metric: `"l2"` (squared Euclidean) or `"cosine"` (both sides are l2-normalised).

    Returns:
        int64 indices, `(...)`, in `[0, K)`. Ties go to the lowest index.

    Raises:
        ValueError: If the widths differ, `codebook` is empty, or the metric is unknown.
    """
    if codebook.dim() != 2 or not len(codebook) or x.shape[-1] != codebook.shape[1]:
        raise ValueError(f"expected x (..., D) and a codebook (K, D) with K > 0, got {x.shape = } and {codebook.shape = }")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"expected metric 'l2' or 'cosine', got {metric!r}")
    with torch.autocast(x.device.type, enabled=False):
        flat, entries = x.detach().reshape(-1, x.shape[-1]).float(), codebook.detach().float()
        if metric == "cosine":
            flat, entries = torch.nn.functional.normalize(flat, dim=-1), torch.nn.functional.normalize(entries, dim=-1)
        ids = _nearest_l2(flat, entries)
    return ids.reshape(x.shape[:-1])


def _nearest_l2(x: Tensor, codebook: Tensor) -> Tensor:
    """Argmin over k of |c_k|^2 - 2 x.c_k: the distance less the term that is the same for every k."""
    squared_norms = codebook.square().sum(1)
    rows = max(1, _CHUNK_ELEMENTS // len(codebook))
    chunks = [torch.addmm(squared_norms, part, codebook.T, alpha=-2).argmin(1) for part in x.split(rows)]
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.long, device=x.device)
