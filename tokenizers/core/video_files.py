"""Reading video files: a small reader interface, the choice of frames, and limits that keep a bad file from hanging.

A reader knows how many frames a file shows, when each is shown, and gives any of them by number, exactly.
"""

import bisect
import importlib.util
import io
import math
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import media_path

Backend = Literal["auto", "decord", "av"]


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

    def close(self) -> None:
        """Frees the file."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


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


_LARGEST_CLIP = 1 << 32  # bytes
_LONGEST_RUN = 2000  # frames to decode forwards for one that is wanted, before seeking with PyAV is the better way
_PATIENCE = 60.0  # seconds without a sign of life
_WORKER = Path(__file__).with_name("_decord_worker.py")
_MP4, _MATROSKA = b"ftyp", b"\x1a\x45\xdf\xa3"
_DAMAGE = (
    *("ended prematurely", "partial file", "truncated", "corrupt", "Invalid NAL unit", "Invalid data", "illegal"),
    *("Error splitting", "error while decoding", "concealing", "moov atom not found", "stream 0, offset 0x"),
)


def is_file(item: Any) -> bool:
    """Whether this is a path or encoded bytes."""
    return isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview))


def read_video(source: Any, sampling: Sampling | None = None, *, backend: Backend = "auto") -> Clip:
    """The chosen frames of a path or encoded bytes.

    Raises:
        MediaError: If there is no such file, it has no video stream, is damaged, or its frames would take more than 4 GiB.
    """
    name = f"these {len(source)} bytes" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)
    with open_video(source, backend=backend) as reader:
        chosen = (sampling or Sampling()).indices(reader.times)
        size = len(chosen) * reader.height * reader.width * 3
        if size > _LARGEST_CLIP:
            raise MediaError(
                f"{name}: {len(chosen)} frames of {reader.width} x {reader.height} take {size / 2**30:.1f} GiB, expected at "
                f"most {_LARGEST_CLIP / 2**30:.0f}: read fewer (Sampling), or cut the file into pieces"
            )
        if backend == "auto" and isinstance(reader, DecordReader) and has_pyav() and _is_sparse(chosen):
            return read_video(source, sampling, backend="av")
        times = reader.times[chosen]
        frames = reader.frames(chosen.tolist())
    fps = float(sampling.value) if sampling is not None and sampling.by == "fps" else _mean_rate(times, reader.fps)
    return Clip(frames, fps, times)


def open_video(source: Any, *, backend: Backend = "auto") -> Reader:
    """A reader over a path or encoded bytes; close it, or use it in a `with` block.

    `"decord"` decodes forwards from the first frame, in a process of its own that is ended when it hangs; `"av"` (PyAV, the
    extra `tokenzoo[video]`) seeks by time stamps. Both give the same pixels. `"auto"` is decord for MP4, MOV, Matroska
    and WebM files that start at time 0, which it counts exactly, and PyAV for everything else.

    Raises:
        MediaError: If there is no such file, it has no video stream that can be decoded, or it needs a backend that is not
            installed.
    """
    name, head = _look(source)
    if backend == "av":
        return PyAVReader(source, name)
    if backend == "decord":
        return DecordReader(source, name)
    if head[4:8] == _MP4 or head[:4] == _MATROSKA:
        reader = DecordReader(source, name)
        if reader.exact:
            return reader
        reader.close()
    if not has_pyav():
        raise MediaError(
            f"{name}: frames of this kind of file are counted exactly by PyAV only: pip install 'tokenzoo[video]', or convert "
            "it to MP4 that starts at time 0"
        )
    return PyAVReader(source, name)


@contextmanager
def _ffmpeg_messages() -> Iterator[list[str]]:
    """Errors that FFmpeg reports through PyAV within the block, filled when it ends."""
    import av.logging

    level, messages = av.logging.get_level(), list[str]()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as captured:
            yield messages
            messages += [text for _, _, text in captured]
    finally:
        av.logging.set_level(level)


def has_pyav() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def _mean_rate(times: np.ndarray, nominal: float) -> float:
    """Frames per second of frames shown at `times`; the nominal rate where it is the same within the stamps' precision."""
    spread = float(times[-1] - times[0])
    if spread <= 0:
        return nominal
    rate = (len(times) - 1) / spread
    return nominal if abs(rate / nominal - 1) < 1e-3 else rate


def _is_sparse(chosen: np.ndarray) -> bool:
    return bool(len(chosen)) and int(chosen.max()) + 1 > _LONGEST_RUN * len(np.unique(chosen))


