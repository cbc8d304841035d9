"""`python -m tokenzoo.evaluation.clip_release`: bundles a video tokenizer's averaged weights, and what they measure.

The run may still be going on: its last checkpoint is read. Measured are crops of files that were held out, beside H.264 and AV1
(PyAV, extra `video`) and beside an image tokenizer that codes the frames one by one, all in as many bytes. Everything between
the markers on the card, and the figures of its front matter, is rewritten; the prose around them is not.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenzoo.evaluation.bundling import averaged_weights, built, bundle, command_line, recipe_of, with_measured
from tokenzoo.evaluation.clip_codecs import CLIP_CODECS, ClipCodec, best_clip
from tokenzoo.loading import load
from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.tokenizers.quality import psnr, ssim
from tokenzoo.training.recipe import ClipsRecipe, Recipe
from tokenzoo.training.sources import prepare_videos

IMAGES = "one_d_piece_nano.photos"
LARGER_SIDE, LARGER_CLIPS = 128, 24


@dataclass(frozen=True)
class Row:
    """A system's mean quality on a set of clips, that of first and last frames, and the share of clips that it could store."""

    name: str
    psnr: float
    ssim: float
    first: float
    last: float
    reached: float = 1.0

    def cells(self) -> str:
        """The row of the table."""
        share = "" if self.reached == 1 else f" ({self.reached:.0%})"
        values = [f"{self.psnr:.2f}{share}", f"{self.ssim:.3f}", f"{self.first:.2f}", f"{self.last:.2f}"]
        return " | ".join([f"| {self.name}", *values]) + " |"


@dataclass(frozen=True)
class Set:
    """Clips uint8 `(N, T, H, W, 3)`, the bytes that the tokenizer took for each, and what was measured, the tokenizer first."""

    clips: np.ndarray
    num_bytes: int
    rows: Sequence[Row]


def release(run: Path, recipe: Recipe, card: Path) -> list[Set]:
    """Writes `nano/<card>.safetensors` beside `card` and refreshes the card.

    Args:
        run: Output folder of the training run.
        recipe: Its recipe, with the folder of video files.
        card: The markdown file.

    Returns:
        What was measured on crops of the size of training, and on larger ones.
    """
    if not isinstance(recipe.data, ClipsRecipe):
        raise ValueError(f"expected a recipe of clips, got {recipe.data}")
    state, step = averaged_weights(run)
    tokenizer = built(recipe.architecture, recipe.config, state)
    larger = replace(recipe.data, eval_size=LARGER_SIDE, eval_clips=LARGER_CLIPS)
    sets, used = [], set[int]()
    for data in (recipe.data, larger):
        clips = prepare_videos(data, run / "clips").held_out
        mine, num_bytes, codes = measured_tokenizer(tokenizer, f"**{card.stem}**", clips)
        sets.append(Set(clips, num_bytes, [mine, *measured_peers(clips, num_bytes, run / f"peers_{clips.shape[2]}.json")]))
        used |= codes
    bundle(card, refreshed(card.read_text(), sets, step, step * recipe.batch_size, len(used)), state, tokenizer)
    return sets


def measured_tokenizer(tokenizer: Tokenizer, name: str, clips: np.ndarray) -> tuple[Row, int, set[int]]:
    """The tokenizer's quality, the bytes of ids of a clip, and the codes it took."""
    decoded, codes, bits = [], set[int](), 0.0
    for clip in clips:
        tokens = tokenizer.encode(clip)
        codes |= set(tokens.ids.flatten().tolist())
        bits = float(tokens.bits[0])
        decoded.append(_pixels(tokenizer.decode(tokens)[0]))
    return _row(name, decoded, clips), math.ceil(bits / 8), codes


def measured_peers(clips: np.ndarray, num_bytes: int, cache: Path) -> list[Row]:
    """An image tokenizer frame by frame, and the codecs, all in at most so many bytes; kept in `cache`."""
    images = load(IMAGES)
    tokens = num_bytes * 8 // (images.info.bits_per_id[0] * clips.shape[1] * len(tiles(clips[0, 0], _side(images))))
    identity = [hashlib.sha256(clips.tobytes()).hexdigest(), num_bytes, images.digest, [asdict(codec) for codec in CLIP_CODECS]]
    identity = json.loads(json.dumps(identity))
    if not cache.exists() or (kept := json.loads(cache.read_text()))["of"] != identity:
        frames = _row(f"{IMAGES}, every frame in {tokens} ids", [by_frames(images, clip, tokens) for clip in clips], clips)
        rows = [frames, *(_codec_row(codec, clips, num_bytes) for codec in CLIP_CODECS)]
        kept = {"of": identity, "rows": [asdict(row) for row in rows]}
        write_atomically(cache, json.dumps(kept).encode())
    return [Row(**row) for row in kept["rows"]]


