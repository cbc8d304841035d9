import io

import numpy as np
import pytest
from PIL import Image

from tokenzoo.evaluation.codecs import AVIF, CODECS, JPEG, WEBP, shrink_then_encode, smallest_file


@pytest.fixture(scope="module")
def pixels():
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))


def error(restored, pixels):
    return np.square(restored.astype(float) - pixels).mean()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_more_bytes_are_never_worse(codec, pixels):
    found = shrink_then_encode(codec, pixels, [400, 600, 1200])
    errors = [error(found[budget], pixels) for budget in sorted(found)]
    assert len(errors) >= 2
    assert errors == sorted(errors, reverse=True)
    assert all(restored.shape == pixels.shape for restored in found.values())


def test_it_is_at_least_as_good_as_any_quality_at_full_size(pixels):
    budget = len(WEBP.encode(Image.fromarray(pixels), 18))
    decoded = np.asarray(Image.open(io.BytesIO(WEBP.encode(Image.fromarray(pixels), 18))).convert("RGB"))
    assert error(shrink_then_encode(WEBP, pixels, [budget])[budget], pixels) <= error(decoded, pixels)


def test_budgets_below_the_headers_are_left_out(pixels):
    assert shrink_then_encode(WEBP, pixels, [4]) == {}
    assert shrink_then_encode(JPEG, pixels, [100]) == {}


def test_headers_alone_take_most_of_a_small_file(pixels):
    assert smallest_file(WEBP, pixels) < 100 < smallest_file(JPEG, pixels)
    assert smallest_file(AVIF, pixels) > 100
