"""Encodes and decodes the bundled photos at several token counts; returns a table and draws a picture sheet."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokenzoo.loading import load
from tokenzoo.media import to_pil
from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.tokenizers.quality import psnr, ssim

MODEL = "one_d_piece_nano"
COUNTS = (8, 32, 128)
TILE, MARGIN, HEADER = 224, 8, 28


@dataclass(frozen=True)
class Trial:
    """All photos at one token count: what the table and one column of the sheet show."""

    count: int
    num_bytes: int
    reconstructions: list[Tensor]
    originals: list[Tensor]
    encode_ms: float
    decode_ms: float

    def psnr(self) -> list[float]:
        """Of each photo, in dB, at the tokenizer's own resolution."""
        return [float(psnr(a[None], b[None])) for a, b in zip(self.reconstructions, self.originals, strict=True)]

    def row(self) -> dict[str, Any]:
        """The row of the table, averaged over photos."""
        similarity = [float(ssim(a[None], b[None])) for a, b in zip(self.reconstructions, self.originals, strict=True)]
        return {
            "tokens": self.count,
            "bytes": self.num_bytes,
            "PSNR (dB)": round(mean(self.psnr()), 2),
            "SSIM": round(mean(similarity), 3),
            "encode (ms)": round(self.encode_ms, 2),
            "decode (ms)": round(self.decode_ms, 2),
        }


def run(folder: Path, *, model: str = MODEL, counts: Sequence[int] = COUNTS) -> tuple[list[dict[str, Any]], Path]:
    """Runs the demo.

    Args:
        folder: Where to write `demo.png`.
        model: A variable-length image tokenizer.
        counts: Token counts to try.

    Returns:
        One row per token count (tokens, bytes of ids per photo, mean PSNR and SSIM at the tokenizer's own resolution,
        milliseconds per photo), and the path of the picture sheet.
    """
    tokenizer = load(model)
    photos = bundled_photos()
    tokenizer.decode(tokenizer.encode(photos[0]))
    trials = [_trial(tokenizer, photos, count) for count in counts]
    sheet = folder / "demo.png"
    _save(_draw(photos, trials), sheet)
    return [trial.row() for trial in trials], sheet


def bundled_photos() -> list[Image.Image]:
    """The photos that come with the package, by name; their licences are in `photos/LICENSES.md`."""
    folder = resources.files("tokenzoo.demo") / "photos"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".jpg")), key=lambda file: file.name)
    if not files:
        raise MediaError(f"no photos in {folder}: is the installation complete?")
    photos = []
    for file in files:
        with file.open("rb") as stream, Image.open(stream) as photo:
            photos.append(photo.convert("RGB"))
    return photos


def _trial(tokenizer: Tokenizer, photos: Sequence[Image.Image], count: int) -> Trial:
    originals = [tokenizer.media.read(photo)[0] for photo in photos]
    start = time.perf_counter()
    tokens = tokenizer.encode(originals, length=count)
    encoded = time.perf_counter()
    reconstructions = tokenizer.decode(tokens, native=True)
    decoded = time.perf_counter()
    each = 1000 / len(photos)
    num_bytes = int(tokens.num_bytes[0])
    return Trial(count, num_bytes, reconstructions, originals, (encoded - start) * each, (decoded - encoded) * each)


def _draw(photos: Sequence[Image.Image], trials: Sequence[Trial]) -> Image.Image:
    """Rows of original | one column per token count, all as wide as a tile and in the original's proportions."""
    heights = [round(TILE * photo.height / photo.width) for photo in photos]
    step = TILE + MARGIN
    size = (MARGIN + (1 + len(trials)) * step, HEADER + sum(heights) + len(photos) * HEADER)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(["original", *(f"{trial.count} tokens, {trial.num_bytes} bytes" for trial in trials)]):
        draw.text((MARGIN + column * step, 6), title, "black", font)
    psnr_of, side, top = [trial.psnr() for trial in trials], trials[0].originals[0].shape[-1], HEADER
    for row, (photo, height) in enumerate(zip(photos, heights, strict=True)):
        tiles = [photo, *(to_pil(trial.reconstructions[row]) for trial in trials)]
        notes = [f"{photo.width} x {photo.height} pixels", *(f"{values[row]:.1f} dB at {side} px" for values in psnr_of)]
        for column, (tile, note) in enumerate(zip(tiles, notes, strict=True)):
            left = MARGIN + column * step
            sheet.paste(tile.resize((TILE, height), Image.Resampling.BICUBIC), (left, top))
            draw.text((left, top + height + 3), note, "dimgrey", font)
        top += height + HEADER
    return sheet


def _save(sheet: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
