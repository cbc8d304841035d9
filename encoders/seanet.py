"""SEANet, the convolutional encoder and decoder of SoundStream, EnCodec, Mimi and WavTokenizer.

Papers: https://arxiv.org/abs/2009.02095 (the network), https://arxiv.org/abs/2210.13438 (this form of it). Layers keep the
positions that they have in the published state dicts, activations included.

Shapes: B batch, C audio channels, D width of the latents, S samples, T frames.
"""

import math
from dataclasses import dataclass

from torch import nn

from tokenzoo.encoders.streaming import FINE_VALUES, Chain, Conv1d, ConvTranspose1d, PadMode, Residual, SkipLSTM


@dataclass(frozen=True)
class SEANet:
    """The dimensions of an encoder and of its mirror image, the decoder.

    Attributes:
        channels: Audio channels.
        dim: Width of the latents.
        filters: Channels at the sample rate; they double with every stage.
        ratios: Strides of the decoder, from frames to samples; the encoder has them in reverse.
        kernel: Of the first convolution.
        last_kernel: Of the last convolution.
        residual_kernel: Of the convolutions in residual units.
        lstm_layers: Layers of the recurrent network at the frame rate; 0 for none.
        causal: Whether nothing looks ahead.
        pad_mode: What stands beyond both ends.
        conv_shortcut: Whether residual units have a convolution in their shortcut.
        norm: Whether every convolution is followed by a GroupNorm over time.
    """

    channels: int
    dim: int
    filters: int
    ratios: tuple[int, ...]
    kernel: int = 7
    last_kernel: int = 7
    residual_kernel: int = 3
    lstm_layers: int = 2
    causal: bool = True
    pad_mode: PadMode = "reflect"
    conv_shortcut: bool = True
    norm: bool = False

    def encoder(self) -> Chain:
        """Audio `[B, C, S]` to latents `[B, D, ceil(S / hop)]`."""
        width = self.filters
        layers = [self._conv(self.channels, width, self.kernel)]
        for stride in reversed(self.ratios):
            layers += [self._unit(width), nn.ELU(inplace=True), self._conv(width, 2 * width, 2 * stride, stride)]
            width *= 2
        layers += self._lstm(width)
        layers += [nn.ELU(inplace=True), self._conv(width, self.dim, self.last_kernel)]
        stride = math.prod(self.ratios[-2:])  # two stages are fine: a convolution, and three layers each
        return Chain(layers, fine=slice(7), steps=FINE_VALUES // (self.filters * stride) * stride)

    def decoder(self) -> Chain:
        """Latents `[B, D, T]` to audio `[B, C, T * hop]`, not limited to [-1, 1]."""
        width = self.filters * 2 ** len(self.ratios)
        layers = [self._conv(self.dim, width, self.kernel), *self._lstm(width)]
        coarse = len(layers) + 3 * max(0, len(self.ratios) - 2)
        for stride in self.ratios:
            up = ConvTranspose1d(width, width // 2, 2 * stride, stride=stride, causal=self.causal, norm=self.norm)
            width //= 2
            layers += [nn.ELU(inplace=True), up, self._unit(width)]
        layers += [nn.ELU(inplace=True), self._conv(width, self.channels, self.last_kernel)]
        steps = FINE_VALUES // (self.filters * math.prod(self.ratios[-2:]))
        return Chain(layers, fine=slice(coarse, None), steps=steps)

    def _conv(self, inside: int, outside: int, kernel: int, stride: int = 1, elu: bool = False) -> nn.Module:
        return Conv1d(
            inside, outside, kernel, stride=stride, causal=self.causal, pad_mode=self.pad_mode, norm=self.norm, elu=elu
        )

    def _unit(self, width: int) -> nn.Module:
        narrow = self._conv(width, width // 2, self.residual_kernel, elu=True)
        block = Chain([nn.Identity(), narrow, nn.ELU(inplace=True), self._conv(width // 2, width, 1)])
        return Residual(block, self._conv(width, width, 1) if self.conv_shortcut else None)

    def _lstm(self, width: int) -> list[nn.Module]:
        return [SkipLSTM(width, self.lstm_layers)] if self.lstm_layers else []
