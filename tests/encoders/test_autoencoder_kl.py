"""Parity on a small config is in the fixture of FlexTok, whose checkpoints hold the autoencoder."""

import pytest
import torch
from torch.nn import functional as F

from tokenzoo.encoders.autoencoder_kl import AutoencoderKL, Downsample, GridAttention, Upsample, arguments_from_diffusers

PUBLISHED = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.32.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 8,
    "latents_mean": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "scaling_factor": 0.3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": True,
}


@pytest.mark.parametrize(("latent_channels", "count"), [(4, 83_653_863), (16, 83_821_011)])
def test_published_size(latent_channels, count):
    with torch.device("meta"):
        model = AutoencoderKL(latent_channels)
    # 335 MB of float32, the size of diffusion_pytorch_model.safetensors
    assert sum(p.numel() for p in model.parameters()) == count
    mean, log_variance = model.encode(torch.zeros(1, 3, 64, 32, device="meta"))
    assert mean.shape == log_variance.shape == (1, latent_channels, 8, 4)
    assert model.decode(mean).shape == (1, 3, 64, 32)


def test_downsampling_pads_right_and_below():
    down = Downsample(1)
    torch.nn.init.zeros_(down.conv.weight)
    torch.nn.init.zeros_(down.conv.bias)
    with torch.no_grad():
        down.conv.weight[0, 0, 0, 0] = 1  # the window's first pixel
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


def test_attention_is_over_all_cells():
    torch.manual_seed(0)
    attention, x = GridAttention(8, 4), torch.randn(2, 8, 3, 5)
    cells = attention.norm(x).flatten(2).transpose(1, 2)
    weights = (attention.q(cells) @ attention.k(cells).transpose(1, 2) / 8**0.5).softmax(-1)
    mixed = attention.out(weights @ attention.v(cells)).transpose(1, 2).view(2, 8, 3, 5)
    torch.testing.assert_close(attention(x), x + mixed)


def test_published_configs():
    assert arguments_from_diffusers(PUBLISHED) == {
        "latent_channels": 8,
        "channels": (128, 256, 512, 512),
        "num_blocks": 2,
        "groups": 32,
        "scaling_factor": 0.3,
    }
    assert "scaling_factor" not in arguments_from_diffusers({**PUBLISHED, "scaling_factor": None})


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "AutoencoderTiny"},
        {"act_fn": "gelu"},
        {"use_quant_conv": False},
        {"mid_block_add_attention": False},
        {"down_block_types": ["DownEncoderBlock2D"] * 3},
        {"up_block_types": ["AttnUpDecoderBlock2D"] * 4},
        {"block_out_channels": []},
        {"in_channels": 4},
        {"auto_map": {"AutoModel": "x.y"}},
    ],
)
def test_other_graphs_are_refused(changes):
    with pytest.raises(ValueError, match=r"expected|unknown keys"):
        arguments_from_diffusers({**PUBLISHED, **changes})


def test_upsampling_convolves_the_enlarged_image():
    torch.manual_seed(0)
    up = Upsample(3)
    for size in ((1, 1), (2, 5), (4, 3)):
        x = torch.randn(2, 3, *size)
        expected = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        torch.testing.assert_close(up(x), expected, rtol=0, atol=1e-5)
    up(x).square().sum().backward()
    ours = up.conv.weight.grad.clone()
    up.zero_grad()
    up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")).square().sum().backward()
    torch.testing.assert_close(ours, up.conv.weight.grad, rtol=1e-4, atol=1e-4)
