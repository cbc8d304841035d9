"""VidTok's networks: convolutions within frames and over time in turn, a LayerNorm at every pixel, attention within frames.

Paper: https://arxiv.org/abs/2412.13061. Causal networks see no later frame; before the first one stand zeros, or copies of it.
Non-causal networks see as many later as earlier frames. Either can be fed piece by piece.

Shapes: B batch, C channels, T frames, H W height and width in pixels, t h w of the latent grid.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.autoencoder_kl import Downsample, Upsample
from tokenzoo.encoders.causal_conv3d import (
    ClipConv,
    FrameAttention,
    FrameConv,
    PerFrame,
    PixelNorm,
    Residual,
    SmoothDouble,
    TimeConv,
    Windowed,
    laid_out,
)
from tokenzoo.encoders.streaming import Chain, State, Streamed


@dataclass(frozen=True)
class Timing:
    """How a network treats time.

    Attributes:
        causal: Whether nothing looks ahead, but for `smooth`.
        repeat: Whether copies of the first frame stand before it, instead of zeros.
        smooth: Whether the decoder doubles frames by interpolation, instead of repeating them.
    """

    causal: bool = True
    repeat: bool = False
    smooth: bool = False

    def frame_conv(self, in_channels: int, out_channels: int) -> TimeConv:
        """A convolution of 3 frames at every pixel."""
        return TimeConv(in_channels, out_channels, causal=self.causal, repeat=self.repeat)

    def clip_conv(self, in_channels: int, out_channels: int) -> ClipConv:
        """A convolution of 3 x 3 x 3."""
        return ClipConv(in_channels, out_channels, causal=self.causal, repeat=self.repeat)


def _block(convolutions: Sequence[nn.Module], in_channels: int, out_channels: int) -> Residual:
    first, second = convolutions
    layers = [PixelNorm(in_channels), nn.SiLU(), first, PixelNorm(out_channels), nn.SiLU(), second]
    return Residual(Chain(layers), None if in_channels == out_channels else FrameConv(in_channels, out_channels, 1))


class HalveSpace(Downsample, PerFrame):
    """A 3 x 3 convolution of stride 2 within frames."""

    def look(self, pictures: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C, H / 2, W / 2]`."""
        return Downsample.forward(self, pictures)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T, H / 2, W / 2]`."""
        return PerFrame.forward(self, x)


class DoubleSpace(Upsample, PerFrame):
    """Every pixel four times, then a 3 x 3 convolution within frames."""

    def look(self, pictures: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C, 2 H, 2 W]`."""
        return Upsample.forward(self, pictures).contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T, 2 H, 2 W]`."""
        return PerFrame.forward(self, x)


class HalveTime(Windowed):
    """The mean of 3 frames mixed with a 3 x 3 x 3 convolution, by a learned share, for every other frame."""

    def __init__(self, channels: int, timing: Timing) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.window, self.repeat = (3, 2, int(timing.causal), int(not timing.causal)), timing.repeat

    def over(self, x: Tensor) -> Tensor:
        """As `Windowed.over`."""
        mean = (x[:, :, :-1:2] + x[:, :, 1::2] + x[:, :, 2::2]) / 3
        return self.conv(x).lerp(mean, self.mix_factor.sigmoid())


class _Mixed(Residual):
    """A clip mixed with a 3 x 3 x 3 convolution of it, by a learned share."""

    def __init__(self, channels: int, timing: Timing) -> None:
        super().__init__(Chain([timing.clip_conv(channels, channels)]))
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """As `Residual.join`."""
        return y.lerp(x, self.mix_factor.sigmoid())


