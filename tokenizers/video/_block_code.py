"""Classified scalar quantization of blocks of a clip, and how its tables are estimated from data.

A block is a vector of cosine coefficients. Its code names one of some classes, each with a mean and a few directions of its
own, and a level along every direction. Levels are evenly spaced (finite scalar quantization), and a class spends its bits
where its blocks vary most. Encoding tries all classes.

Shapes: N blocks, K coefficients, M classes, D directions.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows: an orthonormal luma and two colour differences, close to the principal axes of photos.
_COLOUR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 2.0, -1.0))
# Best distances of 2^b even levels for a Gaussian of unit variance (J. Max, 1960), by b.
_STEPS = (0.0, 1.596, 0.9957, 0.586, 0.3352)
_ROWS_AT_ONCE = 4096
_PRIOR_BLOCKS = 40.0
_ROUNDS = 6
_MEANS_ROUNDS = 8


def cosines(size: int) -> Tensor:
    """Orthonormal DCT-II, float64 `[size, size]`; rows are frequencies."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) * frequency / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@cache
def block_transform(frames: int, side: int, luma: float, chroma: float) -> Tensor:
    """The kept rows of the orthonormal transform of blocks, float32 `[K, frames * 3 * side * side]`.

    Of coefficients at frequencies (f, u, v) those with `(2 f)^2 + u^2 + v^2` below the square of a radius are kept, `luma` or
    `chroma`.
    """
    with torch.device("cpu"):  # the result is kept, so it must not follow where a network is being built
        colours = F.normalize(torch.tensor(_COLOUR_AXES, dtype=torch.float64), dim=1)
        basis = torch.einsum("ft,kc,uy,vx->fkuvtcyx", cosines(frames), colours, cosines(side), cosines(side))
        f, u, v = torch.meshgrid(torch.arange(frames), torch.arange(side), torch.arange(side), indexing="ij")
        distance = ((2 * f) ** 2 + u**2 + v**2).sqrt()
        kept = torch.stack([distance < radius for radius in (luma, chroma, chroma)], 1)
        return basis[kept].flatten(1).float()


