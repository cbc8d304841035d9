import pytest
import timm
import torch
from torch import nn

from tokenzoo.encoders.masked_autoencoder import MaskedAutoencoder
from tokenzoo.encoders.vision import vision_tower


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return vision_tower("test_vit", 64)


def pictures(seed=0):
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_patches_are_those_of_the_tower(tower):
    autoencoder = MaskedAutoencoder(tower, 0.75)
    weight, bias = tower.patch_embed.proj.weight, tower.patch_embed.proj.bias
    found = autoencoder.patches(pictures()) @ weight.flatten(1).T + bias
    torch.testing.assert_close(found, tower.patch_embed(pictures()).reshape(2, 16, 64), rtol=0, atol=1e-4)


def test_what_is_hidden_is_not_seen_and_counts_alone(tower):
    autoencoder = MaskedAutoencoder(tower, 0.75)
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(5)).argsort(1)

    def gradient(x):
        x = x.clone().requires_grad_()
        seen = []
        hook = tower.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        autoencoder(tower, x, torch.Generator().manual_seed(5)).backward()
        hook.remove()
        return autoencoder.patches(x.grad)

    found = gradient(pictures()).abs().sum(2) > 0
    assert bool(found.gather(1, order[:, :4]).all()), "shown patches are read"
    changed = pictures()
    blocks = changed.unflatten(3, (4, 16)).unflatten(2, (4, 16))
    row, column = divmod(int(order[0, -1]), 4)
    blocks[0, :, row, :, column] = 0.5 + 0.1 * blocks[0, :, row, :, column]
    losses = [autoencoder(tower, x, torch.Generator().manual_seed(5)) for x in (pictures(), changed)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)  # a patch is normalised before it is compared
    assert tower.patch_drop.shown is None


def test_every_parameter_learns(tower):
    autoencoder = MaskedAutoencoder(tower, 0.5)
    autoencoder(tower, pictures(), torch.Generator().manual_seed(0)).backward()
    assert not [name for name, p in autoencoder.named_parameters() if p.grad is None]
    assert tower.blocks[0].attn.qkv.weight.grad is not None


def test_towers_and_shares_that_do_not_fit_are_refused(tower):
    for hidden in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            MaskedAutoencoder(tower, hidden)
    network = timm.create_model("resnet18", pretrained=False)
    with pytest.raises(ValueError, match="leave out patches, got ResNet"):
        MaskedAutoencoder(network, 0.5)
    assert isinstance(tower, nn.Module)
