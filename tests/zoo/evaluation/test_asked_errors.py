from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokenzoo.evaluation.asked_errors import asked_errors, markdown, png_size, spearman


def test_spearman_is_one_for_any_rising_relation_and_shares_ranks():
    x = np.array([0.1, 3, 2, 8, 5])
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    assert spearman([1, 1, 2, 2], [1, 1, 2, 2]) == pytest.approx(1)
    # By hand: ranks 0.5 0.5 2 3 against 0 1 2 3.
    assert spearman([5, 5, 6, 7], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_png_sizes_rise_with_detail():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert png_size(np.zeros_like(noise)) < png_size(noise // 64 * 64) < png_size(noise)


class Stub:
    """Keeps the tokens that an error asks for, and is off by a share of the picture's brightness for each one missing."""

    info = SimpleNamespace(max_tokens=8)

    def encode(self, images, target=None, length=None):
        self.images = images
        brightness = images.mean((1, 2, 3))
        wanted = torch.full((len(images),), length) if target is None else (8 - target["l1"] * 8 / brightness).ceil()
        return SimpleNamespace(lengths=wanted.clamp(1, 7 + (length or 0) // 8).long()[:, None])

    def decode(self, tokens, native):
        assert native
        share = tokens.lengths[:, 0] / 8
        return list(self.images * share[:, None, None, None])


def test_what_comes_of_asking_is_measured():
    pictures = np.zeros((6, 4, 4, 3), dtype=np.uint8)
    for i in range(6):
        pictures[i, : i % 5 + 1] = 200
        pictures[i] = np.clip(pictures[i].astype(int) + 40 * i, 0, 240)
    (row,) = asked_errors(Stub(), pictures, [0.1])
    images = pictures.astype(np.float64) / 255
    lengths = np.clip(np.ceil(8 - 0.8 / images.mean((1, 2, 3))), 1, 7)
    found = images.mean((1, 2, 3)) * (1 - lengths / 8)
    assert row.tokens[0] == pytest.approx(lengths.mean())
    assert row.found[0] == pytest.approx(found.mean(), abs=1e-6)
    assert row.within == pytest.approx((found <= 0.1).mean())
    assert row.within_tenth == pytest.approx((found <= 0.11).mean())
    assert row.unreachable == 0
    assert row.correlation == pytest.approx(spearman(lengths, [png_size(picture) for picture in pictures]))
    table = markdown([row])
    assert f"| 0.1 | {row.tokens[0]:.1f} (" in table
    assert len({line.count("|") for line in table.split("\n")}) == 1
