"""Where words end in bytes, in one pass: by a table of bytes, or by an automaton over classes of characters.

The rules themselves are the caller's. A compiled kernel answers where there is one, and Python otherwise, with equal results.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenzoo.kernels import _native

PAGE = 128
Bytes = npt.NDArray[np.uint8]
Ends = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Automaton:
    """A rule that reads a text character by character.

    Attributes:
        pages: For each 128 code points the row of `classes` that has them, `[8704]`.
        classes: Classes of code points, `[P, 128]`.
        entries: Per state and class, twice the next state, plus one where a word begins with this character, `[S, C]`; a
            text starts in state 0.
        broken: The class of a byte that belongs to no character.
    """

    pages: npt.NDArray[np.integer]
    classes: npt.NDArray[np.integer]
    entries: npt.NDArray[np.integer]
    broken: int

    def __post_init__(self) -> None:
        states, classes = self.entries.shape
        if self.pages.shape != (0x110000 // PAGE,) or self.classes.shape[1:] != (PAGE,):
            raise ValueError(f"expected pages (8704,) and classes (P, 128), got {self.pages.shape}, {self.classes.shape}")
        if int(self.pages.max()) >= min(256, len(self.classes)) or max(int(self.classes.max()), self.broken) >= classes:
            raise ValueError("expected pages, classes and broken to be rows and columns of their tables")
        if int(self.entries.max()) >= 2 * states or states > 1 << 15:
            raise ValueError(f"expected entries to lead to one of {states} states, at most 32,768")

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pages, classes and entries as the kernel takes them."""
        tables = (self.pages.astype(np.uint8), self.classes.astype(np.uint8), self.entries.astype(np.uint16))
        pages, classes, entries = (torch.from_numpy(np.ascontiguousarray(table)) for table in tables)
        return pages, classes, entries


def split_bytes(data: bytes, marked: Bytes, *, most: int = 0) -> Ends:
    """Ends of words where a word ends after a marked byte that comes neither first nor after another, and with the data.

    Args:
        data: Any bytes.
        marked: For each of the 256 bytes 1 if it is marked, otherwise 0.
        most: Longer words are cut: see `cut`. 0 for no limit.

    Returns:
        int64 `(W,)`, rising; none for no bytes.
    """
    native = _native.library()
    if native is not None:
        return native.split_bytes(_tensor(data), torch.from_numpy(marked), most).numpy()
    here = marked[np.frombuffer(data, np.uint8)] != 0
    ends = np.flatnonzero(here & ~np.concatenate([[True], here[:-1]])) + 1 if data else np.zeros(0, np.int64)
    return _limited(data, _closed(ends, len(data)), most)


def split_characters(data: bytes, automaton: Automaton, *, most: int = 0) -> Ends:
    """Ends of words by an automaton over UTF-8. A character that the data ends within stays with the word before it.

    Args:
        data: Any bytes, UTF-8 or not.
        automaton: The rule.
        most: Longer words are cut: see `cut`. 0 for no limit.

    Returns:
        int64 `(W,)`, rising; none for no bytes.
    """
    native = _native.library()
    if native is not None:
        return native.split_characters(_tensor(data), *automaton.tensors, automaton.broken, most).numpy()
    ends, state = [], 0
    entries = automaton.entries.tolist()
    for at, kind in _classes(data, automaton):
        entry = entries[state][kind]
        if entry & 1 and at:
            ends.append(at)
        state = entry >> 1
    return _limited(data, _closed(np.array(ends, np.int64), len(data)), most)


def cut(data: bytes, start: int, most: int) -> int:
    """Where a word that begins at `start` and has more than `most` bytes is cut.

    That is after `most` bytes, or up to three bytes earlier if a character begins there and none begins later.
    """
    for at in range(start + most, max(start, start + most - 4), -1):
        if data[at] & 0xC0 != 0x80:
            return at
    return start + most


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _closed(ends: Ends, count: int) -> Ends:
    """Ends with that of the data, if it is not among them."""
    return ends if not count or (ends.size and ends[-1] == count) else np.append(ends, np.int64(count))


def _limited(data: bytes, ends: Ends, most: int) -> Ends:
    if not most or not ends.size or int(np.diff(ends, prepend=0).max()) <= most:
        return ends
    limited, start = [], 0
    for end in ends.tolist():
        while end - start > most:
            start = cut(data, start, most)
            limited.append(start)
        limited.append(end)
        start = end
    return np.array(limited, np.int64)


def _classes(data: bytes, automaton: Automaton) -> Iterator[tuple[int, int]]:
    """Where each character begins, and its class; each byte of no character counts as one."""
    whole = np.frombuffer(data, np.uint8)[: len(data) - _unfinished(data)]
    d = np.concatenate([whole, np.zeros(3, np.uint8)]).astype(np.int64)
    lead, second, third, fourth = d[:-3], d[1:-2], d[2:-1], d[3:]
    low = np.where(lead == 0xE0, 0xA0, np.where(lead == 0xF0, 0x90, 0x80))
    high = np.where(lead == 0xED, 0x9F, np.where(lead == 0xF4, 0x8F, 0xBF))
    two = (low <= second) & (second <= high)
    three, four = two & (third & 0xC0 == 0x80), two & (third & 0xC0 == 0x80) & (fourth & 0xC0 == 0x80)
    length = np.select(
        [lead < 0x80, lead < 0xC2, lead < 0xE0, lead < 0xF0, lead < 0xF5],
        [1, 0, 2 * two, 3 * three, 4 * four],
        0,
    )
    code = np.select(
        [length == 1, length == 2, length == 3, length == 4],
        [
            lead,
            (lead & 0x1F) << 6 | second & 0x3F,
            (lead & 0x0F) << 12 | (second & 0x3F) << 6 | third & 0x3F,
            (lead & 0x07) << 18 | (second & 0x3F) << 12 | (third & 0x3F) << 6 | fourth & 0x3F,
        ],
        0,
    )
    kinds = automaton.classes[automaton.pages[code // PAGE], code % PAGE]
    kinds = np.where(length == 0, automaton.broken, kinds)
    begins = np.ones(len(lead), bool)
    for back in (1, 2, 3):
        inside = np.flatnonzero(length > back) + back
        begins[inside] = False
    at = np.flatnonzero(begins)
    return zip(at.tolist(), kinds[at].tolist(), strict=True)


def _unfinished(data: bytes) -> int:
    """Bytes at the end that begin a character and do not finish it."""
    for count in range(min(3, len(data)), 0, -1):
        try:
            data[-count:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return count
    return 0
