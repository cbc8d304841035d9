"""What several image tokenizers share: continuous vectors, frozen parts, and alignment with another network's features.

Shapes: B batch, N tokens, P patches, C width of a vector, D width of features, H W height and width in pixels.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from tokenzoo.encoders.vision import VisionFeatures
from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.errors import DownloadError


def draw_once(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal float32 noise of one item, for all items, so that none depends on the batch it is in."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def is_finite(value: object) -> bool:
    """Whether this is a real number, NumPy's too, that is neither NaN nor infinite."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def vectors_of(extras: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Tensor:
    """`extras["vectors"]`, which must be there and be of this shape, `[B, N, C]`.

    Raises:
        TokensError: If it is not.
    """
    vectors = extras.get("vectors")
    if vectors is None or vectors.shape != shape:
        got = "none" if vectors is None else tuple(vectors.shape)
        raise TokensError(f"expected extras['vectors'] of shape {shape}, got {got}: this tokenizer has no ids")
    return vectors


def check_frozen(module: nn.Module, name: str) -> None:
    """Refuses a part that the objective gives no gradient, but that an optimizer would wait for.

    Raises:
        ConfigError: If one of its parameters requires a gradient.
    """
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(
            f"expected {name}.* to be frozen, since this objective does not train it: put it under freeze in the recipe, or "
            f"call tok.{name}.requires_grad_(False)"
        )


def projector(dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    """REPA's projection (https://arxiv.org/abs/2410.06940)."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out_dim))


def alignment_features(network: str, grid: int) -> Callable[[Tensor], Tensor]:
    """Gives features `[B, P, D]` of images `[B, 3, H, W]` in [0, 1], by a network of timm's.

    Raises:
        ConfigError: If timm has no such network, or it has no patch tokens.
        DownloadError: If its weights could not be had.
    """
    try:
        return VisionFeatures.load(network, grid)
    except ValueError as error:
        raise ConfigError(f"alignment_network: {error}") from error
    except OSError as error:
        raise DownloadError(f"alignment_network: {error}") from error
