"""Mimi: speech at 12.5 frames per second, the first code of a frame for what is said and the others for how it sounds.

Paper: https://arxiv.org/abs/2410.00037
Reference implementations: kyutai-labs/moshi@e6a55d2, MIT and Apache-2.0; `MimiModel` of transformers 5.23. Weights CC-BY-4.0.

24 kHz mono, causal. A SEANet at 25 Hz, a transformer with a context of ten seconds, a convolution to 12.5 Hz; the decoder is
the mirror image. Two quantizers hear the same latents: a semantic one with one stage and an acoustic one with 31; what
they look up is added. `encode(length=k)` keeps the semantic and the first k - 1 acoustic codes.

Here as in moshi a recording is filled with zeros to whole frames of 1,920 samples. transformers instead fills every layer,
which can give the last frame other codes where the recording ends within it.

Shapes: B batch, S samples, D width of the latents, T frames, K codebooks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from tokenzoo.encoders.causal_transformer import CausalTransformer
from tokenzoo.encoders.seanet import SEANet
from tokenzoo.encoders.streaming import Chain, Conv1d, ConvTranspose1d
from tokenzoo.tokenizers import TokenizerConfig
from tokenzoo.tokenizers.adapter import Adapter, State
from tokenzoo.tokenizers.audio.codec import Codec
from tokenzoo.tokenizers.audio.published import seanet_rules
from tokenzoo.tokenizers.quantizers import Quantized, ResidualQuantizer

_HEADS = 8


@strict
@dataclass(kw_only=True)
class MimiConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are the published one.

    Attributes:
        sample_rate: In Hz.
        ratios: Strides of the convolutional decoder.
        stride: Of the convolution between the transformer and the quantizers.
        filters: Channels at the sample rate.
        dim: Width of the latents.
        layers: Blocks of each transformer.
        hidden_dim: Width between the two linear layers of a block.
        context: Frames before the last stride that a frame attends to.
        codebook_size: Codes per stage.
        codebook_dim: Width of a code.
        num_codebooks: Stages of both quantizers together.
        num_semantic: Stages of the semantic one.
        commitment: Weight of the commitment loss.
    """

    sample_rate: int = 24000
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    stride: int = 2
    filters: int = 64
    dim: int = 512
    layers: int = 8
    hidden_dim: int = 2048
    context: int = 250
    codebook_size: int = 2048
    codebook_dim: int = 256
    num_codebooks: int = 32
    num_semantic: int = 1
    commitment: float = 0.25

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios) * self.stride

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and fit each other."""
        for name in ("sample_rate", "filters", "layers", "hidden_dim", "context", "codebook_size", "codebook_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.dim < 1 or self.dim % (2 * _HEADS):
            raise ValueError(f"expected dim to be a multiple of {2 * _HEADS}, got {self.dim}")
        if not self.ratios or min(self.ratios) < 2 or self.stride < 2:
            raise ValueError(f"expected ratios and a stride of at least 2, got {self.ratios} and {self.stride}")
        if self.filters % 2 or not 0 < self.num_semantic < self.num_codebooks:
            raise ValueError(
                f"expected an even number of filters and 0 < num_semantic < num_codebooks, got {self.filters}, "
                f"{self.num_semantic} and {self.num_codebooks}"
            )


class SplitQuantizer(nn.Module):
    """A semantic and an acoustic residual quantizer of the same vectors; their entries are added."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.num_semantic = config.num_semantic
        self.semantic, self.acoustic = (
            ResidualQuantizer(
                config.codebook_size, config.codebook_dim, stages, input_dim=config.dim, commitment=config.commitment
            )
            for stages in (config.num_semantic, config.num_codebooks - config.num_semantic)
        )

    def ids(self, x: Tensor, num_stages: int | None = None, *, keep: bool = True) -> Tensor:
        """Ids int64 `[B, T, K']` of vectors `[B, T, D]` from the first K' = `num_stages` stages; as `ResidualQuantizer.ids`."""
        total = self.num_semantic + len(self.acoustic.stages) if num_stages is None else num_stages
        first = self.semantic.ids(x, min(total, self.num_semantic), keep=keep)
        if total <= self.num_semantic:
            return first
        return torch.cat([first, self.acoustic.ids(x, total - self.num_semantic, keep=keep)], -1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Vectors float32 `[B, T, D]` of ids `[B, T, K']` of the first K' stages."""
        vectors = self.semantic.lookup(ids[..., : self.num_semantic])
        rest = ids[..., self.num_semantic :]
        return vectors + self.acoustic.lookup(rest) if rest.shape[-1] else vectors

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `[B, T, D]` for training; the losses are added up."""
        first, rest = self.semantic(x), self.acoustic(x)
        return Quantized(first.vectors + rest.vectors, torch.cat([first.ids, rest.ids], -1), first.loss + rest.loss)


@dataclass(frozen=True)
class MimiAdapter(Adapter):
    """Joins what is published apart: sums and counts to codebook entries; queries, keys and values to one matrix.

    Attributes:
        interleaved: Whether rotary positions turn neighbouring channels of a head against each other, as in moshi; ours and
            those of transformers turn the first half against the second, so rows of queries and keys change places.
    """

    interleaved: bool = False

    def to_ours(self, published: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_ours`."""
        ours = super().to_ours(published)
        for name in [name for name in ours if name.endswith(".q.weight")]:
            stem = name.removesuffix("q.weight")
            ours[f"{stem}qkv.weight"] = torch.cat([ours.pop(f"{stem}{part}.weight") for part in "qkv"])
        for name in [name for name in ours if name.endswith(".qkv.weight")]:
            ours[name] = _turn(ours[name], to_halves=True) if self.interleaved else ours[name]
        for name in [name for name in ours if name.endswith(".sum")]:
            stem = name.removesuffix("sum")
            ours[f"{stem}codebook"] = ours.pop(name) / ours.pop(f"{stem}usage").clamp(min=1e-5)[:, None]
        return {name: tensor.flatten(1) if name.endswith("_proj.weight") else tensor for name, tensor in ours.items()}

    def to_published(self, ours: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_published`; every code counts as used once."""
        apart: State = {}
        for name, tensor in ours.items():
            stem = name.rpartition(".")[0]
            if name.endswith(".qkv.weight"):
                stem = stem.removesuffix("qkv")
                if self.interleaved:
                    apart[name] = _turn(tensor, to_halves=False)
                else:
                    apart |= {f"{stem}{part}.weight": matrix for part, matrix in zip("qkv", tensor.chunk(3), strict=True)}
            elif name.endswith(".codebook"):
                apart |= {f"{stem}.sum": tensor, f"{stem}.usage": torch.ones(len(tensor))}
            else:
                apart[name] = tensor[..., None] if name.endswith("_proj.weight") else tensor
        return super().to_published(apart)


def _turn(qkv: Tensor, *, to_halves: bool) -> Tensor:
    """Rows of queries and keys, from neighbouring pairs within each head to two halves, or back."""
    *turned, values = qkv.chunk(3)
    rows = len(values) // _HEADS // 2
    shape = (_HEADS, rows, 2, -1) if to_halves else (_HEADS, 2, rows, -1)
    return torch.cat([*(part.reshape(shape).transpose(1, 2).reshape(values.shape) for part in turned), values])


def _transformer_rules(published: str, ours: str, names: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{published}layers.{{}}.{theirs}", f"{ours}layers.{{}}.{mine}") for theirs, mine in names.items())


def _transformers_rules(encoder: str, decoder: str, seanet: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Of the layout of transformers, whose parts have had prefixes since its release 5."""
    names = {
        "self_attn.q_proj.": "q.",
        "self_attn.k_proj.": "k.",
        "self_attn.v_proj.": "v.",
        "self_attn.o_proj.": "out.",
        "mlp.fc1.": "up.",
        "mlp.fc2.": "down.",
        "input_layernorm.": "norm1.",
        "post_attention_layernorm.": "norm2.",
        "self_attn_layer_scale.scale": "scale1",
        "mlp_layer_scale.scale": "scale2",
    }
    return (
        *seanet_rules(f"{seanet[0]}layers.", "encoder.0.", wrapped=False),
        *_transformer_rules(f"{encoder}encoder_transformer.", "encoder.1.", names),
        (f"{encoder}downsample.conv.", "encoder.2."),
        (f"{decoder}upsample.conv.", "decoder.0."),
        *_transformer_rules(f"{decoder}decoder_transformer.", "decoder.1.", names),
        *seanet_rules(f"{seanet[1]}layers.", "decoder.2.", wrapped=False),
    )


_ORIGINAL_NAMES = {
    "self_attn.in_proj_weight": "qkv.weight",
    "self_attn.out_proj.": "out.",
    "self_attn.in_projs.0.": "qkv.",
    "self_attn.out_projs.0.": "out.",
    "linear1.": "up.",
    "linear2.": "down.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "layer_scale_1.scale": "scale1",
    "layer_scale_2.scale": "scale2",
}

TRANSFORMERS = MimiAdapter(
    rules=(
        *_transformers_rules("", "", ("encoder.", "decoder.")),
        *_transformers_rules("encoder.", "decoder.", ("encoder.encoder_seanet.", "decoder.decoder_seanet.")),
        *(
            (f"quantizer.{kind}_residual_vector_quantizer.{theirs}", f"quantizer.{kind}.{ours}")
            for kind in ("semantic", "acoustic")
            for theirs, ours in (
                ("input_proj.", "in_proj."),
                ("output_proj.", "out_proj."),
                ("layers.{}.codebook.embed_sum", "stages.{}.sum"),
                ("layers.{}.codebook.cluster_usage", "stages.{}.usage"),
            )
        ),
    ),
    dropped={"quantizer.*.initialized": "whether training has begun"},
)

ORIGINAL = MimiAdapter(
    rules=(
        *seanet_rules("encoder.model.", "encoder.0.", wrapped=True),
        *_transformer_rules("encoder_transformer.transformer.", "encoder.1.", _ORIGINAL_NAMES),
        ("downsample.conv.conv.conv.", "encoder.2."),
        ("upsample.convtr.convtr.convtr.", "decoder.0."),
        *_transformer_rules("decoder_transformer.transformer.", "decoder.1.", _ORIGINAL_NAMES),
        *seanet_rules("decoder.model.", "decoder.2.", wrapped=True, transposed=(2, 5, 8, 11)),
        *(
            (f"quantizer.{theirs}.{part}", f"quantizer.{ours}.{name}")
            for theirs, ours in (("rvq_first", "semantic"), ("rvq_rest", "acoustic"))
            for part, name in (
                ("input_proj.", "in_proj."),
                ("output_proj.", "out_proj."),
                ("vq.layers.{}._codebook.embedding_sum", "stages.{}.sum"),
                ("vq.layers.{}._codebook.cluster_usage", "stages.{}.usage"),
                ("vq.layers.{}._codebook.embed_avg", "stages.{}.sum"),
                ("vq.layers.{}._codebook.cluster_size", "stages.{}.usage"),
            )
        ),
    ),
    dropped={"quantizer.*nitialized": "whether training has begun", "quantizer.*.inited": "whether training has begun"},
    interleaved=True,
)


class Mimi(Codec):
    """The tokenizer: K ids per frame of 80 ms, the first of them semantic."""

    architecture: ClassVar[str] = "mimi"
    config_class: ClassVar[type[TokenizerConfig]] = MimiConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"transformers": TRANSFORMERS, "original": ORIGINAL}
    config: MimiConfig
    quantizer: SplitQuantizer
    piece: float = 2.56

    def __init__(self, config: MimiConfig) -> None:
        super().__init__(config, sample_rate=config.sample_rate, hop=config.hop, multiple=config.hop)
        network = SEANet(
            channels=1,
            dim=config.dim,
            filters=config.filters,
            ratios=config.ratios,
            last_kernel=3,
            lstm_layers=0,
            pad_mode="constant",
            conv_shortcut=False,
        )
        dim, kernel, stride = config.dim, 2 * config.stride, config.stride
        down = Conv1d(dim, dim, kernel, stride=stride, bias=False, causal=True, pad_mode="replicate")
        up = ConvTranspose1d(dim, dim, kernel, stride=stride, groups=dim, bias=False, causal=True)
        self.encoder = Chain([network.encoder(), _transformer(config), down])
        self.decoder = Chain([up, _transformer(config), network.decoder()])
        self.quantizer = SplitQuantizer(config)

    def _describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "codebook_sizes": (config.codebook_size,) * config.num_codebooks,
            "variable": "codebooks",
            "rate": self.frame_rate,
        }


def _transformer(config: MimiConfig) -> CausalTransformer:
    return CausalTransformer(config.dim, config.layers, _HEADS, config.hidden_dim, config.context)
