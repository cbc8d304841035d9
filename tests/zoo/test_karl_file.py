"""KARL's files are training checkpoints at an address: what happens from there to tokens."""

import argparse
import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tokenzoo
from tokenzoo.registry import cards, tokenizer_class
from tokenzoo.tokenizers.errors import WeightsError

GOLDEN = Path(__file__).parents[1] / "golden"
CARDS = [card for card in cards().values() if card.architecture == "karl"]


@pytest.fixture(params=["vqgan", "vae"])
def published(request, site, hub, monkeypatch):
    """A server with a small checkpoint in the published form, its card, and what the reference makes of it."""
    monkeypatch.setattr("tokenzoo.card._ADDRESS", re.compile(r"http://127\.0\.0\.1:\d+/\S+|https://\S+"))
    with safe_open(GOLDEN / f"karl_{request.param}.expected.safetensors", "pt") as file:
        expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    state = {key: tensor.float() for key, tensor in load_file(GOLDEN / f"karl_{request.param}.state.safetensors").items()}
    networks = {"gan_losses.0.discriminator.main.0.weight": torch.zeros(2), "gan_losses.7.perceptual_loss.lin0": torch.ones(1)}
    checkpoint = {
        "model": {**{key: torch.zeros_like(tensor) for key, tensor in state.items()}, **networks},
        "ema": {**state, **networks},
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "optimizer_discriminator": {"state": {}, "param_groups": []},
        "scaler": {"scale": 65536.0},
        "epoch": 399,
        "args": argparse.Namespace(model="karl_small", lr=None, output_dir="./output"),
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    hub.uploads["karl.pth"] = buffer.getvalue()
    source = {"url": f"{hub.cdn}/karl.pth?dl=1", "file": "karl.pth", "adapter": request.param}
    site.card("karl_tiny.test", architecture="karl", config=config, source=source, commercial=False)
    return hub, expected


def test_the_averaged_weights_of_the_checkpoint_are_used(published):
    hub, expected = published
    tok = tokenzoo.load("karl_tiny")
    tokens = tok.encode(expected["images"], target={"l1": 0.05})
    assert torch.equal(tokens.extras["kept"], expected["kept_0.05_16"])
    decoded = torch.stack(tok.decode(tokens))
    reference = expected["reconstruction_0.05_16"].clamp(0, 1)
    torch.testing.assert_close(decoded[: len(reference)], reference, rtol=0, atol=1e-4)
    hub.stop()
    assert tokenzoo.load("karl_tiny").info == tok.info


@pytest.mark.usefixtures("published")
def test_weights_of_the_other_kind_are_refused(site):
    card = tokenzoo.info("karl_tiny")
    other = {"vqgan": "vae", "vae": "vqgan"}[card.source.adapter]
    source = {"url": card.source.url, "file": "karl.pth", "adapter": other}
    site.card("karl_other.test", architecture="karl", config=dict(card.config), source=source)
    with pytest.raises(WeightsError, match="do not fit KARL"):
        tokenzoo.load("karl_other")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_cards_describe_networks_that_can_be_built(card):
    cls = tokenizer_class(card.architecture)
    with torch.device("meta"):
        tok = cls(cls.config_class.from_dict(card.config))
    assert sum(p.numel() for p in tok.parameters()) == card.params
    assert not card.commercial
    assert card.source.url.startswith("https://www.dropbox.com/scl/fi/")
    assert card.source.url.endswith("&dl=1")
    published = cls.adapters[card.source.adapter].to_published(tok.state_dict())
    assert ("quantize.embedding.weight" in published) == (card.config.get("quantizer", "vq") == "vq")
    assert {"rec_loss_embeddings", "encoder_ln_post_halt.weight", "halting_mlp.2.bias"} <= published.keys()
    kind = f"base_tokenizer.{card.source.adapter}."
    assert {key for key in published if key.startswith("base_tokenizer")} == {key for key in published if key.startswith(kind)}
    assert f"{kind}decoder.up.4.upsample.conv.weight" in published
