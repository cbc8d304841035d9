"""Splitters: where the words of a text end, on bytes.

A splitter takes any bytes and loses none: its words, one after the other, are the input. It is prefix-stable: for bytes
`a` and `b`, all words of `a` but the last one are words of `a + b`, so a text may be split while it is written.

- `space`: a word ends after an ASCII character that is neither letter nor digit, unless it comes first in the text or after
  another one. Words of other alphabets stay whole; text without spaces (Chinese, Japanese, Thai) is left to `max_bytes`.
- `spacebyte`: the rule of SpaceByte (https://arxiv.org/abs/2404.14408), whose global blocks run at the last byte of each word.
  As `space`, where the first byte of every character beyond ASCII counts like those ASCII characters, so that words end within
  such characters.
- `unicode_word`: Unicode's words, with the space before and the punctuation after them; see `word_rule`.
- `entropy`: a word ends where a byte-level model is unsure what comes next. It needs weights, so it is had by
  `tokenzoo.load("blt_entropy")`, which splits as the others do; see `blt`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokenzoo.kernels.split_words import split_bytes, split_characters
from tokenzoo.tokenizers import ConfigError
from tokenzoo.tokenizers.text.word_rule import automaton

Ends = npt.NDArray[np.int64]


class Splitter(Protocol):
    """Splits bytes into words."""

    def split(self, data: bytes) -> Ends:
        """Where each word ends: int64 `[W]`, rising, the last one `len(data)`; no words for no bytes.

        Word `w` is `data[ends[w - 1] : ends[w]]`, the first one `data[: ends[0]]`.
        """


@dataclass(frozen=True)
class RuleSplitter:
    """A splitter by one of the rules above.

    Attributes:
        name: Of the rule.
        max_bytes: Longer words are cut, between characters where a word may have 4 bytes; `None` for no limit.
    """

    name: str
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _RULES:
            hint = ": it has weights, load blt_entropy" if self.name == "entropy" else ""
            raise ConfigError(f"expected a splitter out of {', '.join(_RULES)}, got {self.name!r}{hint}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"expected max_bytes of at least 1, or None for no limit, got {self.max_bytes}")

    def split(self, data: bytes) -> Ends:
        """Where each word ends; see `Splitter.split`."""
        return _RULES[self.name](data, self.max_bytes or 0)


def splitter(name: str, *, max_bytes: int | None = None) -> RuleSplitter:
    """The splitter of this name.

    Args:
        name: `"space"`, `"spacebyte"` or `"unicode_word"`.
        max_bytes: The longest word.

    Raises:
        ConfigError: If there is no splitter of this name, or no word could be so short.
    """
    return RuleSplitter(name, max_bytes)


def words_of(data: bytes, ends: Ends) -> list[bytes]:
    """The words themselves; `b"".join` of them is `data`."""
    return [data[start:end] for start, end in itertools.pairwise([0, *ends.tolist()])]


def _marked(*, leads: bool) -> npt.NDArray[np.uint8]:
    """Bytes that separate words: ASCII that is neither letter nor digit and, if wanted, the first byte of longer characters."""
    return np.array([not chr(b).isalnum() if b < 0x80 else leads and b >= 0xC0 for b in range(256)], np.uint8)


_SPACE, _SPACEBYTE = _marked(leads=False), _marked(leads=True)
_RULES: dict[str, Callable[[bytes, int], Ends]] = {
    "space": lambda data, most: split_bytes(data, _SPACE, most=most),
    "spacebyte": lambda data, most: split_bytes(data, _SPACEBYTE, most=most),
    "unicode_word": lambda data, most: split_characters(data, automaton(), most=most),
}
