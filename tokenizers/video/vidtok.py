"""VidTok with finite scalar quantization: causal or not, 4 or 8 frames and 8 or 16 pixels a step.

Paper: https://arxiv.org/abs/2412.13061
Reference implementation: microsoft/VidTok@d6ad92d, MIT.

* v1.0, causal: one frame, then 4 a step. Zeros stand before the first frame.
* v1.0, not causal: 4 frames a step.
* v1.1, causal: 4 or 8 frames a step, of clips of any length: copies of the first frame fill the first step. Decoding
  interpolates between frames, and so looks one step ahead.

Here, unlike there: sizes that do not fit are padded by repeating the last row and column, as is the last frame for v1.0, and
cut back when decoding, where v1.0 drops frames. Long clips are fed piece by piece with explicit state, all three kinds of
them, and get the ids of the whole.

Shapes: B batch, T frames, H W height and width in pixels, t h w of the token grid, D width of the latents.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor

from tokenzoo.encoders.vidtok import Timing, VidTokDecoder, VidTokEncoder
from tokenzoo.tokenizers import TokenizerConfig
from tokenzoo.tokenizers.adapter import Adapter, State
from tokenzoo.tokenizers.clips import Video
from tokenzoo.tokenizers.video.pixels import GridVideo


@strict
@dataclass(kw_only=True)
class VidTokConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are the causal model of v1.0 with 262,144 codes.

    Attributes:
        version: Of the family, as the module's docstring has it.
        causal: Whether no frame depends on later ones; v1.1 always is.
        channels: Of the finest level.
        multipliers: Channels of each level over those of the finest, finest first; all but the last halve height and width.
        num_blocks: Pairs of blocks per level of the encoder; the decoder has one more.
        halved: Levels of the encoder, 0 being the finest, after which the frame rate is halved.
        doubled: Levels of the decoder after which it is doubled.
        levels: Of each quantized dimension.
        commitment: Weight of the squared distance of latents to their codes.
    """

    version: Literal["v1.0", "v1.1"] = "v1.0"
    causal: bool = True
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_blocks: int = 2
    halved: tuple[int, ...] = (1, 2)
    doubled: tuple[int, ...] = (1, 2)
    levels: tuple[int, ...] = (8, 8, 8, 8, 8, 8)
    commitment: float = 0.25

    @property
    def stride(self) -> int:
        """Pixels per step of the token grid."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def frame_stride(self) -> int:
        """Frames per step of the token grid."""
        return 1 << len(self.halved)

    @property
    def timing(self) -> Timing:
        """How the networks treat time."""
        newer = self.version == "v1.1"
        return Timing(causal=self.causal, repeat=newer, smooth=newer)

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and fit each other."""
        if len(self.multipliers) < 2 or min(self.channels, self.num_blocks, *self.multipliers) < 1:
            raise ValueError("expected at least two levels, and positive channels, multipliers and num_blocks")
        inner = range(len(self.multipliers) - 1)
        if len(set(self.halved)) < len(self.halved) or not set(self.halved) <= set(inner):
            raise ValueError(f"expected halved levels out of {list(inner)}, each once, got {self.halved}")
        if len(set(self.doubled)) < len(self.doubled) or not {level - 1 for level in self.doubled} <= set(inner):
            raise ValueError(f"expected doubled levels out of {[level + 1 for level in inner]}, each once, got {self.doubled}")
        if len(self.halved) != len(self.doubled):
            raise ValueError(f"expected as many halved as doubled levels, got {self.halved} and {self.doubled}")
        if self.version == "v1.1" and not self.causal:
            raise ValueError("expected causal=True: there is no other v1.1")


