"""Audio and text through the command line: audio with a tiny codec in a folder."""

import io
import json

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from tokenzoo import media
from tokenzoo.cli import app
from tokenzoo.tokenizers.audio.encodec import Encodec, EncodecConfig
from tokenzoo.tokenizers.errors import MediaError


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = EncodecConfig(sample_rate=8000, ratios=(5, 2), filters=4, dim=8, codebook_size=32, num_codebooks=4)
    return Encodec(config).eval().save_pretrained(tmp_path / "model")


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    samples = 0.3 * np.sin(np.arange(3001) * 0.05)
    soundfile.write(folder / "mono.wav", samples, 8000)
    soundfile.write(folder / "stereo.flac", np.stack([samples, -samples], 1), 16000)
    (folder / "notes.txt").write_text("not a recording")
    return folder


def test_recordings_to_tokens_and_back(model, recordings, tmp_path):
    report = json.loads(run("encode", recordings, "-o", tmp_path / "tokens", "-m", model, "-t", "kbps=8", "--json").stdout)
    assert [row["tokens"] for row in report["done"]] == [2 * 301, 2 * 151]
    run("decode", tmp_path / "tokens", "-o", tmp_path / "back", "-m", model)
    mono, stereo = (soundfile.info(tmp_path / "back" / f"{name}.tok.wav") for name in ("mono.wav", "stereo.flac"))
    assert (mono.samplerate, mono.frames, mono.channels) == (8000, 3001, 1)
    assert (stereo.samplerate, stereo.frames, stereo.channels) == (16000, 3001, 1)
    one = tmp_path / "one.wav"
    run("decode", tmp_path / "tokens" / "stereo.flac.tok", "-o", one, "-m", model, "--native")
    assert (soundfile.info(one).samplerate, soundfile.info(one).frames) == (8000, 1501)


def test_roundtrip_reports_audio_measures(model, recordings, tmp_path):
    report = json.loads(run("roundtrip", recordings, "-o", tmp_path / "back", "-m", model, "--json").stdout)
    assert {"file", "tokens", "bytes", "snr", "si_sdr"} == report["done"][0].keys()
    assert (tmp_path / "back" / "mono.wav.wav").exists()


def test_a_name_of_another_modality_is_refused(model, recordings, tmp_path):
    run("encode", recordings / "mono.wav", "-o", tmp_path / "a.tok", "-m", model)
    result = run("decode", tmp_path / "a.tok", "-o", tmp_path / "a.png", "-m", model, code=2)
    assert ".wav for audio" in result.stderr
    assert not (tmp_path / "a.png").exists()


def test_wav_is_rounded_to_16_bits():
    wave = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0]])
    samples, rate = soundfile.read(io.BytesIO(media.encode_wav(wave, 24000)), dtype="int16")
    assert rate == 24000
    assert samples.tolist() == [0, 32767, -32767, 16384, 32767]


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(MediaError, match="sample rate"):
        media.write(torch.zeros(1, 5), tmp_path / "a.wav", "audio")
    with pytest.raises(MediaError, match="got scent"):
        media.write(torch.zeros(3), tmp_path / "a.scent", "scent")


@pytest.mark.parametrize(
    ("item", "expected"), [("a\r\né", b"a\r\n\xc3\xa9"), (b"\xff\r\n", b"\xff\r\n"), ("\ud800", b"\xed\xa0\x80")]
)
def test_texts_are_written_byte_by_byte(item, expected, tmp_path):
    media.write(item, tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_bytes() == expected


def test_texts_on_the_command_line(tmp_path):
    texts = {"a.txt": "Grüße\r\n".encode(), "b.md": b"\xff\xfe", "empty.txt": b"", "image.png": b"no text"}
    for name, data in texts.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    run("encode", tmp_path / "in", "-o", tmp_path / "tokens", "-m", "equal_info_nano")
    run("decode", tmp_path / "tokens", "-o", tmp_path / "out")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written == {f"{name}.tok.txt": data for name, data in texts.items() if name != "image.png"}
    rows = json.loads(run("roundtrip", tmp_path / "in" / "a.txt", "-m", "equal_info_nano", "--json").stdout)["done"]
    assert rows[0]["exact"] is True
