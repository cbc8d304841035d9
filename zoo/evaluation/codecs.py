"""What people would use instead: a still-image codec at the same number of bytes, at its best.

At a few dozen bytes a codec does better on a shrunken picture, so every size is tried at every quality, and the decoded
picture, resized back, that is closest to the original is kept: an oracle that no user has.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

QUALITIES = (0, 1, 2, 3, 5, 8, 12, 18, 25, 35, 50, 65, 80, 95)
SCALES = (0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True)
class Codec:
    """A Pillow format and the options that make it smallest."""

    name: str
    format: str
    options: Mapping[str, Any]

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """The whole file, headers included: what a user would store or send."""
        buffer = io.BytesIO()
        image.save(buffer, self.format, quality=quality, **self.options)
        return buffer.getvalue()


WEBP = Codec("webp", "WEBP", {"method": 6})
JPEG = Codec("jpeg", "JPEG", {"optimize": True, "subsampling": "4:2:0"})
AVIF = Codec("avif", "AVIF", {"speed": 6})
CODECS = (WEBP, JPEG, AVIF)


def shrink_then_encode(codec: Codec, pixels: np.ndarray, budgets: Sequence[int]) -> dict[int, np.ndarray]:
    """The codec's best picture at each budget.

    Args:
        codec: Which codec.
        pixels: uint8 `(H, W, 3)`.
        budgets: In bytes.

    Returns:
        uint8 `(H, W, 3)` per budget; budgets that no file of this codec fits into are left out.
    """
    original = Image.fromarray(pixels)
    best: dict[int, tuple[float, np.ndarray]] = {}
    for scale in SCALES:
        size = (max(1, round(original.width * scale)), max(1, round(original.height * scale)))
        small = original.resize(size, Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            data = codec.encode(small, quality)
            if len(data) > max(budgets):
                break
            decoded = Image.open(io.BytesIO(data)).convert("RGB").resize(original.size, Image.Resampling.BICUBIC)
            restored = np.asarray(decoded)
            error = float(np.square(restored.astype(np.float64) - pixels).mean())
            for budget in budgets:
                if len(data) <= budget and (budget not in best or error < best[budget][0]):
                    best[budget] = (error, restored)
    return {budget: restored for budget, (_, restored) in best.items()}


def smallest_file(codec: Codec, pixels: np.ndarray) -> int:
    """Bytes of the smallest file over all sizes and qualities: mostly headers."""
    image = Image.fromarray(pixels)
    side = max(1, round(min(image.size) * SCALES[0]))
    return len(codec.encode(image.resize((side, side)), QUALITIES[0]))