def _look(source: Any) -> tuple[str, bytes]:
    """What to call a source in messages, and its first bytes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not source:
            raise MediaError("these 0 bytes: not a video, there is nothing in them")
        return f"these {len(source)} bytes", bytes(source[:8])
    path = media_path(source)
    if not path.is_file():
        raise MediaError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise MediaError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not head:
        raise MediaError(f"{path}: not a video, the file is empty")
    return str(path), head


class DecordReader:
    """Frames through `decord`, in a process of its own.

    Attributes:
        exact: Whether the frames are shown from time 0 on, one after another, so that decord counts them exactly.
    """

    def __init__(self, source: Any, name: str) -> None:
        self.name = name
        in_memory = isinstance(source, (bytes, bytearray, memoryview))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), *([] if in_memory else [str(Path(source).resolve())])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            if in_memory:
                self._send(len(source).to_bytes(8, "little") + bytes(source))
            opened = self._receive()
            self.times = opened["times"]
            self.fps = _mean_rate(self.times, opened["fps"])
            self.exact = bool((np.diff(self.times) > 0).all()) and abs(float(self.times[0])) < 1e-6
            first = self.frames([0])
        except BaseException:
            self.close()
            raise
        self.height, self.width = first.shape[1:3]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """As `Reader.frames`."""
        wanted = sorted(set(indices))
        self._send(" ".join(map(str, wanted)).encode() + b"\n")
        found = {}
        for index in wanted:
            message = self._receive()
            while "frame" not in message:
                message = self._receive()
            found[index] = message["frame"]
        self._check_log()
        return np.stack([found[index] for index in indices])

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            pass  # the process ended, and has said why

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watch = threading.Timer(_PATIENCE, self._process.kill)
        watch.start()
        try:
            size = self._process.stdout.read(8)
            data = self._process.stdout.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
        finally:
            hung = not watch.is_alive()
            watch.cancel()
        if hung:
            raise MediaError(f"{self.name}: damaged: nothing could be decoded for {_PATIENCE:g} s")
        message: dict[str, Any] = pickle.loads(data) if data else {"error": "the decoder ended"}
        if "error" in message:
            raise MediaError(f"{self.name}: {self._reason(message['error'])}")
        return message

    def _reason(self, error: str) -> str:
        if "No module named" in error:
            return f"decord cannot be used here ({error}): pip install decord2, or PyAV ('tokenzoo[video]')"
        if "cannot find video stream" in error:
            return "has no video stream"
        return f"not a video that can be decoded, or damaged: {self._complaint() or error.splitlines()[-1]}"

    def _check_log(self) -> None:
        if complaint := self._complaint():
            raise MediaError(f"{self.name}: damaged: {complaint}")

    def _complaint(self) -> str:
        """The first line of FFmpeg's messages that tells of damage."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return next((line.split("] ")[-1].strip() for line in lines if any(sign in line for sign in _DAMAGE)), "")


class PyAVReader:
    """Frames through PyAV, found by their time stamps; streams without any are counted from the start."""

    def __init__(self, source: Any, name: str) -> None:
        if not has_pyav():
            raise MediaError(f"{name}: PyAV is not installed: pip install 'tokenzoo[video]'")
        import av

        self.name, self._error = name, av.error.FFmpegError
        self._source = source
        self._container = self._open()
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        import av

        in_memory = isinstance(self._source, (bytes, bytearray, memoryview))
        try:
            container = av.open(io.BytesIO(self._source) if in_memory else str(Path(self._source).resolve()))
        except self._error as error:
            raise MediaError(f"{self.name}: not a video that can be decoded, or damaged: {error.strerror}") from error
        if not container.streams.video:
            container.close()
            raise MediaError(f"{self.name}: has no video stream")
        return container

    def _index(self) -> None:
        self._stream = self._container.streams.video[0]
        try:
            with _ffmpeg_messages() as messages:
                packets = [p for p in self._container.demux(self._stream) if p.size]
        except self._error as error:
            raise MediaError(f"{self.name}: damaged: {error.strerror}") from error
        broken = any(packet.is_corrupt for packet in packets) or any(sign in m for m in messages for sign in _DAMAGE)
        if broken or not packets:
            raise MediaError(f"{self.name}: damaged: the stream breaks off" if packets else f"{self.name}: has no frames")
        shown = [p for p in packets if not p.is_discard]
        rate = float(self._stream.average_rate or 25)
        if any(p.pts is None for p in shown):
            self._stamps: list[int] = []
            self.times = np.arange(len(shown)) / rate
        else:
            self._stamps = sorted(p.pts for p in shown)
            self._keys = sorted(p.pts for p in packets if p.is_keyframe)
            self.times = (np.array(self._stamps) - self._stamps[0]) * float(self._stream.time_base)
        self.fps = _mean_rate(self.times, rate)
        self.height, self.width = self.frames([0]).shape[1:3]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """As `Reader.frames`."""
        wanted = sorted(set(indices))
        try:
            found = self._by_seeking(wanted) if self._stamps else {}
            if missing := [index for index in wanted if index not in found]:
                found |= self._by_decoding_all(missing)
        except self._error as error:
            raise MediaError(f"{self.name}: damaged: {error.strerror}") from error
        if missing := [index for index in wanted if index not in found]:
            raise MediaError(f"{self.name}: damaged: frame {missing[0]} of {len(self.times)} cannot be decoded")
        return np.stack([found[index] for index in indices])

    def _by_seeking(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Decodes from the last key frame before each; what a seek passed over, as in MPEG-TS, is left out."""
        found: dict[int, np.ndarray] = {}
        runs: dict[int, list[int]] = {}
        for index in wanted:
            runs.setdefault(bisect.bisect_right(self._keys, self._stamps[index]) - 1, []).append(index)
        for key, run in runs.items():
            self._container.seek(self._keys[max(key, 0)], stream=self._stream, backward=True)
            found |= self._collect(run, self._numbered(self._container.decode(self._stream)))
        return found

    def _by_decoding_all(self, wanted: list[int]) -> dict[int, np.ndarray]:
        with self._open() as container:
            container.streams.video[0].codec_context.options = {"err_detect": "explode"}  # none of it is lawful here
            frames = container.decode(video=0)
            return self._collect(wanted, self._numbered(frames) if self._stamps else enumerate(frames))

    def _numbered(self, frames: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        for frame in frames:
            at = bisect.bisect_left(self._stamps, frame.pts)
            if at < len(self._stamps) and self._stamps[at] == frame.pts:
                yield at, frame

    def _collect(self, wanted: list[int], frames: Iterable[tuple[int, Any]]) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for index, frame in frames:
            if index in wanted:
                if frame.is_corrupt:
                    raise MediaError(f"{self.name}: damaged: frame {index} is corrupt")
                upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                found[index] = np.ascontiguousarray(upright)
            if index >= wanted[-1]:
                break
        return found
