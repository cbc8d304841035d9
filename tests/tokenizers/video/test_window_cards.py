"""The cards of OmniTokenizer and LARP describe networks that can be built, of the size they say."""

import pytest
import torch

from tokenzoo.registry import cards, find_card, tokenizer_class

CARDS = {name: card for name, card in cards().items() if card.architecture in ("omnitokenizer", "larp")}


def built(name):
    cls = tokenizer_class(CARDS[name].architecture)
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(CARDS[name].config))


@pytest.mark.parametrize("name", CARDS)
def test_card(name):
    card, tokenizer = CARDS[name], built(name)
    assert sum(p.numel() for p in tokenizer.parameters()) == card.params
    assert card.source.adapter in tokenizer.adapters
    assert card.modality == tokenizer.modality
    size = tokenizer.config.image_size
    assert f"{size} x {size}" in card.body


def test_sizes_are_those_of_the_references():
    """Parameters of the reference's encoder, decoder and projections; and of LARP without its prior."""
    omni = built("omnitokenizer.imagenet_k600")
    assert sum(p.numel() for p in omni.encoder.parameters()) == pytest.approx(25.8e6, rel=0.01)
    assert CARDS["larp_l_long.k600_ucf"].params == pytest.approx(172.18e6, rel=1e-4)


def test_licences_and_the_default():
    assert find_card("omnitokenizer").name == "omnitokenizer.imagenet_k600"
    assert all(card.commercial == (card.architecture == "omnitokenizer") for card in CARDS.values())
    assert {card.config.get("num_frames") for card in CARDS.values()} == {None, 1}
