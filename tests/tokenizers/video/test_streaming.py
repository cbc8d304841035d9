"""Clips encoded and decoded while they come in, beside the same clips as a whole."""

import numpy as np
import pytest
import torch

import tokenzoo
from tokenzoo.tokenizers import MediaError, TokensError
from tokenzoo.tokenizers.video.cosmos import Cosmos
from tokenzoo.tokenizers.video.larp import LARP
from tokenzoo.tokenizers.video.omnitokenizer import OmniTokenizer
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
LONE = [name for name in CLASSES if name.startswith("cosmos") or name == "vidtok_causal"]


@pytest.fixture(params=CLASSES)
def tok(request, golden):
    return golden(request.param, CLASSES[request.param]).tok


def clip(frames, height=13, width=21):
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames))


def told(tok, frames):
    """What a stream has to be told in the beginning."""
    return {"frames": frames} if getattr(tok.config, "version", "") == "v1.1" else {}


def streamed(tok, frames, amounts):
    """Ids and frames, fed so many at a time."""
    stream, ids, shown, at = tok.stream(**told(tok, len(frames))), [], [], 0
    for i, amount in enumerate(amounts):
        last = i == len(amounts) - 1
        ids.append(stream.encode(frames[at:] if last else frames[at : at + amount], last=last))
        shown.append(stream.decode(ids[-1], last=last))
        at += amount
    return torch.cat([part for part in ids if len(part)]), torch.cat([part for part in shown if len(part)])


@pytest.mark.parametrize("frames", [1, 22])
@pytest.mark.parametrize("amounts", [[0, 2, 0, 7, 3, 0], [1] * 30])
def test_any_amounts_give_the_ids_and_frames_of_the_whole(tok, frames, amounts):
    tok = tok.double()  # in float32, norms of nearly equal pixels round too differently to compare frames
    whole, given = tok.encode(clip(frames)), clip(frames)
    ids, shown = streamed(tok, given, amounts)
    assert torch.equal(ids.flatten(), whole.ids[0, 0])
    assert list(ids.shape) == whole.extras["grid"][0].tolist()
    torch.testing.assert_close(shown, tok.decode(whole)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("amounts", [[1] * 11, [4, 0, 7]])
def test_the_bundled_tokenizer_streams(amounts):
    tok = tokenzoo.load("vidtok_nano")
    whole = tok.encode(clip(11))
    ids, shown = streamed(tok, clip(11), amounts)
    assert torch.equal(ids.flatten(), whole.ids[0, 0])
    torch.testing.assert_close(shown, tok.decode(whole)[0], rtol=0, atol=1e-5)


def test_ids_in_single_precision_are_equal_too(tok):
    whole = tok.encode(clip(40))
    assert torch.equal(streamed(tok, clip(40), [5] * 8)[0].flatten(), whole.ids[0, 0])


@pytest.mark.parametrize("name", LONE)
def test_latency_of_causal_ones(golden, name):
    """What the docstring says: the first frame at once, then a step with every full one; all frames of a step at once."""
    tok = golden(name, CLASSES[name]).tok
    stream, stride = tok.stream(), tok.frame_stride
    steps = [stream.encode(clip(1)) for _ in range(1 + 2 * stride)]
    assert [len(ids) for ids in steps] == [1, *([0] * (stride - 1) + [1]) * 2]
    assert [len(stream.decode(ids)) for ids in steps if len(ids)] == [1, stride, stride]


def test_latency_of_the_published_network_that_looks_ahead():
    tok = VidTok(VidTokConfig(causal=False, channels=4)).eval()
    stream = tok.stream()
    steps = [len(stream.encode(clip(4, 8, 8))) for _ in range(32)]
    assert steps.index(1) == 14  # with the 60th frame
    assert steps[14:] == [1] * 18


def test_latency_of_the_published_networks_that_interpolate():
    """Every step is answered when it is full, and the decoder is 6 frames late: two stages each wait for a neighbour."""
    tok = VidTok(VidTokConfig(version="v1.1", channels=4)).eval()
    stream = tok.stream(frames=40)
    steps = [stream.encode(clip(1, 8, 8)) for _ in range(24)]
    assert [len(ids) for ids in steps] == [0, 0, 0, 1] * 6
    assert [len(stream.decode(ids)) for ids in steps if len(ids)] == [4, 0, 2, 4, 4, 4]


def test_a_stream_begins_anew_after_the_last(tok):
    stream = tok.stream(**told(tok, 9))
    found = []
    for seed in (0, 0, 1):
        frames = torch.rand(9, 3, 8, 16, generator=torch.Generator().manual_seed(seed))
        ids = stream.encode(frames, last=True)
        found.append((ids, stream.decode(ids, last=True)))
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
    other = clip(9, 16, 8)
    assert stream.decode(stream.encode(other, last=True), last=True).shape == other.shape
    with pytest.raises(TokensError, match="8 x 16 pixels, got 16 x 8"):
        tok.stream(**told(tok, 9), size=(8, 16)).encode(other)


def test_streams_that_only_decode_cut_to_the_size_and_frames_they_are_told(tok):
    whole = tok.encode(clip(9))
    ids = whole.ids[0, 0].reshape(whole.extras["grid"][0].tolist())
    shown = tok.stream(frames=9, size=(13, 21)).decode(ids, last=True)
    torch.testing.assert_close(shown, tok.decode(whole)[0], rtol=0, atol=1e-3)
    uncut = tok.stream(**told(tok, 9)).decode(ids, last=True)
    assert uncut.shape[2:] == (ids.shape[1] * tok.stride, ids.shape[2] * tok.stride)
    assert torch.equal(uncut[:9, :, :13, :21], shown)


def test_frames_come_in_any_form(golden):
    tok = golden("cosmos_8x8x8", Cosmos).tok
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 16, 3), dtype=np.uint8)
    stream = tok.stream()
    parts = [
        stream.encode(list(pixels[:3])),
        stream.encode(torch.from_numpy(pixels[3:9])),
        stream.encode(pixels[9:], last=True),
    ]
    assert torch.equal(torch.cat(parts).flatten(), tok.encode(pixels).ids[0, 0])


