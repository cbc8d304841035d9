from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from tokenzoo.hub import read_published
from tokenzoo.tokenizers import ConfigError, MediaError, Tokens, TokensError
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


@pytest.mark.parametrize("name", ["omnitokenizer", "omnitokenizer_bias"])
def test_ids_and_clips_equal_the_references(golden, name):
    case = golden(name, OmniTokenizer)
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
def test_decode_returns_the_frames_and_the_size_that_went_in(frames):
    tok = tiny()
    tokens = tok.encode(clip(frames, 11, 23))
    whole, rest = divmod(frames, 5)
    latent = 3 * whole + (1 + -(-(rest - 1) // 2) if rest else 0)
    assert tokens.lengths.tolist() == [[16 * latent]]
    (decoded,) = tok.decode(tokens)
    assert decoded.shape == (frames, 3, 11, 23)
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert tok.decode(tokens, native=True)[0].shape[1:] == (3, 16, 16)


def test_a_crop_comes_back_at_its_own_size():
    tok = tiny(fit="crop")
    assert tok.decode(tok.encode(clip(3, 20, 40)))[0].shape == (3, 3, 20, 20)


def test_a_picture_is_a_clip_of_one_frame():
    tok = tiny()
    pixels = clip(1)
    assert torch.equal(tok.encode(Image.fromarray(pixels[0])).ids, tok.encode(pixels).ids)
    assert tok.encode(Image.fromarray(pixels[0])).ids.shape == (1, 1, 16)


def test_any_length_and_any_size_in_one_list():
    tok = tiny()
    items = [clip(frames, 3 + frames, 90 - 2 * frames) for frames in range(1, 41)]
    decoded = tok.decode(tok.encode(items))
    assert [tuple(item.shape) for item in decoded] == [(n, 3, 3 + n, 90 - 2 * n) for n in range(1, 41)]


def test_windows_are_coded_each_by_itself():
    tok = tiny()
    whole = clip(12)
    parts = [tok.encode(whole[at : at + 5]).ids for at in (0, 5, 10)]
    assert torch.equal(tok.encode(whole).ids, torch.cat(parts, 2))


def test_a_network_for_pictures_codes_every_frame_by_itself():
    tok = tiny(num_frames=1, positions="none")
    frames = clip(3)
    assert torch.equal(tok.encode(frames).ids[0, 0], torch.cat([tok.encode(frame[None]).ids[0, 0] for frame in frames]))


def test_a_batch_equals_its_items():
    tok = tiny()
    items = [clip(5, seed=1), clip(1, seed=2), clip(7, seed=3), clip(5, seed=4)]
    together = tok.encode(items)
    for i, item in enumerate(items):
        alone = tok.encode(item)
        assert torch.equal(together[i].ids, alone.ids)
        assert torch.equal(tok.decode(together)[i], tok.decode(alone)[0])


def test_a_true_batch_equals_its_items():
    tok = tiny()
    batch = torch.rand(3, 7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = tok._encode(batch, length=None, seed=0).ids
    assert torch.equal(ids, torch.cat([tok._encode(item[None], length=None, seed=0).ids for item in batch]))
    lengths = torch.full((3, 1), ids.shape[2])
    each = [tok._decode(ids[i : i + 1], lengths[i : i + 1], {}) for i in range(3)]
    close(tok._decode(ids, lengths, {}), torch.cat(each))


def test_empty_input_and_what_is_no_clip():
    tok = tiny()
    assert len(tok.encode([])) == 0
    for item in (
        np.zeros((0, 16, 16, 3), np.uint8),
        np.zeros((2, 16, 16, 5), np.uint8),
        np.full((2, 3, 4, 4), np.nan, np.float32),
    ):
        with pytest.raises(MediaError):
            tok.encode(item)
    with pytest.raises(TokensError):
        tok.encode(clip(1), length=3)


# -- tokens


def test_what_the_tokens_mean():
    tok = tiny()
    assert (tok.info.codebook_sizes, tok.info.grid, tok.info.modality) == ((32,), (4, 4), "video")
    tokens = tok.encode([clip(5), clip(2)])
    for layout in ("interleaved", "parallel"):
        ids, lengths = Tokens.unflatten(tokens.flatten(layout), tok.info, layout).ids, tokens.lengths
        assert torch.equal(ids, tokens.ids)
        assert lengths.tolist() == [[48], [32]]
    assert torch.equal(Tokens.unpack(tokens.pack()).ids, tokens.ids)


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


def test_half_precision_gives_pixels():
    tok = tiny().to(torch.bfloat16)
    (decoded,) = tok.decode(tok.encode(clip(5)))
    assert decoded.dtype == torch.float32
    assert bool(decoded.isfinite().all())


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


def test_extra_losses_are_added():
    tok = tiny()
    tok.extra_losses["perceptual"] = lambda reconstruction, original: (reconstruction - original).square().mean()
    batch = torch.rand(1, 3, 3, 16, 16)
    output = tok(batch)
    close(output.losses["perceptual"], (output.reconstruction - batch).square().mean())


def test_training_on_one_clip_brings_the_loss_down():
    torch.manual_seed(0)
    tok = OmniTokenizer(OmniTokenizerConfig(**{**TINY, "kmeans_iterations": 2, "restart_after": 5})).train()
    generator = torch.Generator().manual_seed(0)
    batch = torch.nn.functional.avg_pool3d(torch.rand(2, 3, 5, 20, 20, generator=generator), (1, 5, 5), 1).transpose(1, 2)
    optimizer = torch.optim.Adam([p for p in tok.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(40):
        output = tok(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.losses["pixels"].item())
    assert losses[-1] < 0.5 * losses[0]
