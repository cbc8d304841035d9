"""Pitch from normalised autocorrelation (Boersma 1993), as a strength for every candidate and as the likeliest track.

Shapes: B batch, S samples, T frames, P candidates.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOWEST, OCTAVES = 60.0, 3.0
_OCTAVE_COST, _JUMP_COST, _FARTHEST = 0.06, 2.0, 12
_SILENCE = 1e-7


def candidates(count: int) -> Tensor:
    """Frequencies in Hz, `[P]`, evenly spaced on a logarithmic scale."""
    return LOWEST * 2 ** (torch.arange(count) * (OCTAVES / (count - 1)))


def strengths(power: Tensor, window: Tensor, sample_rate: int, count: int) -> Tensor:
    """How periodic each frame is at each candidate, about 0 to 1.

    Args:
        power: Power spectra `[B, T, N + 1]` of windowed frames, padded with zeros to 2 N samples, N at least the window.
        window: The window.
        sample_rate: In Hz.
        count: Candidates P.

    Returns:
        `[B, T, P]`.
    """
    lags = sample_rate / candidates(count).to(power.device)
    below = lags.floor().long()
    of_window = torch.fft.irfft(torch.fft.rfft(window, 2 * (power.shape[-1] - 1)).abs().square())
    found = torch.fft.irfft(power)
    found = found / (found[..., :1] + _SILENCE * len(window))
    found = found[..., : int(below.max()) + 2] / (of_window / of_window[0])[: int(below.max()) + 2]
    return torch.lerp(found[..., below], found[..., below + 1], lags - below)


def track(strengths_BTP: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest pitch (Viterbi), as a place among the candidates `[B, T]`, not whole, and how strong it is `[B, T]`."""
    num_frames, count = strengths_BTP.shape[1:]
    higher = torch.arange(count, device=strengths_BTP.device) / (count - 1) * OCTAVES
    score = strengths_BTP + _OCTAVE_COST * higher
    jumps = torch.arange(-_FARTHEST, _FARTHEST + 1, device=score.device)
    costs = _JUMP_COST * (jumps.abs() * (OCTAVES / (count - 1)))
    total, back = score[:, 0], []
    for t in range(1, num_frames):
        padded = F.pad(total, (_FARTHEST, _FARTHEST), value=-math.inf)
        best, chosen = (padded.unfold(1, 2 * _FARTHEST + 1, 1) - costs).max(-1)
        back.append(jumps[chosen])
        total = best + score[:, t]
    place = total.argmax(1)
    path = [place]
    for moves in reversed(back):
        place = place + moves.gather(1, place[:, None])[:, 0]
        path.append(place)
    places = torch.stack(path[::-1], 1)
    strength = strengths_BTP.gather(2, places[..., None])[..., 0]
    return places + _offset(strengths_BTP, places), strength


def _offset(strengths_BTP: Tensor, places: Tensor) -> Tensor:
    """Where the parabola through a candidate and its neighbours is highest, from -0.5 to 0.5."""
    last = strengths_BTP.shape[-1] - 1
    low, middle, high = (strengths_BTP.gather(2, (places + i).clamp(0, last)[..., None])[..., 0] for i in (-1, 0, 1))
    bend = low - 2 * middle + high
    return torch.where(bend < -1e-6, (low - high) / (2 * bend.clamp(max=-1e-6)), 0).clamp(-0.5, 0.5)


def frequency(place: Tensor, count: int) -> Tensor:
    """Hz of places among `count` candidates."""
    return LOWEST * 2 ** (place * (OCTAVES / (count - 1)))
