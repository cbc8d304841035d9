from pathlib import Path

import pytest
import safetensors.torch
import torch

from tokenzoo.encoders import byte_transformer
from tokenzoo.encoders.byte_transformer import ByteTransformer, Rotary
from tokenzoo.registry import cards, tokenizer_class
from tokenzoo.tokenizers import ConfigError, WeightsError
from tokenzoo.tokenizers.building import build
from tokenzoo.tokenizers.text import hat
from tokenzoo.tokenizers.text.hat import HAT, HATConfig, config_from_published

GOLDEN = Path(__file__).parents[2] / "golden"
ADAPTER = HAT.adapters["published"]
PUBLISHED = {
    "model_type": "hierarchical_autoregressive_transformer",
    "encoder_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "sliding_window": 7,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-5,
        "is_neox_style": True,
        "rope_scaling": {"rope_type": "default"},
        "vocab_size": 256,
        "cross_attention_config": {
            "hidden_size": 48,
            "hidden_size_q": 48,
            "hidden_size_kv": 32,
            "num_attention_heads": 2,
            "attention_num_kv_heads": 2,
        },
    },
    "backbone_config": {"hidden_size": 48},
    "max_word_size": 100,
}


@pytest.fixture(scope="module")
def state():
    return safetensors.torch.load_file(GOLDEN / "hat.state.safetensors")


@pytest.fixture(scope="module")
def expected():
    return safetensors.torch.load_file(GOLDEN / "hat.expected.safetensors")


@pytest.fixture
def tok(state):
    rest = {"backbone.layers.0.mlp.up_proj.weight": torch.ones(1), "decoder.layer_norm.weight": torch.ones(1)}
    return build(HAT, config_from_published(PUBLISHED), ADAPTER.to_ours({**state, **rest}), "the fixture")


@pytest.fixture
def text(expected):
    return expected["text"].numpy().tobytes()


