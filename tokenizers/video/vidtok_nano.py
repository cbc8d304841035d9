"""VidTok nano: a small causal tokenizer of clips of any size and length, trained here.

From VidTok (https://arxiv.org/abs/2412.13061) it takes the grid (one frame, then 4 a step, 8 pixels a step), the 262,144
codes of finite scalar quantization, and causality; the network is our own. It predicts before it codes:

- of the first frame, an id codes a block of 8 x 8 pixels;
- of each further step, an id says how a block of 4 frames of 8 x 8 pixels moves, and codes what the last frame decoded so
  far, moved so, leaves of it. Where nothing moves, more of the id is left for that, so standing detail sharpens with time;
- a small network refines what is decoded, and the refined frame is what the next step is predicted from.

The encoder runs the decoder. The block codes and the choice of motions are estimated from clips by `initialise`; the refiners
start as the identity and are trained by `objective`, in the same closed loop.

Shapes: B batch, T frames, H W height and width in pixels, t h w of the token grid, K coefficients of a block, V motions.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.streaming import State, Streamed
from tokenzoo.tokenizers import Output, TokenizerConfig
from tokenzoo.tokenizers.quantizers import FiniteScalarQuantizer
from tokenzoo.tokenizers.video._block_code import BlockCode, block_transform
from tokenzoo.tokenizers.video._common import trained
from tokenzoo.tokenizers.video.pixels import GridVideo

SIDE, FRAMES = 8, 4
_BITS = 18
_MOTIONS_TRIED = 4
_FITTED_AT_ONCE = 32
_GREY = 0.5


@strict
@dataclass(kw_only=True)
class VidTokNanoConfig(TokenizerConfig):
    """Size of the tokenizer.

    Attributes:
        width: Channels of the refiners at half resolution; twice as many at a quarter.
        blocks: Residual blocks of the refiners at a quarter of the resolution.
        first_classes: Of the blocks of a first frame.
        still_classes: Of blocks that do not move.
        moving_classes: Of blocks that move.
        motions: Ways to move, besides not at all.
        reach: Farthest motion that is tried in half pixels per frame and axis.
    """

    width: int = 40
    blocks: int = 3
    first_classes: int = 16
    still_classes: int = 32
    moving_classes: int = 16
    motions: int = 32
    reach: int = 6

    def validate_sizes(self) -> None:
        """Checks what the code needs of the sizes."""
        for name in ("first_classes", "still_classes", "moving_classes", "motions"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1) or value > 1024:
                raise ValueError(f"expected {name} to be a power of two up to 1024, got {value}")
        if self.motions * self.moving_classes > 1 << (_BITS - 2):
            raise ValueError(f"expected motions * moving_classes of at most {1 << (_BITS - 2)}, got {self}")
        if min(self.width, self.blocks) < 1 or self.motions >= (2 * self.reach + 1) ** 2:
            raise ValueError(f"expected positive width and blocks, and fewer motions than there are within reach, got {self}")


@cache
def _first_transform() -> Tensor:
    return block_transform(1, SIDE, 7.5, 3.5)


@cache
def _transform() -> Tensor:
    return block_transform(FRAMES, SIDE, 7.5, 3.5)


def _log2(power: int) -> int:
    return power.bit_length() - 1


class Words(FiniteScalarQuantizer):
    """The codes of VidTok, 6 digits of 8 levels, of ids that the encoder has chosen already: nothing is left to round."""

    def __init__(self) -> None:
        super().__init__((8,) * (_BITS // 3))

    def ids(self, x: Tensor) -> Tensor:
        """Ids int64 `(...)` of codes `(..., 6)`, in any precision: the inverse of `lookup`."""
        digits = (x.float() * 4 + 4).round().long()
        return (digits << 3 * torch.arange(len(self.levels), device=x.device)).sum(-1)


class GroupRefiner(nn.Module):
    """What blocks decode to, and the frame before it, to something better: residual convolutions at 1/2 and 1/4 resolution.

    The output convolution starts at zero, so an untrained refiner is the identity.

    Args:
        frames: Of a step.
        width: Channels at half resolution.
        blocks: Residual blocks at a quarter of it.
    """

    def __init__(self, frames: int, *, width: int, blocks: int) -> None:
        super().__init__()
        wide = 2 * width
        self.frames = frames
        self.stem = nn.Conv2d(12 * (frames + 1), width, 3, padding=1)
        self.down = nn.Conv2d(width, wide, 2, stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1), nn.SiLU(), nn.Conv2d(wide, wide, 3, padding=1))
            for _ in range(blocks)
        )
        self.up = nn.Conv2d(wide, 4 * width, 1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 12 * frames, 3, padding=1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, coarse: Tensor, before: Tensor) -> Tensor:
        """`[B, T, 3, H, W]`, and the frame before them `[B, 3, H, W]`, to `[B, T, 3, H, W]`."""
        x = 2 * torch.cat([coarse.flatten(1, 2), before], 1) - 1
        half = F.silu(self.stem(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)))
        quarter = self.down(half)
        for block in self.blocks:
            quarter = quarter + block(quarter)
        half = half + F.pixel_shuffle(self.up(F.silu(quarter)), 2)
        change = F.pixel_shuffle(self.head(F.silu(half + self.mix(F.silu(half)))), 2)
        return coarse + change.unflatten(1, (self.frames, 3)).to(coarse.dtype)


def to_blocks(x: Tensor) -> Tensor:
    """Frames `[B, T, 3, H, W]` as blocks `[B, h, w, T * 3 * 64]`."""
    cut = x.unflatten(4, (-1, SIDE)).unflatten(3, (-1, SIDE))
    return cut.permute(0, 3, 5, 1, 2, 4, 6).flatten(3)


def from_blocks(blocks: Tensor, frames: int) -> Tensor:
    """The inverse of `to_blocks`."""
    cut = blocks.unflatten(3, (frames, 3, SIDE, SIDE))
    return cut.permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)


class Mover:
    """A frame whose contents move on by whole numbers of half pixels a frame; what comes in from outside repeats the border.

    Args:
        frame: `[B, C, H, W]`.
        reach: Farthest it will have moved in the end, in half pixels.
    """

    def __init__(self, frame: Tensor, reach: int) -> None:
        self.margin, self.size = reach // 2 + 1, frame.shape[2:]
        wide = F.pad(frame, (self.margin, self.margin + 1, self.margin, self.margin + 1), mode="replicate")
        right = (wide + wide.roll(-1, 3)) / 2
        rows = [wide, right, (wide + wide.roll(-1, 2)) / 2, (right + right.roll(-1, 2)) / 2]
        self.planes = torch.stack(rows, 2)

    def moved(self, down: int, right: int) -> Tensor:
        """The whole frame, its contents moved once."""
        top, left = self.margin + (-down) // 2, self.margin + (-right) // 2
        plane = self.planes[:, :, 2 * (down % 2) + right % 2]
        return plane[:, :, top : top + self.size[0], left : left + self.size[1]]

    def blocks(self, motion: Tensor) -> Tensor:
        """Blocks `[B, h, w, FRAMES * C * 64]` of the frames that follow, moving by `[B, h, w, 2]` each, down and right."""
        num_channels, (height, width) = self.planes.shape[1], self.planes.shape[3:]
        steps = torch.arange(1, FRAMES + 1, device=motion.device)
        half = -motion[..., None] * steps  # [B, h, w, 2, T]
        within = torch.arange(SIDE, device=motion.device)
        rows, columns = (SIDE * torch.arange(n, device=motion.device) for n in motion.shape[1:3])
        y = (self.margin + rows[:, None, None] + half[..., 0, :].div(2, rounding_mode="floor"))[..., None, None]
        x = (self.margin + columns[:, None] + half[..., 1, :].div(2, rounding_mode="floor"))[..., None, None]
        plane = (2 * (half[..., 0, :] % 2) + half[..., 1, :] % 2)[..., None, None]
        at = (plane * height + y + within[:, None]) * width + x + within  # [B, h, w, T, 8, 8]
        found = self.planes.flatten(2).gather(2, at.flatten(1)[:, None].expand(-1, num_channels, -1))
        return found.unflatten(2, at.shape[1:]).permute(0, 2, 3, 4, 1, 5, 6).flatten(3)


class ClosedLoop(nn.Module):
    """The code, and the refiners that are part of it: what encoder and decoder share."""

    motions: Tensor

    def __init__(self, config: VidTokNanoConfig) -> None:
        super().__init__()
        half = _BITS - 1
        self.first = BlockCode(config.first_classes, _BITS - _log2(config.first_classes), len(_first_transform()))
        self.still = BlockCode(config.still_classes, half - _log2(config.still_classes), len(_transform()))
        moving_bits = half - _log2(config.motions) - _log2(config.moving_classes)
        self.moving = BlockCode(config.moving_classes, moving_bits, len(_transform()))
        self.register_buffer("motions", torch.ones(config.motions, 2, dtype=torch.int8))
        self.refine_first = GroupRefiner(1, width=config.width, blocks=config.blocks)
        self.refine = GroupRefiner(FRAMES, width=config.width, blocks=config.blocks)
        self.reach = FRAMES * config.reach

    # -- frames to words

    def encode_first(self, frame: Tensor) -> Tensor:
        """Words int64 `[B, h, w]` of a first frame `[B, 3, H, W]`."""
        blocks = first_blocks(frame)
        return self.first.encode(blocks.flatten(0, 2))[0].view(blocks.shape[:3])

    def encode_step(self, frames: Tensor, before: Tensor) -> Tensor:
        """Words int64 `[B, h, w]` of the frames of a step `[B, T, 3, H, W]` behind the one decoded last, `[B, 3, H, W]`."""
        chosen = self.likely_motions(frames, before)
        still, *moved = self.residuals(frames, before, chosen)
        words, errors = self.still.encode(still.flatten(0, 2))
        for motion, left in zip(chosen.unbind(3), moved, strict=True):
            other, error = self.moving.encode(left.flatten(0, 2))
            other = self.still.size + motion.flatten() * self.moving.size + other
            words, errors = torch.where(error < errors, other, words), torch.minimum(error, errors)
        return words.view(still.shape[:3])

    def likely_motions(self, frames: Tensor, before: Tensor) -> Tensor:
        """Indices int64 `[B, h, w, R]` of the motions that leave least of a step's second and last frames."""
        energy = motion_energy(frames, before, self.motions, self.reach)
        return energy.topk(min(_MOTIONS_TRIED, len(self.motions)), 3, largest=False).indices

    def residuals(self, frames: Tensor, before: Tensor, chosen: Tensor) -> list[Tensor]:
        """Coefficients `[B, h, w, K]` of what is left of a step where nothing moves, and with each of the chosen motions."""
        mover, wanted, transform = Mover(before.float(), self.reach), to_blocks(frames.float()), _transform().to(before.device)
        motions = [torch.zeros_like(chosen[..., :1]).expand(-1, -1, -1, 2), *self.motions.long()[chosen].unbind(3)]
        return [(wanted - mover.blocks(motion)) @ transform.T for motion in motions]

    # -- words to frames

    def decode_first(self, words: Tensor) -> Tensor:
        """The coarse first frame `[B, 1, 3, H, W]`."""
        return from_blocks(self.first.decode(words) @ _first_transform().to(words.device), 1) + _GREY

    def decode_step(self, words: Tensor, before: Tensor) -> Tensor:
        """The coarse frames of a step `[B, T, 3, H, W]`."""
        moves = (words >= self.still.size)[..., None]
        rest = (words - self.still.size).clamp_min(0)
        still = self.still.decode(words.clamp_max(self.still.size - 1))
        left = torch.where(moves, self.moving.decode(rest % self.moving.size), still)
        motion = self.motions.long()[rest // self.moving.size].masked_fill(~moves, 0)
        blocks = Mover(before.float(), self.reach).blocks(motion) + left @ _transform().to(words.device)
        return from_blocks(blocks, FRAMES)

    def decoded(self, words: Tensor, before: Tensor | None) -> Tensor:
        """The refined frames of a step, `[B, T, 3, H, W]`, or the first one where there is none `before`."""
        with torch.autocast(words.device.type, enabled=False):
            coarse = self.decode_first(words) if before is None else self.decode_step(words, before)
        coarse = coarse.to(self.refine.head.weight.dtype)
        if before is None:
            return self.refine_first(coarse, torch.full_like(coarse[:, 0], _GREY))
        return self.refine(coarse, before.to(coarse.dtype))

    def encoded(self, frames: Tensor, before: Tensor | None) -> Tensor:
        """Words int64 `[B, h, w]` of the frames of a step, or of the first one."""
        return self.encode_first(frames[:, 0]) if before is None else self.encode_step(frames, before)


def first_blocks(frame: Tensor) -> Tensor:
    """Coefficients `[B, h, w, K]` of a first frame `[B, 3, H, W]`."""
    return to_blocks(frame[:, None].float() - _GREY) @ _first_transform().to(frame.device).T


def motion_energy(frames: Tensor, before: Tensor, motions: Tensor, reach: int) -> Tensor:
    """What each of V motions leaves of the second and last frames of a step, in grey: `[B, h, w, V]`."""
    grey = frames[:, 1::2].float().mean(2)
    mover = Mover(before.float().mean(1, keepdim=True), reach)
    found = []
    for down, right in motions.tolist():
        moved = torch.cat([mover.moved(down * k, right * k) for k in range(2, FRAMES + 1, 2)], 1)
        found.append(F.avg_pool2d((grey - moved).square(), SIDE).sum(1))
    return torch.stack(found, 3)


def _steps(x: Tensor, begun: bool) -> list[Tensor]:
    """Frames `[B, T, ...]` step by step; the first one is a step of its own unless the clip has begun."""
    lone = 0 if begun or not x.shape[1] else 1
    return [*([x[:, :1]] if lone else []), *(x[:, lone:].split(FRAMES, 1) if x.shape[1] > lone else [])]


class LoopEncoder(Streamed):
    """Clips in [-1, 1] to codes; the loop belongs to the tokenizer."""

    def __init__(self, loop: ClosedLoop, words: Words) -> None:
        super().__init__()
        self._parts = (loop, words)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, 3, 1 + 4 k, H, W]` to `[B, 6, 1 + k, H / 8, W / 8]`; later pieces have 4 k frames."""
        loop, words = self._parts
        before = None if state is None else state.pop(self, None)
        found = [x.new_zeros(len(x), 0, x.shape[3] // SIDE, x.shape[4] // SIDE, dtype=torch.long)]
        for frames in _steps((x.transpose(1, 2) + 1) / 2, before is not None):
            found.append(loop.encoded(frames, before)[:, None])
            before = loop.decoded(found[-1][:, 0], before)[:, -1].clamp(0, 1)
        if state is not None and not last and before is not None:
            state[self] = before
        return words.lookup(torch.cat(found, 1)).movedim(-1, 1)


class LoopDecoder(Streamed):
    """The inverse of `LoopEncoder`."""

    def __init__(self, loop: ClosedLoop, words: Words) -> None:
        super().__init__()
        self._parts = (loop, words)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, 6, 1 + k, h, w]` to `[B, 3, 1 + 4 k, 8 h, 8 w]`; later pieces give 4 k frames."""
        loop, words = self._parts
        before = None if state is None else state.pop(self, None)
        found = [x.new_zeros(len(x), 0, 3, x.shape[3] * SIDE, x.shape[4] * SIDE)]
        for ids in words.ids(x.movedim(1, -1)).unbind(1):
            found.append(loop.decoded(ids, before))
            before = found[-1][:, -1].clamp(0, 1)
        if state is not None and not last and before is not None:
            state[self] = before
        return torch.cat(found, 1).transpose(1, 2) * 2 - 1


class VidTokNano(GridVideo):
    """One frame, then 4 a step; 8 pixels a step; predicted from what is decoded already."""

    architecture: ClassVar[str] = "vidtok_nano"
    config_class: ClassVar[type[TokenizerConfig]] = VidTokNanoConfig
    config: VidTokNanoConfig

    def __init__(self, config: VidTokNanoConfig) -> None:
        words = Words()
        super().__init__(config, words.levels, stride=SIDE, frame_stride=FRAMES, lone_first=True)
        self.quantizer, self.loop = words, ClosedLoop(config)
        self.encoder, self.decoder = LoopEncoder(self.loop, words), LoopDecoder(self.loop, words)

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Mean log squared error, which is PSNR, and `extra_losses`, on clips `[B, 1 + 4 k, 3, H, W]` in [0, 1].

        Steps are coded in the closed loop, and each is told of its own errors only.

        Raises:
            ValueError: If the clips do not fill their steps.
        """
        del progress, generator
        if batch.shape[1] % FRAMES != 1 or batch.shape[3] % SIDE or batch.shape[4] % SIDE:
            raise ValueError(f"expected clips of 1 + {FRAMES} k frames and sides in multiples of {SIDE}, got {batch.shape = }")
        words, parts, before = [], [], None
        for frames in _steps(batch, False):
            with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
                words.append(self.loop.encoded(frames, before))
            parts.append(self.loop.decoded(words[-1], before).float())
            before = parts[-1][:, -1].detach().clamp(0, 1)
        reconstruction = torch.cat(parts, 1)
        errors = [(part - frames).square().flatten(1).mean(1) for part, frames in zip(parts, _steps(batch, False), strict=True)]
        losses = {"log_error": torch.log(torch.stack(errors) + 1e-5).mean()}
        return trained(batch, reconstruction, losses, self.extra_losses, torch.stack(words), self.quantizer.size)

    @torch.no_grad()
    def initialise(self, clips: Tensor, generator: torch.Generator) -> None:
        """Estimates the block codes and the motions from clips uint8 `[N, 1 + 4 k, 3, H, W]`, some hundred."""
        fit_loop(self.loop, clips, self.config.reach, generator)


