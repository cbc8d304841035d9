"""What the neural audio codecs share: bitrates, long recordings in bounded memory, streams, and a training objective.

Shapes: B batch, C channels, S samples, D width of the latents, T frames, K codebooks.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.streaming import Chain, State
from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.audio.mel import mel_distance
from tokenzoo.tokenizers.quality import AUDIO_QUALITIES
from tokenzoo.tokenizers.quantizers import Quantized
from tokenzoo.tokenizers.spec import Modality
from tokenzoo.tokenizers.waveforms import Audio

_ROUNDING = 1e-9
_FRAMES_TOGETHER = 1000


class Codec(Tokenizer):
    """An encoder, a quantizer of several stages and a decoder over a waveform, `hop` samples a frame.

    A system sets `encoder`, `decoder` and `quantizer` (`ids`, `lookup` and a call for training, as `ResidualQuantizer` has
    them), or overrides `_encode` and `_decode` where it does more.

    Attributes:
        piece: Seconds that go through the network at once; longer recordings follow piece by piece and get the same ids
            and, but for rounding, the same samples, so that memory stays bounded.
        sample_rate: In Hz.
        hop: Samples per frame.
        multiple: Recordings are filled with zeros up to a multiple of so many samples.
        whole: Why this network has to hear a recording as a whole and cannot be streamed; empty if it can.
    """

    modality: ClassVar[Modality] = "audio"
    piece: float = 1.0
    whole: str = ""
    media: Audio
    encoder: Chain
    decoder: nn.Module
    quantizer: Any

    def __init__(self, config: TokenizerConfig, *, sample_rate: int, hop: int, channels: int = 1, multiple: int = 1) -> None:
        super().__init__(config, Audio(sample_rate, channels))
        self.sample_rate, self.hop, self.channels, self.multiple = sample_rate, hop, channels, multiple
        self.qualities = dict(AUDIO_QUALITIES)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop

    # -- bitrates

    def codebooks_for(self, kbps: float) -> int:
        """The most codebooks that a bitrate has room for, as `encode(length=...)` takes it.

        Args:
            kbps: Bitrate in kbit/s.

        Raises:
            TokensError: If one codebook takes more, or all of them less.
        """
        spec = self._describe()
        sizes = spec["codebook_sizes"]
        strides = spec.get("strides", (1,) * len(sizes))
        each = [spec["rate"] / stride * math.log2(size) / 1000 for size, stride in zip(sizes, strides, strict=True)]
        totals = [sum(each[: k + 1]) for k in range(len(each))]
        lowest = totals[0] if spec.get("variable") == "codebooks" else totals[-1]
        if not lowest - _ROUNDING <= kbps <= totals[-1] + _ROUNDING:
            allowed = f"{lowest:g} to {totals[-1]:g} kbit/s" if lowest < totals[-1] else f"{lowest:g} kbit/s and nothing else"
            raise TokensError(f"{self.name or self.architecture} encodes at {allowed}, got kbps={kbps:g}")
        return sum(total <= kbps + _ROUNDING for total in totals)

    @torch.no_grad()
    def encode(
        self,
        media: Any,
        *,
        length: int | Sequence[int] | None = None,
        target: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Tokens:
        """As `Tokenizer.encode`, where `length` counts codebooks; `target={"kbps": 6}` asks for a bitrate in kbit/s.

        Raises:
            MediaError: If an item cannot be read as audio.
            TokensError: If the length or target is not one that this tokenizer can meet.
        """
        if target is None or "kbps" not in target:
            return super().encode(media, length=length, target=target, seed=seed)
        if len(target) > 1 or length is not None:
            raise TokensError("expected target={'kbps': ...} by itself: a bitrate excludes a length and a quality")
        number = self.codebooks_for(target["kbps"])
        return super().encode(media, length=number if self._describe().get("variable") == "codebooks" else None, seed=seed)

    # -- encode and decode

    def decode(self, tokens: Tokens, *, native: bool = False) -> list[Any]:
        """As `Tokenizer.decode`; `native` keeps the network's sample rate and channels, and the number of samples heard."""
        items = super().decode(tokens, native=native)
        return [self.media.trim(item, meta) for item, meta in zip(items, tokens.meta, strict=True)] if native else items

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del seed
        num_frames = -(-batch.shape[-1] // self.hop)
        keep = num_frames <= _FRAMES_TOGETHER
        parts = (self.quantizer.ids(part.mT, length, keep=keep).mT for part in _gathered(self._latents(batch)))
        return self._codes(parts, num_frames, length)

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del extras
        ids = ids[:, : self._used(lengths)]
        return self._collect(self._synthesize(ids), ids.shape[-1])

    def _synthesize(self, ids: Tensor) -> Iterator[Tensor]:
        """Audio `[B, C, ...]` of ids `[B, K', T]`, piece by piece."""
        num_frames, size = ids.shape[-1], self._piece_frames
        state: State | None = {} if num_frames > size else None
        for at in range(0, num_frames, size):
            vectors = self.quantizer.lookup(ids[..., at : at + size].mT).to(self.dtype)
            yield self.decoder(vectors.mT, state, at + size >= num_frames)

    @property
    def _piece_frames(self) -> int:
        return max(1, round(self.piece * self.frame_rate))

    def _fill(self, batch: Tensor) -> Tensor:
        """Zeros behind the last sample, up to the next `multiple`."""
        missing = -batch.shape[-1] % self.multiple
        return F.pad(batch, (0, missing)) if missing else batch

    def _latents(self, batch: Tensor) -> Iterator[Tensor]:
        """What the encoder makes of `[B, C, S]` and the zeros behind it, piece by piece."""
        size, total = self._piece_frames * self.hop, batch.shape[-1] + -batch.shape[-1] % self.multiple
        state: State | None = {} if total > size else None
        for at in range(0, total, size):
            piece = batch[..., at : at + size]
            yield self.encoder(F.pad(piece, (0, min(size, total - at) - piece.shape[-1])), state, at + size >= total)

    def _collect(self, parts: Iterable[Tensor], num_frames: int) -> Tensor:
        """The parts of a waveform one after the other, `[B, C, T * hop]`, with zeros where they do not reach so far."""
        return _joined(parts, self.channels, num_frames * self.hop)

    def _codes(self, parts: Iterable[Tensor], num_frames: int, length: int | None = None) -> Codes:
        """Codes of the first `length` codebooks (all by default), whose ids `[B, K', ...]` come in parts of T frames."""
        num_codebooks = len(self._describe()["codebook_sizes"])
        ids = _joined(parts, num_codebooks, num_frames)
        used = num_codebooks if length is None else length
        lengths = torch.tensor([num_frames] * used + [0] * (num_codebooks - used), device=ids.device)
        return Codes(ids, lengths.expand(len(ids), -1))

    @staticmethod
    def _used(lengths: Tensor) -> int:
        """How many codebooks, from the first on, a batch of items with equal lengths `[B, K]` has."""
        row = lengths[0].tolist()
        used = sum(n > 0 for n in row)
        if any(n != row[0] for n in row[:used]):
            raise TokensError(f"expected equally many ids of the first codebooks and none of the others, got lengths {row}")
        return used

    # -- training

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Absolute error of the samples, distance of mel spectra, and the quantizer's loss.

        This is the part of the published recipes that needs no second network: no adversarial and no distillation loss.
        """
        del progress
        found = self.quantizer(self.encoder(self._fill(batch)).mT)
        reconstruction = self._render(found.vectors.mT.to(batch.dtype), generator)
        reconstruction = F.pad(reconstruction, (0, batch.shape[-1] - reconstruction.shape[-1]))
        return self._output(batch, reconstruction, found)

    def _render(self, latents: Tensor, generator: torch.Generator | None) -> Tensor:
        """Audio `[B, C, S]` of whole latents `[B, D, T]` in training."""
        del generator
        return self.decoder(latents)

    def _output(self, batch: Tensor, reconstruction: Tensor, found: Quantized) -> Output:
        losses = {
            "waveform": (reconstruction.float() - batch.float()).abs().mean(),
            "mel": mel_distance(reconstruction, batch, self.sample_rate),
            "quantizer": found.loss,
        }
        with torch.no_grad():
            quality = self.qualities["si_sdr"].measure(reconstruction, batch).mean()
        return Output(reconstruction, losses, {"si_sdr": quality})

    def _measure(self, tokens: Tokens, original: Tensor, target: Mapping[str, float]) -> dict[str, Tensor]:
        reconstruction = self._decode_tokens(tokens)[..., : original.shape[-1]]
        return {name: self.qualities[name].measure(reconstruction, original).cpu() for name in target}

    # -- streams

    def stream(self, *, length: int | None = None) -> "Stream":
        """An encoder and a decoder of one endless recording, which hold their state; `length` as in `encode`.

        Raises:
            TokensError: If this network has to hear a recording as a whole, or cannot encode to this length.
        """
        if self.whole:
            raise TokensError(f"{self.name or self.architecture} {self.whole}: stream with encodec_24khz or mimi instead")
        budgets = self._check_length(length, 1)
        return Stream(self, None if budgets is None else budgets[0])


def _joined(parts: Iterable[Tensor], rows: int, steps: int) -> Tensor:
    """Parts `[B, R', T']` one after the other as `[B, R, T]`, zeros where they do not reach; no part is kept."""
    whole, at = None, 0
    for part in parts:
        if whole is None:
            whole = part.new_zeros(len(part), rows, steps)
        whole[:, : part.shape[1], at : at + part.shape[-1]] = part
        at += part.shape[-1]
    assert whole is not None, "no item is empty"
    return whole


def _gathered(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Parts `[B, D, T]` joined in groups, since quantizers read all of their codebooks at every call.

    Groups are in one buffer, step by step in memory: each is used up before the next is asked for.
    """
    group, size = torch.empty(0), 0
    for part in parts:
        steps = part.shape[-1]
        if not len(group) and steps < _FRAMES_TOGETHER:
            group = part.new_empty(len(part), _FRAMES_TOGETHER, part.shape[1]).mT
        if size and size + steps > _FRAMES_TOGETHER:
            yield group[..., :size]
            size = 0
        if steps >= _FRAMES_TOGETHER:
            yield part
            continue
        group[..., size : size + steps] = part
        size += steps
    if size:
        yield group[..., :size]


class Stream:
    """One recording encoded and decoded while it comes in; sample by sample what `encode` and `decode` make of the whole.

    Frames come as soon as the network has heard enough: a causal one answers every `hop` samples with a frame, after a
    start-up that its card states (padding by reflection has to hear what it reflects); one that looks ahead answers later.
    Audio is at the network's sample rate and channels, not limited to [-1, 1].

    Attributes:
        codec: Whose stream this is.
        length: Codebooks; all of them if `None`.
    """

    def __init__(self, codec: Codec, length: int | None) -> None:
        self.codec, self.length = codec, length
        self._encoder: State = {}
        self._decoder: State = {}
        self._samples = 0

    @torch.no_grad()
    def encode(self, chunk: Tensor, *, last: bool = False) -> Tensor:
        """Feeds samples `[C, S]`, any number of them; ids int64 `[K, T]` of the frames that became certain.

        Args:
            chunk: Next samples.
            last: No more will follow; brings out what remains, and begins anew.

        Raises:
            TokensError: If the chunk has another shape.
        """
        codec = self.codec
        if chunk.dim() != 2 or len(chunk) != codec.channels:
            raise TokensError(f"expected a chunk of shape ({codec.channels}, S), got {tuple(chunk.shape)}")
        self._samples += chunk.shape[-1]
        batch = chunk[None].to(codec.device, codec.dtype)
        if last:
            batch = F.pad(batch, (0, -self._samples % codec.multiple))
        latents = codec.encoder(batch, self._encoder, last)
        if last:
            self._encoder, self._samples = {}, 0
        return codec.quantizer.ids(latents.mT, self.length)[0].mT.cpu()

    @torch.no_grad()
    def decode(self, ids: Tensor, *, last: bool = False) -> Tensor:
        """Feeds ids int64 `[K, T]`, any number of frames; samples float32 `[C, S]` that became certain.

        Args:
            ids: Next frames, of as many codebooks in every call.
            last: No more will follow; brings out what remains, and begins anew.

        Raises:
            TokensError: If the ids have another shape, or are out of range.
        """
        codec = self.codec
        sizes = codec._describe()["codebook_sizes"]
        if ids.dim() != 2 or not 1 <= len(ids) <= len(sizes) or ids.dtype != torch.long:
            raise TokensError(f"expected int64 ids (K, T) with K from 1 to {len(sizes)}, got {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and not (int(ids.min()) >= 0 and bool((ids.max(1).values < torch.tensor(sizes[: len(ids)])).all())):
            raise TokensError(f"expected ids in [0, {max(sizes)}), got {int(ids.min())} to {int(ids.max())}")
        vectors = codec.quantizer.lookup(ids[None].to(codec.device).mT).to(codec.dtype)
        audio = codec.decoder(vectors.mT, self._decoder, last)
        if last:
            self._decoder = {}
        return audio[0].float().cpu()
