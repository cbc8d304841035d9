"""WavTokenizer: speech and sound as one sequence of 40 or 75 codes per second out of 4,096.

Paper: https://arxiv.org/abs/2408.16532
Reference implementation: jishengpeng/WavTokenizer@5cf440d, MIT, weights too.

24 kHz mono, non-causal. EnCodec's encoder with wider latents, a single codebook, and a Vocos decoder with attention over the
whole recording. The eight published files are two architectures, one for each hop.

Here, unlike there: of the decoder's four sets of norm parameters (`bandwidth_id`) the first is kept, which is what inference
uses; weight normalisation is folded. A decoded frame depends on all frames and on their number, so items are decoded
together only if they are equally long, and what is longer than `window` seconds is decoded in windows of that length: each
begins `window - overlap` seconds after the one before it, the last one ends with the recording, and where two meet one is
faded into the other over `overlap` seconds. Encoding is local and in pieces, with the ids of the whole.

Shapes: B batch, S samples, D width of the latents, T frames.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from tokenzoo.encoders.seanet import SEANet
from tokenzoo.encoders.vocos import Vocos
from tokenzoo.tokenizers import TokenizerConfig
from tokenzoo.tokenizers.adapter import Adapter, State
from tokenzoo.tokenizers.audio.codec import Codec
from tokenzoo.tokenizers.audio.published import OLD_SPELLING, FoldingAdapter, seanet_rules
from tokenzoo.tokenizers.quantizers import ResidualQuantizer

_BANDWIDTHS = 4


@strict
@dataclass(kw_only=True)
class WavTokenizerConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are those with 75 tokens per second.

    Attributes:
        sample_rate: In Hz.
        ratios: Strides of the encoder, in reverse.
        filters: Channels at the sample rate.
        dim: Width of the latents and of a code.
        lstm_layers: Layers of the encoder's recurrent network.
        codebook_size: Codes.
        commitment: Weight of the commitment loss, as published.
        decoder_dim: Width of the decoder.
        decoder_hidden_dim: Width between the two linear layers of a block of the decoder.
        decoder_layers: Blocks of the decoder.
        groups: Of the decoder's GroupNorms.
        windows_per_frame: Hops per window of the decoder's spectrum.
    """

    sample_rate: int = 24000
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    filters: int = 32
    dim: int = 512
    lstm_layers: int = 2
    codebook_size: int = 4096
    commitment: float = 1000.0
    decoder_dim: int = 768
    decoder_hidden_dim: int = 2304
    decoder_layers: int = 12
    groups: int = 32
    windows_per_frame: int = 4

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("sample_rate", "filters", "dim", "codebook_size", "decoder_dim", "decoder_hidden_dim", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not self.ratios or min(self.ratios) < 2 or self.filters % 2:
            raise ValueError(f"expected ratios of at least 2 and even filters, got {self.ratios} and {self.filters}")
        if self.groups < 1 or self.decoder_dim % self.groups:
            raise ValueError(f"expected a decoder_dim that {self.groups} groups divide, got {self.decoder_dim}")
        if self.windows_per_frame < 2 or self.windows_per_frame % 2:
            raise ValueError(f"expected an even windows_per_frame, got {self.windows_per_frame}")


@dataclass(frozen=True)
class WavTokenizerAdapter(FoldingAdapter):
    """Also picks the first of the decoder's sets of norm parameters."""

    def to_ours(self, published: Mapping[str, Tensor]) -> State:
        """As `FoldingAdapter.to_ours`."""
        ours = super().to_ours(published)
        return {name: tensor[0].clone() if _adaptive(name) else tensor for name, tensor in ours.items()}

    def to_published(self, ours: Mapping[str, Tensor]) -> State:
        """As `FoldingAdapter.to_published`; all sets of norm parameters are equal."""
        return super().to_published(
            {name: tensor.repeat(_BANDWIDTHS, 1) if _adaptive(name) else tensor for name, tensor in ours.items()}
        )


def _adaptive(name: str) -> bool:
    return name.startswith("decoder.norm.") or (name.startswith("decoder.blocks.") and ".norm." in name)


_TRAINING_ONLY = ("multiperioddisc", "multiresddisc", "dac", "dacdiscriminator", "melspec_loss")

PUBLISHED = WavTokenizerAdapter(
    rules=(
        *seanet_rules("feature_extractor.encodec.encoder.model.", "encoder.", wrapped=True),
        ("feature_extractor.encodec.quantizer.vq.layers.{}._codebook.embed", "quantizer.stages.{}.codebook"),
        ("backbone.norm.scale.weight", "decoder.norm.weight"),
        ("backbone.norm.shift.weight", "decoder.norm.bias"),
        ("backbone.convnext.{}.norm.scale.weight", "decoder.blocks.{}.norm.weight"),
        ("backbone.convnext.{}.norm.shift.weight", "decoder.blocks.{}.norm.bias"),
        ("backbone.convnext.{}.dwconv.", "decoder.blocks.{}.depthwise."),
        ("backbone.convnext.{}.pwconv1.", "decoder.blocks.{}.up."),
        ("backbone.convnext.{}.pwconv2.", "decoder.blocks.{}.down."),
        ("backbone.convnext.", "decoder.blocks."),
        ("backbone.final_layer_norm.", "decoder.final_norm."),
        ("backbone.pos_net.{}.proj_out.", "decoder.mixer.{}.out."),
        ("backbone.pos_net.", "decoder.mixer."),
        ("backbone.embed.", "decoder.embed."),
        ("head.", "decoder.head."),
    ),
    dropped={
        "feature_extractor.encodec.decoder.*": "EnCodec's decoder, which is never called",
        "feature_extractor.encodec.quantizer.*.inited": "whether training has begun",
        "feature_extractor.encodec.quantizer.*.cluster_size": "statistics from which training moves the codebook",
        "feature_extractor.encodec.quantizer.*.embed_avg": "statistics from which training moves the codebook",
        "head.istft.window": "the Hann window, which is computed",
        **{f"{name}.*": "a discriminator or loss, which only training needs" for name in _TRAINING_ONLY},
    },
    inside=("state_dict",),
    spelling=OLD_SPELLING,
    normalized="feature_extractor.",
)


class WavTokenizer(Codec):
    """The tokenizer: one id per frame.

    Attributes:
        window: Seconds that are decoded at once; longer recordings are decoded in windows of that length.
        overlap: Seconds over which one window is faded into the next.
    """

    architecture: ClassVar[str] = "wavtokenizer"
    config_class: ClassVar[type[TokenizerConfig]] = WavTokenizerConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config: WavTokenizerConfig
    window: float = 20.0
    overlap: float = 1.0
    piece: float = 5.0
    whole: str = "attends to whole recordings"

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__(config, sample_rate=config.sample_rate, hop=config.hop)
        self.encoder = SEANet(
            channels=1,
            dim=config.dim,
            filters=config.filters,
            ratios=config.ratios,
            lstm_layers=config.lstm_layers,
            causal=False,
        ).encoder()
        self.quantizer = ResidualQuantizer(config.codebook_size, config.dim, 1, commitment=config.commitment)
        self.decoder = Vocos(
            config.dim,
            config.decoder_dim,
            config.decoder_hidden_dim,
            config.decoder_layers,
            config.windows_per_frame * config.hop,
            config.hop,
            config.groups,
        )

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.codebook_size,), "rate": self.frame_rate}

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del lengths, extras
        length, overlap = (max(1, round(seconds * self.frame_rate)) for seconds in (self.window, self.overlap))
        num_frames = ids.shape[-1]
        if num_frames <= length:
            return self._synthesize_window(ids)
        whole = None
        for start in (*range(0, num_frames - length, max(1, length - overlap)), num_frames - length):
            audio = self._synthesize_window(ids[..., start : start + length])
            if whole is None:
                whole = audio.new_zeros(len(ids), 1, num_frames * self.hop)
            _fade_in(whole, audio, start * self.hop, overlap * self.hop)
        assert whole is not None, "there is at least one window"
        return whole

    def _synthesize_window(self, ids: Tensor) -> Tensor:
        return self.decoder(self.quantizer.lookup(ids.mT).to(self.dtype).mT)


def _fade_in(whole: Tensor, audio: Tensor, start: int, overlap: int) -> None:
    """Writes a window `[B, 1, S]` over a signal from `start` on, fading it in over what is there already."""
    overlap = overlap if start else 0
    weight = torch.arange(1, overlap + 1, device=audio.device) / (overlap + 1)
    head = whole[..., start : start + overlap]
    whole[..., start : start + overlap] = head + weight.to(audio) * (audio[..., :overlap] - head)
    whole[..., start + overlap : start + audio.shape[-1]] = audio[..., overlap:]
