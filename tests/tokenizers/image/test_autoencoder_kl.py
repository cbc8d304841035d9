"""That published weights give the references' vectors is checked in `tests/zoo/test_published.py`."""

import dataclasses

import pytest
import torch

from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.image.autoencoder_kl import GridVAE, GridVAEConfig, config_from_published

TINY = {"image_size": 16, "latent_channels": 3, "channels": (8, 16), "num_blocks": 1, "groups": 4}


def tiny(**changes):
    torch.manual_seed(0)
    return GridVAE(GridVAEConfig(**{**TINY, **changes})).eval()


def test_items_of_a_list_get_what_they_get_alone():
    tok = tiny()
    images = [torch.rand(3, 16 + 5 * i, 40 - 7 * i) for i in range(3)]
    together = tok.encode(images)
    assert (tok.info.grid, tok.info.max_tokens) == ((8, 8), 64)
    assert together.ids.shape == (3, 0, 64)
    assert together.extras["vectors"].shape == (3, 64, 3)
    for i, image in enumerate(images):
        assert torch.equal(tok.encode(image).extras["vectors"][0], together.extras["vectors"][i])
        decoded = tok.decode(together)[i]
        assert torch.equal(decoded, tok.decode(together[i])[0])
        assert list(decoded.shape[1:]) == [min(image.shape[1:])] * 2


def test_samples_of_the_posterior_follow_the_seed():
    images = torch.rand(2, 3, 16, 16)
    tok = tiny(sample_posterior=True)
    first, again, other = (tok.encode(images, seed=seed).extras["vectors"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(tok.encode(images[1], seed=1).extras["vectors"][0], first[1])
    assert not torch.equal(first, tiny().encode(images).extras["vectors"])


def test_vectors_are_cells_row_by_row():
    tok = tiny()
    image = torch.rand(1, 3, 16, 16)
    mean, _ = tok.vae.encode(2 * image - 1)
    assert torch.equal(tok.encode(image[0]).extras["vectors"][0, 8 * 2 + 5], mean[0, :, 2, 5])


def test_vectors_of_another_shape_are_refused():
    tok = tiny()
    tokens = tok.encode(torch.rand(3, 16, 16))
    for extras in ({}, {"vectors": tokens.extras["vectors"][:, :9]}):
        with pytest.raises(TokensError, match="no ids"):
            tok.decode(dataclasses.replace(tokens, extras=extras))


@pytest.mark.parametrize("changes", [{"channels": ()}, {"groups": 3}, {"image_size": 15}, {"num_blocks": 0}])
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        GridVAEConfig.from_dict({**TINY, **changes})


def test_published_configs_of_something_else_are_refused():
    with pytest.raises(ConfigError, match="AutoencoderKL"):
        config_from_published({"_class_name": "UNet2DModel"})


def test_training_learns_and_reaches_every_weight():
    tok = tiny().train()
    batch = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16).contiguous()
    optimizer = torch.optim.Adam(tok.parameters(), lr=3e-3)
    generator, history = torch.Generator().manual_seed(0), []
    for step in range(40):
        output = tok(batch, progress=step / 40, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            # A shift of all keys of attention shifts all scores alike.
            untouched = [name for name, p in tok.named_parameters() if not p.grad.any() and not name.endswith("k.bias")]
            assert not untouched
        optimizer.step()
        history.append(float(output.losses["reconstruction"].detach()))
    assert history[-1] < 0.5 * history[0]
