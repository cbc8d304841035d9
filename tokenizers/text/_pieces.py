"""Pieces: runs of bytes that occur so often in words that one vector of `word_pool` can stand for each.

There are pieces that begin words, and pieces that follow, both ordered, the most used first. A word's shares are the fewest
pieces that make it up, at most k, and among those the likeliest, with a piece as likely as Zipf's law says of its rank.

Shapes: W words, N bytes, P pieces.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PRIME = 0x9E3779B97F4A7C15
_EACH = 10.0  # what a share costs besides the logarithm of its rank, so that few shares are cheaper than many
_CHUNK = 10_000  # words that are cut at a time
_WIDTHS = (4, 6, 8, 10, 12, 14)
_CANDIDATES = 16  # times the size of a table
_ROUNDS = (8.0, 4.0, 2.0, 1.3, 1.0, 1.0)  # sizes of the table after each round, as multiples of what it ends with
_SAMPLE = 200_000  # words that a table is fitted to

Hashes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Substrings:
    """Words as rows of bytes, and a hash of each run of their bytes."""

    rows: npt.NDArray[np.uint8]
    lengths: Indices
    prefixes: Hashes
    powers: Hashes

    @classmethod
    def of(cls, words: Sequence[bytes]) -> "Substrings":
        """Of words of at least one byte."""
        width = max(map(len, words), default=1)
        rows = np.frombuffer(b"".join(word.ljust(width, b"\0") for word in words), np.uint8).reshape(-1, width)
        prefixes = np.zeros((len(rows), width + 1), np.uint64)
        for at in range(width):  # arrays wrap around silently
            prefixes[:, at + 1] = prefixes[:, at] * np.uint64(_PRIME) + rows[:, at] + np.uint64(1)
        powers = np.array([pow(_PRIME, n, 1 << 64) for n in range(width + 1)], np.uint64)
        return cls(rows, np.fromiter(map(len, words), np.int64, len(words)), prefixes, powers)

    def hashes(self, words: Indices, start: int, end: int) -> Hashes:
        """Of the bytes from `start` to `end` of some words."""
        found: Hashes = self.prefixes[words, end] - self.prefixes[words, start] * self.powers[end - start]
        return found

    def reaching(self, end: int) -> Indices:
        """Words of at least so many bytes."""
        return np.flatnonzero(self.lengths >= end)


class Table:
    """One part of the pieces, by hash."""

    def __init__(self, hashes: Hashes) -> None:
        order = np.argsort(hashes)
        self.hashes, self.ranks = hashes[order], order

    def find(self, hashes: Hashes) -> Indices:
        """Ranks of pieces with these hashes; -1 where there is none."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        at = np.searchsorted(self.hashes, hashes)
        at[at == len(self.hashes)] = 0
        return np.where(self.hashes[at] == hashes, self.ranks[at], -1)


@dataclass(frozen=True)
class Cut:
    """How words are cut.

    Attributes:
        ends: Where each share ends, `[W, k]`; the word's length from its last share on.
        ranks: Of each share, among the pieces of its kind, `[W, k]`; -1 behind the last.
        covered: Which words have a cut at all, `[W]`.
    """

    ends: Indices
    ranks: Indices
    covered: npt.NDArray[np.bool_]


class Pieces:
    """Cuts words into shares.

    Args:
        first: Pieces that begin words, the most used first.
        later: Pieces that follow others.
        most: Shares of a word, at most.
    """

    def __init__(self, first: Sequence[bytes], later: Sequence[bytes], most: int) -> None:
        self.first, self.later, self.most = first, later, most
        self._tables = [Table(_hashes(first)), Table(_hashes(later))]

    def shares(self, words: Sequence[bytes]) -> list[list[bytes] | None]:
        """The cheapest pieces that make up each word; `None` where no `most` of them do."""
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        order = np.argsort(lengths, kind="stable")  # what is short is cut in narrow rows
        found: list[list[bytes] | None] = [None] * len(words)
        for chosen in np.split(order, np.searchsorted(lengths[order], _WIDTHS, side="right")):
            for at in range(0, len(chosen), _CHUNK):
                part = chosen[at : at + _CHUNK].tolist()
                cuts = cut(Substrings.of([words[i] for i in part]), self._tables, self.most)
                for i, ends, covered in zip(part, cuts.ends.tolist(), cuts.covered.tolist(), strict=True):
                    if covered:
                        found[i] = _cut_at(words[i], ends)
        return found


def cut(words: Substrings, tables: Sequence[Table], most: int) -> Cut:
    """The cheapest cut of each word into at most `most` pieces, of which the first is from the first table."""
    count, width = words.rows.shape
    ranks, costs = _ranks(words, tables)
    best = np.full((most + 1, count, width + 1), np.inf, np.float32)
    best[0, :, 0] = 0
    starts = np.zeros((most, count, width + 1), np.int64)
    for share in range(most):
        for end in range(share + 1, width + 1):
            from_, to = (0, 1) if share == 0 else (share, end)
            options = best[share, :, from_:to] + costs[:, from_:to, end]
            starts[share, :, end] = options.argmin(1) + from_
            best[share + 1, :, end] = options.min(1)
    every = np.arange(count)
    totals = best[1:, every, words.lengths]
    shares = totals.argmin(0)
    ends, chosen = np.tile(words.lengths[:, None], (1, most)), np.full((count, most), -1)
    at = words.lengths.copy()
    for share in range(most - 1, -1, -1):
        mine = np.flatnonzero(shares >= share)
        start = starts[share, mine, at[mine]]
        ends[mine, share], chosen[mine, share] = at[mine], ranks[mine, start, at[mine]]
        at[mine] = start
    return Cut(ends, chosen, np.isfinite(totals.min(0)))


