import dataclasses

import pytest
import torch

from tokenzoo.encoders.snake import Noise
from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.audio.dac import Dac, DacConfig
from tokenzoo.tokenizers.audio.snac import Snac, SnacConfig


def wave(samples=300):
    return 0.3 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["snac_24khz", "snac_32khz"])
def test_noise_repeats_itself_and_can_be_left_out(golden, name):
    tok = golden(name, Snac).tok
    tokens = tok.encode(wave())
    first = tok.decode(tokens)[0]
    assert torch.equal(tok.decode(tokens)[0], first)
    tok.noise_seed = 1
    assert not torch.allclose(tok.decode(tokens)[0], first)
    tok.noise_seed = None
    silent = tok.decode(tokens)[0]
    assert not torch.allclose(silent, first)
    assert torch.equal(tok.decode(tokens)[0], silent)


def test_noise_is_the_same_however_it_is_asked_for():
    whole = torch.randn(20000, generator=torch.Generator().manual_seed(3))
    noise = Noise(torch.Generator().manual_seed(3))
    parts = torch.cat([noise.take(n) for n in (1, 0, 16, 5000, 4096, 9000, 1887)])
    assert torch.equal(parts, whole)


def test_the_interleaved_order_is_depth_first(golden):
    tok = golden("snac_24khz", Snac).tok
    tokens = tok.encode(wave())
    (coarse, middle, fine), size = tokens.codes(), 64
    flat = tokens.flatten("interleaved")[0]
    for i in range(len(coarse)):
        fines = [fine[4 * i + j] + 2 * size for j in range(4)]
        group = [coarse[i], middle[2 * i] + size, *fines[:2], middle[2 * i + 1] + size, *fines[2:]]
        assert flat[7 * i : 7 * i + 7].tolist() == [int(code) for code in group]


def test_codebooks_of_lengths_that_do_not_fit_are_refused(golden):
    tok = golden("snac_24khz", Snac).tok
    tokens = tok.encode(wave())
    for lengths in ([5, 9, 20], [5, 10, 18]):
        wrong = dataclasses.replace(tokens, lengths=torch.tensor([lengths]))
        with pytest.raises(TokensError, match="lengths"):
            tok.decode(wrong)
    with pytest.raises(TokensError, match="several rates"):
        tok.stream()


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_strides": (8, 8, 4)},
        {"encoder_strides": (1, 512), "decoder_strides": (512,)},
        {"decoder_dim": 100},
        {"strides": ()},
        {"window": 32, "encoder_dim": 2},
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        SnacConfig.from_dict(changes)


def test_dac_gives_back_the_samples_that_its_decoder_is_short_of(golden):
    tok = golden("dac", Dac).tok
    tokens = tok.encode(wave(400))
    with torch.no_grad():
        audio = tok._decode(tokens.ids, tokens.lengths, {})
    assert audio.shape == (1, 1, 400)
    missing = 4  # the odd stride loses one step, which each of two later strides doubles
    assert not audio[..., -missing:].any()
    assert audio[..., -missing - 1].any()


def test_dac_streams_what_it_looks_ahead_for(golden):
    tok = golden("dac", Dac).tok
    whole, stream = tok.encode(wave(1000)), tok.stream()
    parts = [stream.encode(wave(1000)[:, at : at + 100], last=at == 900) for at in range(0, 1000, 100)]
    assert torch.equal(torch.cat(parts, 1), whole.ids[0])


@pytest.mark.parametrize("changes", [{"strides": ()}, {"strides": (1, 2)}, {"decoder_dim": 100}, {"codebook_dim": 0}])
def test_dac_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        DacConfig.from_dict(changes)
