"""The convolutional autoencoder of latent diffusion (https://arxiv.org/abs/2112.10752), with Gaussian latents on a grid.

The graph is that of the `AutoencoderKL` of huggingface/diffusers (Apache-2.0), whose weights it loads through `DIFFUSERS`:
residual blocks at each resolution, attention at the coarsest, GroupNorm and SiLU throughout.

Shapes: B batch, C channels, H W height and width in pixels, h w of the latent grid.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each behind GroupNorm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class GridAttention(nn.Module):
    """Residual single-head attention between all cells of a grid."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C, h, w]`."""
        cells = self.norm(x).flatten(2).transpose(1, 2)[:, None]
        mixed = F.scaled_dot_product_attention(self.q(cells), self.k(cells), self.v(cells))
        return x + self.out(mixed)[:, 0].transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """The residual blocks of one resolution; `resample` is what leads to the next one."""

    def __init__(self, widths: Sequence[int], groups: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in itertools.pairwise(widths))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """`[B, widths[0], H, W]` to `[B, widths[-1], H, W]`, or half or twice the height and width."""
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Downsample(nn.Module):
    """A convolution with stride 2; the padding is on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H / 2, W / 2]`."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel four times, then a 3x3 convolution.

    Most of what that convolution reads are copies. Of the four pixels that come of one, each depends on 2 x 2 input pixels, by
    weights that are sums of the 3x3 ones; computed so, it takes 4/9 of the multiplications.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, 2 H, 2 W]`."""
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        rows = []
        for i, by_row in enumerate(_summed(self.conv.weight, 2)):
            columns = [
                F.conv2d(padded[:, :, i : i + height + 1, j : j + width + 1], kernel, self.conv.bias)
                for j, kernel in enumerate(_summed(by_row, 3))
            ]
            rows.append(torch.stack(columns, 4).flatten(3))
        return torch.stack(rows, 3).flatten(2, 3)


