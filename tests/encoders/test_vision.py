import huggingface_hub
import pytest
import timm
import torch

from tokenzoo.encoders.vision import VisionFeatures
from tokenzoo.tokenizers.errors import ConfigError, DownloadError
from tokenzoo.tokenizers.image._common import alignment_features
from tokenzoo.tokenizers.image.flextok import FlexTok, FlexTokConfig


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False, num_classes=0, dynamic_img_size=True)


def test_features_are_those_of_the_patches(network):
    features = VisionFeatures(network, 3)
    images = torch.rand(2, 3, 48, 48)
    mean, deviation = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((images - mean) / deviation)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(features(images), expected)
    assert features(images).shape == (2, 9, network.embed_dim)
    assert not any(p.requires_grad for p in network.parameters())


def test_images_are_resized_to_the_grid(network):
    features = VisionFeatures(network, 4)
    plain = torch.full((1, 3, 20, 20), 0.3)
    torch.testing.assert_close(features(plain), features(torch.full((1, 3, 64, 64), 0.3)), rtol=0, atol=1e-4)


def test_networks_are_named_as_timm_names_them():
    assert VisionFeatures.load("test_vit", 2, pretrained=False)(torch.rand(1, 3, 8, 8)).shape[1] == 4
    with pytest.raises(ValueError, match="network of timm's"):
        VisionFeatures.load("no_such_network", 2)


def test_a_decoder_can_be_aligned_and_the_network_is_not_saved(network):
    config = FlexTokConfig(
        image_size=16,
        vae_channels=(),
        latent_channels=3,
        patch_size=4,
        num_tokens=4,
        encoder_dim=16,
        encoder_layers=1,
        decoder_dim=16,
        decoder_layers=2,
        head_dim=8,
        alignment_network="test_vit",
        alignment_dim=network.embed_dim,
    )
    tok = FlexTok(config).train()
    tok.features = VisionFeatures(network, config.grid)
    batch, generator = torch.rand(4, 3, 16, 16), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(tok.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        output = tok(batch, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append(float(output.losses["alignment"].detach()))
    assert history[-1] < 0.7 * history[0]
    assert not any("network" in name or "features" in name for name in tok.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_networks_without_patch_tokens_are_refused(name):
    with pytest.raises(ValueError, match="with patch tokens"):
        VisionFeatures.load(name, 2, pretrained=False)
    with pytest.raises(ConfigError, match=r"alignment_network: .*with patch tokens"):
        alignment_features("resnet18", 2)


def test_weights_that_cannot_be_had_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="test_vit could not be had from the Hub, nor is it in the local cache"):
        alignment_features("test_vit", 2)
