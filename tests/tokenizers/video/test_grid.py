"""Cosmos and VidTok against their reference implementations with random weights, and what holds for both."""

import dataclasses

import pytest
import torch

from tokenzoo.tokenizers import ConfigError, MediaError, Tokens, TokensError
from tokenzoo.tokenizers.video.cosmos import Cosmos, CosmosConfig
from tokenzoo.tokenizers.video.vidtok import VidTok, VidTokConfig

CLASSES = {
    "cosmos_4x8x8": Cosmos,
    "cosmos_8x8x8": Cosmos,
    "cosmos_8x16x16": Cosmos,
    "vidtok_causal": VidTok,
    "vidtok_noncausal": VidTok,
    "vidtok_v1_1_488": VidTok,
    "vidtok_v1_1_888": VidTok,
}


@pytest.fixture(params=CLASSES)
def case(request, golden):
    found = golden(request.param, CLASSES[request.param])
    found.tok.piece = type(found.tok).piece
    return found


@pytest.fixture(params=CLASSES)
def tok(request, golden):
    tok = golden(request.param, CLASSES[request.param]).tok
    tok.piece = type(tok).piece
    return tok


def noise(frames, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, 3, height, width, generator=generator)


def lone(tok):
    """Frames beyond whole steps of the grid: the first of causal networks."""
    return int(getattr(tok.config, "causal", True))


def test_ids_and_frames_are_those_of_the_reference(case):
    for expected in case.cases:
        tokens = case.tok.encode(expected.clip.numpy())
        assert torch.equal(tokens.ids[0, 0], expected.ids.flatten())
        assert tokens.extras["grid"].tolist() == [list(expected.ids.shape)]
        (native,) = case.tok.decode(tokens, native=True)
        torch.testing.assert_close(native[-len(expected.clip) :], expected.reconstruction, rtol=0, atol=1e-4)
        (clip,) = case.tok.decode(tokens)
        torch.testing.assert_close(clip, expected.reconstruction.clamp(0, 1), rtol=0, atol=1e-4)


def test_the_published_layout_is_written_as_it_was_read(case):
    written = case.adapter.to_published(case.tok.state_dict())
    assert all(torch.equal(case.published[name], tensor) for name, tensor in written.items())
    assert not {name for name in case.published.keys() - written.keys() if "sample" not in name}


@pytest.mark.parametrize("frames", [2, 9, 16])
@pytest.mark.parametrize("size", [(8, 8), (13, 21)])
def test_decoding_gives_back_every_frame_at_its_size(tok, frames, size):
    tokens = tok.encode(noise(frames, *size))
    (clip,) = tok.decode(tokens)
    assert clip.shape == (frames, 3, *size)
    assert clip.dtype == torch.float32
    assert 0 <= float(clip.min()) <= float(clip.max()) <= 1


