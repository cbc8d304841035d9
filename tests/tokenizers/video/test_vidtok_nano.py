"""VidTok nano: what is particular to it, and the bundled weights."""

import copy

import pytest
import torch

from tokenzoo import load
from tokenzoo.tokenizers import ConfigError, MediaError, TokensError
from tokenzoo.tokenizers.quality import psnr
from tokenzoo.tokenizers.video._block_code import BlockCode, block_transform
from tokenzoo.tokenizers.video.vidtok_nano import (
    FRAMES,
    Mover,
    VidTokNano,
    VidTokNanoConfig,
    Words,
    from_blocks,
    motion_energy,
    to_blocks,
)

TINY = {"width": 4, "blocks": 1, "first_classes": 4, "still_classes": 4, "moving_classes": 2, "motions": 4, "reach": 2}
NAME = "vidtok_nano.clips"


def drifting(frames, height, width, *, down=0, right=1, seed=0):
    """A smooth picture whose contents move by so many pixels a frame."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.rand(1, 3, 12, 12, generator=generator)
    scene = torch.nn.functional.interpolate(wide, size=(height + 64, width + 64), mode="bicubic").clamp(0, 1)[0]
    tops, lefts = (range(32, 32 - frames * step, -step) if step else [32] * frames for step in (down, right))
    return torch.stack([scene[:, y : y + height, x : x + width] for y, x in zip(tops, lefts, strict=True)])


@pytest.fixture(scope="module")
def tok():
    """A tiny one, fitted to clips, with refiners that do something."""
    tokenizer = VidTokNano(VidTokNanoConfig(**TINY))
    clips = torch.stack([drifting(9, 32, 32, right=i % 3 - 1, down=i % 2, seed=i) for i in range(12)])
    tokenizer.initialise((clips * 255).byte(), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for refiner in (tokenizer.loop.refine, tokenizer.loop.refine_first):
        refiner.head.weight.data = 0.02 * torch.randn(refiner.head.weight.shape, generator=generator)
    return tokenizer.eval()


@pytest.fixture(scope="module")
def nano():
    return load(NAME, local_files_only=True)


def test_blocks_are_an_exact_cut():
    clip = torch.rand(2, 4, 3, 16, 24)
    assert to_blocks(clip).shape == (2, 2, 3, 4 * 3 * 64)
    assert torch.equal(from_blocks(to_blocks(clip), 4), clip)


def test_the_transform_keeps_energy_and_is_built_where_it_is_kept():
    block_transform.cache_clear()
    with torch.device("meta"):
        rows = block_transform(FRAMES, 8, 7.5, 3.5)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("motion", [(0, 0), (2, 0), (0, -2), (3, 1), (-5, 6)])
def test_blocks_move_as_whole_frames_do(motion):
    frame = torch.rand(2, 3, 16, 24)
    mover = Mover(frame, FRAMES * 6)
    together = torch.stack([mover.moved(motion[0] * k, motion[1] * k) for k in range(1, FRAMES + 1)], 1)
    each = mover.blocks(torch.tensor(motion).expand(2, 2, 3, 2))
    assert torch.equal(each, to_blocks(together))
    if motion == (2, 0):  # a pixel a frame downwards
        assert torch.equal(together[:, 1, :, 2:], frame[:, :, :-2])


def test_the_motion_of_a_scene_is_found():
    clip = drifting(FRAMES + 1, 32, 32, down=1, right=2)[None]
    motions = torch.tensor([[0, 0], [4, 2], [2, 4], [2, -4]])
    energy = motion_energy(clip[:, 1:], clip[:, 0], motions, FRAMES * 4)
    assert (energy[0, 1:-1, 1:-1].argmin(2) == 2).all()


def test_words_survive_as_digits():
    ids = torch.tensor([[0, 1, 7, 8, 262143, 123456]])
    words = Words()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(words.ids(words.lookup(ids).to(dtype)), ids)


def test_a_block_code_says_what_it_leaves():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 12, generator=generator) * torch.linspace(3, 0.1, 12)
    code = BlockCode(8, 6, 12)
    code.fit(x, generator, rounds=3)
    words, errors = code.encode(x)
    assert 0 <= int(words.min()) <= int(words.max()) < code.size == 8 << 6
    assert (code.bits.sum(1) == 6).all()
    torch.testing.assert_close((code.decode(words) - x).square().sum(1), errors, rtol=1e-3, atol=1e-3)
    assert errors.mean() < 0.35 * x.square().sum(1).mean()


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 6, 9, 13])
@pytest.mark.parametrize("size", [(1, 1), (8, 16), (21, 13)])
def test_decoding_gives_back_every_frame_at_its_size(tok, frames, size):
    tokens = tok.encode(torch.rand(frames, 3, *size))
    assert tokens.extras["grid"].tolist() == [[1 + -(-(frames - 1) // 4), -(-size[0] // 8), -(-size[1] // 8)]]
    (clip,) = tok.decode(tokens)
    assert clip.shape == (frames, 3, *size)
    assert 0 <= float(clip.min()) <= float(clip.max()) <= 1


def test_many_equal_each_alone_and_in_pieces_equals_whole(tok):
    clips = [drifting(n, h, w, seed=n) for n, h, w in [(9, 16, 24), (1, 8, 8), (14, 24, 16), (9, 16, 24)]]
    together = tok.encode(clips)
    decoded = tok.decode(together)
    for i, clip in enumerate(clips):
        assert together[i].equal(tok.encode(clip))
        assert torch.equal(decoded[i], tok.decode(together[i])[0])
    whole = tok.encode(clips[2])
    try:
        tok.piece = 1
        assert whole.equal(tok.encode(clips[2]))
        assert torch.equal(tok.decode(whole)[0], decoded[2])
    finally:
        del tok.piece


def test_no_frame_depends_on_a_later_one(tok):
    clip = drifting(13, 16, 16)
    other = torch.cat([clip[:9], torch.rand(4, 3, 16, 16)])
    ids = [tok.encode(x).ids[0, 0] for x in (clip, other, clip[:9])]
    assert torch.equal(ids[0][:12], ids[1][:12])
    assert torch.equal(ids[0][:12], ids[2])
    assert not torch.equal(ids[0][12:], ids[1][12:])


def test_streams_give_the_ids_and_frames_of_the_whole(tok):
    clip = drifting(11, 16, 24)
    tokens = tok.encode(clip)
    stream = tok.stream()
    steps = [stream.encode(clip[i : i + 3], last=i + 3 >= 11) for i in range(0, 11, 3)]
    ids = torch.cat([step for step in steps if len(step)])
    assert torch.equal(ids.flatten(), tokens.ids[0, 0])
    frames = torch.cat([stream.decode(ids[i : i + 1], last=i + 1 == len(ids)) for i in range(len(ids))])
    assert torch.equal(frames, tok.decode(tokens)[0])


def test_standing_detail_sharpens(tok):
    still = drifting(1, 32, 32, seed=5).expand(17, -1, -1, -1)
    plain = copy.deepcopy(tok)
    for refiner in (plain.loop.refine, plain.loop.refine_first):
        refiner.head.weight.data.zero_()
    quality = psnr(plain.decode(plain.encode(still))[0], still)
    assert quality[-1] > quality[0] + 1


def test_objective_teaches_refiners_in_the_loop(tok):
    clips = torch.stack([drifting(9, 16, 16, seed=i) for i in range(2)])
    output = tok.train()(clips)
    tok.eval()
    assert output.reconstruction.shape == clips.shape
    output.loss.backward()
    for refiner in (tok.loop.refine, tok.loop.refine_first):
        assert refiner.head.weight.grad.abs().sum() > 0
    tok.zero_grad()
    with torch.no_grad():
        (decoded,) = tok.decode(tok.encode(clips[0]))
        torch.testing.assert_close(output.reconstruction[0].detach().clamp(0, 1), decoded, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"expected clips of 1 \+ 4 k frames"):
        tok(clips[:, :8])


def test_what_is_refused(tok):
    with pytest.raises(TokensError, match="fixed rate"):
        tok.encode(torch.rand(5, 3, 8, 8), length=4)
    with pytest.raises(MediaError, match="expected a clip"):
        tok.encode(torch.rand(5, 8, 8))
    for values in ({"motions": 3}, {"still_classes": 0}, {"width": 0}, {"reach": 1, "motions": 16}):
        with pytest.raises(ConfigError):
            VidTokNanoConfig.from_dict(values)


def test_the_bundled_weights_encode_any_clip(nano):
    assert nano.info.codebook_sizes == (262144,)
    for frames, size in [(1, (24, 40)), (6, (17, 9)), (40, (16, 16))]:
        clip = 0.3 + 0.4 * drifting(frames, *size, right=0)
        tokens = nano.encode(clip)
        (decoded,) = nano.decode(tokens)
        assert decoded.shape == clip.shape
        assert psnr(decoded[None], clip[None]) > 22
    assert torch.equal(nano.encode([clip, clip[:5]])[1].ids[0, :, :8], nano.encode(clip[:5]).ids[0])


def test_the_card_says_what_was_measured(nano):
    for name in ("H.264", "AV1", "one_d_piece_nano.photos, every frame", f"| **{NAME}** |", "held-out crops"):
        assert name in nano.card_text