def test_what_does_not_fit_is_refused(golden):
    tok = golden("cosmos_8x8x8", Cosmos).tok
    stream = tok.stream()
    with pytest.raises(TokensError, match="some frames"):
        stream.encode(last=True)
    with pytest.raises(TokensError, match="at least one step"):
        stream.decode(last=True)
    stream.encode(clip(1, 8, 16))
    with pytest.raises(TokensError, match="8 x 16 pixels, got 16 x 8"):
        stream.encode(clip(1, 16, 8))
    with pytest.raises(MediaError):
        stream.encode(torch.full((1, 3, 8, 16), 2.0))
    for ids in (torch.zeros(1, 2, 2).long(), torch.zeros(1, 1, 2), torch.zeros(4).long()):
        with pytest.raises(TokensError, match=r"int64 ids \(t, 1, 2\)"):
            stream.decode(ids)
    with pytest.raises(TokensError, match=r"\[0, 64000\)"):
        stream.decode(torch.full((1, 1, 2), 64000))
    with pytest.raises(TokensError, match="at least 1"):
        tok.stream(frames=0)
    short = tok.stream(frames=3)
    with pytest.raises(TokensError, match="expected 3 frames"):
        short.encode(clip(4))
    with pytest.raises(TokensError, match="expected 3 frames"):
        tok.stream(frames=3).encode(clip(2), last=True)


def test_what_cannot_be_streamed_says_so(golden):
    with pytest.raises(TokensError, match="pass frames="):
        golden("vidtok_v1_1_488", VidTok).tok.stream()
    for name, cls in (("larp", LARP), ("omnitokenizer", OmniTokenizer)):
        with pytest.raises(TokensError, match="as a whole"):
            golden(name, cls).tok.stream()
