"""k-means on the codebook lookup: how codebooks are started, and how VQToken groups a clip's tokens."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.kernels._backend import backend_for
from tokenzoo.kernels.nearest import nearest, pack


class Clusters(NamedTuple):
    """Centroids `(K, D)` and the centroid of each vector, int64 `(...)`."""

    centroids: Tensor
    ids: Tensor


def kmeans(
    x: Tensor,
    size: int,
    *,
    iterations: int = 10,
    spherical: bool = False,
    generator: torch.Generator | None = None,
    initial: Tensor | None = None,
    tolerance: float = 0.0,
    keep_empty: bool = False,
) -> Clusters:
    """Lloyd's k-means with k-means++ seeding (Arthur and Vassilvitskii 2007); deterministic for a generator.

    Empty clusters are moved to the vectors farthest from their centroid, unless they are to be kept.

    Args:
        x: Vectors, `(..., D)`; at least one.
        size: Number of centroids K, from 1; more than there are distinct vectors leaves some centroids equal.
        iterations: Rounds of assignment and update.
        spherical: Compare directions; vectors and centroids are l2-normalised.
        generator: Source of randomness of the seeding; the global one by default.
        initial: Centroids `(K, D)` to start from instead of seeding.
        tolerance: Stops when all centroids together (before they are normalised) moved by no more than this distance;
            with 0, when none moves any more, which further rounds could not change.
        keep_empty: Leave a centroid that no vector is nearest to where it is.

    Raises:
        ValueError: If there is no vector, or `size` is not positive.
    """
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    if not rows.numel() or size < 1:
        raise ValueError(f"expected at least one vector and one centroid, got {x.shape = } and {size = }")
    if spherical:
        rows = F.normalize(rows, dim=-1)
    if initial is not None and initial.shape != (size, rows.shape[1]):
        raise ValueError(f"expected initial centroids {(size, rows.shape[1])}, got {tuple(initial.shape)}")
    means = _seed(rows, size, generator) if initial is None else initial.detach().to(rows)
    centroids = F.normalize(means, dim=-1) if spherical else means
    sums = _Sums(rows, size)
    for _ in range(iterations):
        sums.assign(centroids)
        before, means = means, _moved(sums, means, keep_empty)
        centroids = F.normalize(means, dim=-1) if spherical else means
        if float(torch.linalg.vector_norm(means - before)) <= tolerance:
            break
    return Clusters(centroids, nearest(rows, centroids).reshape(x.shape[:-1]))


def _seed(rows: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """k-means++: each centroid is a vector drawn with probability proportional to its squared distance to those chosen."""
    first = torch.randint(len(rows), (1,), generator=generator)
    chosen = [rows[first]]
    distance = (rows - chosen[0]).square().sum(1)
    draws = torch.rand(size, dtype=torch.float64, generator=generator)
    for draw in draws[1:]:
        cumulative = distance.double().cumsum(0)
        at = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=len(rows) - 1)
        chosen.append(rows[at][None])
        distance = torch.minimum(distance, (rows - chosen[-1]).square().sum(1))
    return torch.cat(chosen)


class _Sums:
    """The nearest centroid of every row, and the number and sum of each centroid's rows.

    From the second round on only rows that changed are taken from the old sums and added to the new.
    """

    def __init__(self, rows: Tensor, size: int) -> None:
        self.rows, self.size = rows, size
        self.ids = torch.empty(0, dtype=torch.long, device=rows.device)
        self.counts = torch.zeros(size, dtype=torch.float64, device=rows.device)
        self.sums = torch.zeros(size, rows.shape[1], dtype=torch.float64, device=rows.device)

    def assign(self, centroids: Tensor) -> None:
        """Assigns the rows to these centroids `(K, D)`; `counts` `(K,)` and `sums` `(K, D)` are float64."""
        backend = backend_for(self.rows)
        _, packed = pack(centroids, "l2", backend)
        self.ids, counts, sums = backend.assign(self.rows, packed, self.size, self.ids)
        self.counts += counts
        self.sums += sums


def _moved(found: _Sums, means: Tensor, keep_empty: bool) -> Tensor:
    """The means of the rows of each centroid."""
    averages = (found.sums / found.counts[:, None].clamp_min(1)).to(means)
    moved = torch.where(found.counts[:, None] > 0, averages, means)
    empty = (found.counts == 0).nonzero()[:, 0]
    if len(empty) and not keep_empty:
        far = (found.rows - moved[found.ids]).square().sum(1).topk(min(len(empty), len(found.rows))).indices
        moved[empty[: len(far)]] = found.rows[far]
    return moved
