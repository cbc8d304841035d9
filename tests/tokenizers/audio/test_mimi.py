import pytest
import torch

from tokenzoo.encoders.causal_transformer import CausalTransformer
from tokenzoo.tokenizers import ConfigError
from tokenzoo.tokenizers.audio.mimi import Mimi, MimiConfig


def test_a_stream_gives_what_the_whole_recording_gives(golden):
    case = golden("mimi", Mimi)
    wave = torch.cat([expected.wave for expected in case.cases], -1)
    tokens = case.tok.encode(wave)
    generator = torch.Generator().manual_seed(0)
    stream, ids, audio, at = case.tok.stream(), [], [], 0
    while at < wave.shape[1]:
        step = int(torch.randint(0, 60, (), generator=generator))
        last = at + step >= wave.shape[1]
        ids.append(stream.encode(wave[:, at : at + step], last=last))
        audio.append(stream.decode(ids[-1], last=last))
        at += step
    assert torch.equal(torch.cat(ids, 1), tokens.ids[0])
    with torch.no_grad():
        whole = case.tok._decode(tokens.ids, tokens.lengths, {})[0]
    torch.testing.assert_close(torch.cat(audio, 1), whole, rtol=0, atol=1e-5)


def test_every_frame_is_answered_at_once():
    """What the card says: 1,920 samples, one frame, 1,920 samples."""
    tok = Mimi(MimiConfig(filters=2, dim=16, layers=1, hidden_dim=4, codebook_size=4, codebook_dim=2, num_codebooks=2)).eval()
    stream = tok.stream(length=1)
    assert [stream.encode(torch.zeros(1, n)).shape[1] for n in (1919, 1, 1920, 3841)] == [0, 1, 1, 2]
    assert [stream.decode(torch.zeros(1, n).long()).shape[1] for n in (1, 3)] == [1920, 5760]
    assert stream.encode(torch.zeros(1, 1), last=True).shape == (1, 1)


def test_the_first_code_is_semantic_and_the_others_see_the_same_latents(golden):
    tok = golden("mimi", Mimi).tok
    latents = torch.randn(1, 5, 32)
    ids = tok.quantizer.ids(latents)
    assert torch.equal(tok.quantizer.ids(latents, 1), ids[..., :1])
    assert torch.equal(tok.quantizer.acoustic.ids(latents), ids[..., 1:])
    both = tok.quantizer.semantic.lookup(ids[..., :1]) + tok.quantizer.acoustic.lookup(ids[..., 1:])
    torch.testing.assert_close(tok.quantizer.lookup(ids), both)


def test_frames_attend_no_further_than_the_context():
    torch.manual_seed(0)
    transformer = CausalTransformer(16, 1, 2, 16, context=4).eval()
    for scale in (transformer.layers[0].scale1, transformer.layers[0].scale2):
        torch.nn.init.ones_(scale)
    x = torch.randn(1, 16, 12)
    changed = x.clone()
    changed[:, 0, 3] += 1
    with torch.no_grad():
        difference = (transformer(x) - transformer(changed)).abs().amax((0, 1)) > 1e-6
    assert difference.tolist() == [False] * 3 + [True] * 4 + [False] * 5


@pytest.mark.parametrize("changes", [{"dim": 24}, {"stride": 1}, {"num_semantic": 32}, {"filters": 3}, {"context": 0}])
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        MimiConfig.from_dict(changes)
