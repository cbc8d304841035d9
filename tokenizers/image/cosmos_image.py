"""NVIDIA Cosmos DI: one id out of 64,000 for every 8 x 8 or 16 x 16 pixels of a picture of any size.

Paper: https://arxiv.org/abs/2501.03575
Reference implementation: NVIDIA/Cosmos-Tokenizer@3584ae7 and nvidia-cosmos/cosmos-predict1, Apache-2.0; weights under the
NVIDIA Open Model License.

Haar wavelets turn blocks of pixels into channels; then come residual blocks at each resolution, attention at the coarsest, and
finite scalar quantization. Here, unlike there: sizes that do not fit are padded by repeating the last row and column, where
the reference's command line puts black around the picture. Weights are read out of the published TorchScript archives
without executing anything in them.

Shapes: B batch, H W height and width in pixels, h w of the token grid.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.autoencoder_kl import Downsample, GridAttention, Level, ResidualBlock, Upsample
from tokenzoo.encoders.haar import PICTURE_AXES, inverse, transform
from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.images import Images, read_image
from tokenzoo.tokenizers.quality import psnr
from tokenzoo.tokenizers.quantizers import FiniteScalarQuantizer
from tokenzoo.tokenizers.spec import Modality

GROUPS = 32


@strict
@dataclass(kw_only=True)
class CosmosImageConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are DI8x8.

    Attributes:
        stride: Pixels per step of the token grid.
        patch: Side of the blocks that the wavelets turn into channels, in pixels.
        channels: Of the first convolution.
        multipliers: Channels of each level over those, finest first.
        num_blocks: Residual blocks per level of the encoder; the decoder has one more.
        latent_channels: Channels before the last map to the quantizer.
        levels: Of each quantized dimension.
    """

    stride: int = 8
    patch: int = 4
    channels: int = 128
    multipliers: tuple[int, ...] = (2, 4, 4)
    num_blocks: int = 2
    latent_channels: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    @property
    def halvings(self) -> int:
        """Levels that halve height and width, beyond the wavelets."""
        return int(math.log2(self.stride)) - int(math.log2(self.patch))

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and fit each other."""
        for name in ("stride", "patch"):
            value = getattr(self, name)
            if value < 2 or value & (value - 1):
                raise ValueError(f"expected {name} to be a power of two from 2, got {value}")
        if not 0 <= self.halvings <= len(self.multipliers):
            raise ValueError(f"no {len(self.multipliers)} levels over patches of {self.patch} have a stride of {self.stride}")
        if min(self.latent_channels, self.num_blocks, *self.multipliers, 1) < 1 or not self.multipliers:
            raise ValueError("expected positive multipliers, num_blocks and latent_channels")
        if self.channels < 1 or self.channels % GROUPS:
            raise ValueError(f"expected channels to be a multiple of {GROUPS}, got {self.channels}")


@dataclass(frozen=True)
class PaddedImages:
    """Pictures at their own size, the last row and column repeated until `stride` divides height and width."""

    stride: int

    def items(self, media: Any) -> Sequence[Any]:
        """As `Images.items`."""
        return Images(self.stride).items(media)

    def read(self, item: Any) -> tuple[Tensor, dict[str, Any]]:
        """One picture as float32 `[3, H, W]` in [0, 1]. Raises `MediaError`."""
        picture = read_image(item)
        if isinstance(picture, Image.Image):
            picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)
        height, width = picture.shape[1:]
        padded = F.pad(picture, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        return padded.contiguous(), {"size": [height, width], "source_size": [height, width]}

    def restore(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> Tensor:
        """A reconstruction cut to the original's size, in [0, 1]."""
        height, width = meta.get("size", reconstruction.shape[1:])
        return reconstruction[:, : int(height), : int(width)].clamp(0, 1)


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, GROUPS), GridAttention(channels, GROUPS), ResidualBlock(channels, channels, GROUPS)
    )


class _Encoder(nn.Module):
    def __init__(self, config: CosmosImageConfig) -> None:
        super().__init__()
        widths = [config.channels, *(config.channels * m for m in config.multipliers)]
        self.bands = int(math.log2(config.patch))
        self.conv_in = nn.Conv2d(3 * 4**self.bands, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level([before, *[width] * config.num_blocks], GROUPS, Downsample(width) if i < config.halvings else None)
            for i, (before, width) in enumerate(itertools.pairwise(widths))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.latent_channels, len(config.levels), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(transform(x, PICTURE_AXES, self.bands))
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class _Decoder(nn.Module):
    """Levels are kept finest first, and run the other way."""

    def __init__(self, config: CosmosImageConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        first = len(widths) - config.halvings
        self.bands = int(math.log2(config.patch))
        self.post_quant_conv = nn.Conv2d(len(config.levels), config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        self.up = nn.ModuleList(
            Level([before, *[width] * (config.num_blocks + 1)], GROUPS, Upsample(width) if i >= first else None)
            for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True))
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * 4**self.bands, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(x)))
        for level in reversed(self.up):
            x = level(x)
        return inverse(self.conv_out(F.silu(self.norm_out(x))), PICTURE_AXES, self.bands)


