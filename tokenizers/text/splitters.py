"""Splitters: where the words of a text end, on bytes.

A splitter takes any bytes and loses none: its words, one after the other, are the input. It is prefix-stable: for bytes
`a` and `b`, all words of `a` but the last one are words of `a + b`, so a text may be split while it is written.
"""

import itertools
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ends = npt.NDArray[np.int64]


class Splitter(Protocol):
    """Splits bytes into words.

    Attributes:
        name: What `splitter` knows it by.
    """

    name: str

    def split(self, data: bytes) -> Ends:
        """Where each word ends: int64 `[W]`, rising, the last one `len(data)`; no words for no bytes.

        Word `w` is `data[ends[w - 1] : ends[w]]`, the first one `data[: ends[0]]`.
        """


def words_of(data: bytes, ends: Ends) -> list[bytes]:
    """The words themselves; `b"".join` of them is `data`."""
    return [data[start:end] for start, end in itertools.pairwise([0, *ends.tolist()])]