def _ranks(words: Substrings, tables: Sequence[Table]) -> tuple[Indices, npt.NDArray[np.float32]]:
    """Of each run of bytes, its rank in the table of its place and its cost, `[W, N, N + 1]`; -1 and infinity without one."""
    count, width = words.rows.shape
    ranks = np.full((count, width, width + 1), -1)
    for end in range(1, width + 1):
        reaching = words.reaching(end)
        for start in range(end):
            ranks[reaching, start, end] = tables[start > 0].find(words.hashes(reaching, start, end))
    costs = np.where(ranks >= 0, np.log(ranks.clip(0) + 2.0) + _EACH, np.inf)
    return ranks, costs.astype(np.float32)


def equal_parts(word: bytes, most: int) -> list[bytes]:
    """A word in at most `most` parts of about as many bytes each."""
    count = min(most, len(word))
    return [word[len(word) * i // count : len(word) * (i + 1) // count] for i in range(count)]


def fit(weights: Mapping[bytes, float], sizes: tuple[int, int], most: int) -> Pieces:
    """Pieces that make up as much as can be of words, by their weights.

    All frequent runs of bytes are candidates. Words are cut by them again and again, and each time the pieces that are used
    least are dropped. Single bytes stay.

    Args:
        weights: How much each word counts.
        sizes: Pieces of both parts, at most.
        most: Shares of a word.
    """
    words, counts = _sample(weights)
    tables, sources = [], []
    everything = Substrings.of(words)
    for part, size in enumerate(sizes):
        starts = range(1) if part == 0 else range(1, everything.rows.shape[1])
        hashes, source = _candidates(everything, counts, starts, size * _CANDIDATES)
        tables.append(Table(hashes))
        sources.append(source)
    for multiple in _ROUNDS:
        used = [np.zeros(len(source)) for source in sources]
        for at in range(0, len(words), _CHUNK):
            ranks = cut(Substrings.of(words[at : at + _CHUNK]), tables, most).ranks
            for share, column in enumerate(ranks.T):
                mine = column >= 0
                part = share > 0
                used[part] += np.bincount(column[mine], counts[at : at + _CHUNK][mine], len(used[part]))
        for part, size in enumerate(sizes):
            kept = _kept(used[part], sources[part], round(size * multiple))
            sources[part] = sources[part][kept]
            tables[part] = Table(_hashes(_bytes(words, sources[part])))
    first, later = (_bytes(words, source) for source in sources)
    return Pieces(first, later, most)


def _sample(weights: Mapping[bytes, float]) -> tuple[list[bytes], Floats]:
    """The heaviest words, and some of the others, which stand for all of those."""
    words, counts = list(weights), np.fromiter(weights.values(), np.float64, len(weights))
    if len(words) <= _SAMPLE:
        return words, counts
    order = np.argsort(-counts, kind="stable")
    rest = order[_SAMPLE // 2 :]
    some = np.random.default_rng(0).choice(rest, _SAMPLE - _SAMPLE // 2, replace=False)
    counts[some] *= len(rest) / len(some)
    chosen = np.concatenate([order[: _SAMPLE // 2], some])
    return [words[i] for i in chosen.tolist()], counts[chosen]


def _candidates(words: Substrings, counts: Floats, starts: Iterable[int], most: int) -> tuple[Hashes, Indices]:
    """The runs of bytes that cover most, and where each is found: word, start and length, int64 `[P, 3]`; the best first."""
    hashes, weights, sources = [], [], []
    for start in starts:
        for end in range(start + 1, words.rows.shape[1] + 1):
            mine = words.reaching(end)
            hashes.append(words.hashes(mine, start, end))
            weights.append(counts[mine])
            sources.append(np.stack([mine, np.full_like(mine, start), np.full_like(mine, end - start)], 1).astype(np.int32))
    if not hashes:  # no word has a second byte
        return np.zeros(0, np.uint64), np.zeros((0, 3), np.int64)
    unique, at, index = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    source = np.concatenate(sources)[at].astype(np.int64)
    scores = np.bincount(index, np.concatenate(weights), len(unique)) * (source[:, 2] - 0.5)
    kept = _kept(scores, source, most)
    return unique[kept], source[kept]


def _kept(scores: Floats, source: Indices, most: int) -> Indices:
    """Indices of the `most` with the best scores, best first, single bytes among them whatever their scores."""
    single = source[:, 2] == 1
    order = np.argsort(-np.where(single, np.inf, scores), kind="stable")[:most]
    return order[np.argsort(-scores[order], kind="stable")]


def _bytes(words: Sequence[bytes], source: Indices) -> list[bytes]:
    return [words[word][start : start + length] for word, start, length in source.tolist()]


def _hashes(pieces: Sequence[bytes]) -> Hashes:
    if not pieces:
        return np.zeros(0, np.uint64)
    found = Substrings.of(pieces)
    hashes: Hashes = found.prefixes[np.arange(len(pieces)), found.lengths]
    return hashes


def _cut_at(word: bytes, ends: Sequence[int]) -> list[bytes]:
    shares, start = [], 0
    for end in ends:
        if end > start:
            shares.append(word[start:end])
        start = end
    return shares
