"""A causal transformer over bytes, in the manner of Llama, with a limited look back (HAT's byte encoder, BLT's entropy model).

Pre-norm blocks (https://arxiv.org/abs/2302.13971): RMS norms, attention with rotary positions
(https://arxiv.org/abs/2104.09864), SwiGLU; no biases. Long texts go through piece by piece, each layer keeping the keys and
values that later bytes still look at, so that memory follows the window and not the text.

Shapes: B batch, N bytes, D width, H heads, W window.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE = 1024


class Rotary(NamedTuple):
    """How positions turn a head: base of the wavelengths, and whether neighbours or the two halves are turned together."""

    theta: float = 10000.0
    neighbours: bool = False

    def angles(self, positions: Tensor, head_dim: int) -> Tensor:
        """Angles `[N, head_dim / 2]` of positions `[N]`, in float32, as the published networks were trained with them."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
        return torch.outer(positions.float(), 1.0 / self.theta**exponents)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """Heads `[..., N, H, head_dim]` turned by `angles`, in float32."""
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        split = x.float().unflatten(-1, (-1, 2) if self.neighbours else (2, -1))
        a, b = split.unbind(-1 if self.neighbours else -2)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if self.neighbours else -2)
        return turned.flatten(-2).to(x.dtype)


class ByteTransformer(nn.Module):
    """Every byte attends to itself and the `window - 1` bytes before it.

    Args:
        dim: Width D.
        num_layers: Blocks.
        num_heads: Attention heads H.
        mlp_dim: Width between the linear layers of a block.
        window: Bytes that a byte attends to; `None` for all before it.
        rotary: How positions turn the heads.
        norm_eps: Added to the mean square in the norms.
    """

    def __init__(
        self, dim: int, num_layers: int, num_heads: int, mlp_dim: int, *, window: int | None, rotary: Rotary, norm_eps: float
    ) -> None:
        super().__init__()
        self.window, self.rotary, self.head_dim = window, rotary, dim // num_heads
        self.layers = nn.ModuleList(_Block(dim, num_heads, mlp_dim, norm_eps) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`, before any last norm."""
        pasts: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        pieces = []
        for start in range(0, x.shape[1], PIECE):
            piece = x[:, start : start + PIECE]
            angles = self.rotary.angles(torch.arange(start, start + piece.shape[1], device=x.device), self.head_dim)
            for i, layer in enumerate(self.layers):
                piece, past = layer(piece, pasts[i], self.rotary, angles, self.window)
                pasts[i] = past if start + PIECE < x.shape[1] else None
            pieces.append(piece)
        return torch.cat(pieces, 1) if pieces else x


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.RMSNorm(dim, norm_eps), nn.RMSNorm(dim, norm_eps)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(dim, mlp_dim, bias=False), nn.Linear(dim, mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, dim, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, rotary: Rotary, angles: Tensor, window: int | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A piece `[B, N, D]`, and the keys and values `[B, M, H, D / H]` that the next piece looks at."""
        h = self.norm1(x)
        query, key, value = (layer(h).unflatten(-1, (self.num_heads, -1)) for layer in (self.query, self.key, self.value))
        query, key = rotary.turn(query, angles), rotary.turn(key, angles)
        if past is not None:
            key, value = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
        seen = _seen(query.shape[1], key.shape[1], window, x.device)
        heads = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), seen)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        kept = 0 if window is None else max(0, key.shape[1] - (window - 1))
        return x, (key[:, kept:], value[:, kept:])


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each of the last `queries` positions attends to: `[queries, keys]`."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (back >= 0) if window is None else (back >= 0) & (back < window)
