import itertools
import random

import pytest
import torch
from torch import nn

from tokenzoo.encoders.streaming import Chain, Conv1d, ConvTranspose1d, Residual, SkipLSTM

KERNELS = [(7, 1, 1), (3, 1, 1), (3, 1, 2), (1, 1, 1), (4, 2, 1), (8, 4, 1), (10, 5, 1), (12, 6, 1), (7, 1, 9), (16, 8, 1)]
LENGTHS = [*range(1, 30), 57, 100]


def in_pieces(network, x, seed=0):
    """What a network answers when it is fed random pieces, some of them empty."""
    rng, state, parts, at = random.Random(seed), {}, [], 0
    while at < x.shape[-1]:
        step = rng.choice([0, 1, 2, 3, 7, 20])
        parts.append(network(x[..., at : at + step], state, at + step >= x.shape[-1]))
        at += step
    return torch.cat(parts, -1)


@torch.no_grad()
def check(network, channels, length):
    x = torch.randn(2, channels, length)
    whole = network(x)
    torch.testing.assert_close(in_pieces(network, x, length), whole, rtol=0, atol=1e-5)
    return whole


@pytest.mark.parametrize(("causal", "pad_mode"), [*itertools.product([True, False], ["constant", "reflect", "replicate"])])
def test_convolutions_in_pieces(causal, pad_mode):
    torch.manual_seed(0)
    for i, (kernel, stride, dilation) in enumerate(KERNELS):
        conv = Conv1d(3, 4, kernel, stride=stride, dilation=dilation, causal=causal, pad_mode=pad_mode, elu=i % 2 == 0)
        for length in LENGTHS:
            assert check(conv, 3, length).shape == (2, 4, -(-length // stride))


@pytest.mark.parametrize(("causal", "symmetric"), [(True, False), (False, False), (False, True)])
def test_transposed_convolutions_in_pieces(causal, symmetric):
    torch.manual_seed(0)
    for kernel, stride in [(4, 2), (10, 5), (6, 3), (16, 8), (5, 5)]:
        conv = ConvTranspose1d(3, 4, kernel, stride=stride, causal=causal, symmetric=symmetric)
        missing = symmetric and (kernel - stride) % 2
        for length in range(1, 12):
            assert check(conv, 3, length).shape[-1] == length * stride - missing


def test_a_network_of_all_kinds_of_layers_in_pieces():
    torch.manual_seed(0)
    unit = Chain([nn.ELU(), Conv1d(4, 2, 3, pad_mode="reflect"), nn.ELU(), Conv1d(2, 4, 1)])
    wide = Residual(Chain([nn.ELU(), Conv1d(4, 4, 7, dilation=9)]))
    down = Conv1d(4, 8, 10, stride=5, pad_mode="reflect")
    layers = [Conv1d(1, 4, 7, pad_mode="reflect"), Residual(unit, Conv1d(4, 4, 1)), nn.ELU(), down, SkipLSTM(8, 2)]
    network = Chain([*layers, ConvTranspose1d(8, 4, 10, stride=5), wide])
    for length in LENGTHS:
        assert check(network, 1, length).shape[-1] == -(-length // 5) * 5


def test_a_reflection_longer_than_the_signal_is_that_of_the_signal_with_zeros_behind_it():
    conv = Conv1d(1, 1, 7, pad_mode="reflect", bias=False)
    nn.init.ones_(conv.weight)
    # 1 2 | with zeros behind: 0 0 2 | 1 2 0 0 | of which the first five and the reflection's head are seen
    torch.testing.assert_close(conv(torch.tensor([[[1.0, 2.0]]])), torch.tensor([[[5.0, 5.0]]]))


def test_elu_before_a_convolution_leaves_its_input_alone():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 20)
    for kernel in (1, 3):
        fused = Conv1d(3, 2, kernel, pad_mode="reflect", elu=True)
        plain = Conv1d(3, 2, kernel, pad_mode="reflect")
        plain.load_state_dict(fused.state_dict())
        before = x.clone()
        torch.testing.assert_close(fused(x), plain(nn.functional.elu(x)))
        assert torch.equal(x, before)


def test_causal_convolutions_hear_nothing_later():
    torch.manual_seed(0)
    conv = Chain([Conv1d(1, 4, 7, causal=True), Conv1d(4, 4, 8, stride=4, causal=True)])
    x = torch.randn(1, 1, 64)
    changed = x.clone()
    changed[..., 32:] = 0
    torch.testing.assert_close(conv(x)[..., :8], conv(changed)[..., :8], rtol=0, atol=0)


def test_streams_do_not_share_state():
    torch.manual_seed(0)
    network = Chain([Conv1d(1, 2, 5, causal=True), SkipLSTM(2, 1)])
    x, y = torch.randn(2, 1, 1, 40)
    states, parts = ({}, {}), ([], [])
    with torch.no_grad():
        for at in range(0, 40, 8):
            for signal, state, part in zip((x, y), states, parts, strict=True):
                part.append(network(signal[..., at : at + 8], state, at + 8 >= 40))
        torch.testing.assert_close(torch.cat(parts[0], -1), network(x))
        torch.testing.assert_close(torch.cat(parts[1], -1), network(y))


def test_a_norm_over_time_needs_the_whole():
    for layer in (Conv1d(1, 2, 3, norm=True), ConvTranspose1d(1, 2, 4, stride=2, norm=True)):
        assert layer(torch.randn(1, 1, 8)).shape[1] == 2
        with pytest.raises(ValueError, match="GroupNorm"):
            layer(torch.randn(1, 1, 8), {}, True)
    with pytest.raises(ValueError, match="two strides"):
        ConvTranspose1d(1, 1, 7, stride=3)
