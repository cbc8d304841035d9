import itertools
import math
import random

import pytest

from tokenzoo.tokenizers.text import _pieces
from tokenzoo.tokenizers.text._pieces import Pieces, equal_parts, fit


def cheapest(word, first, later, most):
    """By trying all cuts: the fewest pieces, and among those the least ranks."""
    found = []
    for count in range(1, most + 1):
        for inner in itertools.combinations(range(1, len(word)), count - 1):
            parts = [word[a:b] for a, b in itertools.pairwise([0, *inner, len(word)])]
            if parts[0] in first and all(part in later for part in parts[1:]):
                ranks = [first.index(parts[0]), *map(later.index, parts[1:])]
                found.append((count, sum(math.log(rank + 2) for rank in ranks), parts))
    return min(found)[2] if found else None


def test_shares_are_the_fewest_pieces():
    source = random.Random(0)
    pieces = ["".join(source.choices("abc", k=source.randint(1, 3))).encode() for _ in range(40)]
    first, later = list(dict.fromkeys(pieces[:20])), list(dict.fromkeys(pieces[20:]))
    words = ["".join(source.choices("abc", k=source.randint(1, 9))).encode() for _ in range(300)]
    for most in (1, 3):
        found = Pieces(first, later, most).shares(words)
        expected = [cheapest(word, first, later, most) for word in words]
        assert found == expected
        assert 0 < sum(shares is None for shares in found) < len(found)


def test_no_pieces_and_no_words():
    assert Pieces([], [], 3).shares([b"a"]) == [None]
    assert Pieces([b"a"], [], 3).shares([b"a", b"aa"]) == [[b"a"], None]
    assert Pieces([b"a"], [b"a"], 3).shares([]) == []


@pytest.mark.parametrize("length", range(1, 9))
def test_equal_parts_are_about_equal(length):
    word = bytes(range(length))
    parts = equal_parts(word, 3)
    assert b"".join(parts) == word
    assert len(parts) == min(3, length)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_frequent_becomes_a_piece():
    stems, endings = (b" look", b" walk", b" jump"), (b"", b"ing", b"ed", b"s")
    words = {stem + ending: 10.0 for stem in stems for ending in endings}
    found = fit(words, (4, 64), 2)
    assert set(found.first) == {b" ", *stems}
    assert {b"ing", b"ed", *(bytes([value]) for value in b"lokwajumpingeds")} <= set(found.later)
    assert len(found.later) <= 64
    assert found.shares([b" looking", b" jumped", b" walk"]) == [[b" look", b"ing"], [b" jump", b"ed"], [b" walk"]]


def test_of_many_words_some_stand_for_the_rest(monkeypatch):
    monkeypatch.setattr(_pieces, "_SAMPLE", 10)
    weights = {bytes([at]): float(at) for at in range(1, 101)}
    words, counts = _pieces._sample(weights)
    assert len(words) == 10
    assert [bytes([at]) for at in range(100, 95, -1)] == words[:5]
    assert counts[:5].tolist() == [100, 99, 98, 97, 96]
    assert counts[5:].tolist() == pytest.approx([19 * weights[word] for word in words[5:]])
    assert fit(weights, (200, 200), 2).shares([words[0]]) == [[words[0]]]
