import math
import os

import pytest
import torch

import tokenzoo
from tokenzoo.hub import read_published
from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.audio.wavtokenizer import WavTokenizer, WavTokenizerConfig


def sine(seconds):
    return 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(round(seconds * 24000)) / 24000)


@pytest.mark.skipif(os.environ.get("TOKENZOO_ONLINE") != "1", reason="downloads 1.8 GB of weights: set TOKENZOO_ONLINE=1")
def test_published_ids_of_a_sine():
    """As the port of huggingface/transformers#47662 prints them, there said to be bit-exact with the original's."""
    ids = tokenzoo.load("wavtokenizer_large_600.unify").encode((sine(0.5), 24000)).ids[0, 0]
    assert len(ids) == 20
    assert ids[:10].tolist() == [1323, 1442, 3524, 2056, 3229, 1723, 2785, 1389, 3144, 1723]


def test_a_training_checkpoint_is_read_without_what_only_training_needs(golden, tmp_path):
    case = golden("wavtokenizer", WavTokenizer)
    rest = {
        "multiperioddisc.discriminators.0.convs.0.weight_g": torch.ones(3, 1, 1, 1),
        "multiresddisc.discriminators.0.emb.weight": torch.ones(3),
        "dac.discriminators.0.convs.0.weight_v": torch.ones(3),
        "dacdiscriminator.discriminator.x": torch.ones(3),
        "melspec_loss.mel_spec.spectrogram.window": torch.ones(3),
        "feature_extractor.encodec.decoder.model.0.conv.conv.weight_g": torch.ones(3, 1, 1),
    }
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {**case.published, **rest}, "optimizer_states": [{"state": {}}], "epoch": 3}, path)
    state = read_published(path, case.adapter)
    assert all(torch.equal(state[key], value) for key, value in case.tok.state_dict().items())
    assert state.keys() == case.tok.state_dict().keys()


def test_both_architectures_give_whole_frames():
    for ratios, hop in (((8, 5, 4, 2), 320), ((6, 5, 5, 4), 600)):
        config = WavTokenizerConfig(
            ratios=ratios, filters=2, dim=4, codebook_size=8, decoder_dim=8, decoder_hidden_dim=8, decoder_layers=1, groups=2
        )
        tok = WavTokenizer(config).eval()
        assert tok.decoder.head.n_fft == 4 * hop
        for samples in (1, hop - 1, hop, hop + 1, 5 * hop + 7):
            tokens = tok.encode(sine(1)[:samples])
            assert tokens.ids.shape == (1, 1, -(-samples // hop))
            assert tok.decode(tokens)[0].shape == (1, samples)


def test_long_recordings_are_decoded_in_windows_that_fade_into_each_other(golden):
    tok = golden("wavtokenizer", WavTokenizer).tok
    tok.window, tok.overlap = 20 / tok.frame_rate, 4 / tok.frame_rate
    tokens = tok.encode(0.3 * torch.randn(1, 503, generator=torch.Generator().manual_seed(0)))
    assert tokens.ids.shape[2] == 51
    with torch.no_grad():
        whole = tok._decode(tokens.ids, tokens.lengths, {})[0, 0]
        first, second, last = (tok._synthesize_window(tokens.ids[..., at : at + 20])[0, 0] for at in (0, 16, 31))
    assert whole.shape == (510,)
    assert torch.equal(whole[:160], first[:160])
    assert torch.equal(whole[200:310], second[40:150])
    assert torch.equal(whole[350:], last[40:])
    weight = torch.arange(1, 41) / 41
    torch.testing.assert_close(whole[160:200], (1 - weight) * first[160:] + weight * second[:40])
    tok.window = 51 / tok.frame_rate
    with torch.no_grad():
        assert torch.equal(tok._decode(tokens.ids, tokens.lengths, {}), tok._synthesize_window(tokens.ids))


def test_there_is_no_stream(golden):
    with pytest.raises(TokensError, match="attends to whole recordings"):
        golden("wavtokenizer", WavTokenizer).tok.stream()


@pytest.mark.parametrize("changes", [{"ratios": ()}, {"filters": 3}, {"groups": 5}, {"windows_per_frame": 3}, {"dim": 0}])
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        WavTokenizerConfig.from_dict(changes)
