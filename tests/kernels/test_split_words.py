import numpy as np
import pytest

from tokenzoo.kernels import _native
from tokenzoo.kernels.split_words import PAGE, Automaton, cut, split_bytes, split_characters


@pytest.fixture(params=["compiled", "python"])
def backend(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(_native, "library", lambda: None)
    elif _native.library() is None:
        pytest.skip("no compiled kernels here")


def after_spaces(**changes):
    """Words begin after spaces (class 1); broken bytes have class 2 and begin a word each."""
    classes = np.zeros((1, PAGE), np.uint8)
    classes[0, ord(" ")] = 1
    values = {
        "pages": np.zeros(0x110000 // PAGE, np.uint8),
        "classes": classes,
        "entries": np.array([[0, 2, 1], [1, 2, 1]]),  # state 1: after a space
        "broken": 2,
    }
    return Automaton(**{**values, **changes})


def test_an_automaton_says_where_words_begin(backend):
    assert split_characters(b"ab  cd e", after_spaces()).tolist() == [4, 7, 8]
    assert split_characters(b" a\xff\xfe", after_spaces()).tolist() == [1, 2, 3, 4]
    assert split_characters(b"", after_spaces()).tolist() == []
    assert split_characters(b"abcdefg", after_spaces(), most=3).tolist() == [3, 6, 7]


def test_characters_of_all_lengths_are_one_step(backend):
    every = np.arange(0x110000 // PAGE) % 2
    classes = np.concatenate([np.zeros((1, PAGE), np.uint8), np.ones((1, PAGE), np.uint8)])
    automaton = after_spaces(pages=every, classes=classes, entries=np.array([[0, 1, 0]]))
    points = [0x00, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    data, ends, at = b"", [], 0
    for point in points:
        if point // PAGE % 2 and at:
            ends.append(at)
        data += chr(point).encode()
        at = len(data)
    assert split_characters(data, automaton).tolist() == [*ends, len(data)]


@pytest.mark.parametrize(
    "broken", [b"\xc0\x80", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80", b"\xbf"]
)
def test_what_is_not_well_formed_is_broken_byte_by_byte(backend, broken):
    assert split_characters(b"a" + broken + b"a", after_spaces()).tolist() == [*range(1, len(broken) + 1), len(broken) + 2]


@pytest.mark.parametrize("start", [b"\xc3", b"\xe0\xa0", b"\xed\x9f", b"\xf0\x90", b"\xf0\x90\x80", b"\xf4\x8f\xbf"])
def test_an_unfinished_character_at_the_end_begins_no_word(backend, start):
    assert split_characters(b"a" + start, after_spaces()).tolist() == [1 + len(start)]


def test_marked_bytes_end_words(backend):
    marked = np.zeros(256, np.uint8)
    marked[[ord(","), ord(" ")]] = 1
    assert split_bytes(b"a, b,c", marked).tolist() == [2, 5, 6]
    assert split_bytes(b",,a,", marked).tolist() == [4]
    assert split_bytes(b",", marked).tolist() == [1]
    assert split_bytes(b"abcde,", marked, most=2).tolist() == [2, 4, 6]
    long = b"ab," * 10_000
    assert split_bytes(long, marked).tolist() == list(range(3, len(long) + 1, 3))


def test_cuts_fall_before_a_character_that_begins_within_reach():
    assert cut("aé".encode() + b"xx", 0, 2) == 1
    assert cut(b"\x80" * 9, 0, 4) == 4
    assert cut("\U00010330\U00010330".encode(), 0, 7) == 4
    assert cut(b"a\x80\x80\x80\x80", 0, 1) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"pages": np.zeros(3, np.uint8)},
        {"pages": np.ones(0x110000 // PAGE, np.uint8)},
        {"classes": np.full((1, PAGE), 3, np.uint8)},
        {"classes": np.zeros((1, 7), np.uint8)},
        {"entries": np.array([[0, 4, 0], [0, 0, 0]])},
        {"broken": 3},
    ],
)
def test_tables_that_lead_nowhere_are_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        after_spaces(**changes)
