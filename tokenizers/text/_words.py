"""Words as tensors, and how `word_pool` writes shares of words and raw bytes as frames of ids.

A frame is one id of each of the K codebooks. Ids below `codes` are codes, all K of them together those of one vector: below
`starts` of the first vector of a word, from there on of a later one. The 257 ids from `codes` on are raw: a byte of its own
value, or, behind the last byte of a word, nothing. So a frame is either a share of a word, or one to K bytes; what a text's
frames stand for, one after the other, is the text.

Shapes: W words, or shares of words, N bytes, K codebooks, L frames.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.tokenizers import TokensError
from tokenzoo.tokenizers.text.splitters import Ends

ROWS = 64  # words computed at a time
RAW = 257  # ids of every codebook that are no codes: 256 bytes, and nothing
_NOTHING = 256
_WIDTHS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
_IDEOGRAPHS = (0xE3, 0xE9)  # lead bytes of kana and Chinese characters


class Words(NamedTuple):
    """Words as rows of bytes int64 `[W, N]`, filled with zeros, and their lengths `[W]`, at least one."""

    rows: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, words: Sequence[bytes], device: torch.device) -> "Words":
        """Words as tensors."""
        width = max(map(len, words), default=1)
        rows = np.frombuffer(b"".join(word.ljust(width, b"\0") for word in words), np.uint8).reshape(-1, width)
        lengths = torch.tensor([len(word) for word in words], dtype=torch.long)
        return cls(torch.from_numpy(rows.astype(np.int64)).to(device), lengths.to(device))

    def groups(self) -> Iterator[tuple[Tensor, "Words"]]:
        """Words of similar length, no wider than they need: their indices `[M]`, and they themselves.

        Words of one zero byte fill groups up to a multiple of `ROWS`: shapes are few then, each of which products have to
        be prepared for, and a word is computed in the same shapes whatever words are beside it.
        """
        lower = 0
        for width in _WIDTHS:
            chosen = ((self.lengths > lower) & (self.lengths <= width)).nonzero()[:, 0]
            if len(chosen):
                missing = -len(chosen) % ROWS
                found = self.rows[chosen, :width]
                filled = F.pad(found, (0, width - found.shape[1], 0, missing))
                yield chosen, Words(filled, F.pad(self.lengths[chosen], (0, missing), value=1))
            lower = width

    def targets(self, end: int) -> Tensor:
        """What a decoder has to say: bytes, then `end`, then -1 for what does not count; int64 `[W, N + 1]`."""
        at = torch.arange(self.rows.shape[1] + 1, device=self.lengths.device)
        padded = F.pad(self.rows, (0, 1))
        targets = torch.where(at < self.lengths[:, None], padded, -1)
        return torch.where(at == self.lengths[:, None], end, targets)


def joined(data: bytes, ends: Ends, most: int) -> Ends:
    """Ends of words where up to `most` kana or Chinese characters in a row, words by themselves, become one word."""
    if most < 2 or len(ends) < 2:
        return ends
    starts = np.concatenate([[0], ends[:-1]])
    lead = np.frombuffer(data, np.uint8)[starts]
    lengths = ends - starts
    lengths[-1] -= _unfinished(data[starts[-1] + 3 :])
    single = (lengths == 3) & (lead >= _IDEOGRAPHS[0]) & (lead <= _IDEOGRAPHS[1])
    at = np.arange(len(ends))
    behind = at - np.maximum.accumulate(np.where(single, -1, at))  # 1, 2, ... within a run that follows a longer word
    follows = np.append(single[1:], False)
    kept: Ends = ends[~(single & follows & (behind % most != 0))]
    return kept


def _unfinished(rest: bytes) -> int:
    """How many bytes these are, if they are all there is of a character that goes on; 0 otherwise."""
    needed = 0 if not rest or rest[0] < 0xC0 else 2 if rest[0] < 0xE0 else 3 if rest[0] < 0xF0 else 4
    return len(rest) if len(rest) < needed else 0


def raw_frames(word: bytes, num_codebooks: int, codes: int) -> npt.NDArray[np.int32]:
    """Frames int32 `[L, K]` of the bytes of a word."""
    count = -(-len(word) // num_codebooks)
    frames = np.full(count * num_codebooks, codes + _NOTHING, np.int32)
    frames[: len(word)] = np.frombuffer(word, np.uint8).astype(np.int32) + codes
    return frames.reshape(count, num_codebooks)


def raw_bytes(frames: npt.NDArray[np.int64], codes: int) -> tuple[npt.NDArray[np.bool_], list[bytes]]:
    """Which frames `[L, K]` are raw, `[L]`, and the bytes of those that are.

    Raises:
        TokensError: If a frame is part code and part bytes, has no byte, or has one behind nothing.
    """
    coded = frames < codes
    raw = np.asarray(~coded.any(1))
    mixed = coded.any(1) & ~coded.all(1)
    nothing = frames == codes + _NOTHING
    gap = raw & (nothing[:, 0] | (nothing[:, :-1] & ~nothing[:, 1:]).any(1))
    if mixed.any() or gap.any():
        at = int(np.flatnonzero(mixed | gap)[0])
        raise TokensError(
            f"expected frames that are {frames.shape[1]} codes below {codes}, or bytes ({codes} to {codes + 255}) up to where "
            f"nothing ({codes + _NOTHING}) follows, got {frames[at].tolist()} in frame {at}"
        )
    mine = frames[raw]
    flat = (mine - codes).astype(np.uint16)
    counts = (flat < _NOTHING).sum(1)
    data = flat.astype(np.uint8)
    return raw, [row[:n].tobytes() for row, n in zip(data, counts.tolist(), strict=True)]


def check_order(frames: npt.NDArray[np.int64], starts: int, codes: int, most: int) -> None:
    """Checks that vectors of words are where they can be.

    Args:
        frames: Of one text, `[L, K]`.
        starts: Ids below it are of first vectors.
        codes: Ids below it are of vectors.
        most: Vectors of a word.

    Raises:
        TokensError: If a later vector follows no vector, or more than `most` belong to a word, or a frame is part first and
            part later vector.
    """
    later = (frames >= starts) & (frames < codes)
    follows = later.all(1)
    coded = frames[:, 0] < codes
    at = np.arange(len(frames))
    behind = at - np.maximum.accumulate(np.where(follows, -1, at))
    alone = follows & ~np.append(False, coded[:-1])
    wrong = (later.any(1) != follows) | alone | (behind >= most)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise TokensError(
            f"expected words of one id below {starts} and at most {most - 1} from there up to {codes - 1}, got "
            f"{frames[first].tolist()} in frame {first}: was something cut off before it?"
        )


def indexed(words: Sequence[bytes]) -> tuple[list[bytes], Tensor]:
    """Each word once, in order of appearance, and where each of `words` is among them, int64 `[W]`."""
    places: dict[bytes, int] = {}
    index = [places.setdefault(word, len(places)) for word in words]
    return list(places), torch.tensor(index, dtype=torch.long)


def choice(count: int, most: int, generator: torch.Generator | None) -> list[int]:
    """At most so many of the numbers below `count`."""
    if count <= most:
        return list(range(count))
    device = generator.device if generator is not None else "cpu"
    chosen: list[int] = torch.randperm(count, generator=generator, device=device)[:most].tolist()
    return chosen


def is_utf8(word: bytes) -> bool:
    """Whether a word is whole characters."""
    try:
        word.decode()
    except UnicodeDecodeError:
        return False
    return True
