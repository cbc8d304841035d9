"""One-dimensional layers that can be fed piece by piece, and then give what they give over the whole, in bounded memory.

A layer is called as `layer(x)` on a whole signal `[B, C, T]`, or as `layer(x, state, last)` on one piece of it after the
other. All that a layer has to remember lies in `state`, outside of the module, so that one network serves many streams. A
layer answers a piece with as many outputs as are certain by then, possibly none; the last piece brings out the rest.
Layers that look ahead only answer later, so this serves causal and non-causal networks alike.

Shapes: B batch, C channels, T steps of this layer's input.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[nn.Module, Any]
PadMode = Literal["constant", "reflect", "replicate"]


class Streamed(nn.Module):
    """Base of layers that take `(x, state, last)`; `state=None` says that `x` is the whole signal."""

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C', T']`."""


class Chain(nn.ModuleList):
    """Layers one after the other; those that remember nothing are called with `x` alone."""

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C', T']`."""
        for layer in self:
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
            x = x if waiting is None else torch.cat([waiting, x], -1)
            x, state[self] = x[..., : y.shape[-1]], x[..., y.shape[-1] :]
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
        elif self.pad_mode == "constant" and self.left == right:
            y = F.conv1d(x, self.weight, self.bias, self.stride, right, self.dilation, self.groups)
        else:
            y = self._convolve(_pad(x, self.left, right, self.pad_mode))
        return y if self.norm is None else self.norm(y)

    def _piece(self, x: Tensor, state: State, last: bool) -> Tensor:
        past = state.pop(self, None) or _Past(x[..., :0], 0, 0, False)
        if last and not past.begun:
            return self._whole(torch.cat([past.buffer, x], -1) if past.seen else x)
        buffer, seen = torch.cat([past.buffer, x], -1), past.seen + x.shape[-1]
        if not past.begun:
            if seen <= self._needed():
                state[self] = _Past(buffer, 0, seen, False)
                return self._nothing(x)
            buffer = _pad(buffer, self.left, 0, self.pad_mode)
        if self.elu:  # what was there before has been through it
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
            state[self] = _Past(buffer[..., start:], used - start, seen, True)
        return y

    def _needed(self) -> int:
        """The convolution begins when more inputs than this are there: enough to pad either side with."""
        if self.pad_mode == "reflect":
            return max(self.left, self.right + self.stride[0] - 1)
        return 0 if self.pad_mode == "replicate" else -1

    def _convolve(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

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

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:  # type: ignore[override]
        """`[B, C, T]` to `[B, C', T * stride]`, or one step less."""
        if state is not None and self.norm is not None:
            raise ValueError("a convolution with a GroupNorm over time cannot be fed piece by piece")
        before, begun = (x[..., :0], False) if state is None else state.get(self, (x[..., :0], False))
        x = torch.cat([before, x], -1) if before.shape[-1] else x
        if state is not None:
            state[self] = (x[..., -1:] if self.trim else x[..., :0], begun or bool(x.shape[-1]))
        if not x.shape[-1]:
            return x.new_empty(len(x), self.out_channels, 0)
        y = F.conv_transpose1d(x, self.weight, self.bias, self.stride, groups=self.groups)
        if self.norm is not None:
            y = self.norm(y)
        start = before.shape[-1] * self.stride[0] if begun else self.left
        return y[..., start : y.shape[-1] - (self.right if last else self.trim)]


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


def pieces(network: nn.Module, x: Tensor, size: int) -> Iterator[Tensor]:
    """What a network makes of `x` `[B, C, T]`, fed `size` steps at a time; together the outputs are those of the whole."""
    length = x.shape[-1]
    if length <= size:
        yield network(x)
        return
    state: State = {}
    for at in range(0, length, size):
        yield network(x[..., at : at + size], state, at + size >= length)


def _pad(x: Tensor, left: int, right: int, mode: PadMode) -> Tensor:
    if not (left or right):
        return x
    if mode != "reflect":
        return F.pad(x, (left, right), mode)
    missing = max(0, max(left, right) - x.shape[-1] + 1)
    padded = F.pad(F.pad(x, (0, missing)), (left, right), mode)
    return padded[..., : padded.shape[-1] - missing]
