"""A causal transformer over frames with a limited context, that can be fed piece by piece (Mimi, Moshi).

Paper: https://arxiv.org/abs/2410.00037. Pre-norm blocks without biases in their linear layers, rotary positions
(https://arxiv.org/abs/2104.09864, the two halves of a head turned against each other), layer scales, exact GELU.

Shapes: B batch, T frames, D width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.streaming import State, Streamed


class CausalTransformer(Streamed):
    """Every frame attends to itself and the `context - 1` frames before it.

    Args:
        dim: Width D.
        num_layers: Blocks.
        num_heads: Attention heads.
        hidden_dim: Width between the two linear layers of a block.
        context: Frames that a frame attends to.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, hidden_dim: int, context: int) -> None:
        super().__init__()
        self.context, self.head_dim = context, dim // num_heads
        self.layers = nn.ModuleList(_Block(dim, num_heads, hidden_dim) for _ in range(num_layers))

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, D, T]` to `[B, D, T]`."""
        del last
        if not x.shape[-1]:
            return x
        x_BTD = x.mT
        num_frames = x_BTD.shape[1]
        pasts: list[tuple[Tensor, Tensor] | None]
        seen, pasts = (state or {}).get(self, (0, [None] * len(self.layers)))
        rotation = self._rotation(seen, num_frames, x)
        before = min(seen, self.context - 1)
        mask = self._mask(before, num_frames, x.device)
        for i, layer in enumerate(self.layers):
            x_BTD, past = layer(x_BTD, rotation, mask, pasts[i])
            pasts[i] = (past[0][:, :, 1 - self.context :], past[1][:, :, 1 - self.context :]) if self.context > 1 else None
        if state is not None:
            state[self] = (seen + num_frames, pasts)
        return x_BTD.mT

    def _rotation(self, start: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, D / H]` of the positions from `start` on."""
        exponents = torch.arange(0, self.head_dim, 2, device=like.device).float() / self.head_dim
        angles = torch.outer(torch.arange(start, start + count, device=like.device).float(), 10000.0**-exponents)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def _mask(self, before: int, count: int, device: torch.device) -> Tensor:
        """Which of `before + count` keys each of the last `count` frames attends to."""
        queries = torch.arange(before, before + count, device=device)[:, None]
        distance = queries - torch.arange(before + count, device=device)
        return (distance >= 0) & (distance < self.context)


class _Block(nn.Module):
    """Residual attention, then a residual MLP, each behind a LayerNorm and scaled per channel."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(hidden_dim, dim, bias=False)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 0.01)) for _ in range(2))

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`[B, T, D]` to `[B, T, D]`, and the keys and values `[B, H, T', D / H]` of past and present."""
        batch, num_frames, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, num_frames, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.scale1 * self.out(attended.transpose(1, 2).flatten(2))
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x)))), (k, v)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine
