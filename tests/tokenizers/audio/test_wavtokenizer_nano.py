from pathlib import Path

import pytest
import torch

import tokenzoo
from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.audio import pitch as pitches
from tokenzoo.tokenizers.audio.mel import mel_distance
from tokenzoo.tokenizers.audio.wavtokenizer_nano import WavTokenizerNano, WavTokenizerNanoConfig
from tokenzoo.tokenizers.waveforms import read_audio

SPEECH = Path(__file__).parents[2] / "golden" / "speech.flac"  # see LICENSES.md there
CARD = "wavtokenizer_nano.speech"
RATE = 16000


def voice(pitch, seconds, loudness=0.1):
    """A vowel: harmonics under two formants, with a slow vibrato."""
    time = torch.arange(round(seconds * RATE)) / RATE
    phase = 2 * torch.pi * pitch * time + 0.3 * torch.sin(2 * torch.pi * 4 * time)
    harmonics = torch.arange(1, int(3500 / pitch))[:, None]
    formants = torch.exp(-(((harmonics * pitch - 600) / 250) ** 2)) + 0.4 * torch.exp(
        -(((harmonics * pitch - 1400) / 300) ** 2)
    )
    whole = (formants * torch.sin(harmonics * phase)).sum(0)
    return loudness * whole / whole.square().mean().sqrt()


def heard_pitch(wave):
    features = WavTokenizerNano(WavTokenizerNanoConfig(codebook_size=2, encoder_layers=1, decoder_layers=1)).features
    frames = -(-len(wave) // 216)
    padded = torch.nn.functional.pad(wave, (features.margin, frames * 216 - len(wave) + features.margin))
    place, strength = pitches.track(features.strengths(features(padded[None])))
    return pitches.frequency(place, 128)[0, 10:-10], strength[0, 10:-10]


@pytest.fixture(scope="module")
def tok():
    return tokenzoo.load(CARD, local_files_only=True)


@pytest.mark.parametrize("hertz", [75.0, 118.0, 220.0, 390.0])
def test_the_pitch_of_a_voice_is_found(hertz):
    found, strength = heard_pitch(voice(hertz, 1.0))
    semitones = 12 * (found / hertz).log2()
    assert float(semitones.abs().median()) < 0.5
    assert float(semitones.abs().max()) < 1.5
    assert float(strength.min()) > 0.7


def test_noise_has_no_pitch_to_speak_of():
    _, strength = heard_pitch(0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0)))
    assert float(strength.mean()) < 0.45


def test_the_track_prefers_one_long_path_to_jumps():
    strengths = torch.zeros(1, 30, 64)
    strengths[0, :, 20] = 0.8
    strengths[0, 10:12, 44] = 0.9  # an octave error of the moment
    place, _ = pitches.track(strengths)
    assert place[0].round().eq(20).all()


@pytest.mark.parametrize("samples", [1, 215, 216, 217, 5000])
def test_the_shipped_weights_give_whole_frames_and_every_sample(tok, samples):
    tokens = tok.encode((voice(150, 1.0)[:samples], RATE))
    assert tokens.ids.shape == (1, 1, -(-samples // 216))
    assert tok.decode(tokens)[0].shape == (1, samples)
    assert tok.info.bits_per_second == pytest.approx(963, abs=0.1)


def test_the_shipped_weights_keep_pitch_loudness_and_spectrum_of_speech(tok):
    original, _ = read_audio(SPEECH)
    decoded = tok.decode(tok.encode(SPEECH))[0]
    assert decoded.shape == original.shape
    (before, strength), (after, _) = heard_pitch(original[0]), heard_pitch(decoded[0])
    assert float((12 * (after / before).log2()).abs()[strength > 0.8].median()) < 1
    assert 0.7 < float(decoded.square().mean().sqrt() / original.square().mean().sqrt()) < 1.4
    assert mel_distance(decoded[None], original[None], RATE) < 0.35
    assert mel_distance(decoded.roll(1600)[None], original[None], RATE) > 0.5


def test_a_long_recording_is_processed_in_pieces(tok):
    original = torch.cat([voice(pitch, 2.1) for pitch in (110, 160, 240)])
    whole = tok.encode((original, RATE))
    audio = tok.decode(whole)[0]
    tok.piece, before = 1.0, tok.piece
    try:
        assert torch.equal(tok.encode((original, RATE)).ids, whole.ids)
        assert float((tok.decode(whole)[0] - audio).abs().max()) < 1e-3
    finally:
        tok.piece = before
    with pytest.raises(TokensError, match="looks ahead"):
        tok.stream()


def test_training_starts_from_principal_components_and_a_used_codebook():
    torch.manual_seed(0)
    config = {"codebook_size": 32, "width": 16, "hidden": 16, "encoder_layers": 1, "decoder_layers": 1, "dim": 4}
    tok = WavTokenizerNano(WavTokenizerNanoConfig(**config))
    clips = torch.stack([voice(80 + 10 * i, 0.2)[None] for i in range(16)])
    tok.initialise(clips, torch.Generator().manual_seed(0))
    features = tok.features(tok._heard(clips, 0, -(-clips.shape[-1] // tok.hop)))
    latents = tok.latents(features).flatten(0, 1).detach()
    covariance = (latents - latents.mean(0)).T @ latents / len(latents)
    spread = covariance.diagonal()
    assert (spread[:-1] >= spread[1:]).all()
    assert float(spread.mean()) == pytest.approx(1, rel=0.05)
    assert float((covariance - spread.diag()).abs().max()) < 0.05 * float(spread[0])
    ids = tok.quantizer.ids(latents)
    assert len(ids.unique()) > 24
    assert float((tok.quantizer.lookup(ids) - latents).square().mean()) < 0.5 * float(latents.square().mean())


def test_sizes_that_cannot_be_are_refused():
    for wrong in ({"hop": 218}, {"hop": 2048}, {"dim": 0}, {"pitch_candidates": 3}, {"dim": 500}):
        with pytest.raises(ConfigError, match="expected"):
            WavTokenizerNanoConfig.from_dict(wrong)
