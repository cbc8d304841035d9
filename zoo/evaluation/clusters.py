"""`python -m tokenzoo.evaluation.clusters`: bundles a VQToken's averaged weights, and how much of a clip its clusters keep.

The run may still be going on: its last checkpoint is read. Measured are clips of held-out files, and whether a clip finds the
one that was filmed next to it among those of all files. Everything between the markers on the card, and the figures of its
front matter, is rewritten; the prose around them is not.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.card import parse_card
from tokenzoo.evaluation.bundling import averaged_weights, built, bundle, command_line, recipe_of, with_measured, with_source
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.tokenizers.video.vqtoken import VQToken, VQTokenConfig, Whitening, read_out
from tokenzoo.training.clips import ClipStore
from tokenzoo.training.recipe import ClipsRecipe, Recipe
from tokenzoo.training.sources import Videos, prepare_videos

SIZES = (12, 16, 32)
ADAPTIVE = (12, 32)
_FITTED_TO = 24
_PLACE_FRAMES = 6
_PLACE_CLUSTERS = 16


@dataclass(frozen=True)
class Row:
    """What K tokens keep of held-out clips, as means over them.

    Attributes:
        tokens: Per clip.
        cosine: Between a patch's feature and its centroid.
        explained: Share of the variance of unit features within a clip that the centroids explain.
        sampled_cosine: As `cosine`, where K patches evenly spread over the clip stand for the others, each for those that are
            most like it.
        sampled_explained: As `explained`, for the same patches.
        readout: Cosine between a patch's feature and what it reads out of the attention's tokens; `None` if there are fewer
            clusters than frames.
    """

    tokens: float
    cosine: float
    explained: float
    sampled_cosine: float
    sampled_explained: float
    readout: float | None


def closeness(features: Tensor, chosen: Tensor) -> tuple[float, float]:
    """Cosine of features `[N, D]` and what stands for each, and the share of variance of unit features that this explains."""
    units = F.normalize(features, dim=-1)
    left = (units - chosen).square().sum()
    total = (units - units.mean(0)).square().sum()
    return float(F.cosine_similarity(units, chosen).mean()), float(1 - left / total)


def evenly_spread(features: Tensor, count: int) -> Tensor:
    """For each of `[N, D]` the most similar of `count` of them, evenly spread over all, as unit vectors."""
    units = F.normalize(features, dim=-1)
    kept = units[np.linspace(0, len(units) - 1, count).round().astype(int)]
    return kept[(units @ kept.mT).argmax(1)]


def kept(tokenizer: VQToken, clips: Sequence[Tensor], clusters: int | None) -> Row:
    """What K tokens, or as many as each clip wants, keep of features `[T, h * w, D]` of clips."""
    rows = []
    for features in clips:
        ids, codebook = tokenizer.group(features, clusters=clusters)
        flat = features.flatten(0, 1)
        readout = None
        if tokenizer.attention is not None and len(features) <= len(codebook):
            tokens = tokenizer.tokens_of(ids, codebook)
            readout = float(F.cosine_similarity(read_out(flat, tokens), flat).mean())
        near, sampled = closeness(flat, codebook[ids.flatten()]), closeness(flat, evenly_spread(flat, len(codebook)))
        rows.append((len(codebook), *near, *sampled, readout))
    counts, cosine, explained, sampled_cosine, sampled_explained, readouts = zip(*rows, strict=True)
    found = [value for value in readouts if value is not None]
    readout = fmean(found) if found else None
    return Row(fmean(counts), fmean(cosine), fmean(explained), fmean(sampled_cosine), fmean(sampled_explained), readout)


# -- finding the clip that was filmed next to another


def neighbours(store: ClipStore) -> Iterator[tuple[Tensor, Tensor]]:
    """Two clips `[T, 3, H, W]` in [0, 1] of every file: the left side of its beginning, and the right side of its end."""
    for file in range(len(store.names)):
        clip = store.clip(max((level for level in store.levels if level.file == file), key=lambda level: level.height))
        side, last = clip.shape[1], len(clip) - 1
        pair = []
        for start, stop, columns in ((0, 0.4 * last, slice(side)), (0.6 * last, last, slice(-side, None))):
            frames = clip[np.linspace(start, stop, _PLACE_FRAMES).round().astype(int)][:, :, columns]
            pair.append(torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255)
        yield pair[0], pair[1]


def found_again(store: ClipStore, describe: Callable[[Tensor], Tensor]) -> float:
    """Share of clips whose neighbour is the most similar, both ways, by codebooks `[K, D]` that `describe` makes of clips.

    Two codebooks are as similar as their centroids are, on average, to the most similar one of the other.
    """
    pairs = [(F.normalize(describe(a), dim=-1), F.normalize(describe(b), dim=-1)) for a, b in neighbours(store)]
    table = torch.stack([torch.stack([_alike(a, b) for _, b in pairs]) for a, _ in pairs])
    right = torch.arange(len(pairs))
    return float(torch.cat([table.argmax(1) == right, table.argmax(0) == right]).float().mean())


def _alike(a: Tensor, b: Tensor) -> Tensor:
    cosines = a @ b.mT
    return cosines.amax(1).mean() + cosines.amax(0).mean()


def colours(tokenizer: VQToken, clip: Tensor) -> Tensor:
    """The mean colours `[T, h * w, 3]` of a clip's patches, around grey."""
    side = tokenizer.config.image_size // tokenizer.grid[0]
    return F.avg_pool2d(tokenizer.sized(clip), side).flatten(2).mT - 0.5


