"""`python -m tokenzoo.evaluation.release`: bundles a training run's averaged weights and writes what they measure on the card.

The run may still be going on: its last checkpoint is read. Everything between the markers on the card, and the figures of
its front matter, is rewritten; the prose around them is not.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from tokenzoo.evaluation.bundling import averaged_weights, built, bundle, command_line, recipe_of, with_measured
from tokenzoo.evaluation.codecs import CODECS, smallest_file
from tokenzoo.evaluation.rate_distortion import (
    TOKEN_COUNTS,
    Curve,
    Point,
    codec_curves,
    markdown_table,
    tokenizer_curve,
)
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.training.recipe import DataRecipe, Recipe
from tokenzoo.training.sources import prepare_crops

LARGER_BUDGETS = (320, 512)
_NOTHING = Point(0, 0.0, 0.0, 0.0)


def release(run: Path, recipe: Recipe, card: Path) -> Curve:
    """Writes `nano/<card>.safetensors` beside `card` and refreshes the card.

    Args:
        run: Output folder of the training run.
        recipe: Its recipe, with the folder of photos.
        card: The markdown file.

    Returns:
        What was measured on the held-out crops.
    """
    assert isinstance(recipe.data, DataRecipe)
    state, step = averaged_weights(run)
    tokenizer = built(recipe.architecture, recipe.config, state)
    pictures = prepare_crops(recipe.data, run / "photos").held_out
    curve = tokenizer_curve(tokenizer, pictures)
    codecs = measured_codecs(pictures, run / "codecs.json")
    bundle(card, refreshed(card.read_text(), curve, codecs, step * recipe.batch_size, pictures), state, tokenizer)
    write_atomically(run / "released.json", json.dumps({"step": step, **curve.to_dict()}, indent=1).encode())
    return curve


def measured_codecs(pictures: np.ndarray, cache: Path) -> dict[str, dict[int, Point]]:
    """Curves of the codecs at the sizes of `TOKEN_COUNTS` and some larger ones, kept in `cache`."""
    budgets = [(12 * count + 7) // 8 for count in TOKEN_COUNTS] + list(LARGER_BUDGETS)
    key = hashlib.sha256(pictures.tobytes() + json.dumps(budgets).encode()).hexdigest()
    if cache.exists() and (kept := json.loads(cache.read_text()))["key"] == key:
        curves = kept["curves"]
        return {name: {int(b): Point(**p) for b, p in points.items()} for name, points in curves.items()}
    measured = codec_curves(pictures, budgets)
    plain = {name: {b: asdict(p) for b, p in points.items()} for name, points in measured.items()}
    write_atomically(cache, json.dumps({"key": key, "curves": plain}).encode())
    return measured


def refreshed(text: str, curve: Curve, codecs: Mapping[str, Mapping[int, Point]], items: int, pictures: np.ndarray) -> str:
    """The card with the measured part replaced.

    Raises:
        ValueError: If the card has no markers.
    """
    smallest = ", ".join(f"{c.name.upper()} {smallest_file(c, pictures[0])}" for c in CODECS)
    larger = "; ".join(
        f"{name.upper()} " + ", ".join(_at(points, budget) for budget in LARGER_BUDGETS) for name, points in codecs.items()
    )
    margins = "; ".join(
        f"{count} tokens ({curve.points[count].num_bytes} bytes): {_margin(curve.points[count], codecs['webp']):+.2f} dB"
        for count in sorted(curve.points)
        if codecs["webp"].get(curve.points[count].num_bytes, _NOTHING).reached == 1
    )
    rising = all(a.psnr < b.psnr for a, b in zip(_points(curve), _points(curve)[1:], strict=False))
    part = f"""\
Measured on {len(pictures)} held-out crops by the bundled float16 weights, after {items:,} training crops. Means over crops, on
8-bit pictures; a percentage is the share of crops that the codec could store in that many bytes (the mean is over those).

{markdown_table(curve, codecs)}

- Against shrink-then-WebP at equal bytes, where every crop fits: {margins}.
- PSNR rises with every row: {"yes" if rising else "no"}. Codebook used on these crops: {curve.codebook_used:.1%}.
- Smallest file of the first crop, in bytes: {smallest}. With more bytes (PSNR): {larger}."""
    return with_measured(text, part)


def _points(curve: Curve) -> list[Point]:
    return [curve.points[count] for count in sorted(curve.points)]


def _margin(point: Point, codec: Mapping[int, Point]) -> float:
    return point.psnr - codec[point.num_bytes].psnr


def _at(points: Mapping[int, Point], budget: int) -> str:
    if budget not in points:
        return f"nothing in {budget} bytes"
    share = "" if points[budget].reached == 1 else f" for {points[budget].reached:.0%} of the crops"
    return f"{points[budget].psnr:.2f} dB in {budget} bytes{share}"


def main() -> None:
    """Command line."""
    arguments = command_line(__doc__, "photos").parse_args()
    torch.set_grad_enabled(False)
    print(json.dumps(release(arguments.run, recipe_of(arguments), arguments.card).to_dict(), indent=1))


if __name__ == "__main__":
    main()
