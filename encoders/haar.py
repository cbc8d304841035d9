"""The Haar wavelet transform of pictures and clips, as a first layer that turns blocks of pixels into channels (Cosmos).

One level halves every axis it is applied to: of two neighbours, the mean and half the difference. Those of all axes make
4 bands of a picture or 8 of a clip, which are themselves transformed at the next level. The inverse is exact but for rounding.

Shapes: B batch, C channels, T frames, H W height and width.
"""

import torch
from torch import Tensor

from tokenzoo.encoders.streaming import State, Streamed

PICTURE_AXES = (2, 3)
CLIP_AXES = (4, 3, 2)


def transform(x: Tensor, axes: tuple[int, ...], levels: int) -> Tensor:
    """`[B, C, ...]` to `[B, 2^(axes * levels) C, ...]`, every axis shorter by 2^levels.

    Bands are the slow part of the channels, those of the last of `axes` the slowest.
    """
    for _ in range(levels):
        for axis in axes:
            first, second = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.cat([first + second, first - second], 1) * 0.5
    return x


def inverse(x: Tensor, axes: tuple[int, ...], levels: int) -> Tensor:
    """The inverse of `transform`."""
    for _ in range(levels):
        for axis in reversed(axes):
            low, high = x.chunk(2, 1)
            x = torch.stack([low + high, low - high], axis + 1).flatten(axis, axis + 1)
    return x


class ClipToBands(Streamed):
    """The transform of a clip whose first frame stands for a block of `2^levels` frames by itself."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, 1 + k n, H, W]` to `[B, n^3 C, 1 + k, H / n, W / n]` with n = 2^levels; later pieces have k n frames."""
        begun = state is not None and state.pop(self, False)
        if state is not None and not last:
            state[self] = True
        if not begun:
            x = torch.cat([x[:, :, :1].expand(-1, -1, (1 << self.levels) - 1, -1, -1), x], 2)
        return transform(x, CLIP_AXES, self.levels)


class BandsToClip(Streamed):
    """The inverse of `ClipToBands`: of the first block only the last frame is kept."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, n^3 C, 1 + k, h, w]` to `[B, C, 1 + k n, n h, n w]` with n = 2^levels; later pieces k to k n frames."""
        begun = state is not None and state.pop(self, False)
        if state is not None and not last:
            state[self] = True
        x = inverse(x, CLIP_AXES, self.levels)
        return x if begun else x[:, :, (1 << self.levels) - 1 :]