class BlockCode(nn.Module):
    """The code of one kind of blocks.

    Args:
        classes: M, a power of two.
        bits: Of the levels of a block, over all directions.
        dim: K.
    """

    bits: Tensor

    def __init__(self, classes: int, bits: int, dim: int) -> None:
        super().__init__()
        self.total_bits, self.size = bits, classes << bits
        directions = max(bits, 1)
        self.register_buffer("mean", torch.zeros(classes, dim))
        self.register_buffer("basis", torch.zeros(classes, directions, dim))
        self.register_buffer("scale", torch.ones(classes, directions))
        self.register_buffer("bits", torch.zeros(classes, directions, dtype=torch.uint8))

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def encode(self, x_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Words int64 `[N]` in [0, size), and the squared errors `[N]` that they leave."""
        parts = [self._encode(part) for part in x_NK.float().split(_ROWS_AT_ONCE)]
        words, errors = zip(*parts, strict=True)
        return torch.cat(words), torch.cat(errors)

    def _encode(self, x_NK: Tensor) -> tuple[Tensor, Tensor]:
        mean, basis, scale = self.mean.float(), self.basis.float(), self.scale.float()
        directions = scale.shape[1]
        offset = torch.einsum("mk,mdk->md", mean, basis)
        y = ((x_NK @ basis.flatten(0, 1).T).unflatten(1, (-1, directions)) - offset) / scale
        highest = (1 << self.bits.long()) // 2
        level = torch.minimum(torch.maximum(y.floor(), -highest.float()), highest.float() - 1)
        gained = (scale.square() * (y.square() - (y - level - 0.5).square())).masked_fill(self.bits == 0, 0)
        errors = mean.square().sum(1) - 2 * x_NK @ mean.T + x_NK.square().sum(1, keepdim=True) - gained.sum(2)
        best, chosen = errors.min(1)
        digits = (level + highest)[torch.arange(len(x_NK)), chosen].long().masked_fill(self.bits[chosen] == 0, 0)
        return (chosen << self.total_bits) + (digits << self._shifts[chosen]).sum(1), best

    def decode(self, words: Tensor) -> Tensor:
        """Blocks `[..., K]` of words int64 `[...]`."""
        chosen = words >> self.total_bits
        bits = self.bits.long()[chosen]
        digits = (words[..., None] >> self._shifts[chosen]) & ((1 << bits) - 1)
        level = (digits - (1 << bits) // 2 + 0.5) * (bits > 0) * self.scale.float()[chosen]
        return self.mean.float()[chosen] + torch.einsum("...d,...dk->...k", level, self.basis.float()[chosen])

    @property
    def _shifts(self) -> Tensor:
        """By how many bits the digit of each direction is shifted, `[M, D]`."""
        bits = self.bits.long()
        return bits.cumsum(1) - bits

    @torch.no_grad()
    def fit(self, x_NK: Tensor, generator: torch.Generator, *, rounds: int = _ROUNDS, fresh: bool = True) -> None:
        """Estimates all tables from blocks: those nearest to a class in what quantizing leaves decide over its tables."""
        labels = _first_labels(x_NK, len(self.mean), generator) if fresh else self.encode(x_NK)[0] >> self.total_bits
        for _ in range(rounds):
            self._estimate(x_NK, labels, generator)
            labels = self.encode(x_NK)[0] >> self.total_bits
        self._estimate(x_NK, labels, generator)

    def _estimate(self, x_NK: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Mean, principal directions and steps of every class; classes that are hardly used split those with most error."""
        overall = x_NK.T @ x_NK / len(x_NK)
        for m in range(len(self.mean)):
            x = x_NK[labels == m]
            if len(x) < 4:
                x = x_NK[torch.randint(len(x_NK), (4,), generator=generator)]
            self.mean[m] = x.sum(0) / (len(x) + 1)
            centred = x - self.mean[m]
            covariance = centred.T @ centred
            prior = overall * (covariance.diagonal().sum() / len(x) / overall.diagonal().sum().clamp_min(1e-12))
            values, vectors = torch.linalg.eigh((covariance + _PRIOR_BLOCKS * prior) / (len(x) + _PRIOR_BLOCKS))
            count = self.basis.shape[1]
            values, vectors = values.flip(0)[:count].clamp_min(1e-8), vectors.flip(1)[:, :count]
            self._spend(m, values, vectors.T)

    def _spend(self, m: int, variances: Tensor, directions: Tensor) -> None:
        """Gives every bit of a class to the direction with most variance left."""
        left, bits = variances.clone(), torch.zeros(len(variances), dtype=torch.long)
        for _ in range(self.total_bits):
            at = int(left.argmax())
            bits[at] += 1
            left[at] = variances[at] / 4.0 ** bits[at] * 1.5 if bits[at] < len(_STEPS) - 1 else 0.0
        self.bits[m], self.basis[m] = bits.to(torch.uint8), directions
        steps = torch.tensor(_STEPS)[bits] * variances.sqrt()
        self.scale[m] = torch.where(bits > 0, steps, torch.ones(()))


def _first_labels(x_NK: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Clusters of blocks whose strength is compressed, so that weak ones get classes of their own."""
    strength = x_NK.square().sum(1, keepdim=True).sqrt()
    compressed = x_NK / (strength + strength.median() * 0.1).sqrt()
    centres = compressed[torch.randperm(len(x_NK), generator=generator)[:count]].clone()
    for _ in range(_MEANS_ROUNDS):
        labels = torch.cat([(centres.square().sum(1) - 2 * part @ centres.T).argmin(1) for part in compressed.split(8192)])
        sizes = torch.bincount(labels, minlength=len(centres)).clamp_min(1)
        centres = torch.zeros_like(centres).index_add(0, labels, compressed) / sizes[:, None]
    return labels
