"""EnCodec: a convolutional codec with a residual quantizer whose number of stages sets the bitrate.

Paper: https://arxiv.org/abs/2210.13438
Reference implementation: facebookresearch/encodec@0e2d0ae, MIT; also `EncodecModel` of transformers 5.23.

* 24 kHz, mono: causal; 75 frames per second of up to 32 codes (0.75 to 24 kbit/s). Can be streamed.
* 48 kHz, stereo: non-causal, with GroupNorms over time; 150 frames per second of up to 16 codes (1.5 to 24 kbit/s). A
  recording is cut into segments of a second that overlap by a hundredth. Each is divided by its root mean square, which
  travels in `Tokens.extras["scales"]`, and the decoded segments are faded into each other.

Here, unlike there: weight normalisation is folded when weights are loaded; the frames of all segments form one sequence.

Shapes: B batch, C channels, S samples, D width of the latents, T frames, K codebooks.
"""

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from tokenzoo.encoders.seanet import SEANet
from tokenzoo.tokenizers import Codes, Output, TokenizerConfig, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.audio.codec import Codec
from tokenzoo.tokenizers.audio.published import OLD_SPELLING, FoldingAdapter, seanet_rules
from tokenzoo.tokenizers.quantizers import ResidualQuantizer


@strict
@dataclass(kw_only=True)
class EncodecConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are the 24 kHz model.

    Attributes:
        sample_rate: In Hz.
        channels: Audio channels.
        ratios: Strides of the decoder.
        filters: Channels at the sample rate.
        dim: Width of the latents and of a code.
        lstm_layers: Layers of the recurrent networks.
        causal: Whether nothing looks ahead.
        norm: How convolutions are normalised: `"weight"` (folded when loading) or `"time"` (GroupNorm over a segment).
        conv_shortcut: Whether residual units have a convolution in their shortcut.
        codebook_size: Codes per stage.
        num_codebooks: Stages.
        commitment: Weight of the commitment loss.
        segment: Samples per segment; 0 takes a recording as a whole.
        segment_stride: Samples from one segment to the next.
    """

    sample_rate: int = 24000
    channels: int = 1
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    filters: int = 32
    dim: int = 128
    lstm_layers: int = 2
    causal: bool = True
    norm: Literal["weight", "time"] = "weight"
    conv_shortcut: bool = True
    codebook_size: int = 1024
    num_codebooks: int = 32
    commitment: float = 1.0
    segment: int = 0
    segment_stride: int = 0

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and fit each other."""
        for name in ("sample_rate", "filters", "dim", "codebook_size", "num_codebooks"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.channels not in (1, 2):
            raise ValueError(f"expected 1 or 2 channels, got {self.channels}")
        if self.filters % 2:
            raise ValueError(f"expected an even number of filters, got {self.filters}")
        if not self.ratios or min(self.ratios) < 2:
            raise ValueError(f"expected ratios of at least 2, got {self.ratios}")
        if self.segment and not self.segment / 2 < self.segment_stride <= self.segment:
            raise ValueError(
                f"expected segments of {self.segment} samples to begin more than half and at most a whole one apart, got "
                f"segment_stride={self.segment_stride}"
            )
        if self.norm == "time" and not self.segment:
            raise ValueError("expected segments where norm='time': its statistics are those of a whole segment")


class Segments:
    """Where the segments of a recording begin and end, and how many frames each has."""

    def __init__(self, config: EncodecConfig) -> None:
        self.length, self.stride, self.hop = config.segment, config.segment_stride, config.hop

    def lengths(self, samples: int) -> list[int]:
        """Samples of each segment of a recording; all but the last one or two are full."""
        return [min(self.length, samples - at) for at in range(0, samples, self.stride)]

    def frames(self, samples: int) -> list[int]:
        """Frames of each segment of a recording."""
        return [-(-length // self.hop) for length in self.lengths(samples)]

    def samples_of(self, num_frames: int) -> int:
        """The longest recording with so many frames.

        Raises:
            TokensError: If there is none.
        """
        samples = bisect.bisect_right(range(1, num_frames * self.hop + 1), num_frames, key=lambda s: sum(self.frames(s)))
        if sum(self.frames(samples)) != num_frames:
            raise TokensError(f"no recording has {num_frames} frames in segments of {self.length} samples")
        return samples


def _layout(wrapped: bool, codebook: str, spelling: tuple[str, str] | None) -> FoldingAdapter:
    layers = "model" if wrapped else "layers"
    return FoldingAdapter(
        rules=(
            *seanet_rules(f"encoder.{layers}.", "encoder.", wrapped=wrapped),
            *seanet_rules(f"decoder.{layers}.", "decoder.", wrapped=wrapped, transposed=(3, 6, 9, 12)),
            (f"{codebook}embed", "quantizer.stages.{}.codebook"),
        ),
        dropped={
            f"{codebook.format('*')}{name}": "statistics from which training moves the codebook"
            for name in ("inited", "cluster_size", "embed_avg")
        },
        spelling=spelling,
    )


_ORIGINAL, _TRANSFORMERS = "quantizer.vq.layers.{}._codebook.", "quantizer.layers.{}.codebook."


class Encodec(Codec):
    """The tokenizer: K ids per frame, of which `encode(length=k)` keeps the first k."""

    architecture: ClassVar[str] = "encodec"
    config_class: ClassVar[type[TokenizerConfig]] = EncodecConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "original": _layout(True, _ORIGINAL, OLD_SPELLING),
        "original_time_norm": _layout(True, _ORIGINAL, None),
        "transformers": _layout(False, _TRANSFORMERS, OLD_SPELLING),
        "transformers_time_norm": _layout(False, _TRANSFORMERS, None),
    }
    config: EncodecConfig
    piece: float = 5.0

    def __init__(self, config: EncodecConfig) -> None:
        super().__init__(config, sample_rate=config.sample_rate, hop=config.hop, channels=config.channels)
        network = SEANet(
            channels=config.channels,
            dim=config.dim,
            filters=config.filters,
            ratios=config.ratios,
            lstm_layers=config.lstm_layers,
            causal=config.causal,
            conv_shortcut=config.conv_shortcut,
            norm=config.norm == "time",
        )
        self.encoder, self.decoder = network.encoder(), network.decoder()
        self.quantizer = ResidualQuantizer(config.codebook_size, config.dim, config.num_codebooks, commitment=config.commitment)
        self.segments = Segments(config) if config.segment else None
        if self.segments is not None:
            self.whole = "encodes whole segments"

    def _describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "codebook_sizes": (config.codebook_size,) * config.num_codebooks,
            "variable": "codebooks",
            "rate": self.frame_rate,
        }

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        if self.segments is None:
            return super()._encode(batch, length=length, seed=seed)
        stride, samples = self.config.segment_stride, batch.shape[-1]
        segments = [batch[..., i * stride :][..., :size] for i, size in enumerate(self.segments.lengths(samples))]
        scales = [_loudness(segment) for segment in segments]
        parts = (
            self.quantizer.ids(self.encoder(segment / scale).mT, length).mT
            for segment, scale in zip(segments, scales, strict=True)
        )
        codes = self._codes(parts, sum(self.segments.frames(samples)), length)
        return codes._replace(extras={"scales": torch.cat(scales, -1)[:, 0].float()})

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        if self.segments is None:
            return super()._decode(ids, lengths, extras)
        ids = ids[:, : self._used(lengths)]
        frames = self.segments.frames(self.segments.samples_of(ids.shape[-1]))
        scales = extras.get("scales")
        if scales is None or scales.dim() != 2 or scales.shape[1] < len(frames):
            got = "none" if scales is None else tuple(scales.shape)
            raise TokensError(
                f"expected extras['scales'] of shape ({len(ids)}, {len(frames)}), a loudness per segment, got {got}"
            )
        parts = (part * scales[:, i, None, None] for i, part in enumerate(self._segments_of(ids, frames)))
        return _fade(parts, [count * self.hop for count in frames], self.config.segment_stride)

    def _segments_of(self, ids: Tensor, frames: list[int]) -> Iterator[Tensor]:
        for part in ids.split(frames, -1):
            yield self.decoder(self.quantizer.lookup(part.mT).to(self.dtype).mT)

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """As `Codec.objective`; of a model with segments, on the first segment of each item."""
        if self.segments is None:
            return super().objective(batch, progress=progress, generator=generator)
        batch = batch[..., : self.config.segment]
        scale = _loudness(batch)
        found = self.quantizer(self.encoder(batch / scale).mT)
        reconstruction = self.decoder(found.vectors.mT.to(batch.dtype)) * scale
        return self._output(batch, reconstruction[..., : batch.shape[-1]], found)


def _loudness(segment: Tensor) -> Tensor:
    """Root mean square of the mean of all channels: `[B, C, S]` to `[B, 1, 1]`, never zero."""
    return segment.mean(1, keepdim=True).square().mean(-1, keepdim=True).sqrt() + 1e-8


def _fade(segments: Iterable[Tensor], lengths: Sequence[int], stride: int) -> Tensor:
    """Segments `[B, C, S]` that begin `stride` samples apart as one signal, weighted by triangles where they overlap.

    Args:
        segments: One after the other.
        lengths: Samples of each; no more than two of them overlap anywhere.
        stride: In samples.
    """
    total = max(i * stride + length for i, length in enumerate(lengths))
    time = torch.linspace(0, 1, lengths[0] + 2)[1:-1]
    weight = 0.5 - (time - 0.5).abs()
    mixed = None
    for i, segment in enumerate(segments):
        if mixed is None:
            mixed, weight = segment.new_zeros(*segment.shape[:2], total), weight.to(segment.device)
        start, stop = i * stride, (i + 1) * stride if i + 1 < len(lengths) else total
        mixed[..., start : start + lengths[i]] += weight[: lengths[i]] * segment
        together = weight.new_zeros(stop - start)  # of this segment and the one before, where no other follows
        if i:
            before = weight[stride : lengths[i - 1]]
            together[: len(before)] += before
        here = weight[: min(lengths[i], stop - start)]
        together[: len(here)] += here
        mixed[..., start:stop] /= together
    assert mixed is not None, "there is at least one segment"
    return mixed
