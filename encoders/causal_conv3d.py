"""Layers of convolutional video networks that take a clip whole or piece by piece, and give the same either way.

A layer is called as `layer(x)` on a whole clip, or as `layer(x, state, last)` on one piece of it after the other, as in
`encoders.streaming`: what it has to remember lies in `state`, outside of the module. Causal layers answer every frame at
once; those that look ahead answer later, and the last piece brings out the rest.

Clips are `[B, C, T, H, W]` but lie in memory pixel by pixel, `[B, T, H, W, C]` (`channels_last_3d`): a convolution within
frames, one over time and a product over channels then all see their data as oneDNN and cuDNN want it, and nothing is
rearranged in between. Clips that lie otherwise are taken too.

Shapes: B batch, C channels, T frames, H W height and width.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.streaming import Chain, State, Streamed


def frames(x: Tensor) -> Tensor:
    """A clip `[B, C, T, H, W]` as pictures `[B * T, C, H, W]`."""
    return x.transpose(1, 2).flatten(0, 1)


def clips(pictures: Tensor, batch: int) -> Tensor:
    """The inverse of `frames`: `[B * T, C, H, W]` to `[B, C, T, H, W]`."""
    return pictures.unflatten(0, (batch, len(pictures) // batch)).transpose(1, 2)


def laid_out(x: Tensor) -> Tensor:
    """A clip that lies in memory pixel by pixel."""
    return x.contiguous(memory_format=torch.channels_last_3d)


class PerFrame(nn.Module):
    """Base of layers that look at one picture at a time; `look` maps pictures `[N, C, H, W]`."""

    @abstractmethod
    def look(self, pictures: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C', H', W']`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C', T, H', W']`."""
        return clips(self.look(frames(x)), len(x))


class FrameConv(nn.Conv2d):
    """A convolution within every frame, padded with zeros to keep its size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C', T, H, W]`."""
        return clips(super().forward(frames(x)), len(x))


class FrameNorm(nn.GroupNorm):
    """A GroupNorm with statistics of its own for every frame; with one group, over all of its channels and pixels."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T, H, W]`."""
        return clips(super().forward(frames(x)), len(x))


class PixelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T, H, W]`."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Windowed(Streamed):
    """Base of layers that see windows of `kernel` frames, `stride` apart.

    Before the first frame stand `left` frames, copies of it or zeros; behind the last one `right` frames of zeros.

    Attributes:
        window: Frames of a window, frames from one to the next, frames before the first and behind the last.
        repeat: Whether copies of the first frame stand before it, instead of zeros.
    """

    window: tuple[int, int, int, int]
    repeat: bool

    @abstractmethod
    def over(self, x: Tensor) -> Tensor:
        """All whole windows of `[B, C, T, H, W]`, at least one: `[B, C', T', H, W]`."""

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C', T', H, W]`."""
        kernel, stride, left, right = self.window
        past = None if state is None else state.pop(self, None)
        if past is not None:
            x = after(past, x)
        elif x.shape[2]:
            edge = x[:, :, :1] if self.repeat else x.new_zeros(())
            x = after(edge.expand(*x.shape[:2], left, *x.shape[3:]), x)
        if last and right and x.shape[2]:
            x = after(x, x.new_zeros(()).expand(*x.shape[:2], right, *x.shape[3:]))
        count = max(0, (x.shape[2] - kernel) // stride + 1)
        used = count * stride
        if state is not None and not last and x.shape[2]:
            state[self] = x[:, :, used:].clone()
        if not count:
            return x.new_empty(len(x), self.width(x.shape[1]), 0, *x.shape[3:])
        return self.over(x[:, :, : used + kernel - stride])

    def width(self, in_channels: int) -> int:
        """Channels of the output."""
        return int(getattr(self, "out_channels", in_channels))


class TimeConv(nn.Conv1d, Windowed):
    """A convolution over time at every pixel.

    Args:
        in_channels: As in `nn.Conv1d`.
        out_channels: As in `nn.Conv1d`.
        kernel_size: As in `nn.Conv1d`.
        causal: Whether an output may see no later frame; else it sees as many later as earlier ones.
        repeat: As in `Windowed`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, causal: bool = True, repeat: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        right = 0 if causal else kernel_size // 2
        self.window, self.repeat = (kernel_size, 1, kernel_size - 1 - right, right), repeat

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C', T, H, W]`."""
        return Windowed.forward(self, x, state, last)

    def over(self, x: Tensor) -> Tensor:
        """A two-dimensional convolution whose one side is time and whose other side are all pixels of a frame."""
        return over_time(x, self.weight, self.bias)


