import numpy as np
import pytest
import torch

from tokenzoo.tokenizers import ConfigError, MediaError, Tokens, TokensError
from tokenzoo.tokenizers.video.larp import LARP, DrawingQuantizer, LARPConfig, waves

TINY = {
    "image_size": 16,
    "num_frames": 4,
    "patch_size": 4,
    "frame_stride": 2,
    "num_tokens": 6,
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "codebook_size": 32,
    "token_dim": 4,
}


def tiny(**changes):
    torch.manual_seed(0)
    tok = LARP(LARPConfig(**{**TINY, **changes})).eval()
    tok.quantizer.codebook.data.normal_()
    tok.encoder.queries.data.mul_(20)
    return tok


def clip(frames, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# -- parity


def test_ids_and_clips_equal_the_references(golden):
    case = golden("larp", LARP)
    tokens = case.tok.encode([item.clip.numpy() for item in case.cases])
    for i, (item, decoded) in enumerate(zip(case.cases, case.tok.decode(tokens), strict=True)):
        assert tokens[i].ids[0, 0].tolist() == item.ids.tolist()
        close(decoded, item.reconstruction.clamp(0, 1))


def test_pixels_before_they_are_clamped_equal_the_references(golden):
    case = golden("larp", LARP)
    item = next(item for item in case.cases if len(item.clip) == 4)
    close(case.tok.decoder(case.tok.quantizer.lookup(item.ids[None]))[0], item.reconstruction)


def test_ids_of_the_reference_depend_on_the_clip(golden):
    first = torch.stack([item.ids[:12] for item in golden("larp", LARP).cases])
    assert len(first.unique()) > 12
    assert len(first.unique(dim=0)) == len(first)


def test_weights_go_back_to_the_published_layout(golden):
    case = golden("larp", LARP)
    back = case.adapter.to_published(case.tok.state_dict())
    assert back.keys() == case.published.keys()
    assert all(torch.equal(back[key], case.published[key]) for key in back)


def test_the_prior_is_dropped_and_nothing_else(golden):
    case = golden("larp", LARP)
    with_prior = {**case.published, "prior_model.head.weight": torch.zeros(1)}
    assert case.adapter.to_ours(with_prior).keys() == case.tok.state_dict().keys()
    with pytest.raises(RuntimeError, match="register"):
        case.tok.load_state_dict(case.adapter.to_ours({**case.published, "register": torch.zeros(1)}))


def test_positions_are_those_that_are_published(golden):
    case = golden("larp", LARP)
    fresh = LARP(case.tok.config).state_dict()
    for name in ("encoder.positions", "decoder.positions", "decoder.queries"):
        torch.testing.assert_close(fresh[name], case.tok.state_dict()[name], rtol=0, atol=1e-3)  # stored in float16


# -- clips of any length and size


@pytest.mark.parametrize("frames", [*range(1, 6), 9])
def test_decode_returns_the_frames_and_the_size_that_went_in(frames):
    tok = tiny()
    tokens = tok.encode(clip(frames, 11, 23))
    assert tokens.lengths.tolist() == [[6 * -(-frames // 4)]]
    (decoded,) = tok.decode(tokens)
    assert decoded.shape == (frames, 3, 11, 23)
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_any_length_and_any_size_in_one_list():
    tok = tiny()
    items = [clip(frames, 3 + frames, 90 - 2 * frames) for frames in range(1, 41)]
    decoded = tok.decode(tok.encode(items))
    assert [tuple(item.shape) for item in decoded] == [(n, 3, 3 + n, 90 - 2 * n) for n in range(1, 41)]


def test_windows_are_coded_each_by_itself():
    tok = tiny()
    whole = clip(10)
    parts = [tok.encode(whole[at : at + 4]).ids for at in (0, 4, 8)]
    assert torch.equal(tok.encode(whole).ids, torch.cat(parts, 2))


def test_the_last_frame_fills_its_window():
    tok = tiny()
    frames = clip(3)
    assert torch.equal(tok.encode(frames).ids, tok.encode(frames[[0, 1, 2, 2]]).ids)
    assert not torch.equal(tok.encode(frames).ids, tok.encode(frames[[2, 1, 0, 0]]).ids)


def test_a_batch_equals_its_items():
    tok = tiny()
    items = [clip(4, seed=1), clip(1, seed=2), clip(7, seed=3), clip(4, seed=4)]
    together = tok.encode(items)
    for i, item in enumerate(items):
        alone = tok.encode(item)
        assert torch.equal(together[i].ids, alone.ids)
        assert torch.equal(tok.decode(together)[i], tok.decode(alone)[0])


def test_a_true_batch_equals_its_items():
    tok = tiny()
    batch = torch.rand(3, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = tok._encode(batch, length=None, seed=0).ids
    assert torch.equal(ids, torch.cat([tok._encode(item[None], length=None, seed=0).ids for item in batch]))
    lengths = torch.full((3, 1), ids.shape[2])
    each = [tok._decode(ids[i : i + 1], lengths[i : i + 1], {}) for i in range(3)]
    close(tok._decode(ids, lengths, {}), torch.cat(each))


def test_empty_input_and_what_is_no_clip():
    tok = tiny()
    assert len(tok.encode([])) == 0
    for item in (np.zeros((0, 16, 16, 3), np.uint8), np.full((2, 3, 4, 4), 2, np.float32)):
        with pytest.raises(MediaError):
            tok.encode(item)
    with pytest.raises(TokensError):
        tok.encode(clip(1), length=3)


# -- tokens


def test_what_the_tokens_mean():
    tok = tiny()
    assert (tok.info.codebook_sizes, tok.info.grid, tok.info.modality) == ((32,), None, "video")
    tokens = tok.encode([clip(5), clip(2)])
    for layout in ("interleaved", "parallel"):
        assert torch.equal(Tokens.unflatten(tokens.flatten(layout), tok.info, layout).ids, tokens.ids)
    assert torch.equal(Tokens.unpack(tokens.pack()).ids, tokens.ids)


def test_part_of_a_window_is_refused():
    tok = tiny()
    with pytest.raises(TokensError, match="all 6 tokens"):
        tok.decode(Tokens(torch.zeros(1, 1, 8).long(), torch.tensor([[8]]), tok.info))


def test_half_precision_gives_pixels():
    tok = tiny().to(torch.bfloat16)
    (decoded,) = tok.decode(tok.encode(clip(5)))
    assert decoded.dtype == torch.float32
    assert bool(decoded.isfinite().all())


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 18},
        {"num_frames": 5},
        {"heads": 3},
        {"dim": 6},
        {"temperature": -1.0},
        {"num_tokens": 0},
        {"unknown": 1},
    ],
)
def test_configs_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        LARPConfig.from_dict({**TINY, **changes})


def test_waves_of_place_zero_and_of_the_shortest_length():
    found = waves(torch.arange(3), 8)
    close(found[0], torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]))
    close(found[:, 0], torch.arange(3).sin())


