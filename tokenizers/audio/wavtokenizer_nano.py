"""WavTokenizer nano: speech at 16 kHz as one sequence of 74 codes per second, small enough to be trained on two CPU cores.

From WavTokenizer (https://arxiv.org/abs/2408.16532) it takes the idea and the training: a single codebook that is started by
k-means and kept in use, wide context around it, a decoder of ConvNeXt blocks that predicts spectra and does not upsample, and
spectral and adversarial losses. Two things differ, so that hours of one core are enough. The encoder reads mel spectra and
periodicity, not samples, and begins as their principal components, which the codebook quantizes from the first step on. And
the decoder predicts a pitch and the spectra of pulses and noise, not phases: what it leaves to learn is not heard as buzzing.
No published weights fit it.

Encoder and decoder are local: recordings of any length are processed in pieces, with the ids of the whole and, but for
rounding, its samples. They look ahead.

Shapes: B batch, S samples, T frames, I features of a frame, D width of the latents, C width of the networks, J = 2 T spectra,
F frequencies, P candidates for the pitch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.source_filter import SPECTRA_PER_FRAME, SourceFilter
from tokenzoo.encoders.vocos import ConvNeXtBlock
from tokenzoo.tokenizers import Codes, Output, TokenizerConfig
from tokenzoo.tokenizers._torchaudio import torchaudio
from tokenzoo.tokenizers.audio import pitch as pitches
from tokenzoo.tokenizers.audio.codec import Codec
from tokenzoo.tokenizers.audio.mel import mel_distance
from tokenzoo.tokenizers.learning import Learning
from tokenzoo.tokenizers.quantizers import Quantized, VectorQuantizer

_WINDOW = 1024
_KERNEL_REACH = 3  # of the blocks' convolutions, in frames
_PITCH_REACH = 3  # frames around a piece whose pitch its samples depend on: two windows, and the way to the next pitch
_FLOOR = 1e-3
_VOICED = 0.45
_PEAK_REACH, _PITCH_STEPS = 3, 16
_LOUDEST = 5.0  # natural logarithm of the largest magnitude
_KMEANS_ROUNDS = 15
_LOSS_RESOLUTIONS = ((256, 24), (512, 48), (1024, 80), (2048, 128))
_LOSS_FLOOR = 3e-4
_PITCH_WEIGHT, _QUANTIZER_WEIGHT = 0.02, 1.0


@strict
@dataclass(kw_only=True)
class WavTokenizerNanoConfig(TokenizerConfig):
    """Size of the tokenizer.

    Attributes:
        sample_rate: In Hz.
        hop: Samples per frame, a multiple of 4.
        mel_bands: Of the spectra that the encoder reads.
        pitch_candidates: Of the periodicity that it reads, and of the pitch that the decoder predicts.
        dim: Width of the latents and of a code.
        codebook_size: Codes.
        width: Of both networks.
        hidden: Width between the two linear layers of a block.
        encoder_layers: Blocks of the encoder.
        decoder_layers: Blocks of the decoder.
        decay: Of the moving averages that the codes are in training.
        restart_after: Training steps without use after which a code is put elsewhere.
    """

    sample_rate: int = 16000
    hop: int = 216
    mel_bands: int = 80
    pitch_candidates: int = 128
    dim: int = 16
    codebook_size: int = 8192
    width: int = 256
    hidden: int = 768
    encoder_layers: int = 4
    decoder_layers: int = 8
    decay: float = 0.995
    restart_after: int = 400

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("sample_rate", "mel_bands", "dim", "codebook_size", "width", "hidden", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.hop < 4 or self.hop % 4 or self.hop > _WINDOW:
            raise ValueError(f"expected a hop that is a multiple of 4, up to {_WINDOW} samples, got {self.hop}")
        if self.pitch_candidates < 2 * _PEAK_REACH + 1:
            raise ValueError(f"expected at least {2 * _PEAK_REACH + 1} pitch_candidates, got {self.pitch_candidates}")
        if self.dim > self.mel_bands + self.pitch_candidates:
            raise ValueError(f"expected a dim of at most {self.mel_bands + self.pitch_candidates}, got {self.dim}")


class Features(nn.Module):
    """Log mel spectra and periodicity of frames, standardised by statistics that are estimated before training."""

    def __init__(self, config: WavTokenizerNanoConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.mel_bands + config.pitch_candidates
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)
        with torch.device("cpu"):  # torchaudio looks at the values, which a network without weights has not got
            filters = torchaudio.functional.melscale_fbanks(
                _WINDOW + 1, 0.0, config.sample_rate / 2, config.mel_bands, config.sample_rate
            )
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("mean", torch.zeros(self.num_features))
        self.register_buffer("scale", torch.ones(self.num_features))
        self.window: Tensor
        self.filters: Tensor
        self.mean: Tensor
        self.scale: Tensor

    @property
    def margin(self) -> int:
        """Samples on either side of a frame that its features depend on."""
        return (_WINDOW - self.config.hop) // 2

    @torch.no_grad()
    def forward(self, padded: Tensor) -> Tensor:
        """Standardised features `[B, T, I]`, float32, of samples `[B, T * hop + 2 * margin]`."""
        return (self.raw(padded) - self.mean.float()) / self.scale.float()

    def raw(self, padded: Tensor) -> Tensor:
        """As `forward`, not standardised."""
        with torch.autocast(padded.device.type, enabled=False):
            window, filters = self.window.float(), self.filters.float()
            frames = padded.float().unfold(1, _WINDOW, self.config.hop) * window
            power = torch.view_as_real(torch.fft.rfft(frames, 2 * _WINDOW)).square().sum(-1)
            mel = (power.sqrt() @ filters + _FLOOR * _WINDOW / 2).log()
            periodic = pitches.strengths(power, window, self.config.sample_rate, self.config.pitch_candidates)
            return torch.cat([mel, periodic], -1)

    def strengths(self, features: Tensor) -> Tensor:
        """The periodicity `[B, T, P]` among standardised features."""
        return (features * self.scale + self.mean)[..., self.config.mel_bands :]


class Blocks(nn.Module):
    """ConvNeXt blocks behind a convolution, as in Vocos (https://arxiv.org/abs/2306.00814); `reach` frames see each other."""

    def __init__(self, input_dim: int, width: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.reach = _KERNEL_REACH * (num_layers + 1)
        self.embed = nn.Conv1d(input_dim, width, 2 * _KERNEL_REACH + 1, padding=_KERNEL_REACH)
        self.norm, self.final_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ConvNeXtBlock(width, hidden, 1 / num_layers) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, I]` to `[B, T, C]`."""
        x = self.norm(self.embed(x.mT).mT).mT
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x.mT)


class Controls(NamedTuple):
    """What the decoder predicts: logits of the pitch `[B, T, P]`, and magnitudes of pulses and of noise `[B, J, F]`."""

    pitch: Tensor
    harmonic: Tensor
    noise: Tensor


class WavTokenizerNano(Codec):
    """The tokenizer: one id per frame."""

    architecture: ClassVar[str] = "wavtokenizer_nano"
    config_class: ClassVar[type[TokenizerConfig]] = WavTokenizerNanoConfig
    config: WavTokenizerNanoConfig
    decoder: Blocks
    piece: float = 4.0
    whole: str = "looks ahead, and is not streamed"

    def __init__(self, config: WavTokenizerNanoConfig) -> None:
        super().__init__(config, sample_rate=config.sample_rate, hop=config.hop, multiple=config.hop)
        self.features = Features(config)
        self.components = nn.Linear(self.features.num_features, config.dim)
        self.context = Blocks(self.features.num_features, config.width, config.hidden, config.encoder_layers)
        self.correction = nn.Linear(config.width, config.dim)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)
        learning = Learning(decay=config.decay, restart_after=config.restart_after, kmeans_iterations=_KMEANS_ROUNDS)
        self.quantizer = VectorQuantizer(config.codebook_size, config.dim, learning=learning)
        self.decoder = Blocks(config.dim, config.width, config.hidden, config.decoder_layers)
        self.synthesizer = SourceFilter(config.sample_rate, config.hop)
        self._sizes = (config.pitch_candidates, *2 * (SPECTRA_PER_FRAME * self.synthesizer.num_frequencies,))
        self.head = nn.Linear(config.width, sum(self._sizes))

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.codebook_size,), "rate": self.frame_rate}

    # -- encode

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length, seed
        num_frames = -(-batch.shape[-1] // self.hop)
        parts = (
            self.quantizer.ids(self.latents(self.features(self._heard(batch, low, high)))[:, None, start - low : stop - low])
            for start, stop, low, high in self._pieces(num_frames, self.context.reach)
        )
        return self._codes(parts, num_frames)

    def _heard(self, batch: Tensor, low: int, high: int) -> Tensor:
        """The samples `[B, S']` of `[B, 1, S]` that features of frames [low, high) depend on, zeros beyond both ends."""
        first, last = low * self.hop - self.features.margin, high * self.hop + self.features.margin
        inside = batch[:, 0, max(0, first) : last]
        return F.pad(inside, (max(0, -first), max(0, last - batch.shape[-1])))

    def latents(self, features: Tensor) -> Tensor:
        """`[B, T, I]` to `[B, T, D]`: principal components, and what the network makes of their context."""
        features = features.to(self.dtype)
        return self.components(features) + self.correction(self.context(features))

    def _pieces(self, num_frames: int, reach: int) -> Iterator[tuple[int, int, int, int]]:
        """Frames [start, stop) piece by piece, and [low, high), all that they depend on."""
        for start in range(0, num_frames, self._piece_frames):
            stop = min(start + self._piece_frames, num_frames)
            yield start, stop, max(0, start - reach), min(num_frames, stop + reach)

    # -- decode

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del lengths, extras
        return self._collect(self._synthesize(ids), ids.shape[-1])

    def _synthesize(self, ids: Tensor) -> Iterator[Tensor]:
        phase: Tensor | None = None
        for start, stop, low, high in self._pieces(ids.shape[-1], self.decoder.reach + _PITCH_REACH):
            controls = self.controls(self.quantizer.lookup(ids[:, 0, low:high]))
            # Pitch is certain `_PITCH_REACH` frames around the piece; what lies beyond only served as context.
            first, last = max(0, start - _PITCH_REACH), min(high, stop + _PITCH_REACH)
            frames = slice(first - low, last - low)
            spectra = slice(SPECTRA_PER_FRAME * frames.start, SPECTRA_PER_FRAME * frames.stop)
            frequency = self.pitch(controls.pitch[:, frames])
            phases = self.synthesizer.phases(frequency)
            at = phases[:, start - first, None]
            phases = phases - at + (at if phase is None else phase)
            audio = self.synthesizer.render(
                controls.harmonic[:, spectra], controls.noise[:, spectra], frequency, phases.remainder(1), first
            )
            phase = phases[:, stop - first, None].remainder(1) if stop < last else None
            yield audio[..., (start - first) * self.hop : (stop - first) * self.hop].to(self.dtype)

    def controls(self, vectors: Tensor) -> Controls:
        """What the decoder predicts of quantized vectors `[B, T, D]`."""
        pitch, *logs = self.head(self.decoder(vectors.to(self.dtype))).float().split(self._sizes, -1)
        magnitudes = [part.clamp(max=_LOUDEST).exp().unflatten(-1, (SPECTRA_PER_FRAME, -1)).flatten(1, 2) for part in logs]
        return Controls(pitch, *magnitudes)

    def pitch(self, logits: Tensor) -> Tensor:
        """Hz `[B, T]` of logits `[B, T, P]`: the mean around the likeliest candidate, in steps of 1/16 Hz.

        Steps keep rounding errors, which differ between a whole and its pieces, from adding up in the phase.
        """
        count = logits.shape[-1]
        near = logits.argmax(-1, keepdim=True) + torch.arange(-_PEAK_REACH, _PEAK_REACH + 1, device=logits.device)
        inside = (near >= 0) & (near < count)
        weights = logits.gather(-1, near.clamp(0, count - 1)).masked_fill(~inside, -torch.inf).softmax(-1)
        return (pitches.frequency((weights * near).sum(-1), count) * _PITCH_STEPS).round() / _PITCH_STEPS

    # -- training

    @torch.no_grad()
    def initialise(self, clips: Tensor, generator: torch.Generator) -> None:
        """Estimates statistics, principal components, the codebook and mean spectra from clips `[N, 1, S]`."""
        del generator
        num_frames = -(-clips.shape[-1] // self.hop)
        raw = torch.cat([self.features.raw(self._heard(part, 0, num_frames)) for part in clips.split(64)]).flatten(0, 1)
        self.features.mean.copy_(raw.mean(0))
        # One scale for each kind of feature, so that neither bands nor candidates that hardly vary are blown up.
        bands = self.config.mel_bands
        for part in (slice(0, bands), slice(bands, None)):
            self.features.scale[part] = raw[:, part].std(0).square().mean().sqrt()
        x = (raw - self.features.mean) / self.features.scale
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        scale = (self.config.dim / values[-self.config.dim :].sum()).sqrt()
        self.components.weight.copy_(vectors[:, -self.config.dim :].T.flip(0) * scale)
        self.components.bias.zero_()
        assert self.quantizer.learner is not None, "the quantizer learns"
        self.quantizer.learner.start(self.quantizer.codebook, self.components(x))
        spectra = torch.fft.rfft(clips.flatten(1).unfold(1, self.synthesizer.n_fft, 1009) * self.synthesizer.window)
        level = (spectra.abs().square().mean((0, 1)) / self.hop).sqrt().add(1e-5).log()
        nn.init.normal_(self.head.weight, std=0.01)
        self.head.bias.copy_(F.pad(level.repeat(2 * SPECTRA_PER_FRAME) - 2, (self._sizes[0], 0)))

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Distance of mel spectra, cross entropy of the pitch, and commitment of the latents to their codes.

        The pulses have the pitch that is found in the original; what the decoder predicts is heard only in `decode`.
        """
        del progress, generator
        features = self.features(self._heard(batch, 0, -(-batch.shape[-1] // self.hop)))
        found: Quantized = self.quantizer(self.latents(features))
        controls = self.controls(found.vectors)
        strengths = self.features.strengths(features)
        with torch.no_grad():
            place, strength = pitches.track(strengths)
        frequency = pitches.frequency(place, strengths.shape[-1])
        audio, _ = self.synthesizer(controls.harmonic, controls.noise, frequency)
        reconstruction = audio[..., : batch.shape[-1]]
        voiced = ((strength - _VOICED) / (1 - _VOICED)).clamp(0, 1)
        losses = {
            "mel": mel_distance(reconstruction, batch, self.sample_rate, resolutions=_LOSS_RESOLUTIONS, floor=_LOSS_FLOOR),
            "pitch": _PITCH_WEIGHT * _pitch_loss(controls.pitch, place, voiced),
            "quantizer": _QUANTIZER_WEIGHT * found.loss,
        }
        with torch.no_grad():
            used = found.ids.unique().numel() / found.ids.numel()
            error = (pitches.frequency(controls.pitch.argmax(-1), strengths.shape[-1]) / frequency).log2().abs()
            semitones = 12 * (error * voiced).sum() / voiced.sum().clamp_min(1e-6)
        return Output(reconstruction, losses, {"codes_used": torch.tensor(used), "semitones": semitones})


def _pitch_loss(logits: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy with a bump one candidate wide around `place`, `[B, T]`, weighted by `weight`."""
    distance = torch.arange(logits.shape[-1], device=logits.device) - place[..., None]
    target = (-distance.square() / 2).softmax(-1)
    entropy = -(target * logits.float().log_softmax(-1)).sum(-1)
    return (entropy * weight).sum() / weight.sum().clamp_min(1.0)
