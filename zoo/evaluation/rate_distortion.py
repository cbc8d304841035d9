"""Quality against bytes: a tokenizer's prefixes beside codecs, on the same pictures.

Shapes: B pictures, H W pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenzoo.evaluation.codecs import CODECS, Codec, shrink_then_encode
from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.quality import psnr, ssim

TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 96, 128)


@dataclass(frozen=True)
class Point:
    """Mean quality at one size; `reached` is the share of pictures that the codec could store in that size."""

    num_bytes: int
    psnr: float
    ssim: float
    reached: float = 1.0


@dataclass(frozen=True)
class Curve:
    """Quality of prefixes, by number of tokens."""

    points: Mapping[int, Point]
    codebook_used: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"codebook_used": self.codebook_used, "tokens": {n: asdict(point) for n, point in self.points.items()}}


def tokenizer_curve(tokenizer: Tokenizer, pictures: np.ndarray, counts: Sequence[int] = TOKEN_COUNTS) -> Curve:
    """Encodes each picture once, at full length, and decodes its prefixes.

    Args:
        tokenizer: One whose codes may be cut off anywhere.
        pictures: uint8 `(B, H, W, 3)` of the tokenizer's own size.
        counts: Numbers of tokens.
    """
    originals = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    tokens = tokenizer.encode(list(originals))
    used = tokens.ids.unique().numel() / tokens.spec.codebook_sizes[0]
    points = {}
    for count in counts:
        part = tokens.truncate(count)
        decoded = torch.stack(tokenizer.decode(part, native=True))
        num_bytes = math.ceil(count * tokens.spec.bits_per_id[0] / 8)
        points[count] = _point(num_bytes, _round(decoded), originals)
    return Curve(points, used)


def codec_curve(codec: Codec, pictures: np.ndarray, budgets: Sequence[int]) -> dict[int, Point]:
    """Mean quality of shrink-then-encode at each budget in bytes, over the pictures that fit."""
    kept: dict[int, list[tuple[int, np.ndarray]]] = {budget: [] for budget in budgets}
    for index, pixels in enumerate(pictures):
        for budget, restored in shrink_then_encode(codec, pixels, budgets).items():
            kept[budget].append((index, restored))
    points = {}
    for budget, results in kept.items():
        if results:
            indices, restored = zip(*results, strict=True)
            points[budget] = _point(
                budget, _tensor(np.stack(restored)), _tensor(pictures[list(indices)]), len(results) / len(pictures)
            )
    return points


def codec_curves(pictures: np.ndarray, budgets: Sequence[int]) -> dict[str, dict[int, Point]]:
    """`codec_curve` of every codec, by name."""
    return {codec.name: codec_curve(codec, pictures, budgets) for codec in CODECS}


def markdown_table(curve: Curve, codecs: Mapping[str, Mapping[int, Point]]) -> str:
    """The curves side by side; a dash where no file of a codec is that small, and the share where only some are."""
    head = ["tokens", "bytes", "PSNR", "SSIM", *(f"{name.upper()} PSNR | {name.upper()} SSIM" for name in codecs)]
    lines = ["| " + " | ".join(head) + " |", "|" + " ---: |" * (4 + 2 * len(codecs))]
    for count, point in curve.points.items():
        cells = [str(count), str(point.num_bytes), f"{point.psnr:.2f}", f"{point.ssim:.3f}"]
        for points in codecs.values():
            cells += _codec_cells(points.get(point.num_bytes))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _codec_cells(point: Point | None) -> list[str]:
    if point is None:
        return ["-", "-"]
    share = "" if point.reached == 1 else f" ({point.reached:.0%})"
    return [f"{point.psnr:.2f}{share}", f"{point.ssim:.3f}"]


def _point(num_bytes: int, restored: Tensor, originals: Tensor, reached: float = 1.0) -> Point:
    quality, similarity = psnr(restored, originals).mean(), ssim(restored, originals).mean()
    return Point(num_bytes, float(quality), float(similarity), reached)


def _round(images: Tensor) -> Tensor:
    """As 8-bit pictures, which is what a codec's are measured on."""
    return (images * 255).round() / 255


def _tensor(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
