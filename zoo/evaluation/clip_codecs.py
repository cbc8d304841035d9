"""What people would use instead of a video tokenizer: H.264 and AV1 at the same number of bytes, at their best.

As for pictures (`codecs`), a clip is also shrunk before it is encoded: of all sizes, each at the best quality that fits into
the budget, the decoded clip closest to the original is kept, an oracle that no user has. Bytes are those of the packets: the
container, and what H.264 keeps apart (parameter sets, remarks), cost nothing here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

SCALES = (0.5, 0.75, 1.0)
_RATE = 25
_H264_SLICES = (1, 5)


@dataclass(frozen=True)
class ClipCodec:
    """An encoder of FFmpeg.

    Attributes:
        name: For tables.
        encoder: FFmpeg's name.
        options: Of the encoder.
        worst: The largest `crf`: fewest bytes.
        smallest: Shortest side that it takes, in pixels.
    """

    name: str
    encoder: str
    options: Mapping[str, str]
    worst: int
    smallest: int = 16

    def encode(self, clip: np.ndarray, crf: int) -> tuple[int, np.ndarray]:
        """Bytes of the packets of a clip uint8 `(T, H, W, 3)` of even sides, and what they decode to."""
        import av

        context: Any = av.CodecContext.create(self.encoder, "w")
        context.height, context.width = clip.shape[1:3]
        context.pix_fmt, context.time_base, context.framerate = "yuv420p", Fraction(1, _RATE), Fraction(_RATE)
        context.gop_size, context.thread_count = len(clip) + 1, 1
        context.options = {**self.options, "crf": str(crf)}
        packets = []
        for number, frame in enumerate(clip):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, _RATE)
            packets += context.encode(picture)
        packets += context.encode(None)
        data = [bytes(packet) for packet in packets]
        decoder: Any = av.CodecContext.create("h264" if self.encoder == "libx264" else "libdav1d", "r")
        frames = [frame for packet in [*(av.Packet(part) for part in data), None] for frame in decoder.decode(packet)]
        size = sum(slice_bytes(part) if self.encoder == "libx264" else len(part) for part in data)
        return size, np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


H264 = ClipCodec("H.264", "libx264", {"preset": "veryslow", "tune": "psnr", "sc_threshold": "0"}, worst=51)
AV1 = ClipCodec("AV1", "libsvtav1", {"preset": "2", "svtav1-params": "lp=1:tune=1:scd=0"}, worst=63, smallest=64)
CLIP_CODECS = (H264, AV1)


def slice_bytes(packet: bytes) -> int:
    """Bytes of the slices in a packet of H.264 (Annex B), each with a start code of 3."""
    units = re.split(rb"\x00?\x00\x00\x01", packet)
    return sum(3 + len(unit) for unit in units if unit and unit[0] & 31 in _H264_SLICES)


def best_clip(codec: ClipCodec, clip: np.ndarray, budget: int) -> np.ndarray | None:
    """The codec's best version of a clip uint8 `(T, H, W, 3)` in at most `budget` bytes; `None` if it has none so small."""
    found = [restored for scale in SCALES if (restored := _at_scale(codec, clip, budget, scale)) is not None]
    return min(found, key=lambda restored: _error(restored, clip), default=None)


def _at_scale(codec: ClipCodec, clip: np.ndarray, budget: int, scale: float) -> np.ndarray | None:
    """By bisection for the best quality that fits."""
    height, width = (2 * round(n * scale / 2) for n in clip.shape[1:3])
    if min(height, width) < codec.smallest:
        return None
    small = _resized(clip, height, width, Image.Resampling.LANCZOS)
    low, high, best = 0, codec.worst, None
    while low <= high:
        crf = (low + high) // 2
        size, decoded = codec.encode(small, crf)
        if size <= budget:
            best, high = decoded, crf - 1
        else:
            low = crf + 1
    return None if best is None else _resized(best, clip.shape[1], clip.shape[2], Image.Resampling.BICUBIC)


def _resized(clip: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    if clip.shape[1:3] == (height, width):
        return clip
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), how)) for frame in clip])


def _error(restored: np.ndarray, clip: np.ndarray) -> float:
    return float(np.square(restored.astype(np.float32) - clip).mean())
