import numpy as np
import pytest
import torch
from PIL import Image

from tokenzoo.tokenizers import MediaError
from tokenzoo.tokenizers.clips import Video, read_clip


def floats(frames=5, height=20, width=30):
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_items_are_clips():
    video, clip, picture = Video(), floats(), Image.new("RGB", (4, 4))
    counts = {1: ["a.mp4", b"", clip, (clip, 25), [picture] * 3, picture], 2: [["a", "b"], [clip] * 2, torch.stack([clip] * 2)]}
    for count, media in counts.items():
        assert [len(video.items(item)) for item in media] == [count] * len(media)
    assert len(video.items([])) == 0


def test_forms_of_one_clip_are_read_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    pictures = [Image.fromarray(frame) for frame in pixels]
    for item in (
        pixels,
        pixels.transpose(0, 3, 1, 2),
        torch.from_numpy(pixels),
        pictures,
        list(pixels),
        expected,
        (pixels, 12.5),
    ):
        clip, meta = Video().read(item)
        assert torch.equal(clip, expected)
        assert meta.get("fps") == (12.5 if isinstance(item, tuple) else None)


@pytest.mark.parametrize("lone_first", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 4, 5, 9, 40])
def test_padding_is_trimmed_back(frames, lone_first):
    video, original = Video(stride=16, frame_stride=4, lone_first=lone_first), floats(frames, 17, 33)
    padded, meta = video.read(original)
    assert padded.shape[2:] == (32, 48)
    assert (len(padded) - lone_first) % 4 == 0
    assert 0 <= len(padded) - frames < 4
    assert torch.equal(video.restore(padded, meta), original)
    assert torch.equal(padded[:frames, :, 17:, :33], original[:, :, -1:].expand(-1, -1, 15, -1))


@pytest.mark.parametrize(("fit", "size"), [("crop", (20, 20)), ("adm", (20, 20)), ("stretch", (20, 30))])
def test_resized_clips_come_back_in_their_size(fit, size):
    video = Video(16, fit)
    clip, meta = video.read(floats())
    assert clip.shape == (5, 3, 16, 16)
    assert video.restore(clip, meta).shape == (5, 3, *size)
    assert video.restore(clip, {}).shape == (5, 3, 16, 16)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.full((1, 3, 4, 4), 2.0), r"\[0, 1\]"),
        (torch.full((1, 3, 4, 4), float("nan")), "nan"),
        (torch.zeros(2, 4, 4, 4), "pass a list"),
        (torch.zeros(0, 3, 4, 4), "with pixels"),
        (np.zeros((1, 3, 4, 4), np.int64), "uint8"),
        ([], "empty list"),
        (None, "NoneType"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "one size"),
        ([Image.new("RGB", (4, 4)), "a.png"], "str at 1"),
    ],
)
def test_what_is_no_clip_is_refused(item, message):
    with pytest.raises(MediaError, match=message):
        read_clip(item)
