from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenzoo.tokenizers import ConfigError, Tokens, TokensError
from tokenzoo.tokenizers.building import build
from tokenzoo.tokenizers.text.mrt5 import END, PUBLISHED, MrT5, MrT5Config

GOLDEN = Path(__file__).parents[2] / "golden"
SIZE = {"dim": 24, "num_layers": 5, "num_heads": 2, "head_dim": 8, "hidden_dim": 32}
TEXTS = ["", "short", "Grüße, 東京! " * 9, b"\xff\x00", "x" * 31, "\ud800"]


def golden(**config):
    state = load_file(GOLDEN / "mrt5.state.safetensors")
    if config.get("gate_layer", 3) is None:
        state = {name: tensor for name, tensor in state.items() if "delete_gate" not in name}
    extra = {"lm_head.weight": torch.zeros(1), "decoder.final_layer_norm.weight": torch.zeros(1)}
    return build(MrT5, {**SIZE, **config}, PUBLISHED.to_ours(state | extra), "golden")


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "mrt5.expected.safetensors")


@pytest.mark.parametrize("deletion", ["soft", "hard"])
def test_states_are_the_references(expected, deletion):
    states, positions, values = golden().states(expected["ids"], deletion=deletion)
    real = positions >= 0
    torch.testing.assert_close(states[real], expected[deletion][real], atol=1e-4, rtol=0)
    torch.testing.assert_close(values, expected["gate"], atol=1e-4, rtol=0)
    if deletion == "hard":
        assert torch.equal(positions, expected["positions"])
        assert 0.2 < float(real.float().mean()) < 1


def test_without_a_gate_it_is_byt5(expected):
    tok = golden(gate_layer=None, softmax1=False)
    states, positions, _ = tok.states(expected["ids"])
    torch.testing.assert_close(states, expected["byt5"], atol=1e-4, rtol=0)
    assert bool((positions == torch.arange(61)).all())
    assert bool(tok.encode("abc").extras["kept"].all())


def test_the_published_layout_is_written_as_it_was_read():
    state = load_file(GOLDEN / "mrt5.state.safetensors")
    back = PUBLISHED.to_published(PUBLISHED.to_ours(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_text_comes_back_with_the_bytes_that_are_kept():
    tok = golden(context=32)
    tokens = tok.encode(TEXTS)
    assert tok.decode(tokens) == TEXTS
    for i, text in enumerate(TEXTS):
        alone = tok.encode(text)
        assert tokens[i].equal(alone)
        assert not tokens.extras["kept"][i, int(tokens.lengths[i]) :].any()


@pytest.mark.parametrize("deletion", ["hard", "soft"])
def test_vectors_are_those_of_kept_bytes(deletion):
    tok = golden(context=32)
    tok.deletion = deletion
    for text, found in zip(TEXTS, tok.embed(TEXTS), strict=True):
        kept = tok.encode(text).extras["kept"][0].nonzero()[:, 0]
        assert found.vectors.shape == (len(kept), 1, 24)
        assert found.offsets[1:-1].tolist() == kept[1:].tolist()
        assert len(found.offsets) == len(kept) + 1
    piece = torch.tensor([[b + 3 for b in b"short"] + [END]])
    states, positions, values = tok.states(piece)
    kept = (positions[0] >= 0) & (positions[0] < 5) & (values[0][positions[0].clamp(min=0)] > -15)
    assert torch.equal(tok.embed("short")[0].vectors[:, 0], states[0][kept])


def test_everything_may_be_deleted():
    tok = golden(context=32)
    tok.gate.linear.bias.data.fill_(-1e4)
    assert tok.embed("some text")[0].vectors.shape == (0, 1, 24)
    assert not tok.encode("some text").extras["kept"].any()
    assert tok.decode(tok.encode("some text")) == ["some text"]


@pytest.mark.parametrize(("wrong", "what"), [(1, "a mark"), (2, "a mark"), (259, "a sentinel"), (383, "a sentinel")])
def test_ids_that_are_no_bytes_are_refused(wrong, what):
    tok = golden()
    tokens = tok.encode("abc")
    ids = tokens.ids.clone()
    ids[0, 0, 1] = wrong
    with pytest.raises(TokensError, match=f"got {wrong} at token 1, which is {what}"):
        tok.decode(Tokens(ids, tokens.lengths, tokens.spec, tokens.extras, tokens.meta))


def test_configs_that_do_not_fit():
    for wrong in ({"gate_layer": 0}, {"gate_layer": 12}, {"context": 1}, {"vocabulary": 100}):
        with pytest.raises(ConfigError):
            MrT5Config.from_dict(wrong)
    with pytest.raises(ConfigError, match="span corruption"):
        golden()(torch.zeros(1, 3, dtype=torch.uint8))
