import random

import numpy as np
import pytest
import torch

import tokenzoo
from tokenzoo.kernels import _native
from tokenzoo.tokenizers import ConfigError, Tokens, TokensError, WeightsError, WrongTokenizerError
from tokenzoo.tokenizers.text.equal_info import EqualInfo, EqualInfoConfig
from tokenzoo.training.equal_info import count

SENTENCE = "The quick brown fox jumps over the lazy dog. Grüße aus Köln, 東京 und Москва!\n"


@pytest.fixture(scope="module")
def small():
    """Counted on a few sentences, with windows of 64 bits."""
    words = SENTENCE.split()
    rng = random.Random(0)
    text = " ".join(rng.choice(words) for _ in range(4000)).encode()
    return count(np.frombuffer(text, np.uint8), hashed_bits=12)


@pytest.fixture(scope="module", params=["equal_info_nano", "equal_info_nano_b64"])
def nano(request):
    return tokenzoo.load(request.param)


def with_windows(tok, bits, **config):
    made = EqualInfo(EqualInfoConfig(window_bits=bits, frozen=False, hashed_bits=tok.config.hashed_bits, **config))
    made.load_state_dict(tok.state_dict())
    return made.eval()


@pytest.mark.parametrize("bits", [16, 32, 64, 128])
def test_text_comes_back(small, bits):
    tok = with_windows(small, bits)
    texts = [SENTENCE, "", b"", b"\xff\x00\xfe", "\ud800 lone", SENTENCE * 30, bytes(1000)]
    tokens = tok.encode(texts)
    assert tok.decode(tokens) == texts
    assert bool((tokens.lengths % (bits // 16) == 0).all())


def test_what_was_counted_is_worth_it(small):
    plain = SENTENCE.encode() * 20
    per_token = [len(plain) / int(with_windows(small, bits).encode(plain).counts[0]) for bits in (16, 32, 64, 128)]
    assert per_token[0] > 3
    assert per_token == sorted(per_token)


def test_the_table_is_what_the_byte_model_says(small):
    table = EqualInfo.frozen(small)
    windows = with_windows(small, 16)
    for text in (SENTENCE * 10, bytes(range(256)) * 4, random.Random(1).randbytes(5000)):
        assert torch.equal(table.encode(text).ids, windows.encode(text).ids)
    everything = torch.arange(1, 65536)
    text = windows.windows().decode(everything)[0].numpy().tobytes()
    assert table.decode(Tokens(everything[None, None], torch.tensor([[65535]]), table.info), native=True) == [text]


def test_the_bundled_table_is_the_bundled_model():
    model, table = tokenzoo.load("equal_info_nano_b64"), tokenzoo.load("equal_info_nano")
    frozen = EqualInfo.frozen(model)
    assert torch.equal(frozen.parents, table.parents)
    assert torch.equal(frozen.labels, table.labels)


def test_each_item_has_the_ids_that_it_has_alone(nano):
    texts = [SENTENCE, "", "x", b"\xff" * 9]
    together = nano.encode(texts)
    assert all(one.equal(nano.encode(text)) for one, text in zip(together, texts, strict=True))


def test_python_gives_what_the_library_gives(nano, monkeypatch):
    tokens = nano.encode(SENTENCE)
    monkeypatch.setattr(_native, "library", lambda: None)
    assert nano.encode(SENTENCE).equal(tokens)
    assert nano.decode(tokens) == [SENTENCE]


def test_known_ids():
    """The table is frozen: these ids must never change."""
    tok = tokenzoo.load("equal_info_nano")
    ids = tok.encode("Tokens of any text, and back.").ids[0, 0].tolist()
    assert ids == [15569, 33042, 39475, 53094, 27155, 10528, 19187, 11185]


def test_damaged_tokens_are_refused(small):
    tok = small
    tokens = tok.encode([SENTENCE, "b"])
    cut = Tokens(tokens.ids, tokens.lengths - 1, tokens.spec, tokens.extras, tokens.meta)
    with pytest.raises(TokensError, match=r"item 0: expected windows of 4 tokens each.*leave out the last 3"):
        tok.decode(cut)
    empty = Tokens(torch.zeros_like(tokens.ids), tokens.lengths, tokens.spec, tokens.extras, tokens.meta)
    with pytest.raises(TokensError, match=r"item 0: expected tokens of windows that hold text, got \[0, 0, 0, 0\] at token 0"):
        tok.decode(empty)
    with pytest.raises(TokensError, match=r"in \[0, 65536\)"):
        tok.decode(Tokens(tokens.ids + 65536, tokens.lengths, tokens.spec))
    with pytest.raises(WrongTokenizerError):
        with_windows(small, 32).decode(tokens)
    with pytest.raises(WrongTokenizerError):
        EqualInfo.frozen(small).decode(tokens)


def test_other_ids_are_refused_where_they_are_no_utf8(small):
    table = EqualInfo.frozen(small)
    ids = table.encode(b"abc\xff").ids
    with pytest.raises(TokensError, match="break it at offset 3"):
        table.decode(Tokens(ids, torch.tensor([[ids.shape[2]]]), table.info))


def test_configs_and_weights_that_do_not_fit(small):
    for wrong in (
        {"window_bits": 32},
        {"paper_mode": True},
        {"window_bits": 128, "frozen": False, "paper_mode": True},
        {"orders": 9},
    ):
        with pytest.raises(ConfigError):
            EqualInfoConfig.from_dict(wrong)
    table = EqualInfo.frozen(small)
    with pytest.raises(ConfigError, match="only a table"):
        table.windows()
    with pytest.raises(ConfigError, match="counted, not trained"):
        table(torch.zeros(1, 3, dtype=torch.uint8))
    damaged = EqualInfo(EqualInfoConfig())
    with pytest.raises(WeightsError, match="the table of strings is damaged"):
        damaged.encode("x")
    damaged.load_state_dict(table.state_dict())
    assert damaged.encode("x").equal(table.encode("x"))


def test_the_greedy_rule_is_not_exact(small):
    tok = with_windows(small, 16, paper_mode=True)
    data = random.Random(2).randbytes(2000)
    assert tok.decode(tok.encode(data))[0] != data


def test_save_and_load(small, tmp_path):
    tok = EqualInfo.frozen(small)
    back = tokenzoo.load(tok.save_pretrained(tmp_path / "tok"))
    tokens = tok.encode(SENTENCE)
    assert back.decode(tokens) == [SENTENCE]
    tokens.save(tmp_path / "a.tok")
    assert back.decode(Tokens.load(tmp_path / "a.tok")) == [SENTENCE]