# -- the card


@torch.no_grad()
def release(run: Path, recipe: Recipe, card: Path, also: Sequence[Path]) -> dict[str, object]:
    """Writes `nano/<card>.safetensors` beside `card` and refreshes it.

    Args:
        run: Output folder of the training run.
        recipe: Its recipe, with the folder of video files.
        card: The markdown file, whose config is what is built.
        also: Other cards of the same weights, whose front matter is refreshed.

    Returns:
        What was measured.
    """
    if not isinstance(recipe.data, ClipsRecipe):
        raise ValueError(f"expected a recipe of clips, got {recipe.data}")
    state, step = averaged_weights(run)
    text = card.read_text()
    tokenizer = built(recipe.architecture, parse_card(card.stem, text).config, state)
    if not isinstance(tokenizer, VQToken):
        raise ValueError(f"expected a recipe of vqtoken, got {recipe.architecture}")
    videos = prepare_videos(recipe.data, run / "clips")
    rows = measured(tokenizer, videos.held_out)
    again = places(tokenizer, videos)
    part = _table(rows, again, len(videos.held_out), videos, step * recipe.batch_size)
    bundle(card, with_measured(text, part), state, tokenizer)
    weights = (card.parent / "nano" / f"{card.stem}.safetensors").read_bytes()
    for other in also:
        front = with_source(other.read_text(), weights, sum(p.numel() for p in tokenizer.parameters()))
        write_atomically(other, front.encode())
    return {"step": step, "kept": {name: vars(row) for name, row in rows.items()}, "found_again": again}


def measured(tokenizer: VQToken, held_out: np.ndarray) -> dict[str, Row]:
    """What is kept of clips uint8 `(B, T, H, W, 3)`, by number of tokens."""
    clips = torch.from_numpy(held_out).permute(0, 1, 4, 2, 3)
    features = [tokenizer.features(tokenizer.sized(clip.float() / 255)) for clip in clips]
    rows = {str(size): kept(tokenizer, features, size) for size in SIZES}
    fewest, most = ADAPTIVE
    changed = {"frames": fewest, "fewest_clusters": fewest, "clusters": most, "iterations": 100}
    adaptive = built("vqtoken", {**tokenizer.config.to_dict(), **changed}, tokenizer.state_dict())
    assert isinstance(adaptive, VQToken)
    return {**rows, f"{fewest} to {most}": kept(adaptive, [part[:fewest] for part in features], None)}


def places(tokenizer: VQToken, videos: Videos) -> dict[str, float]:
    """How often a clip's neighbour is found: by these weights, by a tower of random ones, and by colours."""
    store, fitted_to = videos.training.store, videos.initial(_FITTED_TO)

    def by(describing: VQToken) -> float:
        return found_again(
            store, lambda x: describing.group(describing.features(describing.sized(x)), clusters=_PLACE_CLUSTERS)[1]
        )

    torch.manual_seed(0)
    untrained = VQToken(VQTokenConfig.from_dict(tokenizer.config.to_dict())).eval()
    assert isinstance(untrained.projector, Whitening)
    untrained.initialise(fitted_to, torch.Generator())
    plain = found_again(store, lambda x: tokenizer.group(colours(tokenizer, x), clusters=_PLACE_CLUSTERS)[1])
    return {"these weights": by(tokenizer), "a tower with random weights": by(untrained), "mean colours of patches": plain}


def _table(rows: dict[str, Row], again: dict[str, float], count: int, videos: Videos, items: int) -> str:
    lines = [
        "| tokens per clip | cosine to the centroid | variance explained | cosine, patches kept | explained, patches kept | "
        "cosine, read out of the attention's tokens |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        tokens = name if name.isdigit() else f"{row.tokens:.1f} of {name}"
        read = "-" if row.readout is None else f"{row.readout:.3f}"
        values = (row.cosine, row.explained, row.sampled_cosine, row.sampled_explained)
        lines.append(f"| {tokens} | {' | '.join(f'{value:.3f}' for value in values)} | {read} |")
    table, frames, films = "\n".join(lines), videos.held_out.shape[1], len(videos.training.store.names)
    found = "; ".join(f"{name} {share:.1%}" for name, share in again.items())
    return f"""\
Measured on {count} clips of {frames} frames from held-out files by the bundled float16 weights, after {items:,} training clips;
means over clips. The adaptive row has {ADAPTIVE[0]} frames per clip. "Patches kept" are as many single patches, evenly spread
over the clip, each standing for the patches most like it.

{table}

How often {_PLACE_FRAMES} frames of the left side of a film's beginning find those of the right side of its end, and the other
way round, among {films} films, by {_PLACE_CLUSTERS} centroids each: {found}."""


def main() -> None:
    """Command line."""
    parser: argparse.ArgumentParser = command_line(__doc__, "video files")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="other cards of the same weights")
    arguments = parser.parse_args()
    found = release(arguments.run, recipe_of(arguments), arguments.card, arguments.also)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
