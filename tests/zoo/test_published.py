"""Checkpoints whose values are in the published config: FlexTok's layout on a loopback Hub, and its autoencoders."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load as load_tensors

import tokenzoo
from tokenzoo.card import parse_card
from tokenzoo.tokenizers.errors import ConfigError, DownloadError, WeightsError
from tokenzoo.tokenizers.image.flextok import FlexTok

GOLDEN = Path(__file__).parents[1] / "golden"
REPO, VAE_REPO = "org/flextok", "org/flextok_vae"
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.7,
}
SOURCE = {"repo": REPO, "file": "model.safetensors", "adapter": "published", "config": "config.json"}


@pytest.fixture(scope="module")
def weights():
    return (GOLDEN / "flextok.state.safetensors").read_bytes()


@pytest.fixture(scope="module")
def expected():
    return safetensors.torch.load_file(GOLDEN / "flextok.expected.safetensors")


@pytest.fixture
def config():
    config = json.loads((GOLDEN / "flextok_config.json").read_text())
    config["vae"] |= {"hf_hub_path": VAE_REPO, "scaling_factor": None}
    return config


@pytest.fixture
def published(hub, site, config, weights):
    """The repositories as their authors publish them, and a card of ours that knows next to nothing."""
    hub.repo(VAE_REPO).commit({"config.json": json.dumps(VAE).encode()})
    hub.repo(REPO).commit({"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    site.card("tinyflex.a", architecture="flextok", config={"image_size": 64, "steps": 3}, source=SOURCE)
    return hub


def test_a_checkpoint_loads_by_its_published_config(published, expected):
    tok = tokenzoo.load("tinyflex")
    assert isinstance(tok, FlexTok)
    assert (tok.config.decoder_dim, tok.config.scaling_factor, tok.config.vae_channels) == (48, 0.7, (8, 16, 16))
    assert tok.config.steps == 3
    assert tok.revision == published.repos[REPO].refs["main"]
    assert torch.equal(tok.encode(expected["images"]).ids, expected["ids"])
    published.stop()
    assert tokenzoo.load("tinyflex").digest == tok.digest
    assert tokenzoo.load("tinyflex", local_files_only=True).config == tok.config


def test_what_was_loaded_is_saved_with_all_its_values(published, expected, tmp_path):
    folder = tokenzoo.load("tinyflex").save_pretrained(tmp_path)
    assert torch.equal(tokenzoo.load(folder).encode(expected["images"]).ids, expected["ids"])


def test_each_commit_has_its_own_config(published, config, weights):
    first = published.repos[REPO].refs["main"]
    config["decoder"]["module_dict"]["dec_time_embedder"]["max_timestep"] = 1000.0
    published.repo(REPO).commit({"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    assert tokenzoo.load("tinyflex").config.max_time == 1000
    assert tokenzoo.load("tinyflex", revision=first).config.max_time == 1


def test_configs_that_would_execute_something_are_refused_before_the_weights_are_fetched(published, config):
    config["vae"]["_target_"] = "os.system"
    published.repo(REPO).commit({"config.json": json.dumps(config).encode()})
    with pytest.raises(ConfigError, match="nothing was imported"):
        tokenzoo.load("tinyflex")
    assert not published.seen("cdn")


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_configs_that_are_no_json_objects_are_refused(published, text):
    published.repo(REPO).commit({"config.json": text.encode()})
    with pytest.raises(ConfigError, match=r"not a readable JSON|expected an object"):
        tokenzoo.load("tinyflex")


def test_a_config_of_other_sizes_does_not_fit_the_weights(published, config):
    config["decoder"]["module_dict"]["dec_transformer"]["depth"] = 3
    published.repo(REPO).commit({"config.json": json.dumps(config).encode()})
    with pytest.raises(WeightsError, match=r"missing \(decoder\.blocks\.2"):
        tokenzoo.load("tinyflex")


def test_a_config_that_is_missing(published):
    published.repo("org/other").commit({"model.safetensors": b""})
    card = parse_card("x.y", tokenzoo.info("tinyflex").text.replace(REPO, "org/other"))
    from tokenzoo.hub import load_card

    with pytest.raises(DownloadError, match=r"org/other/config\.json"):
        load_card(card)


def test_conversion_takes_the_configs_that_lie_beside_the_weights(site, config, weights, expected, tmp_path, no_network):
    site.card("tinyflex.a", architecture="flextok", config={"image_size": 64}, source=SOURCE)
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights)
    with pytest.raises(ConfigError, match=r"no file .*config\.json: get config\.json of the repository org/flextok too"):
        tokenzoo.convert(file, "tinyflex", tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"org--flextok_vae\.config\.json: get config\.json of the repository org/"):
        tokenzoo.convert(file, "tinyflex", tmp_path / "out")
    (tmp_path / "org--flextok_vae.config.json").write_text(json.dumps(VAE))
    tok = tokenzoo.load(tokenzoo.convert(file, "tinyflex", tmp_path / "out"))
    assert torch.equal(tok.encode(expected["images"]).ids, expected["ids"])


def test_an_architecture_without_published_configs(site, hub):
    hub.repo("org/tiny").commit({"config.json": b"{}"})
    site.card("tiny.a", source={"repo": "org/tiny", "file": "model.safetensors", "config": "config.json"})
    with pytest.raises(ConfigError, match="reads no published config"):
        tokenzoo.load("tiny")


@pytest.mark.parametrize("source", [{"file": "w.safetensors", "config": "config.json"}, {**SOURCE, "config": "../config.json"}])
def test_sources_whose_config_makes_no_sense(source):
    front = json.dumps({"license": "mit", "tokenzoo": {"architecture": "flextok", "modality": "image", "source": source}})
    with pytest.raises(ConfigError, match=r"source\.(repo beside|config)"):
        parse_card("a.b", f"---\n{front}\n---\n")


def test_an_autoencoder_loads_by_its_diffusers_config(hub, site, weights, expected):
    published = load_tensors(weights)
    state = {key.removeprefix("vae.vae."): tensor for key, tensor in published.items() if key.startswith("vae.vae.")}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = copy.copy(state)
    for new, name in old.items():
        renamed = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in renamed.items()}
    assert renamed.keys() != state.keys()
    tokens = []
    for repo, tensors in (("org/vae_new", state), ("org/vae_old", renamed)):
        source = {"repo": repo, "file": "diffusion_pytorch_model.safetensors", "adapter": "diffusers", "config": "config.json"}
        data = safetensors.torch.save(tensors)
        hub.repo(repo).commit({"config.json": json.dumps(VAE).encode(), "diffusion_pytorch_model.safetensors": data})
        site.card("vae.a", architecture="autoencoder_kl", config={"image_size": 64}, source=source)
        tok = tokenzoo.load("vae")
        assert tok.config.scaling_factor == 0.7
        tokens.append(tok.encode(expected["images"]))
        latents = tokens[-1].extras["vectors"].transpose(1, 2).unflatten(2, (16, 16)) * 0.7
        torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=1e-4)
    assert torch.equal(tokens[0].extras["vectors"], tokens[1].extras["vectors"])
