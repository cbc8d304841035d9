"""Quantizer modules: what turns vectors into ids, with the gradients and losses that training needs."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.kernels import PackCache, nearest


class Quantized(NamedTuple):
    """Vectors `(..., D)` with straight-through gradients, ids `(...)`, and the weighted VQ loss (a scalar)."""

    vectors: Tensor
    ids: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """A codebook of `size` entries of width `dim` (VQ-VAE, https://arxiv.org/abs/1711.00937), always in float32.

    With `metric="cosine"` vectors and entries are l2-normalised before they are compared, and the normalised entry is
    what decoding sees (https://arxiv.org/abs/2110.04627).
    """

    def __init__(self, size: int, dim: int, *, metric: Literal["l2", "cosine"] = "l2", commitment: float = 0.25) -> None:
        super().__init__()
        self.metric = metric
        self.commitment = commitment
        self.codebook = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))
        self._cache = PackCache()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the module it is in, but stays in float32 when that is cast: a rounded codebook has other ids."""
        exact = self.codebook.detach()
        super()._apply(fn, recurse)
        if self.codebook.dtype != torch.float32:
            self.codebook.data = exact.to(self.codebook.device)
        return self

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; the packed codebook is kept in eval mode only."""
        self._cache.clear()
        return super().train(mode)

    def ids(self, x: Tensor) -> Tensor:
        """Ids int64 `(...)` of vectors `(..., D)`."""
        return nearest(x, self.codebook, metric=self.metric, cache=None if self.training else self._cache)

    def lookup(self, ids: Tensor) -> Tensor:
        """Entries float32 `(..., D)` of ids `(...)`; differentiable with respect to the codebook."""
        entries = F.embedding(ids, self.codebook.float())
        return F.normalize(entries, dim=-1) if self.metric == "cosine" else entries

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `(..., D)` for training: codebook loss plus `commitment` times the commitment loss."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.metric == "cosine":
                x = F.normalize(x, dim=-1)
            ids = self.ids(x)
            entries = self.lookup(ids)
            loss = F.mse_loss(entries, x.detach()) + self.commitment * F.mse_loss(x, entries.detach())
            return Quantized(x + (entries - x).detach(), ids, loss)