class EndingVideo(Video):
    """Clips whose reconstructions begin with frames that were put before them."""

    def restore(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> Tensor:
        """As `Video.restore`, keeping the last frames."""
        surplus = len(reconstruction) - int(meta.get("frames", len(reconstruction)))
        return super().restore(reconstruction[surplus:], meta)


_PARTS = {
    "norm1": "block.0",
    "conv1": "block.2",
    "norm2": "block.3",
    "conv2": "block.5",
    "nin_shortcut": "shortcut",
}
_ATTENTION = {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}


def _rules() -> tuple[tuple[str, str], ...]:
    """Renames of modules, once what the reference wraps some convolutions and every norm into is taken off."""
    rules = []
    for side, way, resample, rate in (
        ("encoder", "down", "downsample", "rate.conv"),
        ("decoder", "up", "upsample", "rate.mixed.block.0"),
    ):
        for published, ours in ((way, "frame"), (f"{way}_temporal", "time")):
            stems = f"{side}.{published}.{{}}.block.{{}}.", f"{side}.levels.{{}}.{ours}.{{}}."
            rules += [(f"{stems[0]}{a}.", f"{stems[1]}{b}.") for a, b in _PARTS.items()]
        mix = rate.removesuffix("conv").removesuffix("block.0")
        rules += [
            (f"{side}.{way}.{{}}.{resample}.conv.", f"{side}.levels.{{}}.space.conv."),
            (f"{side}.{way}_temporal.{{}}.{resample}.conv.", f"{side}.levels.{{}}.{rate}."),
            (f"{side}.{way}_temporal.{{}}.{resample}.mix_factor", f"{side}.levels.{{}}.{mix}mix_factor"),
        ]
        for place, name in ((0, "block_1"), (2, "block_2")):
            rules += [(f"{side}.mid.{name}.{a}.", f"{side}.mid.{place}.{b}.") for a, b in _PARTS.items()]
        rules += [(f"{side}.mid.attn_1.{a}.", f"{side}.mid.1.{b}.") for a, b in _ATTENTION.items()]
    return tuple(rules)


_NORM = re.compile(r"(norm\w*)\.(weight|bias)$")
_WRAPPED_NORM = re.compile(r"(norm\w*)\.norm\.(weight|bias)$")


@dataclass(frozen=True)
class VidTokAdapter(Adapter):
    """Norms, and in causal networks all convolutions that see several frames, are published in a wrapper.

    Attributes:
        causal: Whether those convolutions are.
    """

    causal: bool = True

    def to_ours(self, published: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_ours`."""
        plain = {}
        for key, tensor in published.items():
            name = _WRAPPED_NORM.sub(r"\1.\2", key)
            if self.causal and _sees_time(name):
                name = re.sub(r"\.conv\.(weight|bias)$", r".\1", name)
            plain[name] = tensor.flatten(2)[..., None] if _is_pointwise(name) and tensor.dim() == 5 else tensor
        return super().to_ours(plain)

    def to_published(self, ours: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_published`."""
        published: State = {}
        for key, tensor in super().to_published(ours).items():
            name = _NORM.sub(r"\1.norm.\2", key)
            if self.causal and _sees_time(name) and ".norm." not in name and not name.endswith("mix_factor"):
                name = re.sub(r"\.(weight|bias)$", r".conv.\1", name)
            published[name] = tensor[..., None] if _is_pointwise(key) and tensor.dim() == 4 else tensor
        return published


def _sees_time(key: str) -> bool:
    """Whether a published key is of a convolution over several frames, or of its middle's attention."""
    return bool(re.match(r"(en|de)coder\.(\w+_temporal|mid|conv_in|conv_out)\.", key))


def _is_pointwise(key: str) -> bool:
    """Whether a published key is a map of attention, a convolution of one pixel of one frame."""
    return bool(re.search(r"\.attn_1\.(q|k|v|proj_out)\.(conv\.)?weight$", key))


_DROPPED = {
    "loss.*": "discriminator and perceptual network, used in training only",
    "regularization.*": "constants of the quantizer",
    "model_ema.*": "averages kept by training",
}


class VidTok(GridVideo):
    """The tokenizer: one id per step of the grid."""

    architecture: ClassVar[str] = "vidtok"
    config_class: ClassVar[type[TokenizerConfig]] = VidTokConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "causal": VidTokAdapter(_rules(), _DROPPED, inside=("state_dict",)),
        "noncausal": VidTokAdapter(_rules(), _DROPPED, inside=("state_dict",), causal=False),
    }
    config: VidTokConfig

    def __init__(self, config: VidTokConfig) -> None:
        older = config.version == "v1.0"
        super().__init__(
            config, config.levels, stride=config.stride, frame_stride=config.frame_stride, lone_first=config.causal
        )
        if not older:
            self.media = EndingVideo(fit="pad", stride=config.stride)
        self.surplus = config.frame_stride - 1 if older and config.causal else 0
        sizes = (len(config.levels), config.channels, config.multipliers, config.num_blocks)
        self.encoder = VidTokEncoder(*sizes, config.halved, config.timing)
        self.decoder = VidTokDecoder(*sizes, config.doubled, config.timing)

    def _missing(self, num_frames: int) -> int:
        return -num_frames % self.frame_stride

    def _latent_losses(self, latents: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """The commitment loss; the entropy loss of the published recipe needs a matrix of latents by codes, and is left out."""
        return {"commitment": self.config.commitment * (latents - codes.detach()).square().mean()}
