import numpy as np
import pytest
import torch
from PIL import Image

from tokenzoo.evaluation.codecs import JPEG, WEBP
from tokenzoo.evaluation.rate_distortion import Curve, Point, codec_curve, markdown_table, tokenizer_curve
from tokenzoo.tokenizers.image.one_d_piece_nano import OneDPieceNano, OneDPieceNanoConfig
from tokenzoo.tokenizers.quality import psnr, ssim


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(6)]
    return np.stack([np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) for image in coarse])


def test_ssim_and_psnr_equal_scikit_image(pictures):
    metrics = pytest.importorskip("skimage.metrics")
    noisy = np.clip(pictures + np.random.default_rng(1).normal(0, 12, pictures.shape), 0, 255).astype(np.uint8)
    left, right = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (noisy, pictures))
    for index in range(len(pictures)):
        expected = metrics.structural_similarity(
            noisy[index], pictures[index], channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ssim(left, right)[index]) == pytest.approx(expected, abs=1e-4)
        expected = metrics.peak_signal_noise_ratio(pictures[index], noisy[index])
        assert float(psnr(left, right)[index]) == pytest.approx(expected, abs=1e-3)


def test_curve_of_a_tokenizer(pictures):
    torch.manual_seed(0)
    config = OneDPieceNanoConfig(num_tokens=4, codebook_size=64, num_classes=4, width=8, blocks=1, condition_dim=8)
    tokenizer = OneDPieceNano(config).eval()
    curve = tokenizer_curve(tokenizer, pictures[:2], counts=(1, 4))
    assert {count: point.num_bytes for count, point in curve.points.items()} == {1: 1, 4: 3}
    assert 0 < curve.codebook_used <= 8 / 64
    assert curve.to_dict()["tokens"][4]["psnr"] == curve.points[4].psnr


def test_curve_of_a_codec_rises_and_counts_what_fits(pictures):
    points = codec_curve(WEBP, pictures[:3], [20, 100, 300])
    assert 20 not in points
    assert points[100].psnr < points[300].psnr
    assert points[300].reached == 1
    assert codec_curve(JPEG, pictures[:1], [50]) == {}


def test_table_says_what_is_missing():
    curve = Curve({1: Point(2, 10.0, 0.1), 64: Point(96, 20.0, 0.5)}, 0.9)
    table = markdown_table(curve, {"webp": {96: Point(96, 19.0, 0.4, 0.5)}}).splitlines()
    assert table[0] == "| tokens | bytes | PSNR | SSIM | WEBP PSNR | WEBP SSIM |"
    assert table[2] == "| 1 | 2 | 10.00 | 0.100 | - | - |"
    assert table[3] == "| 64 | 96 | 20.00 | 0.500 | 19.00 (50%) | 0.400 |"
