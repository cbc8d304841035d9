"""Transformer blocks without learned norms, optionally modulated by a time embedding (adaLN, https://arxiv.org/abs/2212.09748).

As in FlexTok: LayerNorm has no weights and runs in float32, queries and keys are normalised per head, projections have no
bias, the MLP is a SwiGLU (https://arxiv.org/abs/2002.05202). Modulated blocks shift, scale and gate each kind of token
by its own amounts.

Which positions attend to which is given as a list of `Reach`, so that nothing is computed that a mask would discard, and
independent sequences (the passes of classifier-free guidance) share every matrix product.

Shapes: B batch, L tokens, D width, H heads, K kinds of token.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Reach(NamedTuple):
    """Positions `queries` attend to positions `keys`; `bias` is added to the scores, or masks them where it is boolean."""

    queries: slice
    keys: slice
    bias: Tensor | None = None


class Condition(NamedTuple):
    """What modulates a sequence: SiLU of the time embedding `[B or 1, D]`, and each token's kind, int64 `[L]`."""

    time: Tensor
    kinds: Tensor


def normalise(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without weights, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:]).type_as(x)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys, scaled by 8 / width of a head (muP)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"expected a width that {head_dim = } divides, got {dim = }")
        self.head_dim = head_dim
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BLD: Tensor, reaches: Sequence[Reach], keep: slice | None = None) -> Tensor:
        """Attention from the positions `keep` (all if `None`), which `reaches` must cover in order: `[B, kept, D]`.

        The slices `queries` count from the first kept position.
        """
        q = normalise(self._heads(self.q(x_BLD if keep is None else x_BLD[:, keep]))).transpose(1, 2)
        k = normalise(self._heads(self.k(x_BLD))).transpose(1, 2)
        v = self._heads(self.v(x_BLD)).transpose(1, 2)
        parts = [
            F.scaled_dot_product_attention(q[:, :, i], k[:, :, j], v[:, :, j], attn_mask=bias, scale=8 / self.head_dim)
            for i, j, bias in reaches
        ]
        x_BHLD = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return self.out(x_BHLD.transpose(1, 2).flatten(2))

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(2, (-1, self.head_dim))


class SwiGLU(nn.Module):
    """Gated MLP: `down(silu(gate(x)) * up(x))`, two thirds as wide as an MLP of this ratio, for as many weights."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(2 * int(dim * ratio) / 3)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Residual attention, then a residual MLP; with `num_kinds` of tokens, both are modulated by a `Condition`."""

    def __init__(self, dim: int, head_dim: int, *, mlp_ratio: float = 4.0, num_kinds: int = 0) -> None:
        super().__init__()
        self.num_kinds = num_kinds
        self.attention = Attention(dim, head_dim)
        self.mlp = SwiGLU(dim, mlp_ratio)
        self.modulation = nn.Linear(dim, num_kinds * 6 * dim) if num_kinds else None

    def forward(
        self, x_BLD: Tensor, reaches: Sequence[Reach], *, keep: slice | None = None, condition: Condition | None = None
    ) -> Tensor:
        """The block's output at the positions `keep` (all if `None`): `[B, kept, D]`."""
        kept = x_BLD if keep is None else x_BLD[:, keep]
        if self.modulation is None or condition is None:
            x_BLD = kept + self.attention(normalise(x_BLD), reaches, keep)
            return x_BLD + self.mlp(normalise(x_BLD))
        amounts = self.modulation(condition.time).unflatten(1, (self.num_kinds, -1)).index_select(1, condition.kinds)
        here = slice(None) if keep is None else keep
        gate_attention, gate_mlp, shift_attention, scale_attention, shift_mlp, scale_mlp = amounts.chunk(6, -1)
        attended = self.attention(modulate(x_BLD, shift_attention, scale_attention), reaches, keep)
        x_BLD = torch.addcmul(kept, gate_attention[:, here], attended)
        return torch.addcmul(x_BLD, gate_mlp[:, here], self.mlp(modulate(x_BLD, shift_mlp[:, here], scale_mlp[:, here])))


def modulate(x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised, scaled by 1 + `scale`, and shifted."""
    return torch.addcmul(shift, normalise(x_BLD), 1 + scale)


class TimeEmbedding(nn.Module):
    """Times of a flow as vectors: cosines, then sines, of 256 to 1 cycles' worth of frequencies, through an MLP.

    Args:
        dim: Width of the vectors.
        num_frequencies: Width of the cosines and sines together.
        max_time: Largest time; frequencies are scaled by 1000 over it.
    """

    _SLOWEST = 256

    def __init__(self, dim: int, *, num_frequencies: int = 256, max_time: float = 1000.0) -> None:
        super().__init__()
        self.num_frequencies, self.max_time = num_frequencies, max_time
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        """Float32 `[B]` to `[B, D]`."""
        half = self.num_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angles = time.float()[:, None] * (1000 / self.max_time * torch.exp(-math.log(self._SLOWEST) * exponents))
        features = torch.cat([angles.cos(), angles.sin()], 1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))
