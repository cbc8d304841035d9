"""One-dimensional layers that can be fed piece by piece, and then give what they give over the whole, in bounded memory.

A layer is called as `layer(x)` on a whole signal `[B, C, T]`, or as `layer(x, state, last)` on one piece of it after the
other. All that a layer has to remember lies in `state`, outside of the module, so that one network serves many streams. A
layer answers a piece with as many outputs as are certain by then, possibly none; the last piece brings out the rest.
Layers that look ahead only answer later, so this serves causal and non-causal networks alike.

Signals are `[B, C, T]` but lie in memory step by step, `[B, T, C]`, and weights likewise: the convolutions of codecs then are
matrix products, or what oneDNN and cuDNN do without rearranging anything. Signals that lie otherwise are taken too.

Shapes: B batch, C channels, T steps of this layer's input.
"""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[nn.Module, Any]
PadMode = Literal["constant", "reflect", "replicate"]
FINE_VALUES = 1 << 20  # in the largest signals of fine layers
_FEW_INPUTS = 16
_FEW_STEPS = 256


class Streamed(nn.Module):
    """Base of layers that take `(x, state, last)`; `state=None` says that `x` is the whole signal."""

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C', T']`."""


class Chain(nn.ModuleList):
    """Layers one after the other; those that remember nothing are called with `x` alone.

    Args:
        layers: In order.
        fine: Which of them, next to each other, work at high rates with small weights. Of a piece they get `steps` steps
            at a time, so that their signals, larger than all others, take little memory and stay in the processor's cache.
        steps: Of the input of the fine layers.
    """

    def __init__(self, layers: Iterable[nn.Module], *, fine: slice = slice(0), steps: int = 1) -> None:
        super().__init__(layers)
        self.fine, self.steps = fine, max(1, steps)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C', T']`."""
        start, stop, _ = self.fine.indices(len(self))
        if state is None or start == stop or x.shape[-1] == 0:
            return self._through(slice(None), x, state, last)
        x = self._through(slice(start), x, state, last)
        *parts, final = x.split(self.steps, -1)
        done = [self._through(self.fine, part, state, False) for part in parts]
        done.append(self._through(self.fine, final, state, last))
        x = torch.cat([part.mT for part in done], 1).mT
        return self._through(slice(stop, None), x, state, last)

    def _through(self, which: slice, x: Tensor, state: State | None, last: bool) -> Tensor:
        for layer in list(self)[which]:
            x = layer(x, state, last) if isinstance(layer, (Streamed, Chain)) else layer(x)
        return x


class Residual(Streamed):
    """`shortcut(x) + block(x)`, for a block that keeps the number of steps."""

    def __init__(self, block: Chain, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`; in pieces, the shortcut waits for the block."""
        y = self.block(x, state, last)
        if state is not None:
            waiting = state.get(self)
            x = x if waiting is None else join(waiting, x)
            x, state[self] = x[..., : y.shape[-1]], _rest(x, y.shape[-1])
        return y.add_(self.shortcut(x))


class _Past(NamedTuple):
    """What a convolution remembers: inputs, how many of them are used up, how many there were, whether it has begun."""

    buffer: Tensor
    used: int
    seen: int
    begun: bool


