"""Discriminators of clips: of patches of single frames, and of patches that last (PatchGAN, https://arxiv.org/abs/1611.07004).

Shapes: B batch, T frames, H W height and width.
"""

from itertools import pairwise

from torch import Tensor, nn

from tokenzoo.encoders.discriminators import activations

_SLOPE = 0.2


class FrameDiscriminator(nn.Module):
    """Convolutions of stride 2 over every frame by itself; the logits judge overlapping patches."""

    def __init__(self, width: int, depth: int = 3) -> None:
        super().__init__()
        widths = _widths(width, depth)
        self.layers = nn.ModuleList(nn.Conv2d(inside, outside, 4, 2, 1) for inside, outside in pairwise(widths))
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, clip: Tensor) -> list[Tensor]:
        """Activations of clips `[B, T, 3, H, W]` in [0, 1] after every layer, the logits last; frames lie behind each other."""
        return activations(clip.flatten(0, 1) * 2 - 1, self.layers, self.last, _SLOPE)


class ClipDiscriminator(nn.Module):
    """Convolutions over time and space, of stride 2 in space; the first of them also in time."""

    def __init__(self, width: int, depth: int = 3) -> None:
        super().__init__()
        pairs = enumerate(pairwise(_widths(width, depth)))
        self.layers = nn.ModuleList(nn.Conv3d(a, b, (3, 4, 4), (1 if i else 2, 2, 2), 1) for i, (a, b) in pairs)
        self.last = nn.Conv3d(_widths(width, depth)[-1], 1, 3, padding=1)

    def forward(self, clip: Tensor) -> list[Tensor]:
        """Activations of clips `[B, T, 3, H, W]` in [0, 1] after every layer, the logits last."""
        return activations(clip.transpose(1, 2) * 2 - 1, self.layers, self.last, _SLOPE)


class ClipDiscriminators(nn.Module):
    """One of each kind.

    Args:
        width: Channels after the first layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([FrameDiscriminator(width), ClipDiscriminator(width)])

    def forward(self, clip: Tensor) -> list[list[Tensor]]:
        """Of clips `[B, T, 3, H, W]` of at least 8 pixels a side, the activations of both, their logits last."""
        return [part(clip) for part in self.parts]


def _widths(width: int, depth: int) -> list[int]:
    return [3, *(width << min(i, 2) for i in range(depth))]
