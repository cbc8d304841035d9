"""`ClipStream`: one clip encoded and decoded while its frames come in.

Shapes: T frames, H W height and width in pixels, t h w of the token grid.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenzoo.encoders.causal_conv3d import after
from tokenzoo.encoders.streaming import State
from tokenzoo.tokenizers import TokensError
from tokenzoo.tokenizers.clips import read_clip

if TYPE_CHECKING:
    from tokenzoo.tokenizers.video.pixels import GridVideo


class ClipStream:
    """One clip, some frames at a time; its ids are those of `encode`, and its frames, but for rounding, those of `decode`.

    What comes in is answered as soon as it is certain. A causal tokenizer whose first frame makes a step of the grid by itself
    (Cosmos, VidTok v1.0) answers that frame at once, and then every `frame_stride` frames with a step: a frame waits for at
    most `frame_stride - 1` later ones, and decoding a step gives all of its frames at once. A network that looks ahead answers
    that much later (VidTok's non-causal ones begin with the 60th frame or later), and `last` brings out the rest.

    Attributes:
        tokenizer: Whose stream this is.
        frames: Of the whole clip; known once the last was encoded, unless it was given.
        size: Height and width of the frames in pixels, to which decoded ones are cut; of those encoded, unless it was given.
    """

    def __init__(self, tokenizer: "GridVideo", frames: int | None, size: tuple[int, int] | None) -> None:
        self.tokenizer, self.frames, self.size = tokenizer, frames, size
        self._given, self._given_size = frames, size
        network_frames = tokenizer.media.padded_frames(frames or 1)
        self._before = tokenizer._missing(network_frames)
        self._lone = (network_frames + self._before) % tokenizer.frame_stride
        self._encoder, self._decoder = _Side(), _Side()
        self._waiting: Tensor | None = None

    @torch.no_grad()
    def encode(self, frames: Any = None, *, last: bool = False) -> Tensor:
        """Feeds frames, any number of them; ids int64 `[t, h, w]` of the steps that became certain.

        Args:
            frames: The next ones, in any form that `Tokenizer.encode` takes a clip in, all of one size; `None` for none.
            last: No more will follow; repeats the last frame until its step is full, brings out what remains, and begins anew.

        Raises:
            MediaError: If these are no frames.
            TokensError: If they have another size than those before, or there were more or fewer than was said, or none.
        """
        stride = self.tokenizer.frame_stride
        if frames is not None and len(frames):
            self._take(*self.tokenizer.media.fitted(read_clip(frames)[0]))
        seen = self._encoder.count
        if (last and not seen) or (self._given is not None and (seen > self._given or (last and seen < self._given))):
            raise TokensError(f"expected {self._given or 'some'} frames up to the end of the clip, got {seen}")
        if self._waiting is None:
            return torch.zeros(0, 0, 0, dtype=torch.long)
        clip = self._waiting
        if last:
            missing = self.tokenizer.media.padded_frames(seen) - seen
            clip = after(clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)) if missing else clip
        lead = 0 if self._encoder.begun else self._lone
        ready = clip.shape[2] if last else lead + max(0, clip.shape[2] - lead) // stride * stride
        if clip.shape[2] < ready or not (ready or last):
            return torch.zeros(0, *self._encoder.grid, dtype=torch.long)
        self._waiting = None if last else clip[:, :, ready:].clone()
        latents = self._encoder.feed(self.tokenizer.encoder, clip[:, :, :ready], last)
        if last:
            self.frames, self._encoder = seen, _Side()
        return self.tokenizer.quantizer.ids(latents.movedim(1, -1))[0].cpu()

    @torch.no_grad()
    def decode(self, ids: Tensor | None = None, *, last: bool = False) -> Tensor:
        """Feeds ids int64 `[t, h, w]`, any number of steps; frames float32 `[T, 3, H, W]` in [0, 1] that became certain.

        Args:
            ids: The next steps; `None` for none.
            last: No more will follow; brings out what remains, and begins anew.

        Raises:
            TokensError: If the ids have another shape than those before, are out of range, or there were none.
        """
        tokenizer, side = self.tokenizer, self._decoder
        if ids is not None and ids.numel():
            self._check(ids)
            side.grid = (int(ids.shape[1]), int(ids.shape[2]))
        elif last and not side.begun:
            raise TokensError("expected at least one step up to the end of the clip, got none")
        height, width = self.size or [n * tokenizer.stride for n in side.grid]
        if not last and (ids is None or not ids.numel()):
            return torch.zeros(0, 3, height, width)
        steps = torch.zeros(0, *side.grid, dtype=torch.long) if ids is None else ids.reshape(-1, *side.grid)
        latents = tokenizer.quantizer.lookup(steps[None].to(tokenizer.device)).to(tokenizer.dtype).movedim(-1, 1)
        clip = side.feed(tokenizer.decoder, latents, last)[0].transpose(0, 1)
        start = max(0, self._before - side.count)
        stop = len(clip) if self.frames is None else self._before + self.frames - side.count
        side.count += len(clip)
        if last:
            self._decoder = _Side()
        return ((clip[start : max(start, stop), :, :height, :width].float().cpu() + 1) / 2).clamp(0, 1)

    def _take(self, clip: Tensor, size: list[int]) -> None:
        """Adds frames `[T, 3, H, W]` in [0, 1], padded to whole steps of the grid, to those that wait for theirs to be full."""
        height, width = size
        begins = not self._encoder.count
        expected = self._given_size if begins else self.size
        if expected is not None and expected != (height, width):
            raise TokensError(f"expected frames of {expected[0]} x {expected[1]} pixels, got {height} x {width}")
        tokenizer = self.tokenizer
        x = clip[None].to(tokenizer.device, tokenizer.dtype).transpose(1, 2) * 2 - 1
        if begins:
            self.size = (height, width)
            self._encoder.grid = (clip.shape[2] // tokenizer.stride, clip.shape[3] // tokenizer.stride)
            x = after(x[:, :, :1].expand(-1, -1, self._before, -1, -1), x)
        self._encoder.count += len(clip)
        self._waiting = x if self._waiting is None else after(self._waiting, x)

    def _check(self, ids: Tensor) -> None:
        expected = list(self._decoder.grid) if self._decoder.begun else None
        if expected is None and self.size is not None:
            expected = [-(-n // self.tokenizer.stride) for n in self.size]
        if ids.dtype != torch.long or ids.dim() != 3 or expected not in (None, list(ids.shape[1:])):
            shape = "(t, h, w)" if expected is None else f"(t, {expected[0]}, {expected[1]})"
            raise TokensError(f"expected int64 ids {shape}, got {ids.dtype} {tuple(ids.shape)}")
        size = self.tokenizer.quantizer.size
        if not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise TokensError(f"expected ids in [0, {size}), got {int(ids.min())} to {int(ids.max())}")


class _Side:
    """How far one of the two networks is: what it remembers, its grid, and how many frames it has seen or given."""

    def __init__(self) -> None:
        self.state: State = {}
        self.begun = False
        self.grid: tuple[int, int] = (0, 0)
        self.count = 0

    def feed(self, network: Any, x: Tensor, last: bool) -> Tensor:
        self.begun = True
        found: Tensor = network(x, self.state, last)
        return found