class Conv1d(nn.Conv1d, Streamed):
    """A convolution padded so that T steps become ceil(T / stride), as EnCodec's.

    The padding is `span - stride` steps, all on the left if `causal`, else half on each side, the larger half on the left;
    where the stride does not divide T, the right side gets what is missing. A reflection that needs more steps than there
    are is that of the signal with zeros behind it.

    Args:
        in_channels: As in `nn.Conv1d`.
        out_channels: As in `nn.Conv1d`.
        kernel_size: As in `nn.Conv1d`.
        stride: As in `nn.Conv1d`.
        dilation: As in `nn.Conv1d`.
        groups: As in `nn.Conv1d`.
        bias: As in `nn.Conv1d`.
        causal: Whether an output may see no later input.
        pad_mode: What stands beyond both ends.
        norm: Whether a GroupNorm over all channels and steps follows; such a layer takes whole signals only.
        elu: Whether ELU comes first; this saves a pass over the input, which is copied for padding anyway.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        causal: bool = False,
        pad_mode: PadMode = "constant",
        norm: bool = False,
        elu: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, groups=groups, bias=bias)
        self.pad_mode = pad_mode
        self.span = (kernel_size - 1) * dilation + 1
        padding = self.span - stride
        self.right = 0 if causal else padding // 2
        self.left = padding - self.right
        self.norm = nn.GroupNorm(1, out_channels) if norm else None
        self.elu = elu
        self.weight = _step_by_step(self.weight)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C', ceil(T / stride)]`."""
        if state is None:
            return self._whole(x)
        if self.norm is not None:
            raise ValueError("a convolution with a GroupNorm over time cannot be fed piece by piece")
        return self._piece(x, state, last)

    def _whole(self, x: Tensor) -> Tensor:
        right = self.right + -x.shape[-1] % self.stride[0]
        if not x.shape[-1]:
            return self._nothing(x)
        if self.elu:
            padded = _pad(x, self.left, right, self.pad_mode)
            y = self._convolve(F.elu(x) if padded is x else F.elu_(padded))
        elif self.pad_mode == "constant" and self.left == right and self.stride == self.dilation == (1,):
            y = self._convolve(x, right)
        else:
            y = self._convolve(_pad(x, self.left, right, self.pad_mode))
        return y if self.norm is None else normalize(self.norm, y)

    def _piece(self, x: Tensor, state: State, last: bool) -> Tensor:
        past = state.pop(self, None) or _Past(x[..., :0], 0, 0, False)
        if last and not past.begun:
            return self._whole(join(past.buffer, x) if past.seen else x)
        buffer, seen = join(past.buffer, x), past.seen + x.shape[-1]
        if not past.begun:
            if seen <= self._needed():
                state[self] = _Past(buffer, 0, seen, False)
                return self._nothing(x)
            buffer = _pad(buffer, self.left, 0, self.pad_mode)
        if self.elu:  # what was there before has been through it
            if buffer is x:
                buffer = F.elu(x)
            else:
                F.elu_(buffer[..., past.buffer.shape[-1] if past.begun else 0 :])
        if last:
            buffer = _pad(buffer, 0, self.right + -seen % self.stride[0], self.pad_mode)
        count = max(0, (buffer.shape[-1] - past.used - self.span) // self.stride[0] + 1)
        used = past.used + count * self.stride[0]
        y = self._convolve(buffer[..., past.used : used + self.span - self.stride[0]]) if count else self._nothing(x)
        if not last:
            # A reflection at the end may reach further back than the next window does.
            reserve = self.right + self.stride[0] if self.pad_mode == "reflect" else 0
            start = max(0, min(used, buffer.shape[-1] - reserve))
            state[self] = _Past(_rest(buffer, start), used - start, seen, True)
        return y

    def _needed(self) -> int:
        """The convolution begins when more inputs than this are there: enough to pad either side with."""
        if self.pad_mode == "reflect":
            return max(self.left, self.right + self.stride[0] - 1)
        return 0 if self.pad_mode == "replicate" else -1

    def _convolve(self, x: Tensor, padding: int = 0) -> Tensor:
        (kernel,), (stride,), (dilation,) = self.kernel_size, self.stride, self.dilation
        if self.groups == dilation == 1:
            if kernel == stride or kernel == 2 * stride:
                return self._multiply(x, stride)
            if kernel * self.in_channels <= _FEW_INPUTS or x.shape[-1] <= _FEW_STEPS:
                x_BTC = F.pad(x.mT, (0, 0, padding, padding)).contiguous()
                windows = x_BTC.flatten(1).unfold(1, kernel * self.in_channels, stride * self.in_channels)
                return F.linear(windows.contiguous(), self.weight.mT.flatten(1), self.bias).mT
        weight = self.weight.unsqueeze(2)
        y = F.conv2d(x.unsqueeze(2), weight, self.bias, (1, stride), (0, padding), (1, dilation), self.groups)
        return y.squeeze(2)

    def _multiply(self, x: Tensor, stride: int) -> Tensor:
        """A kernel of one stride is a product of blocks of so many steps; one of two strides also of those that follow."""
        blocks = x.mT.reshape(len(x), -1, stride * self.in_channels)
        first, *second = self.weight.mT.flatten(1).split(stride * self.in_channels, 1)
        y = F.linear(blocks[:, : blocks.shape[1] - len(second)], first, self.bias)
        for weight in second:
            y.baddbmm_(blocks[:, 1:], weight.mT.expand(len(x), -1, -1))
        return y.mT

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), self.out_channels, 0)


