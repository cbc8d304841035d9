"""How a codebook learns without gradients: moving averages, k-means from the first batch, and restarts of dead codes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from tokenzoo.kernels import code_sums, kmeans

_MIX = 2654435761  # spreads seeds apart; the generator looks at 32 bits only


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What a codebook does in training besides following gradients; every part is off by default.

    Attributes:
        decay: Entries are moving averages of the vectors that chose them, with this weight on the past
            (https://arxiv.org/abs/1711.00937, appendix A.1). `None`: entries follow the gradient of the codebook loss.
        smoothing: Laplace smoothing of the averaged counts.
        restart_after: A code that no vector chose in this many training steps in a row is set to a random vector of the batch.
        kmeans_iterations: The first training batch sets the codebook by k-means with this many rounds.
        seed: Of the k-means seeding and the restarts, which are deterministic.
    """

    decay: float | None = None
    smoothing: float = 1e-5
    restart_after: int | None = None
    kmeans_iterations: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {self.decay}")
        if self.restart_after is not None and self.restart_after < 1:
            raise ValueError(f"expected restarts after at least one step, got {self.restart_after}")
        if self.smoothing < 0 or self.kmeans_iterations < 0 or self.seed < 0:
            raise ValueError(f"expected no negative value, got {self}")


def keep_in_use(*, kmeans_iterations: int, restart_after: int) -> Learning | None:
    """The `Learning` of a config that may ask for k-means and restarts: `None`, which adds no buffers, if both are 0."""
    if not (kmeans_iterations or restart_after):
        return None
    return Learning(kmeans_iterations=kmeans_iterations, restart_after=restart_after or None)


class CodebookLearner(nn.Module):
    """Carries out a `Learning` for one codebook. It has exactly those buffers that its `Learning` needs.

    In a distributed run every process ends each step with the same codebook: counts and sums are added up over all of them;
    k-means and restarts draw from the vectors of the first.
    """

    cluster_size: Tensor
    cluster_sums: Tensor
    idle_steps: Tensor
    steps: Tensor
    started: Tensor

    def __init__(self, learning: Learning, codebook: Tensor, *, spherical: bool = False) -> None:
        super().__init__()
        self.learning = learning
        self.spherical = spherical
        size = len(codebook)
        if learning.decay is not None:
            self.register_buffer("cluster_size", torch.ones(size))
            self.register_buffer("cluster_sums", codebook.detach().clone())
        if learning.restart_after is not None:
            self.register_buffer("idle_steps", torch.zeros(size, dtype=torch.long))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        if learning.kmeans_iterations:
            self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def start(self, codebook: Tensor, x: Tensor) -> None:
        """Sets the codebook by k-means of `x`, `(..., D)`, unless that was done before or there are no vectors."""
        if not self.is_waiting or not x.numel():
            return
        generator = torch.Generator().manual_seed(self.learning.seed)
        found = kmeans(
            x, len(codebook), iterations=self.learning.kmeans_iterations, spherical=self.spherical, generator=generator
        )
        codebook.copy_(_from_first(found.centroids))
        if self.learning.decay is not None:
            counts = torch.bincount(found.ids.reshape(-1), minlength=len(codebook)).clamp_min(1)
            self.cluster_size.copy_(_from_first(counts.to(self.cluster_size.dtype)))
            self.cluster_sums.copy_(codebook * self.cluster_size[:, None])
        self.started.fill_(True)

    @property
    def is_waiting(self) -> bool:
        """Whether k-means is still to set the codebook."""
        return bool(self.learning.kmeans_iterations) and not self.started

    @torch.no_grad()
    def start_at(self, codebook: Tensor, entries: Tensor) -> None:
        """Sets the codebook to entries `(K, D)` that are known beforehand, instead of by k-means."""
        codebook.copy_(entries)
        if self.learning.decay is not None:
            self.cluster_size.fill_(1)
            self.cluster_sums.copy_(entries)
        if self.learning.kmeans_iterations:
            self.started.fill_(True)

    @torch.no_grad()
    def update(self, codebook: Tensor, x: Tensor, ids: Tensor) -> None:
        """One training step: vectors `(..., D)` that chose `ids`, `(...)`, change the codebook in place."""
        learning = self.learning
        if learning.decay is None and learning.restart_after is None:
            return
        rows = x.reshape(-1, x.shape[-1])
        counts, sums = (_summed(t) for t in code_sums(rows, ids, len(codebook)))
        if learning.decay is not None:
            self.cluster_size.lerp_(counts, 1 - learning.decay)
            self.cluster_sums.lerp_(sums, 1 - learning.decay)
            total, epsilon = self.cluster_size.sum(), learning.smoothing
            smoothed = (self.cluster_size + epsilon) / (total + len(codebook) * epsilon) * total
            codebook.copy_(self.cluster_sums / smoothed[:, None])
        if learning.restart_after is not None:
            self.idle_steps.add_(1).masked_fill_(counts > 0, 0)
            self._restart(codebook, rows, self.idle_steps >= learning.restart_after)
            self.steps.add_(1)

    def _restart(self, codebook: Tensor, rows: Tensor, dead: Tensor) -> None:
        codes = dead.nonzero()[:, 0]
        if not len(codes):
            return
        vectors = codebook[codes]
        if len(rows):
            generator = torch.Generator().manual_seed((self.learning.seed * _MIX + int(self.steps)) % 2**32)
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            vectors = rows[order[torch.arange(len(codes), device=rows.device) % len(rows)]].to(codebook.dtype)
        codebook[codes] = vectors = _from_first(vectors)
        self.idle_steps[codes] = 0
        if self.learning.decay is not None:
            self.cluster_size[codes] = 1
            self.cluster_sums[codes] = vectors


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _collective(tensor: Tensor, operation: Callable[[Tensor], object]) -> Tensor:
    if _several_processes():
        tensor = tensor.contiguous()
        operation(tensor)
    return tensor


def _summed(tensor: Tensor) -> Tensor:
    """The sum over all processes of a distributed run, or the tensor itself."""
    return _collective(tensor, distributed.all_reduce)


def _from_first(tensor: Tensor) -> Tensor:
    """The first process's tensor, or the tensor itself outside distributed runs."""
    return _collective(tensor, lambda t: distributed.broadcast(t, 0))
