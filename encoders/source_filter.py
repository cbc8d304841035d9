"""A source-filter synthesizer: pulses at a given pitch and noise, each shaped by a spectrum that changes over time.

What differentiable synthesis (https://arxiv.org/abs/2001.04643) and neural source-filter models
(https://arxiv.org/abs/1904.12088) have in common. Phases come from the pitch and are not learned, so that a spectral loss
alone, without an adversary, yields steady voices. Nothing here has weights; gradients reach the spectra, not the pitch.

Shapes: B batch, T frames, S samples, J = 2 T spectra, F = n_fft / 2 + 1 frequencies.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NOISE_SAMPLES = 1 << 16
_NOISE_SEED = 20261122
SPECTRA_PER_FRAME = 2


class SourceFilter(nn.Module):
    """Pitch and spectra to audio.

    There are two spectra a frame, `hop / 2` samples apart, with windows of `2 * hop` samples.

    Args:
        sample_rate: In Hz.
        hop: Samples per frame, a multiple of 4.
    """

    def __init__(self, sample_rate: int, hop: int) -> None:
        super().__init__()
        if hop % (2 * SPECTRA_PER_FRAME):
            raise ValueError(f"expected a hop that is a multiple of {2 * SPECTRA_PER_FRAME}, got {hop}")
        self.sample_rate, self.hop = sample_rate, hop
        self.step, self.n_fft = hop // SPECTRA_PER_FRAME, 2 * hop
        self.margin = (self.n_fft - self.step) // 2
        noise = torch.randn(_NOISE_SAMPLES, generator=torch.Generator().manual_seed(_NOISE_SEED), device="cpu")
        self.register_buffer("noise", noise, persistent=False)
        self.register_buffer("window", torch.hann_window(self.n_fft).sqrt(), persistent=False)
        self.noise: Tensor
        self.window: Tensor

    @property
    def num_frequencies(self) -> int:
        """Frequencies of a spectrum F."""
        return self.n_fft // 2 + 1

    def forward(self, harmonic_BJF: Tensor, noise_BJF: Tensor, pitch_BT: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Shapes both sources and adds them up.

        Args:
            harmonic_BJF: Magnitudes that pulses of unit power get.
            noise_BJF: Magnitudes that white noise of unit power gets.
            pitch_BT: Pulses per second at the middle of each frame.
            start: Index of the first frame in the recording, which decides where in the noise it stands.

        Returns:
            Audio `[B, 1, T * hop]`, and the phase at the middle of each frame in cycles, float64 `[B, T]`, which begins at 0.
        """
        phases = self.phases(pitch_BT)
        return self.render(harmonic_BJF, noise_BJF, pitch_BT, phases, start), phases

    def phases(self, pitch_BT: Tensor) -> Tensor:
        """Phase at the middle of each frame in cycles, float64 `[B, T]`: the pitch is linear in between, and the first is 0."""
        pitch = pitch_BT.detach().double()
        steps = (pitch[:, 1:] + pitch[:, :-1]) * (self.hop / self.sample_rate / 2)
        return F.pad(steps.cumsum(1), (1, 0))

    def render(self, harmonic_BJF: Tensor, noise_BJF: Tensor, pitch_BT: Tensor, phases_BT: Tensor, start: int) -> Tensor:
        """As `forward`, of given phases."""
        with torch.autocast(harmonic_BJF.device.type, enabled=False):
            pulses, noise = self._sources(pitch_BT, phases_BT, start)
            spectrum = harmonic_BJF.float() * self._spectra(pulses) + noise_BJF.float() * self._spectra(noise)
            frames = torch.fft.irfft(spectrum, self.n_fft) * self.window
            envelope = self._overlap_add(self.window.square().expand(1, frames.shape[1], -1))
            return (self._overlap_add(frames) / envelope)[:, None]

    @torch.no_grad()
    def _sources(self, pitch_BT: Tensor, phases_BT: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Pulses and noise `[B, T * hop + 2 * margin]`."""
        num_frames = pitch_BT.shape[1]
        samples = torch.arange(-self.margin, num_frames * self.hop + self.margin, device=pitch_BT.device)
        place = (samples.double() + 0.5) / self.hop - 0.5
        before = place.floor().clamp(0, num_frames - 1).long()
        after = (before + 1).clamp(max=num_frames - 1)
        place = place - before
        pitch = pitch_BT.double()
        change = (pitch[:, after] - pitch[:, before]) * (place >= 0)
        cycles = (pitch[:, before] * place + change * place.square() / 2) * (self.hop / self.sample_rate)
        phase = (phases_BT[:, before] + cycles).remainder(1)
        pulses = _pulses(phase, pitch[:, before] + change * place, self.sample_rate)
        noise = self.noise[(samples + start * self.hop) % _NOISE_SAMPLES]
        return pulses.float(), noise.float().expand(len(pitch), -1)

    def _spectra(self, signal: Tensor) -> Tensor:
        """Complex `[B, J, F]` of `[B, S + 2 * margin]`."""
        return torch.fft.rfft(signal.unfold(1, self.n_fft, self.step) * self.window)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """Windows `[B, J, n_fft]`, `step` samples apart, as one signal `[B, J * step]` without what hangs over the ends."""
        overlaps = self.n_fft // self.step
        parts = frames.unflatten(2, (overlaps, self.step))
        whole = parts.new_zeros(len(frames), frames.shape[1] + overlaps - 1, self.step)
        for i in range(overlaps):
            whole[:, i : i + frames.shape[1]] += parts[:, :, i]
        return whole.flatten(1)[:, self.margin : -self.margin]


def _pulses(phase: Tensor, pitch: Tensor, sample_rate: int) -> Tensor:
    """All harmonics below half the sample rate, equally strong, of unit power together (Dirichlet's kernel).

    The highest fades in, so that a changing pitch causes no clicks.
    """
    highest = (sample_rate / 2 / pitch).clamp_min(1)
    count = highest.floor()
    slow = torch.sin(torch.pi * phase)
    near = slow.abs() < 1e-6
    ratio = torch.sin(torch.pi * (2 * count + 1) * phase) / torch.where(near, 1, slow)
    whole = (torch.where(near, 2 * count + 1, ratio) - 1) / 2
    fading = (highest - count) * torch.cos(2 * torch.pi * (count + 1) * phase)
    return (whole + fading) * (2 / highest).sqrt()