def _rules() -> tuple[tuple[str, str], ...]:
    rules = [("quant_conv.", "encoder.quant_conv."), ("post_quant_conv.", "decoder.post_quant_conv.")]
    for side, way, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        rules += [
            (f"{side}.{way}.{{}}.block.{{}}.nin_shortcut.", f"{side}.{way}.{{}}.blocks.{{}}.shortcut."),
            (f"{side}.{way}.{{}}.block.{{}}.", f"{side}.{way}.{{}}.blocks.{{}}."),
            (f"{side}.{way}.{{}}.{resample}.", f"{side}.{way}.{{}}.resample."),
            (f"{side}.mid.block_1.", f"{side}.mid.0."),
            (f"{side}.mid.block_2.", f"{side}.mid.2."),
            (f"{side}.mid.attn_1.proj_out.", f"{side}.mid.1.out."),
            (f"{side}.mid.attn_1.", f"{side}.mid.1."),
        ]
    return tuple(rules)


class CosmosImage(Tokenizer):
    """The tokenizer. `Tokens.extras["grid"]` holds height and width of the grid that the ids fill row by row.

    Attributes:
        extra_losses: Further terms of `objective`, of `(reconstruction, original)`, such as a perceptual network of yours.
    """

    architecture: ClassVar[str] = "cosmos_image"
    modality: ClassVar[Modality] = "image"
    config_class: ClassVar[type[TokenizerConfig]] = CosmosImageConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "archive": Adapter(
            _rules(),
            {"*patcher.*": "constants of the wavelets", "*quantizer.*": "constants of the quantizer"},
            tuple(f"{side}.mid.1.{name}.weight" for side in ("encoder", "decoder") for name in ("q", "k", "v", "out")),
        )
    }
    config: CosmosImageConfig

    def __init__(self, config: CosmosImageConfig) -> None:
        super().__init__(config, PaddedImages(config.stride))
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quantizer = FiniteScalarQuantizer(config.levels)
        self.extra_losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.quantizer.size,)}

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length, seed
        ids = self.quantizer.ids(self.encoder(batch * 2 - 1).movedim(1, -1))
        grid = torch.tensor(ids.shape[1:], device=ids.device).expand(len(ids), -1)
        return Codes(ids.flatten(1).unsqueeze(1), None, {"grid": grid})

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        grid = extras.get("grid")
        if grid is None or grid.dim() != 2 or grid.shape[1] != 2:
            got = "none" if grid is None else tuple(grid.shape)
            raise TokensError(f"expected extras['grid'] of shape (B, 2), height and width of each item's grid, got {got}")
        height, width = grid[0].tolist()
        if min(height, width) < 1 or height * width != int(lengths[0, 0]):
            raise TokensError(f"expected a grid of {int(lengths[0, 0])} ids, got extras['grid'] = {[height, width]}")
        codes = self.quantizer.lookup(ids[:, 0, : height * width].unflatten(1, (height, width)))
        return (self.decoder(codes.to(self.dtype).movedim(-1, 1)) + 1) / 2

    def _decode_groups(self, tokens: Tokens) -> Iterable[list[int]]:
        """Items with equal lengths and grids."""
        grids = tokens.extras.get("grid")
        for group in super()._decode_groups(tokens):
            rows = [() for _ in group] if grids is None else [tuple(row) for row in grids[group].tolist()]
            for row in dict.fromkeys(rows):
                yield [index for index, other in zip(group, rows, strict=True) if other == row]

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Absolute error of the pixels, and `extra_losses`, on pictures `[B, 3, H, W]` in [0, 1]."""
        del progress, generator
        latents = self.encoder(batch * 2 - 1)
        found = self.quantizer(latents.movedim(1, -1).float())
        reconstruction = (self.decoder(found.vectors.to(latents.dtype).movedim(-1, 1)) + 1) / 2
        losses = {"pixels": (reconstruction.float() - batch.float()).abs().mean()}
        losses |= {name: loss(reconstruction, batch) for name, loss in self.extra_losses.items()}
        with torch.no_grad():
            quality = psnr(reconstruction.clamp(0, 1), batch).mean()
        return Output(reconstruction, losses, {"psnr": quality})