class ConvTranspose1d(nn.ConvTranspose1d, Streamed):
    """The inverse in size of `Conv1d`: T steps become T * stride, by trimming what a transposed convolution has too many.

    Args:
        in_channels: As in `nn.ConvTranspose1d`.
        out_channels: As in `nn.ConvTranspose1d`.
        kernel_size: As in `nn.ConvTranspose1d`; at most twice the stride.
        stride: As in `nn.ConvTranspose1d`.
        groups: As in `nn.ConvTranspose1d`.
        bias: As in `nn.ConvTranspose1d`.
        causal: Trim on the right only; otherwise half on each side, the larger half on the left.
        symmetric: Trim the larger half on both sides, which loses a step where the halves differ (DAC).
        norm: Whether a GroupNorm over all channels and steps follows, before trimming; takes whole signals only.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        groups: int = 1,
        bias: bool = True,
        causal: bool = False,
        symmetric: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=bias)
        if not stride <= kernel_size <= 2 * stride:
            raise ValueError(f"expected a kernel of one to two strides, got {kernel_size = } and {stride = }")
        self.trim = kernel_size - stride
        self.left = 0 if causal else self.trim - self.trim // 2
        self.right = self.left if symmetric else self.trim - self.left
        self.norm = nn.GroupNorm(1, out_channels) if norm else None
        self.weight = _step_by_step(self.weight)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:  # type: ignore[override]
        """`[B, C, T]` to `[B, C', T * stride]`, or one step less."""
        if state is not None and self.norm is not None:
            raise ValueError("a convolution with a GroupNorm over time cannot be fed piece by piece")
        before, begun = (x[..., :0], False) if state is None else state.get(self, (x[..., :0], False))
        x = join(before, x)
        if state is not None:
            state[self] = (_rest(x, -1 if self.trim else x.shape[-1]), begun or bool(x.shape[-1]))
        if not x.shape[-1]:
            return x.new_empty(len(x), self.out_channels, 0)
        y = self._convolve(x)
        if self.norm is not None:
            y = normalize(self.norm, y)
        start = before.shape[-1] * self.stride[0] if begun else self.left
        return y[..., start : y.shape[-1] - (self.right if last else self.trim)]

    def _convolve(self, x: Tensor) -> Tensor:
        """What a step adds to the outputs of its own stride, and to those of the next: a product each."""
        if self.groups > 1:
            return F.conv_transpose1d(x, self.weight, self.bias, self.stride, groups=self.groups)
        (stride,), (batch, _, steps) = self.stride, x.shape
        own, *more = self.weight.mT.flatten(1).split(stride * self.out_channels, 1)
        blocks = x.new_zeros(self.out_channels) if self.bias is None else self.bias
        blocks = blocks.repeat(batch, steps + 1, stride)
        blocks[:, :-1].baddbmm_(x.mT, own.expand(batch, -1, -1))
        for weight in more:
            blocks[:, 1:, : weight.shape[1]].baddbmm_(x.mT, weight.expand(batch, -1, -1))
        return blocks.view(batch, -1, self.out_channels)[:, : steps * stride + self.trim].mT


class SkipLSTM(Streamed):
    """`x + lstm(x)`, forward in time."""

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, num_layers)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        del last
        if not x.shape[-1]:
            return x
        steps = x.permute(2, 0, 1)
        y, memory = self.lstm(steps, None if state is None else state.get(self))
        if state is not None:
            state[self] = memory
        return (y + steps).permute(1, 2, 0)


def join(first: Tensor, second: Tensor) -> Tensor:
    """Two signals `[B, C, T]` one after the other, step by step in memory; the second itself if the first is empty."""
    return torch.cat([first.mT, second.mT], 1).mT if first.shape[-1] else second


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """A GroupNorm of `[B, C, T]`; in four dimensions it takes signals as they lie."""
    y: Tensor = norm(x.unsqueeze(2))
    return y.squeeze(2)


def _rest(x: Tensor, start: int) -> Tensor:
    """What `[B, C, T]` has from `start` on, copied: what is remembered must not keep all of the signal alive."""
    return x[..., start:].clone()


def _step_by_step(weight: Tensor) -> nn.Parameter:
    """A weight `[C', C, kernel]` that lies in memory as `[C', kernel, C]`."""
    return nn.Parameter(weight.detach().mT.contiguous().mT)


def _pad(x: Tensor, left: int, right: int, mode: PadMode) -> Tensor:
    if not (left or right):
        return x
    x_BTC = x.mT
    if mode != "reflect":
        zero = x_BTC.new_zeros(())
        before, after = (zero, zero) if mode == "constant" else (x_BTC[:, :1], x_BTC[:, -1:])
        sides = [side.expand(len(x), count, x.shape[1]) for side, count in ((before, left), (after, right))]
        return torch.cat([sides[0], x_BTC, sides[1]], 1).mT
    missing = max(0, max(left, right) - x.shape[-1] + 1)
    x_BTC = F.pad(x_BTC, (0, 0, 0, missing)) if missing else x_BTC
    steps = x_BTC.shape[1]
    before, after = x_BTC[:, 1 : left + 1].flip(1), x_BTC[:, steps - right - 1 : steps - 1].flip(1)
    return torch.cat([before, x_BTC, after], 1)[:, : left + steps + right - missing].mT
