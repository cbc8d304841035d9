import numpy as np
import pytest

from tokenzoo.evaluation import speech
from tokenzoo.evaluation.bundling import BEGIN, END
from tokenzoo.evaluation.speech_release import Row, refreshed

FOUND = {"stoi": 0.8123, "pesq_nb": 2.0, "pesq_wb": 1.5, "mel_nb": 0.3, "mel_wb": 0.4, "dnsmos": 3.1}


def bursts(seconds=2.0, seed=0):
    """Noise that comes and goes, as words do."""
    random = np.random.default_rng(seed)
    loudness = np.repeat(random.random(int(seconds * 20)) ** 3, speech.SAMPLE_RATE // 20)
    return (0.3 * loudness * random.standard_normal(len(loudness))).astype(np.float32)


@pytest.mark.parametrize("samples", [0, 320, 640])
def test_the_delay_of_a_codec_is_found(samples):
    originals = [bursts(seed=seed) for seed in range(3)]
    late = [np.pad(x, (samples, 0))[: len(x)] for x in originals]
    assert abs(speech._delay(late, originals) - samples) <= 20
    shifted = speech._shifted(late[0], samples, len(originals[0]))
    assert shifted.shape == originals[0].shape
    assert np.array_equal(shifted[: -samples or None], originals[0][: -samples or None])


def test_late_codecs_are_aligned_as_suits_them_best():
    pytest.importorskip("pystoi")
    originals = [bursts(seed=seed) for seed in range(2)]
    peer = speech.Peer("late", 1000, lambda x: np.pad(x, (333, 0)), late=True)
    decoded = speech.reconstructions(peer, originals)
    assert all(y.shape == x.shape for x, y in zip(originals, decoded, strict=True))
    assert speech.stoi(decoded[0], originals[0]) > 0.95
    early = speech.reconstructions(speech.Peer("exact", 1000, lambda x: x[:-7]), originals)
    assert np.array_equal(early[0][:-7], originals[0][:-7])


def test_what_is_closer_measures_better():
    pytest.importorskip("pystoi")
    pytest.importorskip("pesq")
    pytest.importorskip("speechmos")
    original = bursts()
    noise = np.random.default_rng(1).standard_normal(len(original)).astype(np.float32)
    near, far = (speech.measure((original + level * noise).astype(np.float32), original) for level in (0.001, 0.05))
    assert near.keys() == set(speech.METRICS)
    assert near["stoi"] > far["stoi"]
    assert near["mel_wb"] < far["mel_wb"]
    assert near["pesq_wb"] > far["pesq_wb"]
    assert not speech.measurable(original[:1000])


def test_the_card_is_refreshed_between_its_markers(monkeypatch):
    monkeypatch.setattr(speech, "dnsmos", lambda x: 3.456)
    rows = {"held out": [Row("**x**", 963.0, FOUND), Row("Codec2 1300", 1300, FOUND, narrow=True)]}
    text = refreshed(f"before\n{BEGIN}\nold\n{END}\nafter", {"held out": [bursts()] * 2}, rows, 1.25, 4321)
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "old" not in text
    assert "| **x** | 963 | 0.812 | 2.00 | 1.50 | 0.300 | 0.400 | 3.10 |" in text
    assert "| Codec2 1300 | 1300 | 0.812 | 2.00 | - | 0.300 | - | 3.10 |" in text
    assert "2 recordings, held out (4 s), whose own DNSMOS is 3.46:" in text
    assert "4,321 codes" in text
    with pytest.raises(ValueError, match="expected the card to hold"):
        refreshed("nothing", {}, {}, 0, 0)
