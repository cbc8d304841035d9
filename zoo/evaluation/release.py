"""`python -m tokenzoo.evaluation.release`: bundles a training run's averaged weights and writes what they measure on the card.

The run may still be going on: its last checkpoint is read. Everything between the markers on the card, and the figures of
its front matter, is rewritten; the prose around them is not.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from tokenzoo.card import parse_card
from tokenzoo.evaluation.codecs import CODECS, smallest_file
from tokenzoo.evaluation.rate_distortion import (
    TOKEN_COUNTS,
    Curve,
    Point,
    codec_curves,
    markdown_table,
    tokenizer_curve,
)
from tokenzoo.registry import tokenizer_class
from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.training.checkpoint import Checkpoint
from tokenzoo.training.loop import CHECKPOINT
from tokenzoo.training.recipe import DataRecipe, Recipe
from tokenzoo.training.sources import prepare_crops

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
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
    checkpoint = Checkpoint.load(run / CHECKPOINT)
    state = half_precision({**checkpoint.model, **checkpoint.averaged})
    weights = save(state)
    write_atomically(card.parent / "nano" / f"{card.stem}.safetensors", weights)
    tokenizer = _tokenizer(recipe, state)
    assert isinstance(recipe.data, DataRecipe)
    pictures = prepare_crops(recipe.data, run / "photos").held_out
    curve = tokenizer_curve(tokenizer, pictures)
    codecs = measured_codecs(pictures, run / "codecs.json")
    text = refreshed(card.read_text(), curve, codecs, checkpoint.step * recipe.batch_size, pictures)
    text = with_source(text, weights, sum(p.numel() for p in tokenizer.parameters()))
    parse_card(card.stem, text)
    write_atomically(card, text.encode())
    write_atomically(run / "released.json", json.dumps({"step": checkpoint.step, **curve.to_dict()}, indent=1).encode())
    return curve


def half_precision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point weights as float16.

    Raises:
        ValueError: If a weight is too large for it.
    """
    halves = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in state.items()}
    for key, tensor in halves.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{key} does not fit into float16: keep these weights in float32")
    return halves


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
    if BEGIN not in text or END not in text:
        raise ValueError(f"expected the card to hold {BEGIN} and {END}: the measured part goes between them")
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
    part = f"""{BEGIN}
Measured on {len(pictures)} held-out crops by the bundled float16 weights, after {items:,} training crops. Means over crops, on
8-bit pictures; a percentage is the share of crops that the codec could store in that many bytes (the mean is over those).

{markdown_table(curve, codecs)}

- Against shrink-then-WebP at equal bytes, where every crop fits: {margins}.
- PSNR rises with every row: {"yes" if rising else "no"}. Codebook used on these crops: {curve.codebook_used:.1%}.
- Smallest file of the first crop, in bytes: {smallest}. With more bytes (PSNR): {larger}.
{END}"""
    before, _, rest = text.partition(BEGIN)
    return before + part + rest.partition(END)[2]


def with_source(text: str, weights: bytes, params: int) -> str:
    """The card with the digest, size and parameter count of the weights in its front matter."""
    values = {"sha256": hashlib.sha256(weights).hexdigest(), "size_mb": round(len(weights) / 1e6, 1), "params": params}
    for key, value in values.items():
        text, found = re.subn(rf"(?m)^(\s+{key}:).*$", rf"\g<1> {value}", text, count=1)
        if not found:
            raise ValueError(f"expected the card's front matter to have {key}")
    return text


def _points(curve: Curve) -> list[Point]:
    return [curve.points[count] for count in sorted(curve.points)]


def _margin(point: Point, codec: Mapping[int, Point]) -> float:
    return point.psnr - codec[point.num_bytes].psnr


def _at(points: Mapping[int, Point], budget: int) -> str:
    if budget not in points:
        return f"nothing in {budget} bytes"
    share = "" if points[budget].reached == 1 else f" for {points[budget].reached:.0%} of the crops"
    return f"{points[budget].psnr:.2f} dB in {budget} bytes{share}"


def _tokenizer(recipe: Recipe, state: Mapping[str, Tensor]) -> Tokenizer:
    """As `tokenzoo.load` would build it from these weights."""
    cls: Any = tokenizer_class(recipe.architecture)
    tokenizer: Tokenizer = cls(cls.config_class.from_dict(recipe.config))
    tokenizer.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return tokenizer.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of the training run")
    parser.add_argument("--recipe", required=True, help="its recipe: a TOML file or the name of a bundled one")
    parser.add_argument("--data", required=True, help="folder of photos")
    parser.add_argument("--card", type=Path, required=True, help="the card to refresh")
    arguments = parser.parse_args()
    plan = Recipe.read(arguments.recipe).to_dict()
    plan["data"]["folder"] = arguments.data
    torch.set_grad_enabled(False)
    print(json.dumps(release(arguments.run, Recipe.from_dict(plan), arguments.card).to_dict(), indent=1))


if __name__ == "__main__":
    main()