# -- training


def test_the_objective_trains_every_part():
    tok = tiny().train()
    output = tok(torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    output.loss.backward()
    assert output.losses.keys() == {"pixels", "quantizer"}
    assert [name for name, p in tok.named_parameters() if p.grad is None] == []
    assert output.reconstruction.shape == (2, 4, 3, 16, 16)


def test_training_draws_codes_by_their_cosines():
    quantizer = DrawingQuantizer(4, 2, 2, commitment=0.25, temperature=0.5).train()
    quantizer.in_proj.weight.data.copy_(torch.eye(2))
    quantizer.in_proj.bias.data.zero_()
    quantizer.codebook.data.copy_(torch.tensor([[1.0, 0], [0, 2], [-1, 0], [0, -1]]))
    x = torch.tensor([3.0, 0]).expand(20_000, 2)
    ids = quantizer(x, torch.Generator().manual_seed(0)).ids
    expected = (torch.tensor([1.0, 0, -1, 0]) / 0.5).softmax(0)
    torch.testing.assert_close(torch.bincount(ids, minlength=4) / len(ids), expected, rtol=0, atol=0.01)
    assert torch.equal(ids, quantizer(x, torch.Generator().manual_seed(0)).ids)
    assert bool((quantizer.eval()(x).ids == 0).all())


def test_extra_losses_are_added():
    tok = tiny()
    tok.extra_losses["perceptual"] = lambda reconstruction, original: (reconstruction - original).square().mean()
    batch = torch.rand(1, 3, 3, 16, 16)
    output = tok(batch)
    close(output.losses["perceptual"], (output.reconstruction - batch).square().mean())


def test_training_on_one_clip_brings_the_loss_down():
    torch.manual_seed(0)
    tok = LARP(LARPConfig(**TINY)).train()
    generator = torch.Generator().manual_seed(0)
    batch = torch.nn.functional.avg_pool3d(torch.rand(2, 3, 4, 20, 20, generator=generator), (1, 5, 5), 1).transpose(1, 2)
    optimizer = torch.optim.Adam(tok.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        output = tok(batch, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.losses["pixels"].item())
    assert losses[-1] < 0.5 * losses[0]
