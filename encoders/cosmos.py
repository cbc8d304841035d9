"""The causal video network of NVIDIA Cosmos: Haar wavelets, and convolutions factorised into space and time.

Paper: https://arxiv.org/abs/2501.03575. Every convolution is one within frames followed by one over time, which sees no later
frame; before the first frame stand copies of it. Normalisation is within a frame. So nothing depends on the future, and a
clip can be fed piece by piece.

Shapes: B batch, C channels, T frames, H W height and width in pixels, t h w of the latent grid.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.causal_conv3d import (
    FrameAttention,
    FrameConv,
    FrameNorm,
    PerFrame,
    Residual,
    TimeAttention,
    TimeConv,
    Windowed,
    laid_out,
    over_time,
)
from tokenzoo.encoders.haar import BandsToClip, ClipToBands
from tokenzoo.encoders.streaming import Chain, State, Streamed

LEVEL_BLOCKS = 2


@dataclass(frozen=True)
class Plan:
    """Where the network halves and doubles: numbers of levels at which space and time are, beyond the wavelets.

    Attributes:
        levels: Of the network.
        space: Halvings of height and width.
        time: Halvings of the frame rate.
    """

    levels: int
    space: int
    time: int

    def down(self, level: int) -> tuple[bool, bool]:
        """Whether the encoder halves space and time after a level, 0 being the finest."""
        inner = level < self.levels - 1
        return inner and level < self.space, inner and level < self.time

    def up(self, level: int) -> tuple[bool, bool]:
        """Whether the decoder doubles space and time after a level; time is never doubled at the coarsest."""
        done = self.levels - 1 - level
        time = level > 0 and 0 < done <= self.time
        return time or (level > 0 and done < self.space and self.space > self.time), time

    def is_whole(self) -> bool:
        """Whether encoder and decoder halve and double as often as they should."""
        ways = [[side(level) for level in range(self.levels)] for side in (self.down, self.up)]
        return all((sum(s for s, _ in way), sum(t for _, t in way)) == (self.space, self.time) for way in ways)


def split_conv(in_channels: int, out_channels: int) -> list[nn.Module]:
    """A 3 x 3 convolution within frames, and one of 3 frames over time."""
    return [FrameConv(in_channels, out_channels), TimeConv(out_channels, out_channels)]


def residual_block(in_channels: int, out_channels: int) -> Residual:
    """Two factorised convolutions, each behind normalisation and SiLU."""
    layers: list[nn.Module] = []
    for before, width in ((in_channels, out_channels), (out_channels, out_channels)):
        layers += [FrameNorm(before), nn.SiLU(), *split_conv(before, width)]
    return Residual(Chain(layers), None if in_channels == out_channels else FrameConv(in_channels, out_channels, 1))


class HalveSpace(PerFrame):
    """A 3 x 3 convolution of stride 2 plus the mean of 2 x 2 pixels, padded with zeros below and on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def look(self, pictures: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C, H / 2, W / 2]`."""
        return self.conv(F.pad(pictures, (0, 1, 0, 1))) + F.avg_pool2d(pictures, 2)


class HalveTime(nn.Conv1d, Windowed):
    """A convolution of 3 frames and stride 2 plus the mean of the last two of them; the first frame stands by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)
        self.window, self.repeat = (3, 2, 2, 0), True

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, 1 + 2 k, H, W]` to `[B, C, 1 + k, H, W]`."""
        return Windowed.forward(self, x, state, last)

    def over(self, x: Tensor) -> Tensor:
        """As `Windowed.over`."""
        return over_time(x, self.weight, self.bias, 2) + (x[:, :, 1::2] + x[:, :, 2::2]) * 0.5


class DoubleTime(Streamed):
    """Every frame twice but the first, plus a convolution of the result over time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = TimeConv(channels, channels)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, 1 + k, H, W]` to `[B, C, 1 + 2 k, H, W]`; later pieces k to 2 k."""
        begun = state is not None and state.pop(self, False)
        if state is not None and not last:
            state[self] = True
        x = torch.stack([x, x], 3).flatten(2, 3)
        x = laid_out(x if begun else x[:, :, 1:])
        return x + self.conv(x, state, last)


class DoubleSpace(PerFrame):
    """Every pixel four times, plus a 3 x 3 convolution of the result."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def look(self, pictures: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C, 2 H, 2 W]`."""
        pictures = F.interpolate(pictures, scale_factor=2, mode="nearest")
        return pictures + self.conv(pictures)


class Level(Streamed):
    """The residual blocks of one resolution, and what leads to the next."""

    def __init__(self, widths: Sequence[int], resample: dict[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = Chain(residual_block(a, b) for a, b in itertools.pairwise(widths))
        if resample:
            resample["mix"] = FrameConv(widths[-1], widths[-1], 1)
        self.resample = nn.ModuleDict(resample)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, widths[0], T, H, W]` to `[B, widths[-1], T', H', W']`."""
        x = self.blocks(x, state, last)
        for layer in self.resample.values():
            x = layer(x, state, last) if isinstance(layer, Streamed) else layer(x)
        return x


