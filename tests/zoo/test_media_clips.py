"""Clips written as files: H.264 in MP4, arrays, features; and clips through the command line."""

import builtins
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tokenzoo import media
from tokenzoo.cli import app
from tokenzoo.tokenizers.clips import read_clip
from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.quality import psnr
from tokenzoo.tokenizers.video.cosmos import Cosmos, CosmosConfig
from tokenzoo.tokenizers.video.vqtoken import VQToken, VQTokenConfig

av = pytest.importorskip("av")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


def moving(frames=7, height=32, width=48):
    """A gradient that moves to the right, `[T, 3, H, W]` in [0, 1]."""
    places = (torch.arange(width)[None] + 3 * torch.arange(frames)[:, None]) % width / width
    rows = torch.linspace(0, 1, height)[None, :, None].expand(frames, height, width)
    return torch.stack([places[:, None].expand(frames, height, width), rows, 1 - rows], 1)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 48), (32, 47), (17, 31)])
@pytest.mark.parametrize("fps", [25.0, 29.97, 12.5])
def test_a_clip_comes_back_with_its_frames_size_and_rate(tmp_path, height, width, fps):
    clip = moving(7, height, width)
    media.write(clip, tmp_path / "clip.mp4", "video", fps=fps)
    read, rate = read_clip(tmp_path / "clip.mp4")
    assert read.shape == clip.shape
    assert rate == pytest.approx(fps, rel=1e-3)
    assert (psnr(read.float() / 255, clip) > 25).all()
    with av.open(tmp_path / "clip.mp4") as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_one_frame_is_a_clip_too_and_25_frames_a_second_are_the_default(tmp_path):
    media.write(moving(1), tmp_path / "clip.mp4", "video")
    read, rate = read_clip(tmp_path / "clip.mp4")
    assert (len(read), rate) == (1, 25)


def test_arrays_are_written_as_they_are(tmp_path):
    for item in (moving(3), torch.randn(2, 5, 5, 16)):
        media.write(item, tmp_path / "item.npy", "video", fps=10)
        assert np.array_equal(np.load(tmp_path / "item.npy"), item.numpy())
    assert torch.equal(
        read_clip(np.load(tmp_path / "item.npy")[..., :3].clip(0, 1))[0].permute(0, 2, 3, 1), item[..., :3].clip(0, 1)
    )


@pytest.mark.parametrize("item", [torch.zeros(2, 5, 5, 16), torch.zeros(3, 8, 8), torch.zeros(0, 3, 8, 8)])
def test_what_is_no_clip_is_not_written_as_one(tmp_path, item):
    with pytest.raises(MediaError, match=r"expected a clip \[T, 3, H, W\].*write it as .npy"):
        media.write(item, tmp_path / "clip.mp4", "video")
    assert not (tmp_path / "clip.mp4").exists()


def test_what_h264_cannot_hold_is_said(tmp_path):
    with pytest.raises(MediaError, match=r"frames per second cannot be written as \.mp4"):
        media.write(moving(2), tmp_path / "clip.mp4", "video", fps=-1.0)
    assert not (tmp_path / "clip.mp4").exists()


def test_without_pyav_it_is_said_what_to_install(tmp_path, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MediaError, match=r"pip install 'tokenzoo\[video\]', or write .npy"):
        media.write(moving(2), tmp_path / "clip.mp4", "video")


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = CosmosConfig(frame_stride=4, channels=8, multipliers=(1, 1), latent_channels=4, patch=4)
    return Cosmos(config).eval().save_pretrained(tmp_path / "model")


@pytest.fixture
def clips(tmp_path):
    (tmp_path / "clips").mkdir()
    media.write(moving(6, 24, 40), tmp_path / "clips" / "a.mp4", "video", fps=12.5)
    media.write(moving(3, 16, 24), tmp_path / "clips" / "b.mp4", "video", fps=30)
    (tmp_path / "clips" / "notes.txt").write_text("no clip")
    return tmp_path / "clips"


def test_clips_to_tokens_and_back(model, clips, tmp_path):
    report = json.loads(run("encode", clips, "-o", tmp_path / "tokens", "-m", model, "--json").stdout)
    assert [row["tokens"] for row in report["done"]] == [3 * 3 * 5, 2 * 2 * 3]
    run("decode", tmp_path / "tokens", "-o", tmp_path / "back", "-m", model)
    for name, shape, fps in (("a", (6, 3, 24, 40), 12.5), ("b", (3, 3, 16, 24), 30)):
        read, rate = read_clip(tmp_path / "back" / f"{name}.mp4.tok.mp4")
        assert read.shape == shape
        assert rate == pytest.approx(fps)
    run("decode", tmp_path / "tokens" / "a.mp4.tok", "-o", tmp_path / "a.npy", "-m", model)
    assert np.load(tmp_path / "a.npy").shape == (6, 3, 24, 40)


def test_features_are_written_as_arrays(clips, tmp_path):
    torch.manual_seed(0)
    config = VQTokenConfig(
        tower="test_vit", tower_layers=0, image_size=32, dim=8, frames=4, clusters=5, heads=2, feedforward=16
    )
    model = VQToken(config).eval().save_pretrained(tmp_path / "model")
    run("encode", clips / "a.mp4", "-o", tmp_path / "a.tok", "-m", model)
    run("decode", tmp_path / "a.tok", "-o", tmp_path / "out", "-m", model)
    (written,) = (tmp_path / "out").iterdir()
    assert (written.suffix, np.load(written).shape) == (".npy", (4, 2, 2, 8))
    result = run("decode", tmp_path / "a.tok", "-o", tmp_path / "a.mp4", "-m", model, code=2)
    assert ".npy" in result.stderr


def test_a_whole_file_or_none(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"before")
    monkeypatch.setattr(media, "to_pil", lambda frame: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(MediaError, match="broken"):
        media.write(moving(2), tmp_path / "clip.mp4", "video")
    assert (tmp_path / "clip.mp4").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
