"""`python -m tokenzoo.evaluation.asked_errors`: whether a tokenizer that is asked for an error keeps it, and with what lengths.

Bundles the weights of a folder that training wrote, asks them for several mean absolute errors on held-out crops, and writes
what came of it between the markers on the card: how many tokens were kept, what error they have, and how closely the lengths
follow the sizes of the crops as PNG files, by rank.
"""

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tokenzoo.evaluation.bundling import bundle, half_precision, with_measured
from tokenzoo.loading import load
from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.quality import l1
from tokenzoo.training.recipe import DataRecipe, Recipe
from tokenzoo.training.sources import prepare_crops

ERRORS = (0.03, 0.04, 0.05, 0.06, 0.07, 0.1)


@dataclass(frozen=True)
class Asked:
    """What came of asking for one mean absolute error.

    Attributes:
        error: What was asked for.
        tokens: Mean length, and its 10th and 90th percentile.
        found: Mean error of the reconstructions, and its 10th and 90th percentile.
        within: Share of the pictures whose error is at most the one asked for.
        within_tenth: Share of those whose error exceeds it by at most a tenth.
        unreachable: Share of those whose error exceeds it with all tokens.
        correlation: Spearman's, of the lengths with the sizes of the pictures as PNG files.
    """

    error: float
    tokens: tuple[float, float, float]
    found: tuple[float, float, float]
    within: float
    within_tenth: float
    unreachable: float
    correlation: float


def asked_errors(tokenizer: Tokenizer, pictures: np.ndarray, errors: Sequence[float] = ERRORS) -> list[Asked]:
    """Asks a tokenizer for errors on uint8 pictures `(B, H, W, 3)` of its size."""
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    sizes = [png_size(picture) for picture in pictures]

    def ask(**options: object) -> tuple[np.ndarray, np.ndarray]:
        tokens = tokenizer.encode(images, **options)  # type: ignore[arg-type]  # target or length
        return tokens.lengths[:, 0].numpy(), l1(torch.stack(tokenizer.decode(tokens, native=True)), images).numpy()

    _, least = ask(length=tokenizer.info.max_tokens)
    rows = []
    for error in errors:
        lengths, found = ask(target={"l1": error})
        rows.append(
            Asked(
                error=error,
                tokens=_spread(lengths),
                found=_spread(found),
                within=float((found <= error).mean()),
                within_tenth=float((found <= 1.1 * error).mean()),
                unreachable=float((least > error).mean()),
                correlation=spearman(lengths, sizes),
            )
        )
    return rows


def png_size(picture: np.ndarray) -> int:
    """Bytes of a uint8 picture `(H, W, 3)` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.tell()


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(np.asarray(x)), _ranks(np.asarray(y)))[0, 1])


def markdown(rows: Sequence[Asked]) -> str:
    """The rows as a table."""
    lines = [
        "| asked L1 | tokens (10 to 90 %) | L1 found (10 to 90 %) | within | within + 10 % | out of reach | rank correlation |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        tokens = f"{row.tokens[0]:.1f} ({row.tokens[1]:.0f} to {row.tokens[2]:.0f})"
        found = f"{row.found[0]:.4f} ({row.found[1]:.4f} to {row.found[2]:.4f})"
        shares = f"{row.within:.0%} | {row.within_tenth:.0%} | {row.unreachable:.0%}"
        lines.append(f"| {row.error:g} | {tokens} | {found} | {shares} | {row.correlation:.2f} |")
    return "\n".join(lines)


def release(folder: Path, data: Path, recipe: str, card: Path) -> list[Asked]:
    """Writes `nano/<card>.safetensors` beside `card` and refreshes the card.

    Args:
        folder: What training wrote.
        data: Folder of photos.
        recipe: Says which of them are held out.
        card: The markdown file.
    """
    trained = load(folder)
    state = half_precision(trained.state_dict())
    trained.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in state.items()})
    plan = Recipe.read(recipe).data
    assert isinstance(plan, DataRecipe)
    pictures = prepare_crops(replace(plan, folder=str(data)), folder.parent / "photos").held_out
    rows = asked_errors(trained, pictures)
    measured = f"Measured on {len(pictures)} held-out crops by the bundled float16 weights.\n\n{markdown(rows)}"
    bundle(card, with_measured(card.read_text(), measured), state, trained)
    return rows


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    return float(values.mean()), float(np.quantile(values, 0.1)), float(np.quantile(values, 0.9))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of weights that training wrote")
    parser.add_argument("--recipe", required=True, help="its recipe: a TOML file or the name of a bundled one")
    parser.add_argument("--data", type=Path, required=True, help="folder of photos")
    parser.add_argument("--card", type=Path, required=True, help="the card to refresh")
    arguments = parser.parse_args()
    rows = release(arguments.folder, arguments.data, arguments.recipe, arguments.card)
    print(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
