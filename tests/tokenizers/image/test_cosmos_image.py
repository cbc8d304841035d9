"""Cosmos DI against its reference implementation with random weights (see `golden`), and its refusals."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.image.cosmos_image import CosmosImage, CosmosImageConfig

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def published():
    return {name: tensor.float() for name, tensor in load_file(GOLDEN / "cosmos_image.state.safetensors").items()}


@pytest.fixture(scope="module")
def tok(published):
    with safe_open(GOLDEN / "cosmos_image.expected.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    tok = CosmosImage(CosmosImageConfig.from_dict(config)).eval()
    tok.load_state_dict(CosmosImage.adapters["archive"].to_ours({**published, "encoder.patcher.wavelets": torch.ones(2)}))
    return tok


def noise(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def test_ids_and_pixels_are_those_of_the_reference(tok):
    expected = load_file(GOLDEN / "cosmos_image.expected.safetensors")
    for i in range(2):
        tokens = tok.encode(expected[f"image.{i}"].numpy())
        assert torch.equal(tokens.ids[0, 0], expected[f"ids.{i}"].flatten())
        assert tokens.extras["grid"].tolist() == [list(expected[f"ids.{i}"].shape)]
        (native,) = tok.decode(tokens, native=True)
        torch.testing.assert_close(native, expected[f"reconstruction.{i}"], rtol=0, atol=1e-4)


def test_the_published_layout_is_written_as_it_was_read(tok, published):
    written = CosmosImage.adapters["archive"].to_published(tok.state_dict())
    assert written.keys() == published.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in published.items())


def test_pictures_of_all_sizes_come_back_and_get_the_ids_they_get_alone(tok, monkeypatch):
    sizes = [(9, 5), (8, 16), (16, 8), (13, 37), (8, 16)]
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    together = tok.encode(pictures)
    for picture, tokens in zip(pictures, together, strict=True):
        assert torch.equal(tokens.ids[..., : int(tokens.lengths.max())], tok.encode(picture).ids)
    assert [image.shape for image in tok.decode(together)] == [(3, *size) for size in sizes]
    monkeypatch.setattr(CosmosImage, "_batch_size", 16)
    assert [image.shape for image in tok.decode(tok.encode(pictures))] == [(3, *size) for size in sizes]


def test_a_grid_that_does_not_fit_is_refused(tok):
    tokens = tok.encode(noise(16, 24))
    for extras in (
        {},
        {"grid": torch.tensor([[5, 1]])},
        {"grid": torch.tensor([[-2, -3]])},
        {"grid": torch.zeros(1, 3).long()},
    ):
        with pytest.raises(TokensError, match="grid"):
            tok.decode(dataclasses.replace(tokens, extras=extras))


def test_every_parameter_is_trained(tok):
    tok = CosmosImage(tok.config).train()
    tok.extra_losses["mean"] = lambda x, y: (x.mean() - y.mean()).abs()
    found = tok(noise(32, 32)[None])
    assert found.reconstruction.shape == (1, 3, 32, 32)
    found.loss.backward()
    assert not [name for name, parameter in tok.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    "changes", [{"stride": 12}, {"patch": 1}, {"stride": 2}, {"channels": 48}, {"multipliers": []}, {"latent_channels": 0}]
)
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        CosmosImageConfig.from_dict(changes)
