"""The cards of the audio codecs describe networks that can be built, of the size they say."""

import pytest
import torch

from tokenzoo.registry import cards, tokenizer_class
from tokenzoo.tokenizers import TokenSpec

CARDS = {name: card for name, card in cards().items() if card.modality == "audio"}


def built(name):
    cls = tokenizer_class(CARDS[name].architecture)
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(CARDS[name].config))


def spec(name):
    return TokenSpec(name=name, architecture=CARDS[name].architecture, modality="audio", **built(name)._describe())


@pytest.mark.parametrize("name", CARDS)
def test_card(name):
    card, tokenizer = CARDS[name], built(name)
    assert sum(p.numel() for p in tokenizer.parameters()) == card.params
    assert card.source.adapter in tokenizer.adapters or card.source.file.startswith("nano/")
    assert card.commercial == (card.license != "unknown")
    assert f"{tokenizer.sample_rate:,} Hz" in card.body


def test_sizes_on_the_hub():
    """In parameters: these would differ if a module were missing or too many. WavTokenizer's files hold much more."""
    stored = {"dac_24khz.descript": 74_654_000, "dac_44khz.descript": 76_621_000, "snac_24khz.siuzdak": 19_843_000}
    for name, params in stored.items():
        assert CARDS[name].params == pytest.approx(params, rel=1e-3)
        assert CARDS[name].size_mb == pytest.approx(params * 4e-6, rel=5e-3)


def test_bitrates_are_those_published():
    encodec = built("encodec_24khz.meta")
    assert [encodec.codebooks_for(b) for b in (1.5, 3, 6, 12, 24)] == [2, 4, 8, 16, 32]
    stereo = built("encodec_48khz.meta")
    assert [stereo.codebooks_for(b) for b in (3, 6, 12, 24)] == [2, 4, 8, 16]
    assert built("mimi.kyutai").codebooks_for(1.1) == 8
    assert built("dac_16khz.descript").codebooks_for(6) == 12
    assert built("dac_24khz.descript").codebooks_for(24) == 32
    rates = {name: spec(name).bits_per_second for name in CARDS if name.startswith(("snac", "wav"))}
    assert rates["snac_24khz.siuzdak"] == pytest.approx(984, abs=1)
    assert rates["snac_32khz.siuzdak"] == pytest.approx(1875, abs=1)
    assert rates["snac_44khz.siuzdak"] == pytest.approx(2584, abs=1)
    assert rates["wavtokenizer_large_600.unify"] == 480
    assert rates["wavtokenizer_small_320.libritts"] == 900
