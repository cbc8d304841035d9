"""EnCodec against `EncodecModel` of transformers 5.23, with random weights."""

import pytest
import torch

from tokenzoo.tokenizers import ConfigError, TokensError
from tokenzoo.tokenizers.audio.encodec import Encodec, EncodecConfig, Segments
from tokenzoo.tokenizers.audio.published import fold_weight_norm
from tokenzoo.tokenizers.errors import WeightsError


def test_both_spellings_of_weight_norm_are_read(golden):
    case = golden("encodec_24khz", Encodec)
    ours = case.tok.state_dict()
    newer = {
        key.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1"): v
        for key, v in case.published.items()
    }
    assert all(torch.equal(ours[k], v) for k, v in case.adapter.to_ours(newer).items())


def test_half_a_weight_norm_is_refused():
    with pytest.raises(WeightsError, match=r"weight-normalised a\.weight"):
        fold_weight_norm({"a.weight_g": torch.ones(1, 1, 1)})


# -- segments


def published_segments():
    return Segments(EncodecConfig(segment=48000, segment_stride=47520))


@pytest.mark.parametrize("samples", [1, 320, 321, 47520, 47521, 47681, 48000, 95040, 95041, 95200, 95201, 95520, 480000])
def test_segments_are_known_from_the_number_of_frames(samples):
    segments = published_segments()
    frames = segments.frames(samples)
    longest = segments.samples_of(sum(frames))
    assert longest >= samples
    assert segments.frames(longest) == frames


def test_frames_that_no_recording_has_are_refused():
    with pytest.raises(TokensError, match="no recording"):
        Segments(EncodecConfig(sample_rate=1000, ratios=(5, 2), segment=200, segment_stride=110)).samples_of(12)


def test_loudness_is_needed_to_decode_segments(golden):
    tok = golden("encodec_48khz", Encodec).tok
    tokens = tok.encode(torch.randn(2, 300) / 4)
    tokens.extras.clear()
    with pytest.raises(TokensError, match="scales"):
        tok.decode(tokens)


# -- streams


def test_a_stream_gives_what_the_whole_recording_gives(golden):
    case = golden("encodec_24khz", Encodec)
    wave = torch.cat([expected.wave for expected in case.cases], -1)
    tokens = case.tok.encode(wave)
    expected = case.tok._decode(tokens.ids, tokens.lengths, {})[0]
    generator = torch.Generator().manual_seed(0)
    for length in (None, 3):
        stream, ids, audio, at = case.tok.stream(length=length), [], [], 0
        while at < wave.shape[1]:
            step = int(torch.randint(0, 60, (), generator=generator))
            last = at + step >= wave.shape[1]
            ids.append(stream.encode(wave[:, at : at + step], last=last))
            audio.append(stream.decode(ids[-1], last=last))
            at += step
        assert torch.equal(torch.cat(ids, 1), tokens.ids[0, :length])
    torch.testing.assert_close(
        torch.cat(audio, 1), case.tok._decode(tokens.ids[:, :3], tokens.lengths[:, :3], {})[0], rtol=0, atol=1e-5
    )
    assert expected.shape == torch.cat(audio, 1).shape


def test_the_published_models_latency():
    """What the card says: the first frames after 2,240 samples, then one with every 320 samples, both ways."""
    tok = Encodec(EncodecConfig(filters=2, dim=4, num_codebooks=1, codebook_size=4)).eval()
    stream = tok.stream()
    assert [stream.encode(torch.zeros(1, n)).shape[1] for n in (2239, 1, 319, 1, 320)] == [0, 7, 0, 1, 1]
    assert [stream.decode(torch.zeros(1, n).long()).shape[1] for n in (6, 1, 1)] == [0, 2240, 320]


def test_streams_refuse_what_does_not_fit(golden):
    tok = golden("encodec_24khz", Encodec).tok
    stream = tok.stream()
    for chunk in (torch.zeros(10), torch.zeros(2, 10)):
        with pytest.raises(TokensError, match="chunk"):
            stream.encode(chunk)
    for ids in (torch.zeros(9, 1).long(), torch.zeros(3).long(), torch.zeros(2, 2)):
        with pytest.raises(TokensError, match="ids"):
            stream.decode(ids)
    with pytest.raises(TokensError, match=r"\[0, 64\)"):
        stream.decode(torch.full((1, 1), 64))
    with pytest.raises(TokensError, match="1 to 8"):
        tok.stream(length=9)
    with pytest.raises(TokensError, match="segments"):
        golden("encodec_48khz", Encodec).tok.stream()


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 3},
        {"filters": 5},
        {"ratios": ()},
        {"ratios": (4, 1)},
        {"norm": "time"},
        {"segment": 100, "segment_stride": 40},
        {"num_codebooks": 0},
        {"norm": "batch"},
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes):
    with pytest.raises(ConfigError):
        EncodecConfig.from_dict(changes)
