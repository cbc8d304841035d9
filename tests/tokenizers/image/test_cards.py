"""The cards of TiTok, One-D-Piece and TA-TiTok describe networks that can be built, of the size they say."""

import pytest
import torch

from tokenzoo.registry import cards
from tokenzoo.tokenizers.image.one_d_piece import OneDPiece
from tokenzoo.tokenizers.image.tatitok import TATiTok
from tokenzoo.tokenizers.image.titok import TiTok

CLASSES = {cls.architecture: cls for cls in (TiTok, OneDPiece, TATiTok)}
CARDS = {name: card for name, card in cards().items() if card.architecture in CLASSES}


@pytest.mark.parametrize("name", CARDS)
def test_card(name):
    card = CARDS[name]
    cls = CLASSES[card.architecture]
    with torch.device("meta"):
        tokenizer = cls(cls.config_class.from_dict(card.config))
    assert sum(p.numel() for p in tokenizer.parameters()) == card.params
    assert card.params * 4e-6 == pytest.approx(card.size_mb, abs=1)
    assert card.source.adapter in cls.adapters
    assert card.commercial == (card.architecture == "one_d_piece")
    published = cls.adapters["published"].to_published(tokenizer.state_dict())
    assert {"latent_tokens", "encoder.transformer.0.attn.in_proj_weight", "decoder.ffn.0.weight"} <= published.keys()
    assert published["encoder.conv_out.weight"].dim() == 4


def test_sizes_are_those_on_the_hub():
    """In MB, as far as known: these would differ if a module were missing."""
    known = {"titok_b64.in1k": 819, "titok_bl64_vq8k.in1k": 1560, "titok_sl256_vq8k.in1k": 1321}
    assert {name: CARDS[name].size_mb for name in known} == known
