"""Sampling from a rectified flow (https://arxiv.org/abs/2209.03003) with guidance.

The flow leads from noise at time 1 to data at time 0 along straight lines, x = t * noise + (1 - t) * data; a network gives
the velocity noise - data, and Euler steps follow it backwards. Guidance compares a prediction that knows the tokens with one
that does not: classifier-free guidance (https://arxiv.org/abs/2207.12598), or adaptive projected guidance
(https://arxiv.org/abs/2410.02416), which keeps only what is orthogonal to the prediction.

Shapes: B batch, C channels, h w of the latent grid.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenzoo.tokenizers import ConfigError
from tokenzoo.tokenizers.image._common import is_finite

# Momentum and largest norm of the difference between the predictions, as FlexTok was evaluated.
_MOMENTUM = -0.5
_LARGEST_NORM = 2.5


@dataclass(frozen=True)
class Sampling:
    """How tokens are decoded.

    Attributes:
        steps: Euler steps; each evaluates the network once, or twice where there is guidance.
        guidance: How far to move from the prediction without tokens to the one with them, and beyond; 1 is no guidance.
            May be a function of the time in (0, 1].
        method: `"apg"` (adaptive projected guidance) or `"cfg"` (classifier-free guidance).
        seed: Of the noise, for items that have no seed of their own.
    """

    steps: int = 20
    guidance: float | Callable[[float], float] = 7.5
    method: Literal["apg", "cfg"] = "apg"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"expected a whole number of steps, at least 1, got {self.steps!r}")
        if not callable(self.guidance) and not is_finite(self.guidance):
            raise ConfigError(f"expected guidance to be a finite number, or a function of the time, got {self.guidance!r}")
        if self.method not in ("apg", "cfg"):
            raise ConfigError(f"expected the guidance method to be apg or cfg, got {self.method!r}")
        if as_seed(self.seed) is None:
            raise ConfigError(f"expected the seed to be a whole number of 64 bits with a sign, got {self.seed!r}")

    @property
    def guided(self) -> bool:
        """Whether the prediction without tokens is needed at all."""
        return callable(self.guidance) or self.guidance != 1

    def strength(self, time: float) -> float:
        """The guidance at a time."""
        return self.guidance(time) if callable(self.guidance) else self.guidance


def integrate(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, sampling: Sampling) -> Tensor:
    """Follows a flow from noise to data.

    Args:
        velocity: Takes `[B, C, h, w]` and a time; gives the predictions with the tokens, `[B, C, h, w]`, and, where
            `sampling.guided`, below them those without, `[2 B, C, h, w]`.
        noise: float32 `[B, C, h, w]`.
        sampling: Steps and guidance.

    Returns:
        float32 `[B, C, h, w]`.
    """
    x, momentum = noise, torch.zeros_like(noise)
    for i in range(sampling.steps, 0, -1):
        time = i / sampling.steps
        predicted = velocity(x, time).float()
        if sampling.guided:
            with_tokens, without = predicted.chunk(2)
            difference = with_tokens - without
            if sampling.method == "apg":
                momentum = difference + _MOMENTUM * momentum
                predicted = with_tokens + (sampling.strength(time) - 1) * _project(momentum, with_tokens)
            else:
                predicted = without + sampling.strength(time) * difference
        x = x - predicted / sampling.steps
    return x


def _project(difference: Tensor, prediction: Tensor) -> Tensor:
    """`difference`, shortened where it is too long, without its part along `prediction`; each item by itself."""
    dims = (1, 2, 3)
    norm = difference.square().sum(dims, keepdim=True).sqrt()
    difference = difference * (_LARGEST_NORM / norm).clamp(max=1)
    direction = widened(prediction)
    direction = direction / direction.square().sum(dims, keepdim=True).sqrt().clamp_min(1e-12)
    return (widened(difference) - (widened(difference) * direction).sum(dims, keepdim=True) * direction).float()


def widened(x: Tensor) -> Tensor:
    """In float64, or in float32 where the device has nothing wider."""
    return x.float() if x.device.type == "mps" else x.double()


def as_seed(value: object) -> int | None:
    """A whole number of 64 bits with a sign, NumPy's and tensors' too, as int; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        seed = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return seed if -(2**63) <= seed < 2**63 else None


def noise_of(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 `[B, *shape]`, each item from its own seed, the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
