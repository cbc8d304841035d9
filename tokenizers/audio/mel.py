"""Distance between spectra on the mel scale, at several resolutions: the reconstruction loss of most neural codecs."""

import functools

import torch
from torch import Tensor

from tokenzoo.tokenizers._torchaudio import torchaudio

_RESOLUTIONS = ((64, 8), (256, 32), (1024, 80), (2048, 128))  # window in samples, mel bands
_FLOOR = 1e-5


def mel_distance(
    reconstruction: Tensor,
    original: Tensor,
    sample_rate: int,
    *,
    resolutions: tuple[tuple[int, int], ...] = _RESOLUTIONS,
    floor: float = 0.0,
) -> Tensor:
    """Mean absolute difference of log10 mel magnitudes, averaged over resolutions (DAC, https://arxiv.org/abs/2306.06546).

    Args:
        reconstruction: `(B, C, S)`.
        original: `(B, C, S)`.
        sample_rate: In Hz.
        resolutions: Windows in samples, each with its number of mel bands.
        floor: Added to all bands, as a share of a full-scale sine, so that what is softer hardly counts.

    Returns:
        A scalar.
    """
    x, y = reconstruction.flatten(0, 1).float(), original.flatten(0, 1).float()
    distances = []
    for window, bands in resolutions:
        added = floor * window / 4 if floor else 0.0  # a quarter of the window is a sine's magnitude under Hann's
        a, b = (_log_mel(signal, window, bands, sample_rate, added) for signal in (x, y))
        distances.append((a - b).abs().mean())
    return torch.stack(distances).mean()


def _log_mel(x: Tensor, window: int, bands: int, sample_rate: int, added: float) -> Tensor:
    """`(N, S)` to `(N, bands, frames)`."""
    hann = torch.hann_window(window, device=x.device)
    spectrum = torch.stft(x, window, window // 4, window=hann, pad_mode="constant", return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square()).clamp_min(_FLOOR**2).sqrt()
    mel = _filters(window, bands, sample_rate).to(x.device).T @ magnitude
    return (mel + added).clamp_min(_FLOOR).log10()


@functools.cache
def _filters(window: int, bands: int, sample_rate: int) -> Tensor:
    """Triangles over frequency bins, `(window / 2 + 1, bands)`; narrow windows leave some of the low bands empty."""
    return torchaudio.functional.melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate)
