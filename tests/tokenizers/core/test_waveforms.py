import io
import math

import numpy as np
import pytest
import soundfile
import torch

from tokenzoo.tokenizers import MediaError
from tokenzoo.tokenizers._torchaudio import torchaudio
from tokenzoo.tokenizers.waveforms import Audio, read_audio, resample, resampled_length


def tone(samples=1000, rate=16000, channels=1):
    time = torch.arange(samples) / rate
    return torch.stack([0.5 * torch.sin(2 * math.pi * 440 * (k + 1) * time) for k in range(channels)])


def encoded(waveform, rate, file_format, subtype):
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.T.numpy(), rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("file_format", "subtype", "step"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-24),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
    ],
)
def test_files_of_every_depth(file_format, subtype, step, channels, tmp_path):
    wave = tone(channels=channels)
    path = tmp_path / "tone"
    path.write_bytes(encoded(wave, 16000, file_format, subtype))
    for item in (path, str(path), path.read_bytes()):
        read, rate = read_audio(item)
        assert rate == 16000
        torch.testing.assert_close(read, wave, rtol=0, atol=step)


@pytest.mark.parametrize(("file_format", "subtype"), [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_files(file_format, subtype):
    wave = tone(48000, 24000, 2)
    read, rate = read_audio(encoded(wave, 24000, file_format, subtype))
    assert (rate, len(read)) == (24000, 2)
    count = min(read.shape[1], 48000)
    assert float((read[:, :count] - wave[:, :count]).abs().mean()) < 0.1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float16, np.float32, np.float64])
def test_arrays_and_tensors_of_every_type(dtype):
    wave = tone()[0].numpy()
    scale = {"u": 128, "i": 2 ** (8 * np.dtype(dtype).itemsize - 1), "f": 1}[np.dtype(dtype).kind]
    array = (wave * scale + (128 if dtype == np.uint8 else 0)).astype(dtype)
    for item in (array, array[None], torch.from_numpy(array)):
        read, rate = read_audio(item)
        assert rate is None
        assert read.dtype == torch.float32
        torch.testing.assert_close(read, torch.from_numpy(wave)[None], rtol=0, atol=1 / min(scale, 100) if scale > 1 else 1e-3)


def test_items():
    audio, wave = Audio(16000), tone()
    assert len(audio.items((wave, 16000))) == 1
    assert len(audio.items([(wave, 16000), (wave, 8000)])) == 2
    assert len(audio.items((wave, wave))) == 2
    assert len(audio.items(torch.zeros(3, 1, 100))) == 3
    assert len(audio.items(torch.zeros(3, 100))) == 1
    assert len(audio.items("tone.wav")) == 1
    assert len(audio.items([])) == 0


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize("samples", [1, 2, 999, 1000])
def test_conversions_to_and_fro_keep_the_number_of_samples(rate, samples):
    audio = Audio(24000)
    heard, meta = audio.read((tone(samples, rate, 2), rate))
    assert heard.shape == (1, resampled_length(samples, rate, 24000))
    assert meta == {"samples": samples, "sample_rate": rate, "channels": 2}
    frames = torch.nn.functional.pad(heard, (0, 320))
    assert audio.restore(frames, meta).shape == (1, samples)
    assert audio.trim(frames, meta).shape == heard.shape


def test_resampling_is_torchaudios():
    wave = tone(4410, 44100)
    heard, _ = Audio(24000).read((wave, 44100))
    torch.testing.assert_close(heard, torchaudio.functional.resample(wave, 44100, 24000))
    back = Audio(24000).restore(heard, {"samples": 4410, "sample_rate": 44100, "channels": 1})
    assert float((back - wave)[:, 200:-200].abs().max()) < 1e-3


def test_channels():
    three = torch.stack([torch.full((10,), value) for value in (0.1, 0.2, 0.6)])
    mono, stereo = Audio(16000), Audio(16000, 2)
    torch.testing.assert_close(mono.read(three)[0], torch.full((1, 10), 0.3))
    torch.testing.assert_close(stereo.read(three)[0], torch.full((2, 10), 0.3))
    torch.testing.assert_close(stereo.read(three[:2])[0], three[:2])
    heard, meta = stereo.read(three[:1])
    torch.testing.assert_close(heard, three[:1].expand(2, -1))
    torch.testing.assert_close(stereo.restore(three[:2], meta), torch.full((1, 10), 0.15))
    assert stereo.trim(three[:2], meta).shape == (2, 10)


def test_a_recording_without_a_rate_is_at_the_networks():
    assert Audio(32000).read(tone())[1] == {"samples": 1000, "sample_rate": 32000, "channels": 1}


def test_overshoot_and_clipping_are_heard_as_they_are():
    loud = torch.tensor([[1.5, -2.0, 1.0, 1.0]])
    assert torch.equal(Audio(16000).read(loud)[0], loud)
    assert float(Audio(16000).restore(loud, {}).abs().max()) == 1


def test_without_meta_whole_frames_come_back():
    assert Audio(16000).restore(torch.zeros(1, 640), {}).shape == (1, 640)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(1, 0), "no samples"),
        (torch.zeros(0, 5), "no samples"),
        (torch.tensor([0.0, math.nan]), "not finite"),
        (torch.tensor([0.0, -math.inf]), "not finite"),
        (torch.full((5,), 1000.0), "full scale"),
        (torch.zeros(1000, 2), "transpose"),
        (torch.zeros(2, 2, 2, 2), "pass a list"),
        (torch.zeros(5, dtype=torch.int64), "int16"),
        (torch.zeros(5, dtype=torch.bool), "int16"),
        ((torch.zeros(5), 0), "sample rate"),
        ((torch.zeros(5), True), "sample rate"),
        ((torch.zeros(5), 16000.5), "sample rate"),
        ((torch.zeros(5), 16000, 1), "sample rate"),
        ((torch.zeros(5), 16001), "common rate"),
        (None, "NoneType"),
        (b"", "0 bytes"),
        (b"RIFF....WAVE", "libsndfile"),
        ("missing.wav", "does not exist"),
    ],
)
def test_what_is_not_a_recording_is_refused(item, message):
    with pytest.raises(MediaError, match=message):
        Audio(24000).read(item)


def test_damaged_and_misplaced_files_are_refused(tmp_path):
    with pytest.raises(MediaError, match="folder"):
        read_audio(tmp_path)
    wav = encoded(tone(), 16000, "FLAC", "PCM_16")
    for cut in (3, 20, 60):
        with pytest.raises(MediaError):
            read_audio(wav[:cut])
    empty = encoded(torch.zeros(1, 0), 16000, "WAV", "PCM_16")
    with pytest.raises(MediaError, match="no samples"):
        read_audio(empty)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
@pytest.mark.parametrize("samples", [1001, 2000, 7777])
def test_long_recordings_are_resampled_in_pieces(rate, samples, monkeypatch):
    wave = tone(samples, rate, 2)
    whole = resample(wave, rate, 24000)
    monkeypatch.setattr("tokenzoo.tokenizers.waveforms._RESAMPLED_AT_ONCE", 1000)
    torch.testing.assert_close(resample(wave, rate, 24000), whole, rtol=0, atol=1e-5)
