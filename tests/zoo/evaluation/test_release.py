import pytest
import torch

from tokenzoo.evaluation.bundling import BEGIN, END, half_precision, with_source
from tokenzoo.evaluation.rate_distortion import TOKEN_COUNTS, Curve, Point
from tokenzoo.evaluation.release import refreshed

CARD = f"---\nx:\n  sha256: null\n  size_mb: 0\n  params: 0\n---\nbefore\n{BEGIN}\nold\n{END}\nafter\n"


def curve():
    return Curve({n: Point((12 * n + 7) // 8, 10.0 + n, 0.5) for n in TOKEN_COUNTS}, 0.75)


def test_only_the_measured_part_is_replaced():
    import numpy as np

    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    codecs = {"webp": {96: Point(96, 70.0, 0.4)}, "jpeg": {}}
    text = refreshed(CARD, curve(), codecs, 1000, pixels)
    assert text.startswith("---\nx:")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "64 tokens (96 bytes): +4.00 dB" in text
    assert "rises with every row: yes" in text
    assert refreshed(text, curve(), codecs, 1000, pixels) == text
    with pytest.raises(ValueError, match="to hold"):
        refreshed("no markers", curve(), codecs, 1000, pixels)


def test_front_matter_names_the_weights():
    text = with_source(CARD, b"abc", 12)
    assert "sha256: ba7816bf" in text
    assert "params: 12" in text
    with pytest.raises(ValueError, match="sha256"):
        with_source("---\n---\n", b"abc", 12)


def test_weights_that_overflow_float16_are_refused():
    state = half_precision({"a": torch.ones(2), "i": torch.ones(2, dtype=torch.int16)})
    assert state["a"].dtype == torch.float16
    assert state["i"].dtype == torch.int16
    with pytest.raises(ValueError, match="float32"):
        half_precision({"a": torch.tensor([1e6])})
