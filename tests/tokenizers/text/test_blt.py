from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokenzoo.tokenizers import ConfigError, Tokens, TokensError
from tokenzoo.tokenizers.building import build
from tokenzoo.tokenizers.text.blt import BLT, PUBLISHED, BLTConfig
from tokenzoo.tokenizers.text.splitters import words_of

GOLDEN = Path(__file__).parents[2] / "golden"
SIZE = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 256, "window": 8}
TEXTS = ["", "short", "Grüße, 東京! " * 9, b"\xff\x00", "\ud800"]


def golden(**config):
    state = load_file(GOLDEN / "blt.state.safetensors")
    return build(BLT, {**SIZE, **config}, PUBLISHED.to_ours(state), "golden")


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "blt.expected.safetensors")


def test_entropies_are_the_references(expected):
    found = golden().entropies(expected["text"].numpy().tobytes())
    torch.testing.assert_close(found, expected["entropies"], atol=1e-4, rtol=0)
    assert float(found.std()) > 0.1


@pytest.mark.parametrize("rule", ["global", "monotonic", "global_monotonic"])
def test_patches_are_the_references(expected, rule):
    threshold = 0.1 if rule == "monotonic" else float(expected["threshold"])
    tok = golden(rule=rule, threshold=threshold, rise=0.05)
    data = expected["text"].numpy().tobytes()
    starts = tok.encode(data).extras["starts"][0].nonzero()[:, 0]
    assert torch.equal(starts, expected[rule])
    assert tok.split(data).tolist() == [*expected[rule][1:].tolist(), len(data)]
    assert 2 < len(starts) < len(data) - 2


def test_the_published_layout_is_written_as_it_was_read():
    state = load_file(GOLDEN / "blt.state.safetensors")
    back = PUBLISHED.to_published(PUBLISHED.to_ours(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_text_comes_back_and_rows_do_not_touch_each_other():
    tok = golden(threshold=3.5)
    tokens = tok.encode(TEXTS)
    assert tok.decode(tokens) == TEXTS
    for i, text in enumerate(TEXTS):
        assert tokens[i].equal(tok.encode(text))


def test_patches_are_words_of_a_splitter():
    tok = golden(threshold=3.5)
    for data in (b"", b"x", b"some text, some more text", bytes(range(256))):
        ends = tok.split(data)
        assert ends.dtype == np.int64
        assert b"".join(words_of(data, ends)) == data
        assert all(words_of(data, ends))
    longer = words_of(b"some text, some more text", tok.split(b"some text, some more text"))
    shorter = words_of(b"some text, some", tok.split(b"some text, some"))
    assert longer[: len(shorter) - 1] == shorter[:-1]


def test_a_byte_looks_back_no_further_than_its_window():
    tok = golden(num_layers=2)
    one, two = tok.entropies(b"A" + b"abcdefgh" * 8), tok.entropies(b"B" + b"abcdefgh" * 8)
    assert not torch.equal(one[1:9], two[1:9])
    assert torch.equal(one[20:], two[20:])


def test_long_patches_are_cut():
    tok = golden(threshold=100.0, longest=7)
    assert tok.split(b"x" * 20).tolist() == [7, 14, 20]
    assert golden(threshold=100.0).split(b"x" * 20).tolist() == [20]


def test_top_k_starts_patches_where_the_model_is_least_sure():
    tok = golden(rule="top_k", patch_size=4.0)
    entropies = torch.tensor([9.0, 1, 5, 2, 5, 5, 0, 1, 3, 3, 0, 0, 4, 0, 0, 8, 1, 1, 1, 1, 1, 0])
    assert tok.starts(entropies).nonzero()[:, 0].tolist() == [0, 2, 4, 15]
    assert tok.starts(entropies[:11]).nonzero()[:, 0].tolist() == [0]
    assert tok.starts(entropies[:0]).tolist() == []
    data = b"some text, some more text"
    assert len(tok.split(data)) == len(data) // 4 - 1
    assert golden(rule="top_k", patch_size=4.0, longest=3).split(data).tolist()[-1] == len(data)


def test_it_learns():
    torch.manual_seed(0)
    tok = BLT(BLTConfig(**{**SIZE, "hidden_dim": 32}))
    batch = torch.tensor([list(b"abcabcabcabc")], dtype=torch.uint8)
    optimizer = torch.optim.Adam(tok.parameters(), 1e-2)
    first = float(tok(batch).loss.detach())
    for _ in range(30):
        optimizer.zero_grad()
        tok(batch).loss.backward()
        optimizer.step()
    assert float(tok(batch).loss.detach()) < first / 2


def test_ids_that_are_no_bytes_are_refused():
    tok = golden()
    tokens = tok.encode("abc")
    with pytest.raises(TokensError, match="item 0: expected ids of bytes, 4 to 259, got 1 at token 0"):
        tok.decode(Tokens(tokens.ids * 0 + 1, tokens.lengths, tokens.spec, tokens.extras, tokens.meta))
    for wrong in ({"dim": 10, "num_heads": 3}, {"window": 0}, {"longest": 0}, {"rule": "topk"}, {"patch_size": 0.5}):
        with pytest.raises(ConfigError):
            BLTConfig.from_dict(wrong)
