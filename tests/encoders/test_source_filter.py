import pytest
import torch

from tokenzoo.encoders.source_filter import SourceFilter

RATE, HOP = 16000, 200


def rendered(frames, pitch, *, harmonic=1.0, noise=0.0, start=0):
    synthesizer = SourceFilter(RATE, HOP)
    spectrum = torch.ones(1, 2 * frames, synthesizer.num_frequencies)
    pitch = torch.full((1, frames), float(pitch)) if isinstance(pitch, (int, float)) else pitch
    return synthesizer(harmonic * spectrum, noise * spectrum, pitch, start)


@pytest.mark.parametrize("pitch", [80.0, 123.4, 390.0])
def test_pulses_have_their_pitch_and_unit_power(pitch):
    audio, phases = rendered(80, pitch)
    assert audio.shape == (1, 1, 80 * HOP)
    assert float(audio.square().mean()) == pytest.approx(1, abs=0.06)
    assert float(phases[0, -1] - phases[0, 0]) == pytest.approx(79 * HOP / RATE * pitch)
    spectrum = torch.fft.rfft(audio[0, 0] * torch.hann_window(80 * HOP)).abs()
    # The harmonics hold nearly all power: bins are one hertz apart.
    near = torch.zeros(len(spectrum), dtype=torch.bool)
    for k in range(1, int(RATE / 2 / pitch) + 1):
        near[max(0, round(k * pitch) - 3) : round(k * pitch) + 4] = True
    assert float(spectrum[near].square().sum() / spectrum.square().sum()) > 0.95


def test_a_gliding_pitch_has_no_clicks():
    """Where only what lies below 2 kHz is let through, nothing is left above 4 kHz; clicks would be everywhere."""
    synthesizer = SourceFilter(RATE, HOP)
    shape = torch.ones(1, 200, synthesizer.num_frequencies)
    shape[..., HOP // 4 :] = 0  # below 2 kHz only
    audio, _ = synthesizer(shape, 0 * shape, torch.linspace(100, 300, 100)[None])
    power = torch.fft.rfft(audio[0, 0] * torch.hann_window(audio.shape[-1])).abs().square()
    assert float(power[len(power) // 2 :].sum() / power.sum()) < 1e-4


def test_noise_is_the_same_wherever_decoding_begins():
    whole, _ = rendered(20, 100, harmonic=0, noise=1)
    part, _ = rendered(12, 100, harmonic=0, noise=1, start=8)
    assert float(whole.square().mean()) == pytest.approx(1, abs=0.1)
    assert torch.allclose(whole[..., 11 * HOP :], part[..., 3 * HOP :], atol=1e-5)


def test_gradients_reach_spectra_and_not_the_pitch():
    synthesizer = SourceFilter(RATE, HOP)
    spectra = [torch.ones(1, 8, synthesizer.num_frequencies, requires_grad=True) for _ in range(2)]
    pitch = torch.full((1, 4), 150.0, requires_grad=True)
    synthesizer(*spectra, pitch)[0].square().sum().backward()
    assert all(spectrum.grad.abs().sum() > 0 for spectrum in spectra)
    assert pitch.grad is None


def test_a_hop_that_windows_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        SourceFilter(RATE, 10)
