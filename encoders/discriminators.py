"""Discriminators of audio: by period (HiFi-GAN, https://arxiv.org/abs/2010.05646) and by spectrum (UnivNet,
https://arxiv.org/abs/2106.07889; complex as in EnCodec, https://arxiv.org/abs/2210.13438).

Shapes: B batch, S samples, C channels, P period, W window.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SLOPE = 0.1


class PeriodDiscriminator(nn.Module):
    """Convolutions over every `period`-th sample; they never mix samples whose distance is not a multiple of it."""

    def __init__(self, period: int, width: int, depth: int = 4) -> None:
        super().__init__()
        self.period = period
        widths = [1, *(min(width * 2**i, 4 * width) for i in range(depth))]
        self.layers = nn.ModuleList(nn.Conv2d(inside, outside, (5, 1), (3, 1), (2, 0)) for inside, outside in pairwise(widths))
        self.last = nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Activations of audio `[B, 1, S]` after every layer, the logits last."""
        x = F.pad(x, (0, -x.shape[-1] % self.period)).unflatten(-1, (-1, self.period))
        return activations(x, self.layers, self.last, _SLOPE)


class SpectrumDiscriminator(nn.Module):
    """Convolutions over the complex short-time spectrum, `window / 4` samples a step."""

    def __init__(self, window: int, width: int, depth: int = 4) -> None:
        super().__init__()
        self.size = window
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.window: Tensor
        self.layers = nn.ModuleList(
            nn.Conv2d(width if i else 2, width, (3, 9), (1, 2 if i else 1), (1, 4)) for i in range(depth)
        )
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """As `PeriodDiscriminator.forward`."""
        spectrum = torch.stft(
            x[:, 0].float(), self.size, self.size // 4, window=self.window.float(), pad_mode="constant", return_complex=True
        )
        # Roots bring soft and loud partials closer together; without the offset their slope at 0 is infinite.
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-8).sqrt()
        spectrum = spectrum / magnitude.sqrt()
        return activations(torch.view_as_real(spectrum).permute(0, 3, 2, 1), self.layers, self.last, _SLOPE)


class Discriminators(nn.Module):
    """Several of both kinds.

    Args:
        periods: Of the first kind, in samples.
        windows: Of the second kind, in samples.
        width: Channels after the first layer.
    """

    def __init__(self, periods: Sequence[int], windows: Sequence[int], width: int) -> None:
        super().__init__()
        if not periods and not windows:
            raise ValueError("expected at least one period or window")
        parts: list[nn.Module] = [PeriodDiscriminator(period, width) for period in periods]
        self.parts = nn.ModuleList(parts + [SpectrumDiscriminator(window, width) for window in windows])

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        """Of audio `[B, 1, S]`, the activations of every discriminator, its logits last."""
        return [part(x) for part in self.parts]


def activations(x: Tensor, layers: nn.ModuleList, last: nn.Module, slope: float) -> list[Tensor]:
    """What each layer makes of `x` behind a leaky ReLU of this slope, and the logits of the last one."""
    found = []
    for layer in layers:
        x = F.leaky_relu(layer(x), slope)
        found.append(x)
    return [*found, last(x)]
