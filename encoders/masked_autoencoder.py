"""Masked autoencoding: a vision transformer learns by filling in the patches that it was not shown, without any labels.

Paper: https://arxiv.org/abs/2111.06377. The transformer sees a quarter of a picture's patches; a small decoder guesses the
pixels of the others, and is thrown away afterwards.

Shapes: B batch, H W height and width in pixels, N patches, P pixels of a patch, D width.
"""

import torch
from torch import Tensor, nn

from tokenzoo.encoders.vit import Transformer


class ShownPatches(nn.Module):
    """Takes the place of a timm tower's `patch_drop`: in training, lets through the patches in `shown` and no others.

    Attributes:
        prefix: Tokens before the patches, which always pass.
        shown: Indices `[B, n]` of patches; all of them if `None`.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.shown: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, prefix + N, D]` to `[B, prefix + n, D]`."""
        if self.shown is None:
            return x
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        return torch.cat([prefix, patches.gather(1, self.shown[..., None].expand(-1, -1, x.shape[2]))], 1)


class MaskedAutoencoder(nn.Module):
    """The decoder, and the loss that trains a tower through it. The tower itself is its owner's.

    Args:
        tower: A vision transformer of timm's; its `patch_drop` is replaced.
        hidden: Share of the patches that the tower does not see.
        dim: Width of the decoder.
        layers: Of the decoder.
        heads: Of its attention.

    Raises:
        ValueError: If the tower cannot leave out patches, or the share is not between 0 and 1.
    """

    def __init__(self, tower: nn.Module, hidden: float, *, dim: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        if not isinstance(getattr(tower, "patch_drop", None), nn.Module):
            raise ValueError(f"expected a vision transformer that can leave out patches, got {type(tower).__name__}")
        if not 0 < hidden < 1:
            raise ValueError(f"expected a share of hidden patches between 0 and 1, got {hidden}")
        self.hidden = hidden
        self.gate = tower.patch_drop = ShownPatches(int(tower.num_prefix_tokens))  # type: ignore[arg-type]
        height, width = tower.patch_embed.grid_size  # type: ignore[union-attr, misc]
        self.patch: tuple[int, int] = tower.patch_embed.patch_size  # type: ignore[union-attr, assignment]
        self.narrow = nn.Sequential(nn.LayerNorm(tower.num_features), nn.Linear(tower.num_features, dim))  # type: ignore[arg-type]
        self.missing = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(0.02 * torch.randn(height * width, dim))
        self.transformer = Transformer(dim, layers, heads)
        self.pixels = nn.Linear(dim, 3 * self.patch[0] * self.patch[1])

    def forward(self, tower: nn.Module, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the hidden patches' pixels, each patch with mean 0 and variance 1.

        Args:
            tower: The one that this was built for.
            pictures: `[B, 3, H, W]`, normalised as the tower wants them.
            generator: Of the choice of patches.
        """
        patches = self.patches(pictures)
        count = patches.shape[1]
        order = torch.rand(len(patches), count, generator=generator).argsort(1).to(pictures.device)
        shown, hidden = order.split([(kept := max(1, round(count * (1 - self.hidden)))), count - kept], 1)
        self.gate.shown = shown
        seen = tower.forward_features(pictures)[:, tower.num_prefix_tokens :]  # type: ignore[operator]
        self.gate.shown = None
        tokens = self.missing.expand(len(patches), count, -1).scatter(
            1, _wide(shown, self.missing), self.narrow(seen).to(self.missing)
        )
        guess = self.pixels(self.transformer(tokens + self.positions, slice(None)))
        wanted = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
        error = (guess - wanted).square().mean(2)
        return error.gather(1, hidden).mean()

    def patches(self, pictures: Tensor) -> Tensor:
        """`[B, 3, H, W]` as `[B, N, 3 P]`, rows first."""
        height, width = self.patch
        blocks = pictures.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, len(like))
