"""The byte model of equal-information windows: counted contexts as integers, the same probabilities on every machine.

A byte is eight binary decisions, most significant bit first. The table of order k has a correction (int8, sixteenths of a
log-odds) for the last k bytes and the bits decided so far; the corrections of all orders up to the bytes that are known add
up, and `odds` makes a probability of the sum. A table corrects what the lower orders say together, so that their sum is a
fitted model by itself: where a window has just begun, and few bytes are known, nothing else is needed.

A slot that saw n1 ones in n decisions, where lower orders say m, says (n1 + s * m) / (n + s): a Dirichlet prior's back-off.
Lower orders say the same at every visit of a slot, so that one pass over the text per order is exact. Only corrections that
save more than they cost are kept; an 8-bit check keeps other contexts from reading them.

Shapes: N bytes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenzoo.kernels.windows import MULTIPLIER, WindowCode

STEPS = 16  # of a log-odds of 1
LIMIT = 160  # of a sum of corrections: probabilities of 4.5e-5 and up
DIRECT = 256 + 65536  # places of orders 0 and 1, which need no hash
_MORE_BITS = 5  # of the tables that are counted in, so that few contexts meet there
_CHUNK = 1 << 21
_COST = 16.0  # bits that a correction takes


def odds_table() -> np.ndarray:
    """Probability of a one, in 1/65536, of `-LIMIT` to `LIMIT` sixteenths of a log-odds: int32 `(2 * LIMIT + 1,)`."""
    steps = np.arange(-LIMIT, LIMIT + 1)
    return np.rint(65536 / (1 + np.exp(-steps / STEPS))).astype(np.int32)


def fit_model(text: np.ndarray, *, hashed_bits: int, strengths: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Counts the tables on a text.

    Args:
        text: uint8 `(N,)`.
        hashed_bits: Tables of order 2 and up have `2**hashed_bits` places.
        strengths: Of each order from 0 on: how many decisions the lower orders' opinion counts for.

    Returns:
        Corrections int8 and checks uint8, as `tokenzoo.kernels.windows.WindowCode` takes them.
    """
    odds = odds_table() / 65536
    sums = np.zeros((8, len(text)), np.int16)
    corrections, checks = [], []
    for order, strength in enumerate(strengths):
        bits = hashed_bits + _MORE_BITS if order > 1 else 8 * (order + 1)
        count, ones, expected = (np.zeros(1 << bits, np.float32) for _ in range(3))
        seen = np.zeros(1 << bits, np.uint8)
        for part, depth, spread in _decisions(text, order):
            place = (spread >> np.uint64(64 - bits)).astype(np.int64) if order > 1 else spread.astype(np.int64)
            chance = odds[np.clip(sums[depth, part], -LIMIT, LIMIT) + LIMIT]
            for table, weights in ((count, None), (ones, text[part] >> (7 - depth) & 1), (expected, chance)):
                table += np.bincount(place, weights, 1 << bits).astype(np.float32)
            if order > 1:
                seen[place] = (spread >> np.uint64(56 - hashed_bits)).astype(np.uint8)
        correction, gain = _corrections(count, ones, expected, strength)
        if order < 2:
            table, check = correction, np.zeros(0, np.uint8)
        else:
            table, check = _kept(correction, gain, seen, _MORE_BITS)
        for part, depth, spread in _decisions(text, order):
            sums[depth, part] += look_up(table, check, spread, hashed_bits)
        corrections.append(table)
        checks.append(check)
    return np.concatenate(corrections), np.concatenate(checks)


def look_up(table: np.ndarray, check: np.ndarray, spread: np.ndarray, hashed_bits: int) -> np.ndarray:
    """Corrections int8 of one order's table at hashes, or places where there are no checks, uint64."""
    if not len(check):
        return table[spread.astype(np.int64)]
    place = (spread >> np.uint64(64 - hashed_bits)).astype(np.int64)
    known = check[place] == (spread >> np.uint64(56 - hashed_bits)).astype(np.uint8)
    return np.where(known, table[place], np.int8(0))


