"""The cards of Cosmos and VidTok describe networks that can be built, of the size they say."""

import pytest
import torch

from tokenzoo.registry import cards, find_card, tokenizer_class

CARDS = {name: card for name, card in cards().items() if card.architecture in ("cosmos", "cosmos_image", "vidtok")}


def built(name):
    cls = tokenizer_class(CARDS[name].architecture)
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(CARDS[name].config))


@pytest.mark.parametrize("name", CARDS)
def test_card(name):
    card, tokenizer = CARDS[name], built(name)
    assert sum(p.numel() for p in tokenizer.parameters()) == card.params
    assert card.source.adapter in tokenizer.adapters
    assert card.commercial
    state = tokenizer.state_dict()
    adapter = tokenizer.adapters[card.source.adapter]
    assert adapter.to_ours(adapter.to_published(state)).keys() == state.keys()


@pytest.mark.parametrize("name", CARDS)
def test_names_say_the_strides_and_codes(name):
    tokenizer = built(name)
    (size,) = tokenizer._describe()["codebook_sizes"]
    config = tokenizer.config
    if name.startswith("cosmos_di"):
        assert name.startswith(f"cosmos_di{config.stride}x{config.stride}.")
    elif name.startswith("cosmos"):
        assert name.startswith(f"cosmos_dv{config.frame_stride}x{config.stride}x{config.stride}.")
    else:
        assert f"causal_{config.frame_stride}{config.stride}{config.stride}_{size}.{config.version.replace('.', '_')}" in name
    assert size == 64000 or name.startswith("vidtok")


def test_sizes_on_the_hub():
    """In MB: encoder.jit and decoder.jit together are 211.6, 214 and 224.3, code included."""
    stored = {"cosmos_dv4x8x8.v0_1": 211.6, "cosmos_dv8x8x8.v0_1": 214.0, "cosmos_dv8x16x16.v0_1": 224.3}
    for name, size in stored.items():
        assert CARDS[name].params * 2e-6 == pytest.approx(size, rel=0.02)


def test_default_tags():
    assert find_card("cosmos_dv8x16x16").name == "cosmos_dv8x16x16.v0_1"
    assert find_card("cosmos_di8x8").name == "cosmos_di8x8.v0_1"
    assert find_card("vidtok_causal_488_32768").name == "vidtok_causal_488_32768.v1_0"
