"""DAC, the Descript Audio Codec: music, speech and sound at high fidelity, with codes looked up in eight dimensions.

Paper: https://arxiv.org/abs/2306.06546
Reference implementations: descriptinc/descript-audio-codec@c7cfc5d, MIT, weights too; `DacModel` of transformers 5.23.

16 and 24 kHz (hop 320, 12 and 32 codes per frame) and 44.1 kHz (hop 512, 9 codes, or 18 over narrow latents), mono.
Non-causal; `encode(length=k)` keeps the first k codes of every frame.

Here, unlike there: the decoders with a stride of 5 (16 and 24 kHz) end 8 samples short of the last frame, and 8 zeros are put
there, so that no recording comes back shorter; weight normalisation is folded and all stages' projections are one product;
nothing is normalised in loudness. A recording is filled with zeros to whole frames, as in the reference's `preprocess`.

Shapes: B batch, S samples, D width of the latents, T frames, K codebooks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from tokenzoo.encoders.snake import snake_decoder, snake_encoder
from tokenzoo.tokenizers import TokenizerConfig
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.audio.codec import Codec
from tokenzoo.tokenizers.audio.published import OLD_SPELLING, FoldingAdapter
from tokenzoo.tokenizers.quantizers import ProjectedResidualQuantizer


@strict
@dataclass(kw_only=True)
class DacConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are the 44.1 kHz model of 8 kbit/s.

    Attributes:
        sample_rate: In Hz.
        encoder_dim: Channels at the sample rate in the encoder.
        strides: Of the encoder.
        latent_dim: Width of the latents.
        decoder_dim: Channels at the frame rate in the decoder.
        codebook_size: Codes per stage.
        codebook_dim: Width of a code.
        num_codebooks: Stages.
        commitment: Weight of the commitment loss.
        quantizer_dropout: Probability that in training an item uses only its first stages.
    """

    sample_rate: int = 44100
    encoder_dim: int = 64
    strides: tuple[int, ...] = (2, 4, 8, 8)
    latent_dim: int = 1024
    decoder_dim: int = 1536
    codebook_size: int = 1024
    codebook_dim: int = 8
    num_codebooks: int = 9
    commitment: float = 0.25
    quantizer_dropout: float = 0.5

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.strides)

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("sample_rate", "encoder_dim", "latent_dim", "codebook_size", "codebook_dim", "num_codebooks"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not self.strides or min(self.strides) < 2:
            raise ValueError(f"expected strides of at least 2, got {self.strides}")
        if self.decoder_dim < 1 or self.decoder_dim % 2 ** len(self.strides):
            raise ValueError(f"expected a decoder_dim that 2 ** {len(self.strides)} divides, got {self.decoder_dim}")


ORIGINAL = FoldingAdapter(
    rules=(
        *(
            rule
            for published, ours in (("encoder.block.", "encoder."), ("decoder.model.", "decoder."))
            for rule in (
                (f"{published}{{}}.block.{{}}.block.{{}}.", f"{ours}{{}}.{{}}.block.{{}}."),
                (f"{published}{{}}.block.{{}}.", f"{ours}{{}}.{{}}."),
                (published, ours),
            )
        ),
        ("quantizer.quantizers.{}.codebook.weight", "quantizer.stages.{}.codebook"),
        ("quantizer.quantizers.", "quantizer.stages."),
    ),
    inside=("state_dict",),
    spelling=OLD_SPELLING,
    matrices=("_proj.weight",),
)


def _unit_rules(published: str, ours: str) -> tuple[tuple[str, str], ...]:
    names = ("snake1.", "conv1.", "snake2.", "conv2.")
    return tuple((published + name, f"{ours}block.{i}.") for i, name in enumerate(names))


def _transformers(stages: int) -> FoldingAdapter:
    rules: list[tuple[str, str]] = []
    for i in range(stages):
        for unit in range(3):
            rules += _unit_rules(f"encoder.block.{i}.res_unit{unit + 1}.", f"encoder.{i + 1}.{unit}.")
            rules += _unit_rules(f"decoder.block.{i}.res_unit{unit + 1}.", f"decoder.{i + 1}.{unit + 2}.")
        rules += [
            (f"encoder.block.{i}.snake1.", f"encoder.{i + 1}.3."),
            (f"encoder.block.{i}.conv1.", f"encoder.{i + 1}.4."),
            (f"decoder.block.{i}.snake1.", f"decoder.{i + 1}.0."),
            (f"decoder.block.{i}.conv_t1.", f"decoder.{i + 1}.1."),
        ]
    for side in ("encoder", "decoder"):
        ends = (("conv1.", 0), ("snake1.", stages + 1), ("conv2.", stages + 2))
        rules += [(f"{side}.{name}", f"{side}.{position}.") for name, position in ends]
    return FoldingAdapter(
        rules=(
            *rules,
            ("quantizer.quantizers.{}.codebook.weight", "quantizer.stages.{}.codebook"),
            ("quantizer.quantizers.", "quantizer.stages."),
        ),
        matrices=("_proj.weight",),
    )


class Dac(Codec):
    """The tokenizer: K ids per frame, of which `encode(length=k)` keeps the first k."""

    architecture: ClassVar[str] = "dac"
    config_class: ClassVar[type[TokenizerConfig]] = DacConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"transformers": _transformers(4), "original": ORIGINAL}
    config: DacConfig
    piece: float = 0.5

    def __init__(self, config: DacConfig) -> None:
        super().__init__(config, sample_rate=config.sample_rate, hop=config.hop, multiple=config.hop)
        self.encoder = snake_encoder(config.encoder_dim, config.strides, config.latent_dim)
        self.decoder = snake_decoder(config.latent_dim, config.decoder_dim, config.strides[::-1], symmetric=True)
        self.quantizer = ProjectedResidualQuantizer(
            config.codebook_size,
            config.codebook_dim,
            config.latent_dim,
            config.num_codebooks,
            commitment=config.commitment,
            dropout=config.quantizer_dropout,
        )

    def _describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "codebook_sizes": (config.codebook_size,) * config.num_codebooks,
            "variable": "codebooks",
            "rate": self.frame_rate,
        }
