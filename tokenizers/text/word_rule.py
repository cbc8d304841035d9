"""The rule `unicode_word` as an automaton over classes of characters.

Words as the byte encoder of HAT (https://arxiv.org/abs/2501.10322) has them:

1. Pieces are Unicode's default words (UAX #29), cut again after each punctuation character (general category P) and between a
   lower-case and an upper-case letter.
2. A piece is named by its first character: punctuation, whitespace or a word; a single U+0020 is a space.
3. Pieces join from left to right: a word joins a space; punctuation joins a space, a word or punctuation.

Three things differ from the published rule, which is not prefix-stable there or not defined: U+2044 (the fraction slash) joins
no numbers; whitespace that carries a combining mark is whitespace; and bytes that are not UTF-8 make words by themselves,
each run of them one. A character that the data ends within belongs to the last word.

UAX #29 looks ahead at one character in its rules 6, 7b and 12, for punctuation between letters or digits. It need not here:
that punctuation ends a piece and joins the piece before it in any case.
"""

import functools
import zlib
from base64 import b85decode
from typing import NamedTuple

import numpy as np

from tokenzoo.kernels.split_words import PAGE, Automaton
from tokenzoo.tokenizers.text._word_classes import CLASSES, TABLE

_BREAKS = frozenset(["CR", "LF", "Newline", "Broken"])
_MARKS = frozenset(["Extend", "Format", "ZWJ"])
_LETTERS = frozenset(["ALetter", "Hebrew_Letter"])
_BETWEEN_LETTERS = frozenset(["MidLetter", "MidNumLet", "Single_Quote"])
_BETWEEN_DIGITS = frozenset(["MidNum", "MidNumLet", "Single_Quote"])
_SEPARATORS = _BETWEEN_LETTERS | _BETWEEN_DIGITS | {"Double_Quote"}
_CONNECTED = _LETTERS | {"Numeric", "Katakana"}


class Kind(NamedTuple):
    """What the rule knows of a character: its word-break property (UAX #29), and what else it is."""

    breaks: str
    pictograph: bool = False
    punctuation: bool = False
    lower: bool = False
    upper: bool = False
    whitespace: bool = False
    space: bool = False


class State(NamedTuple):
    """What the rule remembers of the characters before.

    Attributes:
        last: Word-break property of the last character.
        base: Word-break property of the last character that is not a mark; before the first character, none.
        before: Word-break property of the one before `base`, where `base` may stand between letters or digits.
        flag: Whether `base` is the first half of a flag.
        punctuation: Whether the last character is punctuation, which ends its piece.
        lower: Whether the last character is a lower-case letter.
        piece: Name of the last piece.
    """

    last: str = "Newline"
    base: str = ""
    before: str = ""
    flag: bool = False
    punctuation: bool = False
    lower: bool = False
    piece: str = ""


@functools.cache
def automaton() -> Automaton:
    """The rule, worked out for every state that a text can lead to."""
    kinds = [_kind(properties.split()) for properties in CLASSES] + [Kind("Broken")]
    states, numbers, rows = [State()], {State(): 0}, []
    for state in states:
        steps = [_step(state, kind) for kind in kinds]
        for after, _ in steps:
            if after not in numbers:
                numbers[after] = len(states)
                states.append(after)
        rows.append([2 * numbers[after] + begins for after, begins in steps])
    table = zlib.decompress(b85decode(TABLE))
    found: dict[bytes, int] = {}
    pages = [found.setdefault(table[at : at + PAGE], len(found)) for at in range(0, len(table), PAGE)]
    classes = np.frombuffer(b"".join(found), np.uint8).reshape(-1, PAGE)
    return Automaton(np.array(pages), classes, np.array(rows), broken=len(CLASSES))


def _kind(properties: list[str]) -> Kind:
    breaks = next((name.removeprefix("WB=") for name in properties if name.startswith("WB=")), "")
    names = ("Extended_Pictographic", "P", "Ll", "Lu", "White_Space", "U+0020")
    return Kind("" if breaks == "MidNum" and "P" not in properties else breaks, *(name in properties for name in names))


def _step(state: State, kind: Kind) -> tuple[State, bool]:
    """The state after one more character, and whether a word begins with it."""
    if _same_piece(state, kind):
        piece, begins = "whitespace" if state.piece == "space" else state.piece, False
    else:
        piece = _name(kind)
        joins = {"word": ("space",), "punctuation": ("space", "word", "punctuation")}.get(piece, ())
        begins = state.piece not in joins
    if kind.breaks in _MARKS and state.last not in _BREAKS:
        base, before, flag = state.base, state.before, state.flag
    else:
        base = "" if kind.breaks in _MARKS | _BREAKS else kind.breaks
        before = state.base if base in _SEPARATORS and state.base in _LETTERS | {"Numeric"} else ""
        flag = base == "Regional_Indicator" and not state.flag
    last = kind.breaks if kind.breaks in _BREAKS | {"ZWJ", "WSegSpace"} else ""
    return State(last, base, before, flag, kind.punctuation, kind.lower, piece), begins


def _name(kind: Kind) -> str:
    if kind.breaks == "Broken":
        return "broken"
    if kind.punctuation:
        return "punctuation"
    if kind.space:
        return "space"
    return "whitespace" if kind.whitespace else "word"


def _same_piece(state: State, kind: Kind) -> bool:
    """Whether a character continues the piece of the one before it; the rules of UAX #29 are named by their numbers."""
    last, here = state.last, kind.breaks
    if state.punctuation or (state.lower and kind.upper):
        return False
    if (last, here) in (("CR", "LF"), ("Broken", "Broken")):  # 3
        return True
    if last in _BREAKS or here in _BREAKS:  # 3a, 3b
        return False
    if (last == "ZWJ" and kind.pictograph) or last == here == "WSegSpace" or here in _MARKS:  # 3c, 3d, 4
        return True
    return _word_goes_on(state, here)


def _word_goes_on(state: State, here: str) -> bool:
    base, before = state.base, state.before
    if base in _LETTERS or base == "Numeric":
        return here in _LETTERS or here in ("Numeric", "ExtendNumLet")  # 5, 8, 9, 10, 13a
    if base == "Katakana":
        return here in ("Katakana", "ExtendNumLet")  # 13, 13a
    if base == "ExtendNumLet":
        return here in _CONNECTED or here == "ExtendNumLet"  # 13a, 13b
    if base == "Double_Quote":
        return before == here == "Hebrew_Letter"  # 7c
    if base == "Regional_Indicator":
        return here == base and state.flag  # 15, 16
    letters = base in _BETWEEN_LETTERS and before in _LETTERS and here in _LETTERS  # 7
    return letters or (base in _BETWEEN_DIGITS and before == here == "Numeric")  # 11