def test_every_length_comes_back(golden):
    """1 to 40 frames; of four networks, each takes its turn."""
    names = ("cosmos_8x8x8", "vidtok_causal", "vidtok_noncausal", "vidtok_v1_1_488")
    toks = [golden(name, CLASSES[name]).tok for name in names]
    for frames in range(1, 41):
        for tok in (toks[frames % 4], toks[frames // 4 % 4]):
            assert tok.decode(tok.encode(noise(frames, 8, 9)))[0].shape == (frames, 3, 8, 9)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pieces_give_the_ids_and_frames_of_the_whole(tok, steps):
    clip = noise(37, 16, 16)
    tok.piece = 1 << 40
    whole = tok.encode(clip)
    frames = tok.decode(whole)[0]
    tok.piece = steps * tok.frame_stride * 16 * 16
    assert tok.encode(clip).equal(whole)
    torch.testing.assert_close(tok.decode(whole)[0], frames, rtol=0, atol=1e-4)


def test_causal_ids_do_not_depend_on_later_frames(tok):
    if not lone(tok):
        pytest.skip("looks ahead")
    first = 1 + 2 * tok.frame_stride
    clip = noise(first + 2 * tok.frame_stride, 16, 16)
    other = torch.cat([clip[:first], noise(len(clip) - first, 16, 16, seed=1)])
    mine, theirs = (tok.encode(c).ids.unflatten(2, (-1, tok.encode(c).extras["grid"][0, 1:].prod())) for c in (clip, other))
    assert torch.equal(mine[:, :, :3], theirs[:, :, :3])
    assert not torch.equal(mine, theirs)


def test_items_of_all_sizes_get_the_ids_they_get_alone(tok):
    clips = [noise(n, *size, seed=n) for n, size in ((1, (8, 8)), (9, (8, 16)), (9, (16, 8)), (4, (8, 8)), (9, (8, 16)))]
    together = tok.encode(clips)
    for clip, tokens in zip(clips, together, strict=True):
        assert torch.equal(tokens.ids[..., : int(tokens.lengths.max())], tok.encode(clip).ids)
    assert [frames.shape for frames in tok.decode(together)] == [clip.shape for clip in clips]


def test_true_batches_equal_singles(tok):
    batch = torch.stack([tok.media.read(noise(9, 16, 16, seed))[0] for seed in range(3)])
    together = tok._encode(batch, length=None, seed=0)
    lengths = torch.full((3, 1), together.ids.shape[2])
    clips = tok._decode(together.ids, lengths, together.extras)
    for i in range(3):
        one = tok._encode(batch[i : i + 1], length=None, seed=0)
        assert torch.equal(one.ids[0], together.ids[i])
        torch.testing.assert_close(tok._decode(one.ids, lengths[:1], one.extras)[0], clips[i], rtol=0, atol=1e-4)


def test_batches_on_accelerators_hold_one_grid_each(tok, monkeypatch):
    monkeypatch.setattr(type(tok), "_batch_size", 16)
    tokens = tok.encode([noise(5, 8, 16), noise(5, 16, 8), noise(5, 8, 16, 1)])
    assert [clip.shape[2:] for clip in tok.decode(tokens)] == [(8, 16), (16, 8), (8, 16)]


def test_saved_tokens_decode_alike(tok, tmp_path):
    tokens = tok.encode([noise(9, 8, 16), noise(2, 16, 16)])
    tokens.save(tmp_path / "tokens.tok")
    again = Tokens.load(tmp_path / "tokens.tok")
    assert again.equal(tokens)
    assert all(torch.equal(a, b) for a, b in zip(tok.decode(again), tok.decode(tokens), strict=True))


def test_a_saved_tokenizer_gives_the_same_tokens(tok, tmp_path):
    again = type(tok).from_pretrained(tok.save_pretrained(tmp_path))
    assert torch.equal(again.encode(noise(9, 8, 8)).ids, tok.encode(noise(9, 8, 8)).ids)


def test_a_grid_that_does_not_fit_is_refused(tok):
    tokens = tok.encode(noise(5, 8, 16))
    for grid in (torch.tensor([[7, 1, 1]]), torch.tensor([[-1, -1, int(tokens.lengths[0, 0])]]), torch.zeros(1, 2).long()):
        with pytest.raises(TokensError, match="grid"):
            tok.decode(dataclasses.replace(tokens, extras={"grid": grid}))
    with pytest.raises(TokensError, match="got none"):
        tok.decode(dataclasses.replace(tokens, extras={}))


def test_what_is_no_clip_is_refused(tok):
    for item in (torch.zeros(0, 3, 8, 8), torch.zeros(3, 8), "there is no such file"):
        with pytest.raises(MediaError):
            tok.encode(item)
    with pytest.raises(TokensError, match="length"):
        tok.encode(noise(1, 8, 8), length=3)


def test_the_objective_learns(tok):
    tok = type(tok)(tok.config).train()
    torch.manual_seed(0)
    batch = noise(1, 16, 16).expand(lone(tok) + 8, -1, -1, -1)[None]
    batch = (
        batch[:, : len(batch[0]) // tok.frame_stride * tok.frame_stride] if not getattr(tok.config, "causal", True) else batch
    )
    tok.extra_losses["blurred"] = lambda x, y: (x.mean((3, 4)) - y.mean((3, 4))).abs().mean()
    optimizer = torch.optim.Adam(tok.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        found = tok(batch)
        assert found.reconstruction.shape == batch.shape
        assert {"pixels", "blurred"} <= found.losses.keys()
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in tok.parameters())


def test_every_parameter_is_trained(tok):
    tok = type(tok)(tok.config).train()
    tok(
        torch.stack([tok.media.read(noise(17, 32, 32))[0][: 16 if not getattr(tok.config, "causal", True) else 17]])
    ).loss.backward()
    assert not [name for name, parameter in tok.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CosmosConfig, {"stride": 12}),
        (CosmosConfig, {"frame_stride": 2}),
        (CosmosConfig, {"patch": 2}),
        (CosmosConfig, {"stride": 32}),
        (CosmosConfig, {"multipliers": []}),
        (CosmosConfig, {"channels": 0}),
        (VidTokConfig, {"multipliers": [1]}),
        (VidTokConfig, {"halved": [3]}),
        (VidTokConfig, {"halved": [1, 1]}),
        (VidTokConfig, {"doubled": [0, 1]}),
        (VidTokConfig, {"doubled": [1]}),
        (VidTokConfig, {"version": "v1.1", "causal": False}),
        (VidTokConfig, {"version": "v2"}),
    ],
)
def test_configs_that_cannot_be_built_are_refused(config, changes):
    with pytest.raises(ConfigError):
        config.from_dict(changes)


def test_averaged_weights_of_a_training_checkpoint_are_read(golden):
    case = golden("cosmos_8x16x16", Cosmos)
    used = case.adapter.to_published(case.tok.state_dict())
    checkpoint = {f"network.{name}": torch.zeros_like(tensor) for name, tensor in used.items()}
    averaged = {f"ema.network-{name.replace('.', '-')}": tensor for name, tensor in used.items()}
    ours = Cosmos.adapters["training"].to_ours({**checkpoint, **averaged, "ema.num_updates": torch.tensor(3)})
    assert all(torch.equal(ours[name], tensor) for name, tensor in case.tok.state_dict().items())
    plain = Cosmos.adapters["training"].to_ours({f"network.{name}": tensor for name, tensor in used.items()})
    assert all(torch.equal(plain[name], tensor) for name, tensor in case.tok.state_dict().items())


def test_losses_left_in_a_checkpoint_are_dropped(golden):
    case = golden("vidtok_causal", VidTok)
    ours = case.adapter.to_ours({**case.published, "loss.logvar": torch.ones(1), "regularization.zero": torch.ones(1)})
    assert ours.keys() == case.tok.state_dict().keys()
