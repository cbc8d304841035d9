import numpy as np
import pytest
import torch

from tokenzoo.evaluation.bundling import BEGIN, END
from tokenzoo.evaluation.clip_codecs import AV1, H264, best_clip, slice_bytes
from tokenzoo.evaluation.clip_release import Row, Set, by_frames, measured_tokenizer, refreshed, tiles
from tokenzoo.tokenizers.video.vidtok_nano import VidTokNano, VidTokNanoConfig

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip():
    """A smooth scene that drifts by a pixel a frame."""
    coarse = torch.from_numpy(np.random.default_rng(0).random((1, 3, 6, 7)))
    scene = torch.nn.functional.interpolate(coarse, size=(64, 70), mode="bicubic").clamp(0, 1)[0]
    frames = torch.stack([scene[:, :, i : i + 64] for i in range(6)])
    return (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()


def error(restored, clip):
    return np.square(restored.astype(float) - clip).mean()


@pytest.mark.parametrize("codec", [H264, AV1], ids=lambda codec: codec.name)
def test_codecs_give_back_every_frame_and_keep_their_budget(codec, clip):
    if codec.encoder not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec.encoder} here")
    sizes = {crf: codec.encode(clip, crf) for crf in (20, codec.worst)}
    assert all(decoded.shape == clip.shape for _, decoded in sizes.values())
    assert sizes[20][0] > sizes[codec.worst][0] > 20
    assert error(sizes[20][1], clip) < error(sizes[codec.worst][1], clip)
    best = best_clip(codec, clip, sizes[20][0])
    assert best.shape == clip.shape
    assert error(best, clip) <= error(sizes[20][1], clip)
    assert best_clip(codec, clip, 10) is None
    if codec is AV1:
        assert best_clip(codec, clip[:, ::2, ::2], 10_000) is None


def test_only_slices_are_counted():
    parameters, remark, slices = b"\0\0\0\1\x67abc", b"\0\0\1\x06" + b"x" * 600, b"\0\0\1\x65abcd"
    assert slice_bytes(parameters + remark + slices) == 3 + 5
    assert slice_bytes(b"\0\0\0\1\x41ab") == 3 + 3


class Averaging:
    """Stands in for an image tokenizer: a tile becomes its mean."""

    config = type("Config", (), {"image_size": 16})

    def encode(self, images, *, length):
        assert length == 3
        return images

    def decode(self, images):
        return [image.mean((1, 2), keepdim=True).expand_as(image) for image in images]


def test_frames_are_tiled_and_put_together_again(clip):
    restored = by_frames(Averaging(), clip[:2, :32, :48], 3)
    assert restored.shape == (2, 32, 48, 3)
    for frame, original in zip(restored, clip[:2, :32, :48], strict=True):
        for tile, expected in zip(tiles(frame, 16), tiles(original, 16), strict=True):
            assert np.abs(tile - expected.mean((0, 1))).max() <= 0.51


def test_a_tokenizer_is_measured_on_what_it_decodes(clip):
    tokenizer = VidTokNano(VidTokNanoConfig(width=4, blocks=1)).eval()
    row, num_bytes, codes = measured_tokenizer(tokenizer, "grey", clip[None])
    grey = np.full_like(clip, 128)
    assert num_bytes == 64 * 3 * 18 // 8
    assert row.psnr == pytest.approx(-10 * np.log10(error(grey, clip) / 255**2), abs=0.05)
    assert row.ssim < 1
    assert codes


def test_the_card_is_refreshed_between_its_markers(clip):
    rows = [Row("**x**", 25.0, 0.8, 22.0, 26.123), Row("AV1", 31.0, 0.9, 30.0, 32.0, reached=0.8)]
    text = refreshed(f"before\n{BEGIN}\nold\n{END}\nafter", [Set(clip[None], 432, rows)], 12, 96, 4321)
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "old" not in text
    assert "| **x** | 25.00 | 0.800 | 22.00 | 26.12 |" in text
    assert "| AV1 | 31.00 (80%) | 0.900 | 30.00 | 32.00 |" in text
    assert "1 held-out crops of 6 frames of 64 x 64 pixels, 432 bytes each (0.141 bit per pixel):" in text
    assert "step 12, after 96 clips. 4,321 codes" in text
    with pytest.raises(ValueError, match="expected the card to hold"):
        refreshed("nothing", [], 0, 0, 0)
