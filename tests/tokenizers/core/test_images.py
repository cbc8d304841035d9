import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.images import Images, read_image

RNG = np.random.default_rng(0)


def noise(height, width, *bands):
    return RNG.integers(0, 256, (height, width, *bands), dtype=np.uint8)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(item):
    picture = read_image(item)
    return np.array(picture) if isinstance(picture, Image.Image) else picture.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (64, 64), (65, 64), (10, 17), (1000, 41), (1, 1), (3, 40)])
def test_crop_matches_the_published_pipeline_to_the_bit(size):
    picture = Image.fromarray(noise(size[1], size[0], 3))
    published = transforms.Compose(
        [
            transforms.Resize(64, transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
        ]
    )
    tensor, meta = Images(64).read(picture)
    side = min(size)
    if max(size) <= 16 * side:
        assert torch.equal(tensor, published(picture))
    assert meta == {"size": [side, side], "source_size": [size[1], size[0]]}


def test_an_extreme_strip_costs_no_memory():
    tensor, _ = Images(64).read(Image.new("RGB", (60000, 1), "red"))
    assert tensor.shape == (3, 64, 64)
    assert torch.allclose(tensor[0], torch.ones(64, 64))


@pytest.mark.parametrize("size", [(30, 20), (64, 64), (7, 900)])
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_restore_gives_back_the_size_that_was_encoded(size, fit):
    images = Images(64, fit)
    tensor, meta = images.read(Image.fromarray(noise(size[1], size[0], 3)))
    restored = images.restore(tensor * 3 - 1, meta)
    expected = (3, min(size), min(size)) if fit == "crop" else (3, size[1], size[0])
    assert restored.shape == expected
    assert 0 <= float(restored.min()) <= float(restored.max()) <= 1
    assert images.restore(tensor, {}).shape == (3, 64, 64)


def test_a_file_its_bytes_its_array_and_its_tensor_are_the_same_picture(tmp_path):
    array = noise(40, 50, 3)
    data = encoded(Image.fromarray(array), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    forms = [path, str(path), data, bytearray(data), memoryview(data), Image.fromarray(array), array]
    forms += [torch.from_numpy(array).permute(2, 0, 1), array[:, ::-1].copy()[:, ::-1]]
    expected = Images(32).read(array)[0]
    for form in forms:
        assert torch.equal(Images(32).read(form)[0], expected)
    floats = torch.from_numpy(array).permute(2, 0, 1) / 255
    smooth = torch.nn.functional.avg_pool2d(floats, 9, 1, 4)
    rounded = (smooth * 255).round().byte()
    assert torch.allclose(Images(32).read(smooth)[0], Images(32).read(rounded)[0], atol=2 / 255)
    assert torch.equal(Images(40).read(floats[:, :, 5:45].double())[0], floats[:, :, 5:45])


def test_grey_palette_cmyk_and_16_bit():
    grey = noise(8, 8)
    assert np.array_equal(pixels(Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(pixels(grey), pixels(grey[..., None]))
    palette = Image.fromarray(noise(8, 8, 3)).quantize(16)
    assert np.array_equal(pixels(palette), np.array(palette.convert("RGB")))
    cmyk = Image.fromarray(noise(8, 8, 3)).convert("CMYK")
    assert np.array_equal(pixels(encoded(cmyk, "TIFF")), np.array(cmyk.convert("RGB")))
    deep = grey.astype(np.uint16) * 257
    assert np.array_equal(pixels(encoded(Image.fromarray(deep), "PNG")), pixels(grey))
    assert np.array_equal(pixels(deep), pixels(grey))
    assert np.array_equal(pixels(grey > 127), pixels(np.where(grey > 127, 255, 0).astype(np.uint8)))
    assert np.allclose(pixels(Image.fromarray(grey.astype(np.float32) / 255)), pixels(grey) / 255)


def test_transparency_is_laid_over_white():
    clear = np.zeros((4, 4, 4), np.uint8)
    assert pixels(clear).min() == 255
    assert pixels(Image.fromarray(clear).convert("LA")).min() == 255
    assert pixels(clear.astype(np.float32)).min() == 1
    gif = encoded(Image.fromarray(noise(8, 8, 3)).quantize(8), "GIF", transparency=0)
    index = np.array(Image.open(io.BytesIO(gif)))
    assert (pixels(gif)[index == 0] == 255).all()


def test_exif_rotation_is_applied():
    array = noise(8, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encoded(Image.fromarray(array), "PNG", exif=exif)).shape == (16, 8, 3)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert (pixels(data) == [255, 0, 0]).all()
    animation = Image.open(io.BytesIO(data))
    animation.seek(1)
    assert (pixels(animation) == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("missing.png", "does not exist"),
        (".", "is a folder"),
        (b"", "not a picture"),
        (b"GIF89a hello", "picture|read|damaged"),
        (12, "got int"),
        (None, "got NoneType"),
        (np.zeros((0, 4, 3), np.uint8), "with pixels"),
        (np.zeros((4, 4, 2), np.uint8), "expected a picture"),
        (np.zeros((2, 3, 4, 4), np.uint8), "pass a list"),
        (np.zeros((4, 4), np.int64), "got int64"),
        (np.zeros((4, 4), np.complex64), "got complex64"),
        (torch.full((3, 4, 4), 255.0), r"\[0, 1\]"),
        (torch.full((3, 4, 4), float("nan")), "nan"),
        (torch.full((3, 4, 4), float("inf")), "inf"),
        (torch.zeros(5, 4, 3), r"\(3, H, W\)"),
    ],
)
def test_what_is_no_picture_is_refused(item, reason):
    with pytest.raises(MediaError, match=reason):
        Images(16).read(item)


def test_damaged_files_are_refused_and_name_the_file(tmp_path):
    data = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"cut\.jpg: truncated or damaged"):
        Images(16).read(path)


@pytest.mark.parametrize("factor", [0.9, 3])
def test_decompression_bombs_are_refused(monkeypatch, factor):
    data = encoded(Image.new("1", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10000 / factor * 0.8))
    with pytest.raises(MediaError, match="too large"):
        Images(16).read(data)


def test_items():
    images = Images(8)
    batch = torch.zeros(2, 3, 8, 8)
    assert len(images.items(batch)) == 2
    assert images.items("a.png") == ["a.png"]
    assert images.items(("a.png", b"")) == ("a.png", b"")
    assert len(images.items(batch[0])) == 1


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]),
)
@settings(max_examples=150)
def test_every_size_and_mode_is_read(height, width, mode):
    source = Image.fromarray(noise(height, width, 3))
    if mode == "F":
        picture = Image.fromarray(noise(height, width).astype(np.float32) / 255)
    elif mode == "LAB":
        picture = Image.frombytes("LAB", (width, height), noise(height, width, 3).tobytes())
    else:
        picture = source.convert("L").convert(mode) if mode in ("I", "I;16", "PA") else source.convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fit in ("crop", "stretch"):
            tensor, _ = Images(16, fit).read(picture)
            assert tensor.shape == (3, 16, 16)
            assert tensor.dtype == torch.float32
            assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1


@pytest.mark.parametrize(
    "data", [b"P6\n4x 4\n255\n", b"II*\x00\x08\x00\x00\x00\x00\x00", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x01IHDR"]
)
def test_whatever_a_parser_stumbles_over_is_a_media_error(data):
    with pytest.raises(MediaError):
        Images(16).read(data)


def test_text_that_is_no_path_is_refused():
    for text in ("A" * 5000, "a\0b"):
        with pytest.raises(MediaError, match="does not exist"):
            Images(16).read(text)


def test_32_bit_greys_of_8_bit_pictures_stay_as_bright():
    grey = noise(8, 8)
    assert np.array_equal(pixels(Image.fromarray(grey).convert("I")), pixels(grey))
