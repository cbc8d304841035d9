"""KL-16: the autoencoder with 16 latent channels on a 16-times coarser grid that MAR trained for images of 256 pixels.

Paper: https://arxiv.org/abs/2406.11838; code LTH14/mar, MIT. It is latent diffusion's autoencoder with attention not only in
the middle but, in the encoder, after every residual block of the coarsest level too. Published under the key names of
CompVis/latent-diffusion, which number the decoder's levels from the finest.

Shapes: B batch, C channels, H W height and width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from tokenzoo.encoders.autoencoder_kl import AutoencoderKL, GridAttention, Level

LEVELS = 5


class AttentiveLevel(Level):
    """A coarsest level with attention after every residual block."""

    def __init__(self, widths: Sequence[int], groups: int) -> None:
        super().__init__(widths, groups, None)
        self.attention = nn.ModuleList(GridAttention(width, groups) for width in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, widths[0], H, W]` to `[B, widths[-1], H, W]`."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = attention(block(x))
        return x


class KL16(AutoencoderKL):
    """The autoencoder; arguments as those of `AutoencoderKL`, for five levels of `channels`."""

    def __init__(
        self,
        latent_channels: int = 16,
        channels: Sequence[int] = (128, 128, 256, 256, 512),
        *,
        num_blocks: int = 2,
        groups: int = 32,
    ) -> None:
        if len(channels) != LEVELS:
            raise ValueError(f"expected channels of {LEVELS} levels, got {tuple(channels)}")
        super().__init__(latent_channels, channels, num_blocks=num_blocks, groups=groups)
        self.encoder.down[-1] = AttentiveLevel([channels[-2], *[channels[-1]] * num_blocks], groups)


def _names(side: str, way: str, between: str) -> list[tuple[str, str]]:
    rules = [
        (f"{side}.mid.block_1.", f"{side}.mid.0."),
        (f"{side}.mid.attn_1.proj_out.", f"{side}.mid.1.out."),
        (f"{side}.mid.attn_1.", f"{side}.mid.1."),
        (f"{side}.mid.block_2.", f"{side}.mid.2."),
    ]
    for level in range(LEVELS):
        theirs, ours = f"{side}.{way}.{level}", f"{side}.{way}.{level if way == 'down' else LEVELS - 1 - level}"
        rules += [
            (f"{theirs}.block.{{}}.nin_shortcut.", f"{ours}.blocks.{{}}.shortcut."),
            (f"{theirs}.block.{{}}.", f"{ours}.blocks.{{}}."),
            (f"{theirs}.attn.{{}}.proj_out.", f"{ours}.attention.{{}}.out."),
            (f"{theirs}.attn.{{}}.", f"{ours}.attention.{{}}."),
            (f"{theirs}.{between}.conv.", f"{ours}.resample.conv."),
        ]
    return rules


# Prefixes of keys: those of latent diffusion, and ours.
LATENT_DIFFUSION_KEYS: tuple[tuple[str, str], ...] = (
    *_names("encoder", "down", "downsample"),
    *_names("decoder", "up", "upsample"),
    ("quant_conv.", "encoder.quant_conv."),
    ("post_quant_conv.", "decoder.post_quant_conv."),
)

# Our names of what latent diffusion holds as 1x1 convolutions, and `GridAttention` as matrices.
ATTENTION_WEIGHTS: tuple[str, ...] = tuple(
    f"{place}.{name}.weight"
    for place in ("encoder.mid.1", "decoder.mid.1", *(f"encoder.down.{LEVELS - 1}.attention.{i}" for i in range(2)))
    for name in ("q", "k", "v", "out")
)