def test_vectors_are_the_reference_s(tok, text, expected):
    (found,) = tok.embed(text)
    assert found.offsets.tolist() == [0, *expected["ends"].tolist()]
    assert found.vectors.shape == (len(expected["ends"]), 1, 48)
    torch.testing.assert_close(found.byte_vectors, expected["bytes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.vectors[:, 0], expected["words"], atol=1e-4, rtol=0)
    assert float(found.vectors.std(0).mean()) > 0.1


def test_pieces_and_groups_change_nothing(tok, text, expected, monkeypatch):
    for size in (1, 5, 64):
        monkeypatch.setattr(byte_transformer, "PIECE", size)
        monkeypatch.setattr(hat, "POOLED_TOGETHER", size)
        (found,) = tok.embed(text)
        torch.testing.assert_close(found.byte_vectors, expected["bytes"], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.vectors[:, 0], expected["words"], atol=1e-4, rtol=0)


def test_vectors_depend_on_the_window_before_and_on_nothing_after(tok, text):
    whole, early = tok.embed(text)[0], tok.embed(text[:100])[0]
    torch.testing.assert_close(early.byte_vectors, whole.byte_vectors[:100], atol=1e-5, rtol=0)
    complete = len(early.vectors) - 1  # the last word may go on
    torch.testing.assert_close(early.vectors[:complete], whole.vectors[:complete], atol=1e-5, rtol=0)
    changed = bytes([text[0] ^ 1]) + text[1:]
    reach = 2 * (tok.config.window - 1)
    difference = (tok.embed(changed)[0].byte_vectors - whole.byte_vectors).abs().amax(1)
    assert float(difference[reach]) > 0
    assert float(difference[reach + 1 :].max()) == 0


def test_each_text_has_the_vectors_that_it_has_alone(tok, text):
    texts = [text, "", "ab c", b"\xff\xfe", "ein Wort"]
    together = tok.embed(texts)
    for one, found in zip(texts, together, strict=True):
        (alone,) = tok.embed(one)
        assert torch.equal(found.vectors, alone.vectors)
        assert torch.equal(found.byte_vectors, alone.byte_vectors)
        assert torch.equal(found.offsets, alone.offsets)
    assert together[1].vectors.shape == (0, 1, 48)
    assert together[1].byte_vectors.shape == (0, 32)
    assert together[1].offsets.tolist() == [0]


def test_ids_are_bytes_and_come_back(tok, text):
    texts = [text, "", "a\ud800", b"\xff\x00\xc0", "<|eot_id|>"]
    tokens = tok.encode(texts)
    assert tok.decode(tokens) == texts
    assert tokens.ids[0, 0, : len(text)].tolist() == list(text)
    assert tok.info.codebook_sizes == (256,)


def test_published_keys_go_both_ways(tok, state):
    back = ADAPTER.to_published(tok.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_published_size_is_119_million():
    with torch.device("meta"):
        tok = HAT(HATConfig())
    assert sum(p.numel() for p in tok.parameters()) == 119_291_904


def test_the_config_is_read_as_published():
    config = config_from_published(PUBLISHED)
    assert HATConfig.from_dict(config).to_dict() == config
    assert config["window"] == 7
    assert config["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("encoder_config", {"num_key_value_heads": 1}, "num_key_value_heads to be 2"),
        ("encoder_config", {"sliding_window": None}, "sliding_window"),
        ("encoder_config", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        ("encoder_config", {"attention_bias": True}, "attention_bias"),
        ("encoder_config", {"qk_norm": True}, "qk_norm"),
        ("encoder_config", {"cross_attention_config": None}, "cross_attention_config"),
        ("encoder_config", {"vocab_size": 512}, "vocab_size to be 256"),
    ],
)
def test_encoders_that_are_built_otherwise_are_refused(part, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_published({**PUBLISHED, part: {**PUBLISHED[part], **changes}})


@pytest.mark.parametrize("changes", [{"num_heads": 3}, {"window": 0}, {"max_word_bytes": 0}, {"word_heads": 48}])
def test_configs_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        HATConfig.from_dict({**config_from_published(PUBLISHED), **changes})


def test_weights_of_another_kind_are_refused(state):
    normed = {**state, "encoder.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    with pytest.raises(WeightsError, match="unexpected"):
        build(HAT, config_from_published(PUBLISHED), ADAPTER.to_ours(normed), "another HAT")


def test_training_is_refused(tok):
    with pytest.raises(ConfigError, match="backbone"):
        tok(torch.zeros(1, 4, dtype=torch.uint8))


def test_cards_name_the_encoder_s_tensors():
    found = [card for card in cards().values() if card.architecture == "hat"]
    assert len(found) == 3
    for card in found:
        assert tokenizer_class(card.architecture) is HAT
        assert not card.commercial
        assert card.source.tensors == ("encoder.*", "encoder_connector.*")


# -- the transformer that it shares


def test_rotary_turns_neighbours_or_halves():
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # neighbours as halves
    angles = Rotary().angles(torch.arange(5), 8)
    halves = Rotary().turn(x[..., order], angles)
    assert torch.equal(Rotary(neighbours=True).turn(x, angles)[..., order], halves)
    torch.testing.assert_close(halves.norm(dim=-1), x.norm(dim=-1))


def test_without_a_window_every_byte_sees_all_before(monkeypatch):
    torch.manual_seed(0)
    network = ByteTransformer(16, 1, 2, 24, window=None, rotary=Rotary(), norm_eps=1e-5).requires_grad_(False)
    x = torch.randn(2, 50, 16)
    whole = network(x)
    x2 = x.clone()
    x2[:, 0] += 1
    assert float((network(x2) - whole)[:, -1].abs().max()) > 0
    monkeypatch.setattr(byte_transformer, "PIECE", 7)
    torch.testing.assert_close(network(x), whole, atol=1e-5, rtol=0)
    assert network(x[:, :0]).shape == (2, 0, 16)
