"""Reading video files: a small reader interface, the choice of frames, and limits that keep a bad file from hanging.

A reader knows how many frames a file shows, when each is shown, and gives any of them by number, exactly.
"""

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from tokenzoo.tokenizers.errors import MediaError


class Reader(Protocol):
    """Frame-exact access to one video stream.

    Attributes:
        times: When each frame is first shown, in seconds, rising; float64 `(N,)`.
        height: In pixels, after rotation.
        width: In pixels, after rotation.
        fps: Mean frames per second.
    """

    times: np.ndarray
    height: int
    width: int
    fps: float

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """The frames of these numbers, in this order: uint8 `(n, H, W, 3)`. Raises `MediaError` if one cannot be decoded."""


class Clip(NamedTuple):
    """Frames uint8 `(T, H, W, 3)`, their mean rate in frames per second, and when each was shown in seconds `(T,)`."""

    frames: np.ndarray
    fps: float
    times: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """Which frames of a file are read.

    Attributes:
        by: All of them; `"uniform"`: `value` frames, `linspace` from the first to the last truncated to whole numbers, as
            LLaVA and VQToken read; `"fps"`: what is on screen `value` times per second, by the frames' times, so a variable
            frame rate becomes a constant one; `"segments"`: the middle frame of each of `value` equal parts.
        value: As `by` says.
    """

    by: Literal["all", "uniform", "fps", "segments"] = "all"
    value: float = 0

    def __post_init__(self) -> None:
        whole = self.by in ("uniform", "segments")
        if self.by != "all" and not (
            math.isfinite(self.value) and self.value > 0 and (not whole or self.value == int(self.value))
        ):
            kind = "a whole number of frames" if whole else "frames per second"
            raise ValueError(f"expected {kind} above 0 to sample by {self.by!r}, got {self.value!r}")

    def indices(self, times: np.ndarray) -> np.ndarray:
        """Numbers int64 `(T,)` of the chosen frames of a file whose frames are shown at `times` in seconds."""
        count = len(times)
        if self.by == "all" or not count:
            return np.arange(count)
        if self.by == "uniform":
            return np.linspace(0, count - 1, int(self.value)).astype(np.int64)
        if self.by == "segments":
            return ((np.arange(int(self.value)) + 0.5) * count / self.value).astype(np.int64)
        shown = np.arange(math.floor((times[-1] - times[0]) * self.value + 1e-6) + 1) / self.value + times[0]
        return np.maximum(np.searchsorted(times, shown + 1e-6, side="right") - 1, 0)


_LARGEST_CLIP = 1 << 32


def is_file(item: Any) -> bool:
    """Whether this is a path or encoded bytes."""
    return isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview))


def read_video(source: Any, sampling: Sampling) -> Clip:
    """The chosen frames of a path or encoded bytes.

    Raises:
        MediaError: If there is no such file, it has no video stream, is damaged, or its frames would take more than 4 GiB.
    """
    name = str(source) if isinstance(source, (str, os.PathLike)) else f"these {len(source)} bytes"
    reader = open_video(source)
    chosen = sampling.indices(reader.times)
    size = len(chosen) * reader.height * reader.width * 3
    if size > _LARGEST_CLIP:
        raise MediaError(
            f"{name}: {len(chosen)} frames of {reader.height} x {reader.width} take {size / 2**30:.1f} GiB, expected at most "
            f"{_LARGEST_CLIP / 2**30:.0f}: read fewer with Sampling, or cut the file into pieces"
        )
    times = reader.times[chosen]
    spread = float(times[-1] - times[0])
    fps = reader.fps if sampling.by == "all" or spread <= 0 else (len(times) - 1) / spread
    return Clip(reader.frames(chosen.tolist()), sampling.value if sampling.by == "fps" else fps, times)


def open_video(source: Any) -> Reader:
    """A reader over a path or encoded bytes.

    Raises:
        MediaError: If there is no such file, or it has no video stream that can be decoded.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            path.stat()
        except (OSError, ValueError) as error:
            shown = str(path) if len(str(path)) < 200 else f"{str(path)[:100]}... ({len(str(path))} characters)"
            raise MediaError(f"{shown} does not exist, or cannot be read as a path: {error}") from error
        if path.is_dir():
            raise MediaError(f"{path} is a folder: pass its files, or use the command line, which takes folders")
        return DecordReader(str(path), str(path))
    return DecordReader(io.BytesIO(source), f"these {len(source)} bytes")


class DecordReader:
    """Reads through `decord`."""

    def __init__(self, source: Any, name: str) -> None:
        import decord

        try:
            self._reader = decord.VideoReader(source, num_threads=1)
            self.times = np.asarray(self._reader.get_frame_timestamp(range(len(self._reader))), dtype=np.float64)[:, 0]
            self.height, self.width = self._reader[0].shape[:2]
        except (decord.DECORDError, AssertionError, RuntimeError, IndexError) as error:
            raise MediaError(f"{name}: not a video that can be decoded: {str(error).splitlines()[-1]}") from error
        self.fps = float(self._reader.get_avg_fps())

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """As `Reader.frames`."""
        frames: np.ndarray = self._reader.get_batch(indices).asnumpy()
        return frames
