"""T5's encoder (https://arxiv.org/abs/1910.10683, version 1.1), with MrT5's softmax1 and deletion of positions.

Scores are not scaled, and a learned bias by bucketed distance, the same in all blocks, is added to them. `softmax1` is a
softmax beside one more score of 0, so that a position may attend to nothing.

Shapes: B batch, L positions, D width, H heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, in float32, and scales per channel."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class Attention(nn.Module):
    """Self-attention over positions, with a bias that is given."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, *, softmax1: bool) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.heads, self.softmax1 = (num_heads, head_dim), softmax1
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x_BLD: Tensor, bias: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`; `bias` is added to the scores, `[B or 1, H, L or 1, L]`."""
        q, k, v = (part(x_BLD).unflatten(-1, self.heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.mT + bias).float()
        weights = F.pad(scores, (0, 1)).softmax(-1)[..., :-1] if self.softmax1 else scores.softmax(-1)
        return self.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Residual attention, then a residual gated MLP, each behind an `RMSNorm`."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, hidden_dim: int, *, softmax1: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(dim, num_heads, head_dim, softmax1=softmax1)
        self.gate, self.up = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        x = x + self.attention(self.norm1(x), bias)
        y = self.norm2(x)
        return x + self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))


class DistanceBias(nn.Module):
    """A learned bias per head and bucket of distance; buckets widen logarithmically up to `longest`.

    Args:
        num_buckets: For both directions together.
        num_heads: Heads H.
        longest: Distances from here on share a bucket.
    """

    def __init__(self, num_buckets: int, num_heads: int, longest: int = 128) -> None:
        super().__init__()
        self.table = nn.Embedding(num_buckets, num_heads)
        self.longest = longest

    def forward(self, positions: Tensor) -> Tensor:
        """Bias `[B, H, L, L]` of positions int64 `[B, L]`; the second L are the keys."""
        distance = positions[:, None, :] - positions[:, :, None]
        half = self.table.num_embeddings // 2
        exact = half // 2
        away = distance.abs()
        wide = torch.log(away.clamp(min=1).float() / exact) / math.log(self.longest / exact) * (half - exact)
        bucket = torch.where(away < exact, away, (exact + wide.long()).clamp(max=half - 1))
        return self.table(bucket + half * (distance > 0)).permute(0, 3, 1, 2)
