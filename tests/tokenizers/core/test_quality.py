import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tokenzoo.tokenizers.quality import QUALITIES, l1, psnr, ssim


@pytest.mark.parametrize("size", [(64, 64), (33, 40), (11, 12)])
def test_psnr_and_ssim_agree_with_scikit_image(size):
    rng = np.random.default_rng(0)
    a = rng.random((2, 3, *size)).astype(np.float32)
    b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1).astype(np.float32)
    for i in range(2):
        x, y = torch.from_numpy(b[i : i + 1]), torch.from_numpy(a[i : i + 1])
        assert float(psnr(x, y)) == pytest.approx(peak_signal_noise_ratio(a[i], b[i], data_range=1), abs=1e-3)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1, "channel_axis": 0}
        if min(size) > 11:
            assert float(ssim(x, y)) == pytest.approx(structural_similarity(a[i], b[i], **options), abs=1e-4)


def test_equal_images_and_tiny_images():
    image = torch.rand(2, 3, 5, 1)
    assert ssim(image, image).tolist() == pytest.approx([1, 1])
    assert psnr(image, image).tolist() == [100, 100]
    assert l1(image, image + 0.25).tolist() == pytest.approx([0.25, 0.25])


def test_better_is_higher_or_lower():
    value = torch.tensor([1.0, 2.0])
    assert QUALITIES["psnr"].meets(value, 2).tolist() == [False, True]
    assert QUALITIES["l1"].meets(value, 1).tolist() == [True, False]