def over_time(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """`[B, C, T, H, W]`, convolved over time without padding by `[C', C, kernel]`: `[B, C', T', H, W]`."""
    y = F.conv2d(x.flatten(3), weight.unsqueeze(3), bias, (stride, 1))
    return y.unflatten(3, x.shape[3:])


class ClipConv(nn.Conv3d, Windowed):
    """A convolution over time and space, padded with zeros to keep height and width; arguments as `TimeConv`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, causal: bool = True, repeat: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=(0, kernel_size // 2, kernel_size // 2))
        right = 0 if causal else kernel_size // 2
        self.window, self.repeat = (kernel_size, 1, kernel_size - 1 - right, right), repeat

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C', T, H, W]`."""
        return Windowed.forward(self, x, state, last)

    def over(self, x: Tensor) -> Tensor:
        """As `Windowed.over`."""
        return self._conv_forward(x, self.weight, self.bias)


class Residual(Streamed):
    """`shortcut(x) + block(x)`, for a block that keeps the frames; in pieces, the shortcut waits for the block."""

    def __init__(self, block: Chain, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C', T, H, W]`."""
        y = self.block(x, state, last)
        if state is not None:
            waiting = state.pop(self, None)
            x = x if waiting is None else after(waiting, x)
            if y.shape[2] < x.shape[2]:
                state[self] = x[:, :, y.shape[2] :].clone()
                x = x[:, :, : y.shape[2]]
        return self.join(self.shortcut(x), y)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """What becomes of the shortcut and the block's answer, `[B, C', T, H, W]` both."""
        return x + y


class SmoothDouble(Streamed):
    """Twice as many frames, each a quarter of the nearest neighbour and three quarters of itself.

    The first `lead` frames and those after them are two clips of their own here, whose first and last frames have no
    neighbour beyond. A frame is doubled once the next one is known, or that there is none.
    """

    def __init__(self, lead: int) -> None:
        super().__init__()
        self.lead = lead

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, 2 T, H, W]`; of the first piece, at least `lead` frames are expected."""
        past = None if state is None else state.pop(self, None)
        done = []
        if past is None:
            head, x = x[:, :, : self.lead], x[:, :, self.lead :]
            done.append(_doubled(head[:, :, :1], head, head[:, :, -1:]))
            past = x[:, :, :0]
        x = after(past if past.shape[2] else x[:, :, :1], x)  # the frame before, and those that wait for the next
        if state is not None and not last:
            state[self] = x[:, :, -2:].clone()
        certain = x[:, :, 1:] if last else x[:, :, 1:-1]
        if certain.shape[2]:
            done.append(_doubled(x[:, :, :1], certain, x[:, :, -1:]))
        return torch.cat(done, 2) if done else x[:, :, :0]


def _doubled(before: Tensor, x: Tensor, behind: Tensor) -> Tensor:
    """Frames `[B, C, T, H, W]` between one neighbour on each side, doubled: `[B, C, 2 T, H, W]`."""
    earlier, later = after(before, x[:, :, :-1]), after(x[:, :, 1:], behind)
    return torch.stack([earlier.lerp(x, 0.75), x.lerp(later, 0.25)], 3).flatten(2, 3)


class FrameAttention(nn.Module):
    """Residual single-head attention between all pixels of a frame."""

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v, self.out = (FrameConv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T, H, W]`."""
        h = self.norm(x)
        q, k, v = (frames(part(h)).flatten(2).mT.unsqueeze(1) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.unflatten(2, x.shape[3:])
        return x + self.out(clips(mixed, len(x)))


class TimeAttention(Streamed):
    """Residual single-head attention of every pixel to itself in this frame and all before it.

    In pieces, keys and values of all frames are remembered: this is the one layer whose state grows with the clip.
    """

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v, self.out = (FrameConv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T, H, W]`."""
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        past = None if state is None else state.pop(self, None)
        if past is not None:
            k, v = after(past[0], k), after(past[1], v)
        if state is not None and not last:
            state[self] = (k, v)
        mixed = self._mix(*(part.permute(0, 3, 4, 2, 1).flatten(1, 2) for part in (q, k, v)))
        return x + self.out(mixed.unflatten(1, x.shape[3:]).permute(0, 4, 3, 1, 2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries `[B, HW, T, C]` of the last frames, keys and values `[B, HW, T', C]` of all."""
        if k.shape[2] == 1:
            return v
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, seen)


def after(first: Tensor, second: Tensor) -> Tensor:
    """Two clips `[B, C, T, H, W]` one after the other, pixel by pixel in memory; the second itself if the first is empty."""
    return torch.cat([first.movedim(1, -1), second.movedim(1, -1)], 1).movedim(-1, 1) if first.shape[2] else second