def middle(channels: int) -> Chain:
    """Residual blocks around attention within frames and over time."""
    return Chain(
        [
            residual_block(channels, channels),
            FrameAttention(FrameNorm(channels), channels),
            TimeAttention(FrameNorm(channels), channels),
            residual_block(channels, channels),
        ]
    )


class CosmosEncoder(Streamed):
    """Clips in [-1, 1] to latents.

    Args:
        plan: Where the network halves.
        bands: Wavelet levels.
        channels: Of the first convolution.
        multipliers: Channels of each level over those, finest first.
        latent_channels: After the last convolution.
        dim: Of a latent.
    """

    def __init__(
        self, plan: Plan, bands: int, channels: int, multipliers: Sequence[int], latent_channels: int, dim: int
    ) -> None:
        super().__init__()
        widths = [channels, *(channels * m for m in multipliers)]
        self.bands = ClipToBands(bands)
        self.conv_in = Chain(split_conv(3 * 8**bands, channels))
        self.levels = Chain(
            Level([before, *[width] * LEVEL_BLOCKS], _halving(plan.down(i), width))
            for i, (before, width) in enumerate(itertools.pairwise(widths))
        )
        self.mid = middle(widths[-1])
        self.norm_out = FrameNorm(widths[-1])
        self.conv_out = Chain(split_conv(widths[-1], latent_channels))
        self.to_latents = FrameConv(latent_channels, dim, 1)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, 3, T, H, W]` to `[B, dim, t, h, w]`."""
        x = self.conv_in(laid_out(self.bands(x, state, last)), state, last)
        x = self.mid(self.levels(x, state, last), state, last)
        return self.to_latents(self.conv_out(F.silu(self.norm_out(x)), state, last))


class CosmosDecoder(Streamed):
    """Latents to clips, about [-1, 1] but not clamped; arguments as `CosmosEncoder`. Levels are kept finest first."""

    def __init__(
        self, plan: Plan, bands: int, channels: int, multipliers: Sequence[int], latent_channels: int, dim: int
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.from_latents = FrameConv(dim, latent_channels, 1)
        self.conv_in = Chain(split_conv(latent_channels, widths[-1]))
        self.mid = middle(widths[-1])
        self.levels = nn.ModuleList(
            Level([before, *[width] * (LEVEL_BLOCKS + 1)], _doubling(plan.up(i), width))
            for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True))
        )
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = Chain(split_conv(widths[0], 3 * 8**bands))
        self.bands = BandsToClip(bands)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, dim, t, h, w]` to `[B, 3, T, H, W]`."""
        x = self.mid(self.conv_in(self.from_latents(laid_out(x)), state, last), state, last)
        for level in reversed(self.levels):
            x = level(x, state, last)
        return self.bands(self.conv_out(F.silu(self.norm_out(x)), state, last), state, last)


def _halving(at: tuple[bool, bool], channels: int) -> dict[str, nn.Module]:
    space, time = at
    return {**({"space": HalveSpace(channels)} if space else {}), **({"time": HalveTime(channels)} if time else {})}


def _doubling(at: tuple[bool, bool], channels: int) -> dict[str, nn.Module]:
    space, time = at
    return {**({"time": DoubleTime(channels)} if time else {}), **({"space": DoubleSpace(channels)} if space else {})}
