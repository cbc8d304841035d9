"""Text to the strings of a trie, and to equal-information windows of an arithmetic code (https://arxiv.org/abs/2404.03626).

A window is an interval of `2**bits - 1` points. Each byte narrows it in eight binary decisions, most significant bit first, the
zeros' part before the ones'; the likelier branch gets what rounding leaves over, and in a window's first byte every one of
the 256 values keeps a point, so that any text can be written. A string's code is the first point of its interval, and a window
takes in bytes for as long as there is one.

With the Delay rule that point is the string's own: longer strings share the points behind it, so that every code stands for
one string, and code 0 for the empty one. With the greedy rule, as published, longer strings share all of it, as intervals of
real numbers (in 65,536ths of a point); several then have the same code, which is read as the longest of them.

Everything is computed in integers, by C++ where it is at hand and by Python otherwise, with the same results.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenzoo.kernels import _native

TOKEN_BITS = 16
MULTIPLIER = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Trie:
    """Strings as a tree of single bytes; the root is node 0 and has all 256 children.

    Attributes:
        first: int32 `(S + 1,)`, where each node's children start among all children.
        labels: uint8 `(S - 1,)`, the byte that leads to each child; rising within a node.
        children: int32 `(S - 1,)`, the child's node.
    """

    first: Tensor
    labels: Tensor
    children: Tensor

    @classmethod
    def of(cls, parents: Tensor, labels: Tensor) -> "Trie":
        """The trie whose node n has parent `parents[n]` (int64 `(S,)`) and was reached by `labels[n]` (uint8 `(S,)`).

        Raises:
            ValueError: If a parent does not come before its child, a label occurs twice, or the root lacks one.
        """
        size = len(parents)
        if size < 257 or bool((parents[1:] >= torch.arange(1, size)).any()) or bool((parents < 0).any()):
            raise ValueError("expected a trie of at least 257 nodes, every parent before its children")
        keys = parents[1:] * 256 + labels[1:].long()
        order = keys.argsort()
        if bool((keys[order].diff() < 1).any()) or not torch.equal(keys[order][:256], torch.arange(256)):
            raise ValueError("expected the trie's root to have all 256 bytes as children, and no node the same byte twice")
        first = torch.searchsorted(keys[order], torch.arange(size + 1) * 256)
        return cls(first.int(), labels[1:][order].contiguous(), (order + 1).int())


@dataclass(frozen=True)
class WindowCode:
    """How text becomes windows.

    Attributes:
        corrections: int8 `(256 + 65536 + (orders - 2) * 2**hashed_bits,)`, of log-odds in sixteenths: the tables of all
            orders, one behind the other. Order 0 is looked up by the bits of the byte so far behind a leading 1, order 1 by
            the byte before and those, higher ones by a hash of the last bytes and those.
        checks: uint8 `((orders - 2) * 2**hashed_bits,)`; a hashed place counts only for contexts with the same check.
        odds: int32 `(2 * limit + 1,)`, the probability of a one in 1/65536 for every sum of corrections, held to `limit`.
        orders: Number of tables; order k is looked up where at least k bytes of the window are known.
        hashed_bits: 17 to 56.
        bits: Of a window: 16, 32, 64 or 128.
        greedy: Use the greedy rule, for windows of up to 64 bits.
    """

    corrections: Tensor
    checks: Tensor
    odds: Tensor
    orders: int
    hashed_bits: int
    bits: int
    greedy: bool = False

    def encode(self, text: Tensor) -> Tensor:
        """Ids int64 `(W * bits / 16,)` of bytes, uint8 `(N,)`; a window's highest 16 bits come first."""
        library = _native.library()
        if library is not None:
            return library.encode_windows(text, *self._arguments)
        return torch.tensor(list(self._encoded(text.numpy().tobytes())), dtype=torch.long)

    def decode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What ids int64 `(W * bits / 16,)` in [0, 65536) stand for.

        Returns:
            Bytes uint8 `(N,)`, and how many of them are each window's, int64 `(W,)`: 0 for a code that no string has.
        """
        library = _native.library()
        if library is not None:
            return library.decode_windows(ids, *self._arguments)
        strings = [self._decoded(code) for code in self._codes(ids.tolist())]
        text = np.frombuffer(b"".join(strings), np.uint8).copy()
        return torch.from_numpy(text), torch.tensor([len(string) for string in strings], dtype=torch.long)

    @property
    def _arguments(self) -> tuple[Tensor, Tensor, Tensor, int, int, int, bool]:
        return self.corrections, self.checks, self.odds, self.orders, self.hashed_bits, self.bits, self.greedy

    def _encoded(self, text: bytes) -> Iterator[int]:
        model, at = _Model(self), 0
        while at < len(text):
            window, code = _Window(self.bits, self.greedy), 0
            while at < len(text) and window.size:
                node = 1
                for depth in range(8):
                    bit = text[at] >> (7 - depth) & 1
                    window.take(bit, window.ones(model.one(window.text, node), depth))
                    node = node << 1 | bit
                if not window.open:
                    break
                code = window.code
                window.finish(text[at])
                at += 1
            yield from (code >> shift & 65535 for shift in range(self.bits - TOKEN_BITS, -1, -TOKEN_BITS))

    def _codes(self, ids: list[int]) -> Iterator[int]:
        width = self.bits // TOKEN_BITS
        for at in range(0, len(ids) - width + 1, width):
            code = 0
            for token in ids[at : at + width]:
                code = code << TOKEN_BITS | token
            yield code

    def _decoded(self, code: int) -> bytes:
        model, window, length = _Model(self), _Window(self.bits, self.greedy), 0
        point = code << window.parts
        while 0 <= point - window.low < window.size:
            node = 1
            for depth in range(8):
                ones = window.ones(model.one(window.text, node), depth)
                bit = int(point - window.low >= window.size - ones)
                window.take(bit, ones)
                node = node << 1 | bit
            if not window.open:
                break
            if window.code == code:
                length = len(window.text) + 1
            window.finish(node & 255)
        return bytes(window.text[:length])


class _Window:
    """An interval, in whole points or in parts of them, and the string that it belongs to."""

    def __init__(self, bits: int, greedy: bool) -> None:
        self.parts = TOKEN_BITS if greedy else 0
        self.greedy = greedy
        self.low, self.size = (0, 1 << bits + self.parts) if greedy else (1, (1 << bits) - 1)
        self.text = bytearray()

    def ones(self, one: int, depth: int) -> int:
        """What the branch of ones gets, where a one has this probability in 1/65536."""
        share = self.size * min(one, 65536 - one) >> 16
        share = self.size - share if one > 32768 else share
        if self.text:
            return share
        least = 1 << (7 - depth + (self.parts + 1 if self.greedy else 0))
        return min(max(share, least), self.size - least)

    def take(self, bit: int, ones: int) -> None:
        """Goes on with the branch of zeros or ones."""
        self.low, self.size = (self.low + self.size - ones, ones) if bit else (self.low, self.size - ones)

    @property
    def code(self) -> int:
        """The first whole point."""
        return -(-self.low >> self.parts)

    @property
    def open(self) -> bool:
        """Whether there is a whole point."""
        return self.low + self.size >> self.parts > self.code

    def finish(self, byte: int) -> None:
        """The string is complete: with the Delay rule its first point is its own."""
        self.text.append(byte)
        if not self.greedy:
            self.low, self.size = self.low + 1, self.size - 1


class _Model:
    """The probabilities of a `WindowCode`, in plain Python."""

    def __init__(self, code: WindowCode) -> None:
        self.corrections, self.checks, self.odds = code.corrections.numpy(), code.checks.numpy(), code.odds.numpy()
        self.orders, self.hashed_bits, self.limit = code.orders, code.hashed_bits, len(code.odds) // 2

    def one(self, text: bytearray, node: int) -> int:
        """Probability of a one, in 1/65536, behind these bytes of the window and these bits of the next."""
        total, last = int(self.corrections[node]), int.from_bytes(text[-7:], "big")
        if self.orders > 1 and text:
            total += int(self.corrections[256 + ((last & 255) << 8 | node)])
        for order in range(2, min(self.orders - 1, len(text)) + 1):
            spread = ((last & (1 << 8 * order) - 1) << 8 | node) * MULTIPLIER & _WORD
            place = (order - 2 << self.hashed_bits) + (spread >> 64 - self.hashed_bits)
            if self.checks[place] == spread >> 56 - self.hashed_bits & 255:
                total += int(self.corrections[256 + 65536 + place])
        return int(self.odds[min(max(total, -self.limit), self.limit) + self.limit])


def match_strings(text: Tensor, trie: Trie) -> Tensor:
    """The longest string of a trie at each place of a text, one behind the other.

    Args:
        text: Bytes, uint8 `(N,)`.
        trie: The strings.

    Returns:
        Their nodes, int64 `(W,)`; the strings make up the text.
    """
    library = _native.library()
    if library is not None:
        return library.match_strings(text, trie.first, trie.labels, trie.children)
    parents = np.repeat(np.arange(len(trie.first) - 1), np.diff(trie.first.numpy()))
    keys = (parents << 8 | trie.labels.numpy()).tolist()
    edges = dict(zip(keys, trie.children.tolist(), strict=True))
    return torch.tensor(list(_matched(text.numpy().tobytes(), edges)), dtype=torch.long)


def _matched(text: bytes, edges: dict[int, int]) -> Iterator[int]:
    node = 0
    for byte in text:
        longer = edges.get(node << 8 | byte)
        if longer is None:
            yield node
            longer = edges[byte]
        node = longer
    if node:
        yield node
