"""ReToK's file comes from a page that only a person gets through: what happens before and after it is there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tokenzoo
from tokenzoo.registry import cards, tokenizer_class
from tokenzoo.tokenizers.errors import DownloadError, WeightsError

GOLDEN = Path(__file__).parents[1] / "golden"
CARDS = [card for card in cards().values() if card.architecture == "retok" and not card.bundled]


@pytest.fixture
def published(site, cache):
    """The card of a small checkpoint, its file's place, and its state dict under the published keys."""
    with safe_open(GOLDEN / "retok.expected.safetensors", "pt") as file:
        config = file.metadata()["config"]
    source = {"page": CARDS[0].source.page, "file": "VQ.pt", "adapter": "published"}
    site.card("retok_tiny.test", architecture="retok", config=json.loads(config), source=source, commercial=False)
    place = cache / "assets/tokenzoo/files/retok_tiny.test/VQ.pt"
    place.parent.mkdir(parents=True)
    return place, {key: tensor.float() for key, tensor in load_file(GOLDEN / "retok.state.safetensors").items()}


@pytest.mark.parametrize("key", ["ema", "model", "state_dict"])
def test_the_file_is_read_wherever_it_keeps_the_weights(published, key, no_network):
    place, state = published
    order = ["ema", "model", "state_dict"]
    later = {name: {"wrong": torch.zeros(1)} for name in order[order.index(key) + 1 :]}
    torch.save({**later, key: state, "steps": 5, "config": {"lr": 1e-4}}, place)
    tok = tokenzoo.load("retok_tiny")
    with safe_open(GOLDEN / "retok.expected.safetensors", "pt") as file:
        assert torch.equal(tok.encode(file.get_tensor("images")).ids, file.get_tensor("ids"))
    assert tok.name == "retok_tiny.test"


def test_without_the_file_it_is_said_where_to_get_it(published):
    with pytest.raises(DownloadError, match=r"cannot be downloaded by a program: get VQ\.pt from https://drive\.google\.com"):
        tokenzoo.load("retok_tiny")


def test_another_files_weights_are_refused(published):
    place, state = published
    torch.save({"ema": {key: value for key, value in state.items() if "s1to2decoder" not in key}}, place)
    with pytest.raises(WeightsError, match=r"token_decoder"):
        tokenzoo.load("retok_tiny")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_cards_describe_networks_that_can_be_built(card):
    cls = tokenizer_class(card.architecture)
    with torch.device("meta"):
        tok = cls(cls.config_class.from_dict(card.config))
    assert sum(p.numel() for p in tok.parameters()) == card.params
    assert card.source.adapter in cls.adapters
    assert not card.commercial
    published = cls.adapters["published"].to_published(tok.state_dict())
    assert {"s2to1encoder.latent_token_positional_embedding_comp", "decoder.adaptive.4.gamma.weight"} <= published.keys()
