"""`Refiner`: a small conditioned U-Net that turns a coarse image into the one expected behind it.

Plain residual convolutions (no normalisation: the scale of an image is part of what is restored, as in EDSR,
https://arxiv.org/abs/1707.02921) at 1/2 and 1/4 of the resolution, a transformer at 1/8, skip connections between. The
output convolution starts at zero, so an untrained refiner is the identity.

Shapes: B batch, C channels, H W pixels, E width of the condition, L positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a SiLU, scaled and shifted by the condition (FiLM, https://arxiv.org/abs/1709.07871)."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = _zero(nn.Linear(condition_dim, 2 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`[B, C, H, W]` and `[B, E]` to `[B, C, H, W]`."""
        scale, shift = self.modulation(condition)[..., None, None].chunk(2, 1)
        return x + self.conv2(F.silu(self.conv1(x) * (1 + scale) + shift))


class AttentionBlock(nn.Module):
    """A pre-norm transformer block whose normalised inputs are scaled and shifted by the condition."""

    def __init__(self, dim: int, heads: int, condition_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 3 * dim)
        self.down = nn.Linear(3 * dim, dim)
        self.modulation = _zero(nn.Linear(condition_dim, 4 * dim))

    def forward(self, x_BLD: Tensor, condition: Tensor) -> Tensor:
        """`[B, L, D]` and `[B, E]` to `[B, L, D]`."""
        scale1, shift1, scale2, shift2 = self.modulation(condition)[:, None].chunk(4, -1)
        y = F.layer_norm(x_BLD, x_BLD.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
        x_BLD = x_BLD + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x_BLD, x_BLD.shape[-1:]) * (1 + scale2) + shift2
        return x_BLD + self.down(F.gelu(self.up(y)))


class Refiner(nn.Module):
    """Image and condition to a better image.

    Args:
        image_size: Height and width of the images, a multiple of 8.
        width: Channels at half resolution; twice as many at a quarter, four times as many at an eighth.
        blocks: Residual blocks per resolution and side, and half the number of attention blocks.
        heads: Attention heads.
        condition_dim: E.
    """

    def __init__(self, image_size: int, *, width: int, blocks: int, heads: int, condition_dim: int) -> None:
        super().__init__()
        wide, widest, self.side = 2 * width, 4 * width, image_size // 8

        def stack(channels: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(channels, condition_dim) for _ in range(blocks))

        self.stem = nn.Conv2d(12, width, 3, padding=1)
        self.half_in, self.quarter_in = stack(width), stack(wide)
        self.down1 = nn.Conv2d(width, wide, 2, stride=2)
        self.down2 = nn.Conv2d(wide, widest, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.side**2, widest))
        self.attention = nn.ModuleList(AttentionBlock(widest, heads, condition_dim) for _ in range(2 * blocks))
        self.up2 = nn.Conv2d(widest, 4 * wide, 1)
        self.up1 = nn.Conv2d(wide, 4 * width, 1)
        self.quarter_out, self.half_out = stack(wide), stack(width)
        self.head = _zero(nn.Conv2d(width, 12, 3, padding=1))

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1] and `[B, E]` to `[B, 3, H, W]`, not clamped."""
        half = self.stem(F.pixel_unshuffle(2 * images - 1, 2).contiguous(memory_format=torch.channels_last))
        half = _through(self.half_in, half, condition)
        quarter = _through(self.quarter_in, self.down1(half), condition)
        eighth = self.down2(quarter)
        x_BLD = eighth.flatten(2).transpose(1, 2) + self.positions
        for block in self.attention:
            x_BLD = block(x_BLD, condition)
        eighth = x_BLD.transpose(1, 2).unflatten(2, (self.side, self.side))
        quarter = _through(self.quarter_out, quarter + F.pixel_shuffle(self.up2(eighth), 2), condition)
        half = _through(self.half_out, half + F.pixel_shuffle(self.up1(quarter), 2), condition)
        return images + F.pixel_shuffle(self.head(half), 2).to(images.dtype)


def _through(blocks: nn.ModuleList, x: Tensor, condition: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, condition)
    return x


def _zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer with zero weights and biases."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
