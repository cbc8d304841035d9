"""What holds for OmniTokenizer and LARP alike, which code a clip in windows of a fixed size and know nothing beyond them."""

import numpy as np
import pytest
import torch

from tokenzoo.tokenizers import MediaError, Tokens, TokensError
from tokenzoo.tokenizers.video.larp import LARP
from tokenzoo.tokenizers.video.omnitokenizer import OmniTokenizer

CLASSES = {"larp": LARP, "omnitokenizer": OmniTokenizer}


@pytest.fixture(params=CLASSES)
def case(request, golden):
    return golden(request.param, CLASSES[request.param])


@pytest.fixture
def tok(case):
    return case.tok


def clip(frames, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_ids_and_clips_equal_the_references(case):
    tokens = case.tok.encode([item.clip.numpy() for item in case.cases])
    for i, (item, decoded) in enumerate(zip(case.cases, case.tok.decode(tokens), strict=True)):
        assert tokens[i].ids[0, 0].tolist() == item.ids.tolist()
        close(decoded, item.reconstruction.clamp(0, 1))


@pytest.mark.parametrize("frames", [*range(1, 8), 9, 12])
def test_decode_returns_the_frames_and_the_size_that_went_in(tok, frames):
    tokens = tok.encode(clip(frames, 11, 23))
    (decoded,) = tok.decode(tokens)
    assert decoded.shape == (frames, 3, 11, 23)
    assert 0 <= float(decoded.min()) <= float(decoded.max()) <= 1
    assert tok.decode(tokens, native=True)[0].shape[1:] == (3, tok.config.image_size, tok.config.image_size)


def test_any_length_and_any_size_in_one_list(tok):
    items = [clip(frames, 3 + frames, 90 - 2 * frames) for frames in range(1, 41)]
    decoded = tok.decode(tok.encode(items))
    assert [tuple(item.shape) for item in decoded] == [(n, 3, 3 + n, 90 - 2 * n) for n in range(1, 41)]


def test_windows_are_coded_each_by_itself(tok):
    size = tok.config.num_frames
    whole = clip(2 * size + 2)
    parts = [tok.encode(whole[at : at + size]).ids for at in range(0, len(whole), size)]
    assert torch.equal(tok.encode(whole).ids, torch.cat(parts, 2))


def test_a_batch_equals_its_items(tok):
    items = [clip(5, seed=1), clip(1, seed=2), clip(7, seed=3), clip(5, seed=4)]
    together = tok.encode(items)
    for i, item in enumerate(items):
        alone = tok.encode(item)
        assert torch.equal(together[i].ids, alone.ids)
        assert torch.equal(tok.decode(together)[i], tok.decode(alone)[0])


def test_a_true_batch_equals_its_items(tok):
    size = tok.config.image_size
    batch = torch.rand(3, 7, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = tok._encode(batch, length=None, seed=0).ids
    assert torch.equal(ids, torch.cat([tok._encode(item[None], length=None, seed=0).ids for item in batch]))
    lengths = torch.full((3, 1), ids.shape[2])
    each = [tok._decode(ids[i : i + 1], lengths[i : i + 1], {}) for i in range(3)]
    close(tok._decode(ids, lengths, {}), torch.cat(each))


def test_empty_input_and_what_is_no_clip(tok):
    assert len(tok.encode([])) == 0
    for item in (
        np.zeros((0, 16, 16, 3), np.uint8),
        np.zeros((2, 16, 16, 5), np.uint8),
        np.full((2, 3, 4, 4), np.nan, np.float32),
        np.full((2, 3, 4, 4), 2, np.float32),
    ):
        with pytest.raises(MediaError):
            tok.encode(item)
    with pytest.raises(TokensError):
        tok.encode(clip(1), length=3)


def test_layouts_and_packing_keep_the_ids(tok):
    assert (tok.info.modality, tok.info.codebook_sizes) == ("video", (tok.config.codebook_size,))
    tokens = tok.encode([clip(5), clip(2)])
    for layout in ("interleaved", "parallel"):
        again = Tokens.unflatten(tokens.flatten(layout), tok.info, layout)
        assert torch.equal(again.ids, tokens.ids)
        assert torch.equal(again.lengths, tokens.lengths)
    assert torch.equal(Tokens.unpack(tokens.pack()).ids, tokens.ids)


def test_half_precision_gives_pixels(tok):
    (decoded,) = tok.to(torch.bfloat16).decode(tok.encode(clip(5)))
    assert decoded.dtype == torch.float32
    assert bool(decoded.isfinite().all())


def test_extra_losses_are_added(tok):
    tok.extra_losses["perceptual"] = lambda reconstruction, original: (reconstruction - original).square().mean()
    batch = torch.rand(1, 3, 3, tok.config.image_size, tok.config.image_size)
    output = tok(batch)
    close(output.losses["perceptual"], (output.reconstruction - batch).square().mean())


def test_training_on_one_clip_brings_the_loss_down(tok):
    torch.manual_seed(0)
    more = {"kmeans_iterations": 2, "restart_after": 5} if isinstance(tok, OmniTokenizer) else {}
    config = tok.config_class.from_dict({**tok.config.to_dict(), **more})
    fresh, generator, size = type(tok)(config).train(), torch.Generator().manual_seed(0), config.image_size
    batch = torch.rand(2, 3, config.num_frames, size + 4, size + 4, generator=generator)
    batch = torch.nn.functional.avg_pool3d(batch, (1, 5, 5), 1).transpose(1, 2)
    optimizer = torch.optim.Adam([p for p in fresh.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(40):
        output = fresh(batch, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.losses["pixels"].item())
    assert losses[-1] < 0.5 * losses[0]
