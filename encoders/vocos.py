"""Vocos: features to audio by predicting a spectrogram, without upsampling; with the attention that WavTokenizer put before it.

Papers: https://arxiv.org/abs/2306.00814 (Vocos), https://arxiv.org/abs/2408.16532 (WavTokenizer). Attention and GroupNorms span
all frames, so that every frame's audio depends on every frame and on their number.

Shapes: B batch, D width of the features, C width of the network, T frames, F = n_fft / 2 + 1 frequencies.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.streaming import Conv1d, normalize

_EPSILON = 1e-6
_LOUDEST = 100.0


class Vocos(nn.Module):
    """Features `[B, D, T]` to audio `[B, 1, T * hop]`.

    Args:
        input_dim: Width of the features D.
        dim: Width of the network C.
        hidden_dim: Width between the two linear layers of a block.
        num_layers: ConvNeXt blocks.
        n_fft: Samples per window, a multiple of the hop.
        hop: Samples from one window to the next.
        groups: Of the GroupNorms.
    """

    def __init__(
        self, input_dim: int, dim: int, hidden_dim: int, num_layers: int, n_fft: int, hop: int, groups: int = 32
    ) -> None:
        super().__init__()
        self.embed = Conv1d(input_dim, dim, 7)
        mixers = [
            ConvUnit(dim, groups),
            ConvUnit(dim, groups),
            GlobalAttention(dim, groups),
            *(ConvUnit(dim, groups) for _ in range(2)),
        ]
        self.mixer = nn.ModuleList([*mixers, nn.GroupNorm(groups, dim, eps=_EPSILON)])
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, hidden_dim, 1 / num_layers) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(dim, eps=_EPSILON)
        self.head = SpectrumHead(dim, n_fft, hop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, T]` to `[B, 1, T * hop]`, not limited to [-1, 1]."""
        x = self.embed(x)
        *mixers, norm = self.mixer
        assert isinstance(norm, nn.GroupNorm)
        for mixer in mixers:
            x = mixer(x)
        x = self.norm(normalize(norm, x).mT).mT
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x.mT))


class ConvUnit(nn.Module):
    """Two convolutions behind GroupNorm and SiLU, and the input added."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, dim, eps=_EPSILON) for _ in range(2))
        self.conv1, self.conv2 = (Conv1d(dim, dim, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        y = self.conv1(F.silu(normalize(self.norm1, x)))
        return x + self.conv2(F.silu(normalize(self.norm2, y)))


class GlobalAttention(nn.Module):
    """Residual self-attention over all frames, one head."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=_EPSILON)
        self.q, self.k, self.v, self.out = (Conv1d(dim, dim, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        y = normalize(self.norm, x)
        q, k, v = (layer(y).mT[:, None] for layer in (self.q, self.k, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].mT)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and two linear layers (https://arxiv.org/abs/2201.03545), scaled and added to the input."""

    def __init__(self, dim: int, hidden_dim: int, scale: float) -> None:
        super().__init__()
        self.depthwise = Conv1d(dim, dim, 7, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)
        self.up, self.down = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        y = self.norm(self.depthwise(x).mT)
        return torch.addcmul(x.mT, self.gamma, self.down(F.gelu(self.up(y)))).mT


class SpectrumHead(nn.Module):
    """Log magnitudes and phases of a short-time spectrum, and its inverse transform, `hop` samples a frame."""

    def __init__(self, dim: int, n_fft: int, hop: int) -> None:
        super().__init__()
        if n_fft % (2 * hop):
            raise ValueError(f"expected n_fft to be an even multiple of {hop = }, got {n_fft}")
        self.n_fft, self.hop = n_fft, hop
        self.out = nn.Linear(dim, n_fft + 2)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.window: Tensor

    def forward(self, x_BTC: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, 1, T * hop]`."""
        log_magnitude, phase = self.out(x_BTC).float().chunk(2, -1)
        spectrum = torch.polar(log_magnitude.exp().clamp(max=_LOUDEST), phase)
        window = self.window.float()
        frames = torch.fft.irfft(spectrum, self.n_fft) * window
        envelope = self._overlap_add(window.square().expand(1, x_BTC.shape[1], -1))
        return (self._overlap_add(frames) / envelope)[:, None].to(x_BTC.dtype)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """Windows `[B, T, n_fft]`, `hop` samples apart, as one signal `[B, T * hop]` without the outer half overlaps."""
        batch, num_frames, _ = frames.shape
        overlaps = self.n_fft // self.hop
        parts = frames.reshape(batch, num_frames, overlaps, self.hop)
        whole = parts.new_zeros(batch, num_frames + overlaps - 1, self.hop)
        for i in range(overlaps):
            whole[:, i : i + num_frames] += parts[:, :, i]
        margin = (self.n_fft - self.hop) // 2
        return whole.flatten(1)[:, margin:-margin]