def _decisions(text: np.ndarray, order: int) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Stretches of a text and depths in their bytes, with the hash (or place, of orders 0 and 1) of every decision, uint64."""
    for at in range(order, len(text), _CHUNK):
        part = slice(at, min(at + _CHUNK, len(text)))
        context = np.zeros(part.stop - at, np.uint64)
        for back in range(1, order + 1):
            context |= text[at - back : part.stop - back].astype(np.uint64) << np.uint64(8 * (back - 1))
        whole = text[part].astype(np.uint64) | np.uint64(256)
        for depth in range(8):
            key = context << np.uint64(8) | whole >> np.uint64(8 - depth)
            yield part, depth, key * np.uint64(MULTIPLIER) if order > 1 else key


def _corrections(count: np.ndarray, ones: np.ndarray, expected: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The correction of every slot, int8, and the bits that it saves on the text counted."""
    count, ones, expected = (table.astype(np.float64) for table in (count, ones, expected))
    mean = np.clip(expected / np.maximum(count, 1), 1e-5, 1 - 1e-5)
    share = (ones + strength * mean) / (count + strength)
    step = np.log(share / (1 - share)) - np.log(mean / (1 - mean))
    correction = np.where(count > 0, np.clip(np.rint(step * STEPS), -127, 127), 0).astype(np.int8)
    gain = ones * np.log2(share / mean) + (count - ones) * np.log2((1 - share) / (1 - mean))
    return correction, gain


def _kept(correction: np.ndarray, gain: np.ndarray, seen: np.ndarray, narrower: int) -> tuple[np.ndarray, np.ndarray]:
    """A table with `2**narrower` times fewer places, each with whichever of its corrections saves most, if any saves enough."""
    rows = gain.reshape(-1, 1 << narrower)
    best = rows.argmax(1)
    row = np.arange(len(rows))
    worth = rows[row, best] > _COST
    table = np.where(worth, correction.reshape(rows.shape)[row, best], np.int8(0))
    return table, np.where(worth, seen.reshape(rows.shape)[row, best], np.uint8(0))


def freeze(code: WindowCode) -> tuple[Tensor, Tensor]:
    """All strings of 16-bit windows: what `code` with the Delay rule says of every window that there can be.

    Returns:
        The parent of each string, its place without the last byte, int64 `(S,)`, and its last byte, uint8 `(S,)`. A string's
        place is its code, and string 0 is empty.
    """
    size = (1 << code.bits) - 1
    lows, parents, labels = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.zeros(1, np.uint8)]
    owner, low, points = np.zeros(1, np.int64), np.ones(1, np.int64), np.full(1, size)
    context = np.zeros(1, np.uint64)
    known = 0
    while len(low):
        row, label, low, points = _divided(code, context, known, low, points)
        lows.append(low)
        parents.append(owner[row])
        labels.append(label)
        longer = points > 1
        owner, context = low[longer], (context[row] << np.uint64(8) | label.astype(np.uint64))[longer]
        low, points, known = low[longer] + 1, points[longer] - 1, known + 1
    order = np.argsort(np.concatenate(lows))
    return torch.from_numpy(np.concatenate(parents)[order]), torch.from_numpy(np.concatenate(labels)[order])


def _divided(
    code: WindowCode, context: np.ndarray, known: int, low: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The strings that get a point when each of some intervals is divided among all bytes: row, byte, low and points."""
    row, node = np.arange(len(low)), np.ones(len(low), np.uint64)
    for depth in range(8):
        one = _chances(code, context[row], known, node)
        rare = np.minimum(one, 65536 - one)
        share = points * rare >> 16
        share = np.where(one > 32768, points - share, share)
        if not known:
            least = 1 << 7 - depth
            share = np.clip(share, least, points - least)
        row, node = np.concatenate([row, row]), np.concatenate([node << np.uint64(1), node << np.uint64(1) | np.uint64(1)])
        low = np.concatenate([low, low + points - share])
        points = np.concatenate([points - share, share])
        kept = points > 0
        row, node, low, points = row[kept], node[kept], low[kept], points[kept]
    return row, (node & np.uint64(255)).astype(np.uint8), low, points


def _chances(code: WindowCode, context: np.ndarray, known: int, node: np.ndarray) -> np.ndarray:
    """Probabilities of a one, in 1/65536, int64."""
    corrections, checks, odds = code.corrections.numpy(), code.checks.numpy(), code.odds.numpy()
    total = np.zeros(len(node), np.int64)
    for order in range(min(code.orders - 1, known) + 1):
        key = (context & np.uint64((1 << 8 * order) - 1)) << np.uint64(8) | node
        start, size = (0, 256, DIRECT)[min(order, 2)], 1 << code.hashed_bits
        if order < 2:
            total += look_up(corrections[start:], corrections[:0], key, code.hashed_bits)
        else:
            at = (order - 2) * size
            table, check = corrections[start + at :][:size], checks[at:][:size]
            total += look_up(table, check, key * np.uint64(MULTIPLIER), code.hashed_bits)
    limit = len(odds) // 2
    return odds[np.clip(total, -limit, limit) + limit].astype(np.int64)
