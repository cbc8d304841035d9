"""VQToken's file lies behind terms, among the weights of a language model: what happens without a token, and with one."""

import pytest
import safetensors.torch
import torch

import tokenzoo
from tokenzoo.registry import cards
from tokenzoo.tokenizers.errors import DownloadError
from tokenzoo.tokenizers.video.vqtoken import VQToken, VQTokenConfig

REPO = "haichaozhang/VQ-Token-llava-ov-0.5b"
CONFIG = {"tower": "vit_medium_patch16_gap_240", "tower_layers": 1, "image_size": 32, "dim": 16, "frames": 4, "clusters": 10}


@pytest.fixture
def published(site, hub):
    """A small tokenizer, whose weights a gated repository holds beside those of a language model."""
    torch.manual_seed(0)
    tok = VQToken(VQTokenConfig(**CONFIG)).eval()
    source = {"repo": REPO, "file": "model.safetensors", "adapter": "published"}
    site.card("vqtoken_tiny.test", architecture="vqtoken", modality="video", config=CONFIG, source=source, license="unknown")
    state = VQToken.adapters["published"].to_published(tok.state_dict())
    state |= {"lm_head.weight": torch.zeros(3, 3), "model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}
    data = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
    hub.repo(REPO, gated=True, token="granted").commit({"model.safetensors": data})
    return tok


def test_the_cards_name_the_gated_repository():
    named = [card for card in cards().values() if card.source.repo == REPO]
    assert [card.name for card in named] == ["vqtoken_0_5b.llava_ov", "vqtoken_0_5b.llava_ov_adaptive"]
    assert not any(card.commercial for card in named)


def test_without_a_token_it_is_said_what_to_do(published):
    with pytest.raises(DownloadError, match=rf"gated: accept its terms at http://\S+/{REPO}, then pass token="):
        tokenzoo.load("vqtoken_tiny")


def test_with_a_token_the_language_model_is_left_aside(published):
    tok = tokenzoo.load("vqtoken_tiny", token="granted")
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in tok.state_dict().items())
