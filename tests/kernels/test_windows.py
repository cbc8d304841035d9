import numpy as np
import pytest
import torch

from tokenzoo.kernels import _native
from tokenzoo.kernels.windows import Trie, WindowCode, match_strings

LIMIT = 160


@pytest.fixture
def python(monkeypatch):
    """Turns the compiled library off for what is called inside."""

    def call(function, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(_native, "library", lambda: None)
            return function(*arguments)

    return call


def random_code(bits, *, orders=7, greedy=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hashed = max(0, orders - 2) << 12
    corrections = torch.randint(-60, 61, (256 + 65536 + hashed,), generator=generator).to(torch.int8)
    checks = torch.randint(0, 3, (hashed,), generator=generator).to(torch.uint8)
    odds = torch.tensor([round(65536 / (1 + np.exp(-step / 16))) for step in range(-LIMIT, LIMIT + 1)], dtype=torch.int32)
    return WindowCode(corrections, checks, odds, orders, 12, bits, greedy)


def random_text(size, *, values=256, seed=0):
    return torch.randint(0, values, (size,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("bits", [16, 32, 64, 128])
@pytest.mark.parametrize("orders", [1, 2, 7])
def test_text_comes_back_and_every_window_holds_some(bits, orders):
    code = random_code(bits, orders=orders)
    for text in (
        random_text(3000),
        random_text(500, values=2),
        torch.zeros(300, dtype=torch.uint8),
        random_text(1),
        random_text(0),
    ):
        ids = code.encode(text)
        back, lengths = code.decode(ids)
        assert torch.equal(back, text)
        assert len(ids) == len(lengths) * bits // 16
        assert bool((lengths > 0).all())
        assert not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < 65536


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("bits", [16, 64])
def test_python_gives_what_the_library_gives(bits, greedy, python):
    code, text = random_code(bits, greedy=greedy), random_text(700, values=60)
    ids = code.encode(text)
    assert torch.equal(python(code.encode, text), ids)
    anything = torch.cat([ids, torch.randint(0, 65536, (80,), generator=torch.Generator().manual_seed(1))])
    for mine, other in zip(code.decode(anything), python(code.decode, anything), strict=True):
        assert torch.equal(mine, other)


def test_codes_but_the_empty_one_stand_for_one_string_each():
    code = random_code(16)
    text, lengths = code.decode(torch.arange(65536))
    ends = lengths.cumsum(0).tolist()
    strings = [text.numpy().tobytes()[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert strings[0] == b""
    assert len(set(strings)) == 65536
    assert {bytes([value]) for value in range(256)} <= set(strings)


def test_with_the_greedy_rule_several_strings_share_a_code():
    code = random_code(16, greedy=True)
    singles = [torch.tensor([value], dtype=torch.uint8) for value in range(256)]
    read = [code.decode(code.encode(single))[0] for single in singles]
    assert all(len(text) >= 1 and text[0] == single[0] for text, single in zip(read, singles, strict=True))
    assert any(len(text) > 1 for text in read)


def test_windows_are_read_one_by_one():
    code, text = random_code(32), random_text(400, values=60)
    ids = code.encode(text)
    _, lengths = code.decode(ids)
    assert torch.equal(code.decode(ids[6:])[0], text[int(lengths[:3].sum()) :])


def trie():
    parents = torch.cat([torch.zeros(257, dtype=torch.long), torch.tensor([98, 257, 258])])
    labels = torch.cat([torch.arange(-1, 256).clamp(min=0), torch.tensor([98, 99, 100])]).to(torch.uint8)
    return Trie.of(parents, labels)


def test_the_longest_string_is_found(python):
    text = torch.tensor(list(b"aababcabcdabce"), dtype=torch.uint8)
    expected = [98, 257, 258, 259, 258, 102]
    assert match_strings(text, trie()).tolist() == expected
    assert python(match_strings, text, trie()).tolist() == expected
    assert match_strings(text[:0], trie()).tolist() == python(match_strings, text[:0], trie()).tolist() == []


def test_what_is_no_trie_is_refused():
    parents, labels = torch.zeros(257, dtype=torch.long), torch.arange(-1, 256).clamp(min=0).to(torch.uint8)
    Trie.of(parents, labels)
    with pytest.raises(ValueError, match="at least 257 nodes"):
        Trie.of(parents[:200], labels[:200])
    with pytest.raises(ValueError, match="every parent before"):
        Trie.of(torch.cat([parents, torch.tensor([300])]), torch.cat([labels, labels[:1]]))
    with pytest.raises(ValueError, match="no node the same byte twice"):
        Trie.of(torch.cat([parents, torch.tensor([0])]), torch.cat([labels, labels[5:6]]))
