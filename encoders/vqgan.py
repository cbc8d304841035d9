"""VQGAN's convolutional networks without attention (https://arxiv.org/abs/2012.09841), in GigaTok's variant.

The encoder halves with strided convolutions. The decoder doubles with a convolution and depth-to-space, and before every
level it scales and shifts normalised channels by the spread and the mean of its input, as in MAGVIT-v2
(https://arxiv.org/abs/2310.05737). The graph is that of zfu006/ReTok@ffaa8a7, which follows SilentView/GigaTok.

Shapes: B batch, C channels, D width of the features, H W height and width, h w height and width of the grid.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.autoencoder_kl import Downsample, Level, ResidualBlock

GROUPS, EPSILON = 32, 1e-6


class Double(nn.Module):
    """A 3x3 convolution to four times the channels, dealt out to blocks of 2 x 2 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, 2 H, 2 W]`; the place in the block is the slow part of the channels."""
        batch, channels, height, width = x.shape
        blocks = self.conv(x).view(batch, 2, 2, channels, height, width)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels, 2 * height, 2 * width)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and shift are read off a style: the spread and the mean of each of its channels."""

    def __init__(self, style_channels: int, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(style_channels, channels)
        self.beta = nn.Linear(style_channels, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """`[B, C, H, W]` and the style `[B, D, h, w]` to `[B, C, H, W]`."""
        cells = style.flatten(2)
        scale = self.gamma((cells.var(2) + EPSILON).sqrt())
        shift = self.beta(cells.mean(2))
        return F.group_norm(x, GROUPS, eps=EPSILON) * scale[..., None, None] + shift[..., None, None]


class ConvEncoder(nn.Module):
    """Images to features on a grid that is coarser by 2 for every level but the last.

    Args:
        dim: D.
        channels: Of the finest level.
        multipliers: Channels of each level over those of the finest, finest first.
        num_blocks: Residual blocks per level.
    """

    def __init__(self, dim: int, channels: int, multipliers: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level([before, *[width] * num_blocks], GROUPS, Downsample(width) if i < last else None)
            for i, (before, width) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], GROUPS) for _ in range(2))
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], dim, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] to `[B, D, h, w]`."""
        x = self.conv_in(images)
        for layer in (*self.levels, *self.mid):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class StyledDecoder(nn.Module):
    """Features on a grid to images, every level normalised in the style of the features. Arguments as `ConvEncoder`.

    Levels are kept in the order they run in, coarsest first, and have one residual block more.
    """

    def __init__(self, dim: int, channels: int, multipliers: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(dim, widths[0], 3, padding=1)
        self.mid = nn.ModuleList(ResidualBlock(widths[0], widths[0], GROUPS) for _ in range(2))
        pairs = list(zip([widths[0], *widths], widths, strict=False))
        self.styles = nn.ModuleList(AdaptiveGroupNorm(dim, before) for before, _ in pairs)
        self.levels = nn.ModuleList(
            Level([before, *[width] * (num_blocks + 1)], GROUPS, Double(width) if i < last else None)
            for i, (before, width) in enumerate(pairs)
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """`[B, D, h, w]` to images `[B, 3, H, W]`, about [-1, 1] but not clamped."""
        x = self.conv_in(features)
        for block in self.mid:
            x = block(x)
        for style, level in zip(self.styles, self.levels, strict=True):
            x = level(style(x, features))
        return self.conv_out(F.silu(self.norm_out(x)))
