"""How close a reconstruction is: the measures that `encode(target=...)` and the evaluation share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Quality:
    """A measure of `(reconstruction, original) -> one value per item`, and which way is better."""

    measure: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool

    def meets(self, value: Tensor, target: float) -> Tensor:
        """Whether each item's `value` is at least as good as `target`."""
        return value >= target if self.higher_is_better else value <= target


def l1(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Mean absolute error per item: `(B, ...)` twice to float32 `(B,)`."""
    return (reconstruction.float() - original.float()).abs().flatten(1).mean(1)


def psnr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per item in dB, for values in [0, 1]: `(B, ...)` twice to float32 `(B,)`."""
    error = (reconstruction.float() - original.float()).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Structural similarity per image, for values in [0, 1].

    The Gaussian window (11 taps, sigma 1.5), population covariance and borders left out of Wang et al. 2004
    (https://doi.org/10.1109/TIP.2003.819861), averaged over channels; smaller windows for images under 11 pixels.

    Args:
        reconstruction: `(B, C, H, W)`, or clips `(B, T, C, H, W)`, whose frames' values are averaged.
        original: Of the same shape.

    Returns:
        float32 `(B,)`.
    """
    if original.dim() == 5:
        return torch.stack([ssim(x, y).mean() for x, y in zip(reconstruction, original, strict=True)])
    channels, height, width = original.shape[1:]
    taps = min(11, height - (height + 1) % 2, width - (width + 1) % 2)
    offsets = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    kernel = torch.exp(-offsets.square() / (2 * 1.5**2))
    kernel = kernel / kernel.sum()

    def blur(x: Tensor) -> Tensor:
        rows = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    x, y = reconstruction.cpu().double(), original.cpu().double()  # not every device has float64
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.flatten(1).mean(1).float()


def snr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Signal-to-noise ratio per waveform in dB: `(B, C, S)` twice to float32 `(B,)`."""
    signal = original.float().square().flatten(1).sum(1)
    noise = (reconstruction.float() - original.float()).square().flatten(1).sum(1)
    return 10 * torch.log10(signal.clamp_min(1e-10) / noise.clamp_min(1e-10))


def si_sdr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio per waveform in dB (https://arxiv.org/abs/1811.02508).

    Means are subtracted first.

    Args:
        reconstruction: `(B, C, S)`.
        original: `(B, C, S)`.

    Returns:
        float32 `(B,)`.
    """
    x, y = reconstruction.float().flatten(1), original.float().flatten(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    scaled = y * ((x * y).sum(1) / y.square().sum(1).clamp_min(1e-10))[:, None]
    return snr(x, scaled)


QUALITIES = {"psnr": Quality(psnr, True), "ssim": Quality(ssim, True), "l1": Quality(l1, False)}
AUDIO_QUALITIES = {"snr": Quality(snr, True), "si_sdr": Quality(si_sdr, True), "l1": Quality(l1, False)}