class DoubleTime(Streamed):
    """Twice as many frames, mixed with a 3 x 3 x 3 convolution of them; `lead` as in `SmoothDouble`."""

    def __init__(self, channels: int, timing: Timing, lead: int) -> None:
        super().__init__()
        self.smooth = SmoothDouble(lead) if timing.smooth else None
        self.mixed = _Mixed(channels, timing)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, 2 T, H, W]`."""
        doubled = torch.stack([x, x], 3).flatten(2, 3) if self.smooth is None else self.smooth(x, state, last)
        return self.mixed(laid_out(doubled), state, last)


class Level(Streamed):
    """Blocks within frames and over time in turn, then what leads to the next resolution and the next frame rate."""

    def __init__(self, widths: Sequence[int], timing: Timing, space: nn.Module | None, rate: Streamed | None) -> None:
        super().__init__()
        self.frame, self.time = nn.ModuleList(), nn.ModuleList()
        for a, b in itertools.pairwise(widths):
            self.frame.append(_block([FrameConv(a, b), FrameConv(b, b)], a, b))
            self.time.append(_block([timing.frame_conv(b, b), timing.frame_conv(b, b)], b, b))
        self.space, self.rate = space, rate

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, widths[0], T, H, W]` to `[B, widths[-1], T', H', W']`."""
        for frame, time in zip(self.frame, self.time, strict=True):
            x = time(frame(x), state, last)
        x = x if self.space is None else self.space(x)
        return x if self.rate is None else self.rate(x, state, last)


def _middle(channels: int, timing: Timing) -> Chain:
    blocks = [_block([timing.clip_conv(channels, channels) for _ in range(2)], channels, channels) for _ in range(2)]
    return Chain([blocks[0], FrameAttention(PixelNorm(channels), channels), blocks[1]])


class VidTokEncoder(Streamed):
    """Clips in [-1, 1] to latents, halved in space after every level but the last.

    Args:
        dim: Of a latent.
        channels: Of the finest level.
        multipliers: Channels of each level over those of the finest, finest first.
        num_blocks: Pairs of blocks per level.
        halved: Levels, 0 being the finest, after which the frame rate is halved too.
        timing: How time is treated.
    """

    def __init__(
        self, dim: int, channels: int, multipliers: Sequence[int], num_blocks: int, halved: Sequence[int], timing: Timing
    ) -> None:
        super().__init__()
        widths = [channels, *(channels * m for m in multipliers)]
        last = len(multipliers) - 1
        self.conv_in = timing.clip_conv(3, channels)
        self.levels = Chain(
            Level(
                [before, *[width] * num_blocks],
                timing,
                HalveSpace(width) if i < last else None,
                HalveTime(width, timing) if i in halved else None,
            )
            for i, (before, width) in enumerate(itertools.pairwise(widths))
        )
        self.mid = _middle(widths[-1], timing)
        self.norm_out = PixelNorm(widths[-1])
        self.conv_out = timing.clip_conv(widths[-1], dim)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, 3, T, H, W]` to `[B, dim, t, h, w]`."""
        x = self.mid(self.levels(self.conv_in(laid_out(x), state, last), state, last), state, last)
        return self.conv_out(F.silu(self.norm_out(x)), state, last)


class VidTokDecoder(Streamed):
    """Latents to clips, about [-1, 1] but not clamped; arguments as `VidTokEncoder`. Levels are kept finest first.

    `doubled` are the levels before whose end the frame rate is doubled.
    """

    def __init__(
        self, dim: int, channels: int, multipliers: Sequence[int], num_blocks: int, doubled: Sequence[int], timing: Timing
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        leads = {level: 1 << i for i, level in enumerate(sorted(doubled, reverse=True))}
        self.conv_in = timing.clip_conv(dim, widths[-1])
        self.mid = _middle(widths[-1], timing)
        self.levels = nn.ModuleList(
            Level(
                [before, *[width] * (num_blocks + 1)],
                timing,
                DoubleSpace(width) if i else None,
                DoubleTime(width, timing, leads[i]) if i in leads else None,
            )
            for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True))
        )
        self.norm_out = PixelNorm(widths[0])
        self.conv_out = timing.clip_conv(widths[0], 3)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, dim, t, h, w]` to `[B, 3, T, H, W]`."""
        x = self.mid(self.conv_in(laid_out(x), state, last), state, last)
        for level in reversed(self.levels):
            x = level(x, state, last)
        return self.conv_out(F.silu(self.norm_out(x)), state, last)