def _summed(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """3 weights along `dim` as 2: the first alone and the others together, then the first two together and the last alone."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


class GridEncoder(nn.Module):
    """Images to means and log variances on a grid coarser by 2 for every level but the last."""

    def __init__(self, latent_channels: int, channels: Sequence[int], num_blocks: int, groups: int) -> None:
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level([channels[max(i - 1, 0)], *[width] * num_blocks], groups, None if i == last else Downsample(width))
            for i, width in enumerate(channels)
        )
        self.mid = _middle(channels[-1], groups)
        self.norm_out = _norm(channels[-1], groups)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] to `[B, 2 C, h, w]`."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class GridDecoder(nn.Module):
    """Latents on a grid to images; the mirror of `GridEncoder`, with one block more per level."""

    def __init__(self, latent_channels: int, channels: Sequence[int], num_blocks: int, groups: int) -> None:
        super().__init__()
        widths = list(reversed(channels))
        last = len(widths) - 1
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], groups)
        self.up = nn.ModuleList(
            Level([widths[max(i - 1, 0)], *[width] * (num_blocks + 1)], groups, None if i == last else Upsample(width))
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, C, h, w]` to images `[B, 3, H, W]`, about [-1, 1] but not clamped."""
        x = self.mid(self.conv_in(self.post_quant_conv(latents)))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """The whole autoencoder; the defaults are those of Stable Diffusion, but for the channels of the latents.

    Args:
        latent_channels: Channels of the latents.
        channels: Channels of each level, finest first; all but the last halve the resolution.
        num_blocks: Residual blocks per level of the encoder.
        groups: Of every GroupNorm.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        channels: Sequence[int] = (128, 256, 512, 512),
        *,
        num_blocks: int = 2,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.encoder = GridEncoder(latent_channels, channels, num_blocks, groups)
        self.decoder = GridDecoder(latent_channels, channels, num_blocks, groups)
        # A quarter faster on CPUs. The encoder keeps the layout of the reference, and so its rounding: ids hang on it.
        self.decoder.to(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, float32 `[B, C, h, w]` each, of images `[B, 3, H, W]` in [-1, 1]."""
        mean, log_variance = self.encoder(images).float().chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]`, about [-1, 1] but not clamped, of latents `[B, C, h, w]`."""
        return self.decoder(latents)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, groups), GridAttention(channels, groups), ResidualBlock(channels, channels, groups)
    )


def _published_names(side: str, way: str, between: str) -> list[tuple[str, str]]:
    attention = f"{side}.mid_block.attentions.0."
    return [
        (f"{side}.{way}_blocks.{{}}.resnets.{{}}.conv_shortcut.", f"{side}.{way}.{{}}.blocks.{{}}.shortcut."),
        (f"{side}.{way}_blocks.{{}}.resnets.{{}}.", f"{side}.{way}.{{}}.blocks.{{}}."),
        (f"{side}.{way}_blocks.{{}}.{between}.0.conv.", f"{side}.{way}.{{}}.resample.conv."),
        (f"{side}.mid_block.resnets.0.", f"{side}.mid.0."),
        (f"{side}.mid_block.resnets.1.", f"{side}.mid.2."),
        (f"{side}.conv_norm_out.", f"{side}.norm_out."),
        (f"{attention}group_norm.", f"{side}.mid.1.norm."),
        *((f"{attention}to_{name}.", f"{side}.mid.1.{name}.") for name in ("q", "k", "v")),
        (f"{attention}to_out.0.", f"{side}.mid.1.out."),
        # Until diffusers 0.17:
        *((f"{attention}{name}.", f"{side}.mid.1.{name[0]}.") for name in ("query", "key", "value")),
        (f"{attention}proj_attn.", f"{side}.mid.1.out."),
    ]


# Prefixes of keys: those of diffusers, and ours. The first ones are those of its present releases.
DIFFUSERS_KEYS: tuple[tuple[str, str], ...] = (
    *_published_names("encoder", "down", "downsamplers"),
    *_published_names("decoder", "up", "upsamplers"),
    ("quant_conv.", "encoder.quant_conv."),
    ("post_quant_conv.", "decoder.post_quant_conv."),
)

_DEFAULTS: dict[str, Any] = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_WITHOUT_EFFECT = {"sample_size", "force_upcast", "shift_factor", "latents_mean", "latents_std"}


def arguments_from_diffusers(published: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `AutoencoderKL`, and `scaling_factor`, that a published `config.json` stands for.

    Nothing that it names is imported. `scaling_factor` is left out where the config has none. What the file says about
    the training resolution, and about shifts that the autoencoder itself never applies, is without effect here.

    Raises:
        ValueError: If it is not the config of an `AutoencoderKL`, or has a key or value of another graph.
    """
    if published.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(f"expected the config of an AutoencoderKL, got {published['_class_name']!r}")
    values = {key: value for key, value in published.items() if not key.startswith("_") and key not in _WITHOUT_EFFECT}
    for key, expected in _DEFAULTS.items():
        if (found := values.pop(key, expected)) != expected:
            raise ValueError(f"expected {key} = {expected!r}, got {found!r}: this autoencoder has another graph")
    channels = tuple(values.pop("block_out_channels", ()))
    for side, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        if list(values.pop(f"{side}_block_types", [])) != [kind] * len(channels) or not channels:
            raise ValueError(f"expected {side}_block_types to be {kind} once for each of block_out_channels = {channels}")
    arguments = {
        "latent_channels": values.pop("latent_channels", 4),
        "channels": channels,
        "num_blocks": values.pop("layers_per_block", 1),
        "groups": values.pop("norm_num_groups", 32),
    }
    scaling_factor = values.pop("scaling_factor", None)
    if values:
        raise ValueError(f"unknown keys of an AutoencoderKL's config: {', '.join(sorted(values))}")
    return arguments if scaling_factor is None else {**arguments, "scaling_factor": scaling_factor}
