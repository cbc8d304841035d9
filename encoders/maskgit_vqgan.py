"""MaskGIT's VQGAN (https://arxiv.org/abs/2202.04200): a convolutional autoencoder without attention, 16 x 16 codes per image.

TiTok and One-D-Piece predict its codes and end with its decoder; its encoder gives the codes they learn from. The graph is
that of the PyTorch port in bytedance/1d-tokenizer@942a96f (Apache-2.0), which follows huggingface/open-muse; the modules have
the names of the published keys.

Two habits of the original are kept, since the weights were trained with them: residual blocks that change the width add a
1x1 convolution of their *output* to it, and drop their input; convolutions in residual blocks have no bias.

Shapes: B batch, C channels, H W height and width, D width of the codes, h w height and width of the grid of codes.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.kernels import nearest


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each behind GroupNorm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = None if in_channels == out_channels else nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Level(nn.Module):
    """The residual blocks of one resolution; going up, all but the finest level end by doubling it."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, upsample: bool = False) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_blocks]
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(widths))
        self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, out_channels, H, W]`, or twice the height and width."""
        for block in self.block:
            x = block(x)
        return x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelEncoder(nn.Module):
    """Images to vectors on a grid that is coarser by 2 for every level but the last."""

    def __init__(self, dim: int, channels: int, multipliers: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(a, b, num_blocks) for a, b in zip([channels, *widths[:-1]], widths, strict=True))
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1]) for _ in range(num_blocks))
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] to `[B, D, h, w]`."""
        x = self.conv_in(images)
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else F.avg_pool2d(x, 2))
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PixelDecoder(nn.Module):
    """Vectors on a grid to images; the mirror of `PixelEncoder`."""

    def __init__(self, dim: int, channels: int, multipliers: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1]) for _ in range(num_blocks))
        above = zip([*widths[1:], widths[-1]], widths, strict=True)
        self.up = nn.ModuleList(Level(a, b, num_blocks, upsample=i > 0) for i, (a, b) in enumerate(above))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, h, w]` to images `[B, 3, H, W]`, about [0, 1] but not clamped."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskGITVQGAN(nn.Module):
    """The whole autoencoder, with 1,024 codes of width 256 and images of 256 pixels as published.

    Published weights: `maskgit-vqgan-imagenet-f16-256.bin` of `fun-research/TiTok` on the Hugging Face Hub, whose
    `quantize.embedding.weight` is our `codebook`.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 1024,
        dim: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = PixelEncoder(dim, channels, multipliers, num_blocks)
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        self.decoder = PixelDecoder(dim, channels, multipliers, num_blocks)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids int64 `[B, h, w]` of images `[B, 3, H, W]` in [0, 1]: the proxy codes that TiTok's first stage learns."""
        return nearest(self.encoder(images).permute(0, 2, 3, 1), self.codebook)

    def decode(self, ids: Tensor) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped, of ids `[B, h, w]`."""
        return self.decoder(F.embedding(ids, self.codebook).permute(0, 3, 1, 2))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)
