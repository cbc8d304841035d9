"""Decodes one file with `decord` for another process, which can end this one: decord may wait forever on damaged streams.

Run as a script with a path, or with nothing and the file's bytes on standard input after their length (8 bytes). Every
message out is its length (8 bytes) and a pickled dictionary or a block of frames; a line of indices in asks for frames.
"""

import io
import os
import pickle
import sys
from typing import Any, BinaryIO

import numpy as np

_BEAT = 32  # frames between signs of life


def main() -> None:
    """Answers until standard input ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        reader = _open(sys.argv[1] if len(sys.argv) > 1 else io.BytesIO(_block(sys.stdin.buffer)))
        times = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64)[:, 0]
        send(out, {"times": times, "fps": float(reader.get_avg_fps())})
        for line in sys.stdin.buffer:
            _answer(reader, [int(n) for n in line.split()], out)
    except Exception as error:  # decord's own, assertions, and those of its foreign functions: the other side words it
        send(out, {"error": str(error).strip() or type(error).__name__})


def send(out: BinaryIO, message: dict[str, Any]) -> None:
    """One message, in one piece."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    out.write(len(data).to_bytes(8, "little") + data)
    out.flush()


def _block(stream: BinaryIO) -> bytes:
    return stream.read(int.from_bytes(stream.read(8), "little"))


def _open(source: Any) -> Any:
    import decord

    return decord.VideoReader(source, num_threads=1)


def _answer(reader: Any, indices: list[int], out: BinaryIO) -> None:
    """Sends the frames of rising numbers, decoding from the start: decord's seeks and skips miss in open groups of pictures."""
    reader.seek(0)
    at = 0
    for index in indices:
        while at <= index:
            frame = reader.next()
            at += 1
            if at % _BEAT == 0:
                send(out, {})
        send(out, {"frame": _pixels(frame.asnumpy())})


def _pixels(frame: np.ndarray) -> np.ndarray:
    """The picture `(H, W, 3)`; decord takes the padding of rows, where it divides evenly by the width, for more channels."""
    height, width, channels = frame.shape
    rows = np.ascontiguousarray(frame).reshape(height, width * channels)
    return np.ascontiguousarray(rows[:, : 3 * width]).reshape(height, width, 3)


if __name__ == "__main__":
    main()
