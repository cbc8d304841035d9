"""The convolutional encoder and decoder of DAC and SNAC: dilated residual units with the periodic Snake activation.

Papers: https://arxiv.org/abs/2306.06546 (DAC), https://arxiv.org/abs/2410.14411 (SNAC). Layers keep the positions that they
have in the published state dicts.

Shapes: B batch, C channels, D width of the latents, S samples, T steps.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.streaming import FINE_VALUES, Chain, Conv1d, ConvTranspose1d, Residual, State, Streamed, join

_DILATIONS = (1, 3, 9)
_NOISE_BLOCK = 4096


class Snake(nn.Module):
    """`x + sin(alpha x)^2 / alpha` with one alpha per channel (https://arxiv.org/abs/2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`."""
        scale = (self.alpha + 1e-9).reciprocal()
        if torch.is_grad_enabled():
            return torch.addcmul(x, (self.alpha * x).sin().square(), scale)
        waves = (self.alpha * x).sin_().square_()
        return torch.addcmul(x, waves, scale, out=waves)


class LocalAttention(Streamed):
    """Residual self-attention within windows that do not overlap, rotary positions beginning anew in each (SNAC)."""

    def __init__(self, dim: int, window: int, head_dim: int = 64) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"expected a width that {head_dim = } divides, got {dim}")
        self.window, self.head_dim = window, head_dim
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`, where the window divides T; in pieces, whole windows as soon as they are there."""
        if state is not None:
            x = join(state.get(self, x[..., :0]), x)
            whole = x.shape[-1] if last else x.shape[-1] // self.window * self.window
            x, state[self] = x[..., :whole], x[..., whole:].clone()
        if not x.shape[-1]:
            return x
        batch, channels, length = x.shape
        heads = self.qkv(self.norm(x.mT)).view(batch, length // self.window, self.window, 3, -1, self.head_dim)
        q, k, v = heads.permute(3, 0, 1, 4, 2, 5).unbind(0)
        cosine, sine = self._rotation(x)
        attended = F.scaled_dot_product_attention(_rotate(q, cosine, sine), _rotate(k, cosine, sine), v)
        return self.out(attended.transpose(2, 3).reshape(batch, length, channels)).mT + x

    def _rotation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = 1.0 / 10000 ** (torch.arange(0, self.head_dim, 2, device=like.device).float() / self.head_dim)
        angles = torch.outer(torch.arange(self.window, device=like.device).float(), frequencies)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


class Noise:
    """White noise that is the same however it is asked for: in one go, or piece by piece."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = torch.Generator()
        self._generator.set_state(generator.get_state())
        self._waiting = torch.empty(0)

    def take(self, count: int) -> Tensor:
        """The next samples, float32 `[count]`."""
        missing = -(-(count - len(self._waiting)) // _NOISE_BLOCK)
        drawn = [torch.randn(_NOISE_BLOCK, generator=self._generator) for _ in range(missing)]
        samples = torch.cat([self._waiting, *drawn])
        self._waiting = samples[count:]
        return samples[:count]


class NoiseInjection(Streamed):
    """`x + noise * linear(x)`, the noise shared by all channels; only where `state` holds a `Noise` for this layer (SNAC)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = Conv1d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """`[B, C, T]` to `[B, C, T]`; every item hears the same noise."""
        del last
        source = None if state is None else state.get(self)
        if source is None or not x.shape[-1]:
            return x
        return x + source.take(x.shape[-1]).to(x) * self.linear(x)


def seed_noise(decoder: Chain, num_frames: int, seed: int) -> State:
    """A state in which every `NoiseInjection` of a decoder has its noise.

    They draw from one generator one after the other, as if each drew all of its noise at once.

    Args:
        decoder: As `snake_decoder` builds it.
        num_frames: What it is about to decode.
        seed: Of the generator.
    """
    state: State = {}
    generator, steps = torch.Generator().manual_seed(seed), num_frames
    for layer in decoder.modules():
        if isinstance(layer, ConvTranspose1d):
            steps *= layer.stride[0]
        elif isinstance(layer, NoiseInjection):
            state[layer] = Noise(generator)
            for at in range(0, steps, 1 << 20):
                torch.randn(min(1 << 20, steps - at), generator=generator)
    return state


def snake_encoder(width: int, strides: Sequence[int], latent_dim: int, *, depthwise: bool = False, window: int = 0) -> Chain:
    """Audio `[B, 1, S]` to latents `[B, D, S / hop]`.

    Args:
        width: Channels at the sample rate; they double with every stage.
        strides: Of the stages; the latents' width is `width * 2 ** len(strides)` if `depthwise`.
        latent_dim: Width of the latents.
        depthwise: Whether dilated convolutions, and the last, work on every channel by itself (SNAC).
        window: Of the attention behind the stages; 0 for none.
    """
    layers: list[nn.Module] = [Conv1d(1, width, 7)]
    stride = math.prod(strides[:2])
    steps = FINE_VALUES // (width * stride) * stride
    for stride in strides:
        units = [_unit(width, dilation, depthwise) for dilation in _DILATIONS]
        layers.append(Chain([*units, Snake(width), Conv1d(width, 2 * width, 2 * stride, stride=stride)]))
        width *= 2
    if window:
        layers.append(LocalAttention(width, window))
    if depthwise:
        layers.append(Conv1d(width, latent_dim, 7, groups=width))
    else:
        layers += [Snake(width), Conv1d(width, latent_dim, 3)]
    return Chain(layers, fine=slice(3), steps=steps)  # the first convolution and two stages


def snake_decoder(
    latent_dim: int,
    width: int,
    strides: Sequence[int],
    *,
    depthwise: bool = False,
    window: int = 0,
    noise: bool = False,
    symmetric: bool = False,
) -> Chain:
    """Latents `[B, D, T]` to audio `[B, 1, T * hop]` in [-1, 1].

    Args:
        latent_dim: Width of the latents.
        width: Channels at the frame rate; they halve with every stage.
        strides: Of the stages.
        depthwise: As in `snake_encoder`.
        window: Of the attention before the stages; 0 for none.
        noise: Whether every stage can be given noise.
        symmetric: Whether stages of odd strides lose a step, so that the audio is shorter (DAC).
    """
    if depthwise:
        layers: list[nn.Module] = [Conv1d(latent_dim, latent_dim, 7, groups=latent_dim), Conv1d(latent_dim, width, 1)]
    else:
        layers = [Conv1d(latent_dim, width, 7)]
    if window:
        layers.append(LocalAttention(width, window))
    coarse = len(layers) + max(0, len(strides) - 2)
    for stride in strides:
        up = ConvTranspose1d(width, width // 2, 2 * stride, stride=stride, symmetric=symmetric)
        width //= 2
        between = [NoiseInjection(width)] if noise else []
        layers.append(Chain([Snake(2 * width), up, *between, *(_unit(width, d, depthwise) for d in _DILATIONS)]))
    layers += [Snake(width), Conv1d(width, 1, 7), nn.Tanh()]
    return Chain(layers, fine=slice(coarse, None), steps=FINE_VALUES // (width * math.prod(strides[-2:])))


def _unit(width: int, dilation: int, depthwise: bool) -> Residual:
    conv = Conv1d(width, width, 7, dilation=dilation, groups=width if depthwise else 1)
    return Residual(Chain([Snake(width), conv, Snake(width), Conv1d(width, width, 1)]))