def fit_loop(loop: ClosedLoop, clips: Tensor, reach: int, generator: torch.Generator) -> None:
    """Estimates the codes of a loop around its refiners as they are: step by step, then twice from all steps in the loop."""
    first = torch.cat([first_blocks(_floats(clips[:, at])).flatten(0, 2) for at in (0, clips.shape[1] // 2)])
    loop.first.fit(first, generator)
    loop.motions.copy_(_frequent_motions(clips, len(loop.motions), reach))
    first_step, *steps = _steps(clips, False)
    for fresh in (True, False, False):
        kept: list[tuple[Tensor, Tensor]] = []
        before = _last_frames(loop, first_step, None)
        for step in steps:
            batches = zip(step.split(_FITTED_AT_ONCE), before.split(_FITTED_AT_ONCE), strict=True)
            pairs = [_still_and_moving(loop, _floats(part), last) for part, last in batches]
            kept.append((torch.cat([still for still, _ in pairs]), torch.cat([moving for _, moving in pairs])))
            if fresh and len(kept) == 1:
                _fit_pair(loop, kept, generator, fresh=True)
            before = _last_frames(loop, step, before)
        _fit_pair(loop, kept, generator, fresh=fresh)


def _last_frames(loop: ClosedLoop, step: Tensor, before: Tensor | None) -> Tensor:
    """What the last frames of a step, uint8 `[N, T, 3, H, W]`, are decoded to."""
    found = []
    for at in range(0, len(step), _FITTED_AT_ONCE):
        last = None if before is None else before[at : at + _FITTED_AT_ONCE]
        words = loop.encoded(_floats(step[at : at + _FITTED_AT_ONCE]), last)
        found.append(loop.decoded(words, last)[:, -1].clamp(0, 1))
    return torch.cat(found)


def _fit_pair(loop: ClosedLoop, kept: list[tuple[Tensor, Tensor]], generator: torch.Generator, *, fresh: bool) -> None:
    still, moving = (torch.cat(part) for part in zip(*kept, strict=True))
    loop.still.fit(still, generator, fresh=fresh)
    loop.moving.fit(moving, generator, fresh=fresh)


def _still_and_moving(loop: ClosedLoop, frames: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the blocks of a step that do not move, and of those that do, `[N, K]` both."""
    still, moved, *_ = (left.flatten(0, 2) for left in loop.residuals(frames, before, loop.likely_motions(frames, before)))
    moves = moved.square().sum(1) < 0.7 * still.square().sum(1)
    return still[~moves], moved[moves]


def _frequent_motions(clips: Tensor, count: int, reach: int) -> Tensor:
    """The motions `[count, 2]` that, one after another, leave least of the steps of some clips."""
    places = torch.arange(-reach, reach + 1)
    candidates = torch.cartesian_prod(places, places)
    candidates = candidates[candidates.abs().sum(1) > 0]
    some = clips[:: max(1, len(clips) // 96)]
    left = []
    for at in range(1, clips.shape[1], FRAMES):
        frames, before = _floats(some[:, at : at + FRAMES]), _floats(some[:, at - 1])
        both = torch.cat([torch.zeros(1, 2, dtype=torch.long), candidates])
        left.append(torch.log(motion_energy(frames, before, both, FRAMES * reach) + 1e-3).flatten(0, 2))
    energies = torch.cat(left)
    best, rest = energies[:, 0], energies[:, 1:]
    chosen: list[int] = []
    for _ in range(count):
        gains = (best[:, None] - rest).clamp_min_(0).sum(0)
        gains[chosen] = -1.0
        chosen.append(int(gains.argmax()))
        best = torch.minimum(best, rest[:, chosen[-1]])
    return candidates[chosen].to(torch.int8)


def _floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 255
