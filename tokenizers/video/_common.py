"""What tokenizers that see a clip in windows of a fixed size share. Shapes: B batch, T frames, H W height and width."""

from typing import Protocol

import torch
from torch import Tensor

from tokenzoo.tokenizers import Output
from tokenzoo.tokenizers.quality import psnr


class Loss(Protocol):
    """A loss of `(reconstruction, original)`, clips `[B, T, 3, H, W]` in [0, 1] both."""

    def __call__(self, reconstruction: Tensor, original: Tensor, /) -> Tensor:
        """A scalar."""


def repeat_last(clip: Tensor, times: int) -> Tensor:
    """A clip `[B, T, ...]` with its last frame repeated behind it so many times."""
    return torch.cat([clip, clip[:, -1:].expand(-1, times, *clip.shape[2:])], 1) if times else clip


def trained(
    clip: Tensor, reconstruction: Tensor, losses: dict[str, Tensor], extra: dict[str, Loss], ids: Tensor, codes: int
) -> Output:
    """What `objective` returns: its own losses and the extra ones; the quality and the number of codes in use, to log."""
    used = torch.bincount(ids.flatten(), minlength=codes).count_nonzero()
    losses = losses | {name: loss(reconstruction, clip) for name, loss in extra.items()}
    with torch.no_grad():
        return Output(reconstruction, losses, {"psnr": psnr(reconstruction.clamp(0, 1), clip).mean(), "codes_used": used})