def by_frames(images: Tokenizer, clip: np.ndarray, tokens: int) -> np.ndarray:
    """What an image tokenizer makes of every frame by itself, cut into tiles of its own size with so many ids each."""
    side, (height, width) = _side(images), clip.shape[1:3]
    pieces = [tile for frame in clip for tile in tiles(frame, side)]
    decoded = images.decode(
        images.encode([torch.from_numpy(tile).permute(2, 0, 1).float() / 255 for tile in pieces], length=tokens)
    )
    grid = torch.stack(decoded).unflatten(0, (len(clip), height // side, width // side))
    return _pixels(grid.permute(0, 3, 1, 4, 2, 5).reshape(len(clip), 3, height, width))


def tiles(frame: np.ndarray, side: int) -> list[np.ndarray]:
    """Squares of a frame uint8 `(H, W, 3)` whose sides are multiples of `side`, row by row."""
    height, width = frame.shape[:2]
    return [
        np.ascontiguousarray(frame[y : y + side, x : x + side]) for y in range(0, height, side) for x in range(0, width, side)
    ]


def refreshed(text: str, sets: Sequence[Set], step: int, items: int, codes: int) -> str:
    """The card with the measured part replaced.

    Raises:
        ValueError: If the card has no markers.
    """
    parts = [f"Measured by the bundled float16 weights of step {step:,}, after {items:,} clips. {codes:,} codes were used."]
    for found in sets:
        count, frames, height, width = found.clips.shape[:4]
        rate = found.num_bytes * 8 / (frames * height * width)
        lines = [
            f"{count} held-out crops of {frames} frames of {width} x {height} pixels, {found.num_bytes:,} bytes each "
            f"({rate:.3f} bit per pixel):",
            "",
            "| | PSNR | SSIM | PSNR of the first frame | of the last |",
            "| --- | ---: | ---: | ---: | ---: |",
            *(row.cells() for row in found.rows),
        ]
        parts.append("\n".join(lines))
    return with_measured(text, "\n\n".join(parts))


def _codec_row(codec: ClipCodec, clips: np.ndarray, num_bytes: int) -> Row:
    restored = [best_clip(codec, clip, num_bytes) for clip in clips]
    pairs = [(clip, best) for clip, best in zip(clips, restored, strict=True) if best is not None]
    if not pairs:
        return Row(codec.name, math.nan, math.nan, math.nan, math.nan, 0.0)
    row = _row(codec.name, [best for _, best in pairs], np.stack([clip for clip, _ in pairs]))
    return replace(row, reached=len(pairs) / len(clips))


def _row(name: str, decoded: Sequence[np.ndarray], clips: np.ndarray) -> Row:
    pairs = [(_floats(a), _floats(b)) for a, b in zip(decoded, clips, strict=True)]

    def mean(measure: Callable[[Tensor, Tensor], Tensor], part: slice) -> float:
        return float(np.mean([float(measure(a[None, part], b[None, part])) for a, b in pairs]))

    everything, first, last = slice(None), slice(0, 1), slice(-1, None)
    return Row(name, mean(psnr, everything), mean(ssim, everything), mean(psnr, first), mean(psnr, last))


def _pixels(clip: Tensor) -> np.ndarray:
    """A clip `[T, 3, H, W]` in [0, 1] as 8-bit pictures `(T, H, W, 3)`, which is what a codec's are measured on."""
    return (clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _floats(clip: np.ndarray) -> Tensor:
    return torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 255


def _side(images: Tokenizer) -> int:
    return int(images.config.image_size)  # type: ignore[attr-defined]


def main() -> None:
    """Command line."""
    arguments = command_line(__doc__, "video files").parse_args()
    torch.set_grad_enabled(False)
    for found in release(arguments.run, recipe_of(arguments), arguments.card):
        print(found.clips.shape, found.num_bytes, *(row.cells() for row in found.rows), sep="\n")


if __name__ == "__main__":
    main()
