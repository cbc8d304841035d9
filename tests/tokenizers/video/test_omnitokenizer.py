from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from tokenzoo.hub import read_published
from tokenzoo.tokenizers import ConfigError, Tokens, TokensError
from tokenzoo.tokenizers.video.omnitokenizer import OmniTokenizer, OmniTokenizerConfig, rotations

TINY = {
    "image_size": 16,
    "num_frames": 5,
    "patch_size": 4,
    "frame_stride": 2,
    "dim": 16,
    "heads": 2,
    "encoder_blocks": "tw",
    "decoder_blocks": "tt",
    "temporal_layers": 2,
    "window": 2,
    "codebook_size": 32,
    "token_dim": 4,
}


def tiny(**changes):
    torch.manual_seed(0)
    tok = OmniTokenizer(OmniTokenizerConfig(**{**TINY, **changes})).eval()
    for name, tensor in tok.named_parameters():
        if tensor.dim() > 1 and name != "quantizer.codebook":
            tensor.data.mul_(2)
    return tok


def clip(frames, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# -- parity


def test_ids_and_clips_of_the_network_with_biases_equal_the_references(golden):
    case = golden("omnitokenizer_bias", OmniTokenizer)
    tokens = case.tok.encode([item.clip.numpy() for item in case.cases])
    for i, (item, decoded) in enumerate(zip(case.cases, case.tok.decode(tokens), strict=True)):
        assert tokens[i].ids[0, 0].tolist() == item.ids.tolist()
        close(decoded, item.reconstruction.clamp(0, 1))


def test_ids_of_the_reference_depend_on_the_clip_and_on_time(golden):
    cases = golden("omnitokenizer", OmniTokenizer).cases
    assert len(torch.cat([item.ids for item in cases]).unique()) >= 40
    assert not torch.equal(cases[-1].ids[:48], cases[-1].ids[48:96])
    assert 0.1 < cases[-1].reconstruction.std() < 0.5


def test_pixels_before_they_are_clamped_equal_the_references(golden):
    case = golden("omnitokenizer", OmniTokenizer)
    item = next(item for item in case.cases if len(item.clip) == 5)
    vectors = case.tok.quantizer.lookup(item.ids.view(1, 3, 4, 4))
    close(case.tok.decoder(vectors)[0], item.reconstruction)


@pytest.mark.parametrize("name", ["omnitokenizer", "omnitokenizer_bias"])
def test_weights_go_back_to_the_published_layout(golden, name):
    case = golden(name, OmniTokenizer)
    back = case.adapter.to_published(case.tok.state_dict())
    assert all(torch.equal(back[key], case.published[key]) for key in back)
    left = case.published.keys() - back.keys()
    unused = ("beta", "context_norm.gamma", "relative_position_index", "codebook_usage")
    assert all(key.endswith(unused) or "spatial_rel_pos_bias" in key for key in left)


def test_discriminators_and_perceptual_networks_are_dropped_and_nothing_else(golden):
    case = golden("omnitokenizer", OmniTokenizer)
    extra = {f"{name}.0.weight": torch.zeros(1) for name in ("image_discriminator", "video_discriminator", "perceptual_model")}
    assert case.adapter.to_ours({**case.published, **extra}).keys() == case.tok.state_dict().keys()
    with pytest.raises(RuntimeError, match="register"):
        case.tok.load_state_dict(case.adapter.to_ours({**case.published, "encoder.register": torch.zeros(1)}))


def test_a_training_checkpoint_is_read_and_nothing_in_it_runs(golden, tmp_path):
    case = golden("omnitokenizer", OmniTokenizer)
    checkpoint = {"state_dict": case.published, "hyper_parameters": {"args": Namespace(casual_in_peg=True)}, "epoch": 3}
    torch.save(checkpoint, tmp_path / "imagenet_k600.ckpt")
    state = read_published(tmp_path / "imagenet_k600.ckpt", case.adapter)
    assert state.keys() == case.tok.state_dict().keys()
    assert torch.equal(state["quantizer.codebook"], case.published["codebook.embeddings"])


# -- clips of any length and size


@pytest.mark.parametrize("frames", [*range(1, 8), 12])
def test_frames_of_the_latents_follow_those_of_the_windows(frames):
    tokens = tiny().encode(clip(frames))
    whole, rest = divmod(frames, 5)
    latent = 3 * whole + (1 + -(-(rest - 1) // 2) if rest else 0)
    assert tokens.lengths.tolist() == [[16 * latent]]
    assert tokens.spec.grid == (4, 4)


def test_a_crop_comes_back_at_its_own_size():
    tok = tiny(fit="crop")
    assert tok.decode(tok.encode(clip(3, 20, 40)))[0].shape == (3, 3, 20, 20)


def test_a_picture_is_a_clip_of_one_frame():
    tok = tiny()
    pixels = clip(1)
    assert torch.equal(tok.encode(Image.fromarray(pixels[0])).ids, tok.encode(pixels).ids)
    assert tok.encode(Image.fromarray(pixels[0])).ids.shape == (1, 1, 16)


def test_a_network_for_pictures_codes_every_frame_by_itself():
    tok = tiny(num_frames=1, positions="none")
    frames = clip(3)
    assert torch.equal(tok.encode(frames).ids[0, 0], torch.cat([tok.encode(frame[None]).ids[0, 0] for frame in frames]))


# -- tokens


def test_half_a_latent_frame_is_refused():
    tok = tiny()
    with pytest.raises(TokensError, match="4 x 4"):
        tok.decode(Tokens(torch.zeros(1, 1, 20).long(), torch.tensor([[20]]), tok.info))


def test_tokens_that_a_model_wrote_decode_without_meta():
    tok = tiny()
    assert tok.decode(Tokens(torch.zeros(1, 1, 64).long(), torch.tensor([[64]]), tok.info))[0].shape == (6, 3, 16, 16)


# -- architecture


@pytest.mark.parametrize("positions", ["rotary", "bias"])
def test_places_matter(positions):
    tok = tiny(positions=positions, encoder_blocks="t")
    x = torch.rand(1, 16, 16)
    attention = tok.encoder.spatial.layers[0].attention
    turns = rotations(4, 4, 8, x.device) if positions == "rotary" else None
    moved = attention(x.flip(1), (4, 4), turns).flip(1)
    assert (moved - attention(x, (4, 4), turns)).abs().max() > 1e-3
    if positions == "rotary":
        close(attention(x.flip(1), (4, 4), None).flip(1), attention(x, (4, 4), None))


def test_one_key_needs_no_queries():
    attention = tiny().encoder.temporal.layers[0].attention
    x = torch.rand(3, 1, 16)
    quick = attention(x, (4, 4), None)
    close(quick, attention.train()(x, (4, 4), None))


def test_frames_need_not_be_square():
    tok = tiny()
    vectors = tok.encoder(torch.rand(1, 3, 3, 16, 24))
    assert vectors.shape == (1, 2, 4, 6, 4)
    assert tok.decoder(vectors).shape == (1, 3, 3, 16, 24)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 18},
        {"num_frames": 4},
        {"heads": 3},
        {"encoder_blocks": "tx"},
        {"window": 3},
        {"codebook_size": 0},
        {"positions": "learned"},
        {"unknown": 1},
    ],
)
def test_configs_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        OmniTokenizerConfig.from_dict({**TINY, **changes})


# -- training


def test_the_objective_trains_every_part_but_the_codes_which_are_averages():
    tok = tiny().train()
    before = tok.quantizer.codebook.clone()
    output = tok(torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    output.loss.backward()
    assert output.losses.keys() == {"pixels", "quantizer"}
    assert output.reconstruction.shape == (2, 5, 3, 16, 16)
    assert [name for name, p in tok.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not torch.equal(tok.quantizer.codebook, before)
    assert 1 <= output.metrics["codes_used"] <= 32
