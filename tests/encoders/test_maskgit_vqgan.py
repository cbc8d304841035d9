"""Parity with bytedance/1d-tokenizer@942a96f on a small config with random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tokenzoo.encoders.maskgit_vqgan import MaskGITVQGAN, ResidualBlock

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def expected():
    with safe_open(GOLDEN / "maskgit_vqgan.expected.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | {"config": json.loads(file.metadata()["config"])}  # noqa: SIM118


@pytest.fixture(scope="module")
def vqgan(expected):
    state = {name: tensor.float() for name, tensor in load_file(GOLDEN / "maskgit_vqgan.state.safetensors").items()}
    state["codebook"] = state.pop("quantize.embedding.weight")
    model = MaskGITVQGAN(**expected["config"]).eval()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_encoder(vqgan, expected):
    images = expected["images"].float() / 255
    torch.testing.assert_close(vqgan.encoder(images), expected["latents"], rtol=0, atol=1e-4)
    assert torch.equal(vqgan.encode(images), expected["ids"])


@torch.no_grad()
def test_decoder(vqgan, expected):
    torch.testing.assert_close(vqgan.decode(expected["ids"]), expected["reconstruction"], rtol=0, atol=1e-4)


def test_published_size():
    with torch.device("meta"):
        model = MaskGITVQGAN()
    # 218.06 MB of float32, the size of maskgit-vqgan-imagenet-f16-256.bin
    assert sum(p.numel() for p in model.parameters()) * 4 == pytest.approx(218.06e6, abs=0.05e6)
    assert model.encoder(torch.zeros(1, 3, 32, 32, device="meta")).shape == (1, 256, 2, 2)


def test_a_block_that_changes_the_width_drops_its_input():
    block = ResidualBlock(32, 64)
    torch.nn.init.zeros_(block.conv2.weight)
    assert not block(torch.randn(1, 32, 4, 4)).any()
