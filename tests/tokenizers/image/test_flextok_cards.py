"""The cards of FlexTok and its autoencoders describe networks that can be built, of the size they say."""

import json
from pathlib import Path

import pytest
import torch

from tokenzoo.registry import cards, find_card, tokenizer_class
from tokenzoo.training import Recipe

CARDS = {name: card for name, card in cards().items() if card.variant.startswith("flextok_")}
GOLDEN = Path(__file__).parents[2] / "golden"


def test_all_of_them():
    kinds = {name: card.architecture for name, card in CARDS.items()}
    assert list(kinds.values()).count("flextok") == 4
    assert list(kinds.values()).count("autoencoder_kl") == 3
    assert find_card("flextok_d18_d28").name == "flextok_d18_d28.dfn"


@pytest.mark.parametrize("name", CARDS)
def test_card(name):
    card = CARDS[name]
    cls = tokenizer_class(card.architecture)
    with torch.device("meta"):
        tokenizer = cls(cls.config_class.from_dict(card.config))
    assert sum(p.numel() for p in tokenizer.parameters()) == card.params
    # tables of sines are in the file too, though they are not parameters
    assert sum(t.numel() for t in tokenizer.state_dict().values()) * 4e-6 == pytest.approx(card.size_mb, abs=1)
    assert card.source.adapter in cls.adapters
    assert card.source.config == "config.json"
    assert (card.license, card.commercial) == ("apple-amlr", False)
    assert "Apple Machine Learning Research Model License Agreement" in card.body
    published = cls.adapters[card.source.adapter].to_published(tokenizer.state_dict())
    prefix = "vae.vae." if card.architecture == "flextok" else ""
    assert published[f"{prefix}decoder.up_blocks.3.resnets.2.conv2.weight"].shape == (128, 128, 3, 3)
    assert f"{prefix}encoder.mid_block.attentions.0.to_out.0.weight" in published


def test_a_published_config_of_full_size_gives_the_cards_network():
    published = json.loads((GOLDEN / "flextok_config.json").read_text())
    graph = json.dumps(published)
    for ours, full in (('"dim": 32', '"dim": 768'), ('"dim": 48', '"dim": 768'), ('"depth": 2', '"depth": 12')):
        graph = graph.replace(ours, full)
    for ours, full in (("[8, 8]", "[16, 16]"), ('"max_sizes": [64]', '"max_sizes": [256]'), ('"n_max": 64', '"n_max": 256')):
        graph = graph.replace(ours, full)
    for key in ("latent_channels", "channels_in", "channels_out", "out_channels"):
        graph = graph.replace(f'"{key}": 4', f'"{key}": 16')
    graph = graph.replace('"head_dim": 16', '"head_dim": 64').replace('size": 32', 'size": 256')
    cls = tokenizer_class("flextok")
    values = cls.config_from_published(json.loads(graph))
    with torch.device("meta"):
        tokenizer = cls(cls.config_class.from_dict(values))
    assert sum(p.numel() for p in tokenizer.parameters()) == find_card("flextok_d12_d12").params


def test_the_nano_recipe_can_be_built():
    recipe = Recipe.read("flextok_nano")
    cls = tokenizer_class(recipe.architecture)
    tokenizer = cls(cls.config_class.from_dict(recipe.config))
    assert tokenizer.config.image_size == recipe.data.crop_size
    assert max(recipe.eval_lengths) == tokenizer.config.num_tokens
