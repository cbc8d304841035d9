"""NVIDIA Cosmos DV: causal tokens of clips of any length and size, out of 64,000 by finite scalar quantization.

Paper: https://arxiv.org/abs/2501.03575
Reference implementation: NVIDIA/Cosmos-Tokenizer@3584ae7 and nvidia-cosmos/cosmos-predict1, Apache-2.0; weights under the
NVIDIA Open Model License.

A first frame makes a step of the grid by itself, then every 4 or 8 frames one; a still picture is a clip of one frame.

Here, unlike there: sizes and lengths that do not fit are padded by repeating the last row, column and frame, and cut back
when decoding, where the reference's networks drop frames without a word. A long clip is one causal sequence that is fed piece
by piece with carried state, where the reference cuts it into windows of 17 frames that know nothing of each other. Weights
are read out of the published TorchScript archives without executing anything in them.

Shapes: B batch, T frames, H W height and width in pixels, t h w of the token grid.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor

from tokenzoo.encoders.cosmos import CosmosDecoder, CosmosEncoder, Plan
from tokenzoo.tokenizers import TokenizerConfig
from tokenzoo.tokenizers.adapter import Adapter, State
from tokenzoo.tokenizers.video.pixels import GridVideo

LEVELS = (8, 8, 8, 5, 5, 5)


@strict
@dataclass(kw_only=True)
class CosmosConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are DV8x8x8.

    Attributes:
        frame_stride: Frames per step of the token grid.
        stride: Pixels per step of the token grid.
        patch: Side of the blocks that the wavelets turn into channels, in pixels and in frames.
        channels: Of the first convolution.
        multipliers: Channels of each level over those, finest first.
        latent_channels: Channels before the last map to the quantizer.
        levels: Of each quantized dimension.
    """

    frame_stride: int = 8
    stride: int = 8
    patch: int = 4
    channels: int = 128
    multipliers: tuple[int, ...] = (2, 4, 4)
    latent_channels: int = 16
    levels: tuple[int, ...] = LEVELS

    @property
    def plan(self) -> Plan:
        """Where the network halves and doubles."""
        space, time = (int(math.log2(n)) - int(math.log2(self.patch)) for n in (self.stride, self.frame_stride))
        return Plan(len(self.multipliers), space, time)

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and fit each other."""
        for name in ("frame_stride", "stride", "patch"):
            value = getattr(self, name)
            if value < 2 or value & (value - 1):
                raise ValueError(f"expected {name} to be a power of two from 2, got {value}")
        if min(self.channels, self.latent_channels, *self.multipliers, 1) < 1 or not self.multipliers:
            raise ValueError("expected positive channels, multipliers and latent_channels")
        if min(self.stride, self.frame_stride) < self.patch or not self.plan.is_whole():
            raise ValueError(
                f"no network of {len(self.multipliers)} levels over patches of {self.patch} has strides of {self.stride} "
                f"pixels and {self.frame_stride} frames in encoder and decoder"
            )


_BLOCK = {
    "norm1": "block.0",
    "conv1.0": "block.2",
    "conv1.1": "block.3",
    "norm2": "block.4",
    "conv2.0": "block.6",
    "conv2.1": "block.7",
    "nin_shortcut": "shortcut",
}
_ATTENTION = {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}


def _rules() -> tuple[tuple[str, str], ...]:
    """Renames of modules, once what the reference wraps every convolution and norm into is taken off."""
    rules = [("quant_conv.", "encoder.to_latents."), ("post_quant_conv.", "decoder.from_latents.")]
    for side, way, resample, parts in (
        ("encoder", "down", "downsample", {"conv1": "space.conv", "conv2": "time", "conv3": "mix"}),
        ("decoder", "up", "upsample", {"conv1": "time.conv", "conv2": "space.conv", "conv3": "mix"}),
    ):
        rules += [(f"{side}.{way}.{{}}.block.{{}}.{a}.", f"{side}.levels.{{}}.blocks.{{}}.{b}.") for a, b in _BLOCK.items()]
        rules += [(f"{side}.{way}.{{}}.{resample}.{a}.", f"{side}.levels.{{}}.resample.{b}.") for a, b in parts.items()]
        for place, name in ((0, "block_1"), (3, "block_2")):
            rules += [(f"{side}.mid.{name}.{a}.", f"{side}.mid.{place}.{b}.") for a, b in _BLOCK.items()]
        for place in (0, 1):
            rules += [(f"{side}.mid.attn_1.{place}.{a}.", f"{side}.mid.{place + 1}.{b}.") for a, b in _ATTENTION.items()]
    return tuple(rules)


_UNWRAPPED = re.compile(r"\.(conv3d|norm)(?=\.(weight|bias)$)")
_NORM = re.compile(r"(^|\.)(norm\w*)\.(weight|bias)$")
_CONVOLUTION = re.compile(r"\.(weight|bias)$")
_AVERAGED = "ema.network-"


@dataclass(frozen=True)
class CosmosAdapter(Adapter):
    """Every published convolution has three dimensions; here it has those that it uses. A training checkpoint also holds
    averaged weights, from which the published archives were made: they are read, and the others left.
    """

    def to_ours(self, published: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_ours`."""
        if any(key.startswith(_AVERAGED) for key in published):
            published = {
                key.removeprefix(_AVERAGED).replace("-", "."): tensor
                for key, tensor in published.items()
                if key.startswith(_AVERAGED)
            }
        plain = {_UNWRAPPED.sub("", key.removeprefix("network.")): tensor for key, tensor in published.items()}
        return {name: _used(tensor) for name, tensor in super().to_ours(plain).items()}

    def to_published(self, ours: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_published`."""
        published: State = {}
        for key, tensor in super().to_published(ours).items():
            if _NORM.search(key):
                published[_NORM.sub(r"\1\2.norm.\3", key)] = tensor
            else:
                whole = tensor[..., None, None] if tensor.dim() == 3 else tensor[:, :, None] if tensor.dim() == 4 else tensor
                published[_CONVOLUTION.sub(r".conv3d.\1", key)] = whole
        return published


def _used(tensor: Tensor) -> Tensor:
    """A convolution's weight `[C', C, t, h, w]` as `[C', C, t]` if it is over time only, else as `[C', C, h, w]`."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 5:
        return tensor
    return tensor.flatten(2) if tensor.shape[2] > 1 else tensor.squeeze(2)


def _layout(plan: Plan, inside: tuple[str, ...] = ()) -> CosmosAdapter:
    """The published layout of networks with this plan, some of which hold convolutions that are never called."""
    dropped = {"*patcher3d.*": "constants of the wavelets", "*quantizer.*": "constants of the quantizer"}
    for level in range(plan.levels):
        for stem, (space, time), names in (
            (f"encoder.down.{level}.downsample", plan.down(level), ("conv1", "conv2")),
            (f"decoder.up.{level}.upsample", plan.up(level), ("conv2", "conv1")),
        ):
            unused = [name for name, used in (*zip(names, (space, time), strict=True), ("conv3", space or time)) if not used]
            dropped |= {f"{stem}.{name}.*": "a convolution of a way to halve or double that is not taken" for name in unused}
    return CosmosAdapter(_rules(), dropped, inside=inside)


class Cosmos(GridVideo):
    """The tokenizer: one id per step of the grid."""

    architecture: ClassVar[str] = "cosmos"
    config_class: ClassVar[type[TokenizerConfig]] = CosmosConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "archive_4x8x8": _layout(Plan(3, 1, 0)),
        "archive_8x8x8": _layout(Plan(3, 1, 1)),
        "archive_8x16x16": _layout(Plan(3, 2, 1)),
        "training": _layout(Plan(3, 2, 1), inside=("model",)),
    }
    config: CosmosConfig

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__(config, config.levels, stride=config.stride, frame_stride=config.frame_stride, lone_first=True)
        bands = int(math.log2(config.patch))
        sizes = (config.plan, bands, config.channels, config.multipliers, config.latent_channels, len(config.levels))
        self.encoder, self.decoder = CosmosEncoder(*sizes), CosmosDecoder(*sizes)
