"""What tokenizers of clips over a grid share: padding, long clips in bounded memory, streams, and a training objective.

Shapes: B batch, T frames, H W height and width in pixels, t h w of the token grid, D width of the latents.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenzoo.encoders.causal_conv3d import after
from tokenzoo.encoders.streaming import State
from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.clips import Video
from tokenzoo.tokenizers.quantizers import FiniteScalarQuantizer
from tokenzoo.tokenizers.spec import Modality
from tokenzoo.tokenizers.video._common import Loss, trained
from tokenzoo.tokenizers.video.streaming import ClipStream


class GridVideo(Tokenizer):
    """An encoder and a decoder over clips, which can be fed piece by piece, and a finite scalar quantizer between them.

    The ids of a clip go through the token grid row by row and frame by frame; `Tokens.extras["grid"]` says how large it is.
    A system sets `encoder` and `decoder`, networks between clips `[B, 3, T, H, W]` in [-1, 1] and latents `[B, D, t, h, w]`
    that are called as those of `encoders.causal_conv3d`.

    Attributes:
        piece: Pixels, over all frames, that go through the network at once, but at least one step of the grid. Longer clips
            follow piece by piece and get the same ids and, but for rounding, the same pixels, so that memory stays bounded.
        stride: Pixels per step of the grid.
        frame_stride: Frames per step of the grid.
        surplus: Frames that the decoder gives before the first one of the clip.
        extra_losses: Further terms of `objective`, of `(reconstruction, original)`, clips `[B, T, 3, H, W]` in [0, 1] both,
            such as a perceptual network of yours.
    """

    modality: ClassVar[Modality] = "video"
    piece: int = 1 << 20
    surplus: int = 0
    media: Video
    encoder: nn.Module
    decoder: nn.Module

    def __init__(
        self, config: TokenizerConfig, levels: Sequence[int], *, stride: int, frame_stride: int, lone_first: bool
    ) -> None:
        media = Video(fit="pad", stride=stride, frame_stride=frame_stride, lone_first=lone_first)
        super().__init__(config, media)
        self.quantizer = FiniteScalarQuantizer(levels)
        self.stride, self.frame_stride = stride, frame_stride
        self.extra_losses: dict[str, Loss] = {}

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.quantizer.size,)}

    # -- encode and decode

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length, seed
        parts = [self.quantizer.ids(latents.movedim(1, -1)) for latents in self._latents(batch)]
        ids = torch.cat(parts, 1)
        grid = torch.tensor(ids.shape[1:], device=ids.device).expand(len(ids), -1)
        return Codes(ids.flatten(1).unsqueeze(1), None, {"grid": grid})

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        grid = self._grid(extras, int(lengths[0, 0]))
        latents = self.quantizer.lookup(ids[:, 0, : math.prod(grid)].unflatten(1, grid)).to(self.dtype).movedim(-1, 1)
        clip = torch.cat(list(self._pieces(self.decoder, latents, self._steps(*grid[1:]))), 2)
        return (clip.transpose(1, 2)[:, self.surplus :] + 1) / 2

    def _latents(self, batch: Tensor) -> Iterator[Tensor]:
        """Latents `[B, D, t', h, w]` of clips `[B, T, 3, H, W]` in [0, 1], piece by piece."""
        clip = self._clip(batch)
        size = self.frame_stride * self._steps(clip.shape[3] // self.stride, clip.shape[4] // self.stride)
        return self._pieces(self.encoder, clip, size, clip.shape[2] % self.frame_stride)

    def _clip(self, batch: Tensor) -> Tensor:
        """What the encoder sees of `[B, T, 3, H, W]` in [0, 1]: `[B, 3, T', H, W]` in [-1, 1]."""
        clip = batch.transpose(1, 2) * 2 - 1
        missing = self._missing(clip.shape[2])
        return after(clip[:, :, :1].expand(-1, -1, missing, -1, -1), clip)

    def _missing(self, num_frames: int) -> int:
        """How many copies of the first frame the network wants before a clip of so many frames."""
        del num_frames
        return 0

    def _steps(self, height: int, width: int) -> int:
        """Steps of a grid of this height and width that go through the network at once."""
        return max(1, self.piece // (height * width * self.stride**2 * self.frame_stride))

    @staticmethod
    def _pieces(network: nn.Module, x: Tensor, size: int, first: int = 0) -> Iterator[Tensor]:
        """What a network makes of `[B, C, T, H, W]`, fed `size` frames at a time, and `first` more in the beginning."""
        total = x.shape[2]
        state: State | None = {} if total > first + size else None
        edges = [0, *range(first + size, total, size), total]
        for start, end in itertools.pairwise(edges):
            yield network(x[:, :, start:end], state, end == total)

    def _grid(self, extras: Mapping[str, Tensor], length: int) -> tuple[int, int, int]:
        """The grid `(t, h, w)` of items that share one.

        Raises:
            TokensError: If it is missing, or not one of so many ids.
        """
        grid = extras.get("grid")
        if grid is None or grid.dim() != 2 or grid.shape[1] != 3:
            got = "none" if grid is None else tuple(grid.shape)
            raise TokensError(f"expected extras['grid'] of shape (B, 3), the sizes t, h and w of each item's grid, got {got}")
        t, h, w = grid[0].tolist()
        if min(t, h, w) < 1 or t * h * w != length:
            raise TokensError(f"expected a grid of {length} ids, got extras['grid'] = {[t, h, w]}")
        return t, h, w

    def _decode_groups(self, tokens: Tokens) -> Iterable[list[int]]:
        """Items with equal lengths and grids."""
        grids = tokens.extras.get("grid")
        for group in super()._decode_groups(tokens):
            rows = [()] * len(group) if grids is None else [tuple(row) for row in grids[group].tolist()]
            for row in dict.fromkeys(rows):
                yield [index for index, other in zip(group, rows, strict=True) if other == row]

    # -- streams

    def stream(self, *, frames: int | None = None, size: tuple[int, int] | None = None) -> ClipStream:
        """An encoder and a decoder of one clip while it comes in, which hold their state.

        Args:
            frames: Of the whole clip, where it is known; VidTok v1.1 has to know it in the beginning.
            size: Height and width of the frames in pixels, to which a stream that only decodes shall cut them.

        Raises:
            TokensError: If the number of frames has to be known, or is not positive.
        """
        if frames is not None and frames < 1:
            raise TokensError(f"expected frames, the number of them in the clip, of at least 1, got {frames}")
        if frames is None and len({self._missing(self.media.padded_frames(n)) for n in range(1, self.frame_stride + 1)}) > 1:
            raise TokensError(
                f"{self.name or self.architecture} fills the first step with copies of the first frame, as many as the length "
                "of the clip wants: pass frames=, the number of frames to come"
            )
        return ClipStream(self, frames, size)

    # -- training

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Absolute error of the pixels, the quantizer's loss, and `extra_losses`, on clips `[B, T, 3, H, W]` in [0, 1].

        An adversarial loss is the training loop's: `adversary` in the recipe.
        """
        del progress, generator
        latents = self.encoder(self._clip(batch))
        found = self.quantizer(latents.movedim(1, -1).float())
        clip = self.decoder(found.vectors.to(latents.dtype).movedim(-1, 1))
        reconstruction = (clip.transpose(1, 2)[:, -batch.shape[1] :] + 1) / 2
        losses = {"pixels": (reconstruction.float() - batch.float()).abs().mean()}
        losses |= self._latent_losses(latents.movedim(1, -1).float(), found.vectors)
        return trained(batch, reconstruction, losses, self.extra_losses, found.ids, self.quantizer.size)

    def _latent_losses(self, latents: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Losses of latents and their codes, `[B, t, h, w, D]` both, of systems that have any."""
        del latents, codes
        return {}
