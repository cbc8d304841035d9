"""What a run is trained and evaluated on: photos as crops, recordings and video files as clips, manuals as windows.

Everything is a function of the recipe and the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.audio.mel import mel_distance
from tokenzoo.tokenizers.errors import ConfigError
from tokenzoo.training.clips import ClipCropSampler, ClipStore, find_clips, split_files
from tokenzoo.training.data import CropSampler, PhotoStore, find_photos, split_pictures
from tokenzoo.training.recipe import ClipsRecipe, DataRecipe, MediaRecipe, Recipe, RecordingsRecipe, TextsRecipe
from tokenzoo.training.recordings import ClipSampler, RecordingStore, find_recordings, split_recordings
from tokenzoo.training.texts import TextStore, WindowSampler, find_texts, first_lines

# Steps far from any that is trained on draw the items for `initialise`.
_INITIAL_STEP = 1 << 40
_INITIAL_BATCH = 1000


class Source(Protocol):
    """Training batches and held-out items of one kind of media."""

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The items of a step."""

    def initial(self, count: int) -> Tensor:
        """Items that a tokenizer estimates its start from; photos and video clips as uint8."""

    def evaluate(self, tokenizer: Tokenizer, recipe: Recipe) -> dict[str, float]:
        """How well held-out items are reconstructed."""


def prepare(recipe: Recipe, output: Path) -> Source:
    """Decodes the media of a recipe into its output folder (once)."""
    if isinstance(recipe.data, RecordingsRecipe):
        return prepare_clips(recipe.data, output / "recordings")
    if isinstance(recipe.data, ClipsRecipe):
        return prepare_videos(recipe.data, output / "clips")
    if isinstance(recipe.data, TextsRecipe):
        return prepare_texts(recipe.data, output / "texts")
    return prepare_crops(recipe.data, output / "photos")


@dataclass(frozen=True)
class Crops:
    """Training crops, and the held-out ones as uint8 `(B, H, W, 3)`."""

    training: CropSampler
    held_out: np.ndarray

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Crops float32 `(B, 3, H, W)` in [0, 1]."""
        return self.training.batch(step, batch_size)

    def initial(self, count: int) -> Tensor:
        """Crops uint8 `(count, 3, H, W)`."""
        parts = [
            self.training.crops(_INITIAL_STEP + index, min(_INITIAL_BATCH, count - index))
            for index in range(0, count, _INITIAL_BATCH)
        ]
        return torch.cat([torch.from_numpy(crops).permute(0, 3, 1, 2) for crops in parts])

    def evaluate(self, tokenizer: Tokenizer, recipe: Recipe) -> dict[str, float]:
        """Mean PSNR of held-out crops, at each token count of the recipe; losses, if the tokenizer decodes to features."""
        crops = torch.from_numpy(self.held_out[: recipe.eval_items]).permute(0, 3, 1, 2).float() / 255
        if tokenizer.info.decodes_to == "features":
            return held_out_losses(tokenizer, crops, recipe.batch_size)
        tokens = tokenizer.encode(list(crops))
        measured = {}
        for length in recipe.eval_lengths or (None,):
            part = tokens if length is None else tokens.truncate(length)
            images = torch.stack(tokenizer.decode(part, native=True))
            psnr = tokenizer.qualities["psnr"].measure(images, crops).mean()
            measured["held_out_psnr" if length is None else f"held_out_psnr_{length}"] = float(psnr)
        return measured


@dataclass(frozen=True)
class Clips:
    """Training clips, the held-out ones float32 `(B, 1, S)`, and the indices of held-out recordings in the store."""

    sample_rate: int
    training: ClipSampler
    held_out: Tensor
    held_out_recordings: list[int]

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Clips float32 `(B, 1, S)` in [-1, 1]."""
        return self.training.batch(step, batch_size)

    def initial(self, count: int) -> Tensor:
        """Clips float32 `(count, 1, S)`."""
        return self.training.batch(_INITIAL_STEP, count)

    def evaluate(self, tokenizer: Tokenizer, recipe: Recipe) -> dict[str, float]:
        """Mean distance of mel spectra of held-out clips."""
        clips = self.held_out[: recipe.eval_items]
        decoded = torch.stack(tokenizer.decode(tokenizer.encode(list(clips)), native=True))
        return {"held_out_mel": float(mel_distance(decoded, clips, self.sample_rate))}


@dataclass(frozen=True)
class Videos:
    """Training clips, and the held-out ones as uint8 `(B, T, H, W, 3)`."""

    training: ClipCropSampler
    held_out: np.ndarray

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Clips float32 `(B, T, 3, H, W)` in [0, 1]."""
        return self.training.batch(step, batch_size)

    def initial(self, count: int) -> Tensor:
        """Clips uint8 `(count, T, 3, H, W)`."""
        return torch.from_numpy(self.training.crops(_INITIAL_STEP, count)).permute(0, 1, 4, 2, 3)

    def evaluate(self, tokenizer: Tokenizer, recipe: Recipe) -> dict[str, float]:
        """Mean PSNR of held-out clips, each as a whole; losses, if the tokenizer decodes to features."""
        clips = torch.from_numpy(self.held_out[: recipe.eval_items]).permute(0, 1, 4, 2, 3).float() / 255
        if tokenizer.info.decodes_to == "features":
            return held_out_losses(tokenizer, clips, recipe.batch_size)
        decoded = tokenizer.decode(tokenizer.encode(list(clips)))
        found = [tokenizer.qualities["psnr"].measure(a[None], b[None]) for a, b in zip(decoded, clips, strict=True)]
        return {"held_out_psnr": float(torch.cat(found).mean())}


@dataclass(frozen=True)
class Texts:
    """Training windows, and held-out bytes of each language."""

    training: WindowSampler
    held_out: dict[str, bytes]

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Windows uint8 `(B, N)`."""
        return self.training.batch(step, batch_size)

    def initial(self, count: int) -> Tensor:
        """Windows uint8 `(count, N)`."""
        return self.training.batch(_INITIAL_STEP, count)

    def evaluate(self, tokenizer: Tokenizer, recipe: Recipe) -> dict[str, float]:
        """Bits of tokens per byte of held-out text; where a tokenizer has words that fail, the share that does not."""
        texts = list(self.held_out.values())[: recipe.eval_items]
        tokens = tokenizer.encode(texts)
        measured = {"held_out_bits_per_byte": float(tokens.bits.sum()) / sum(map(len, texts))}
        reconstructed = getattr(tokenizer, "reconstructed", None)
        if reconstructed is not None:
            shares = zip(self.held_out, reconstructed(texts), strict=False)
            measured |= {f"held_out_words_{name}": share for name, share in shares}
        return measured


def held_out_losses(tokenizer: Tokenizer, items: Tensor, batch_size: int) -> dict[str, float]:
    """The objective's losses on held-out items, with the same draws every time."""
    parts = items.split(batch_size)
    losses = [tokenizer(part, generator=torch.Generator().manual_seed(i)).losses for i, part in enumerate(parts)]
    sums = {k: sum(float(x[k]) * len(part) for x, part in zip(losses, parts, strict=True)) for k in losses[0]}
    return {f"held_out_{name}": value / len(items) for name, value in sums.items()}


def prepare_crops(data: DataRecipe, cache: Path) -> Crops:
    """Decodes the photos into `cache` (once) and splits them by picture."""
    root, names = _found(data, "photos", find_photos)
    store = PhotoStore.build(root, names, cache, smallest=data.smallest, largest=data.largest)
    training, held_out = split_pictures(store, data.held_out)
    options: dict[str, Any] = {"size": data.crop_size, "candidates": data.candidates}
    held = CropSampler(store, held_out or training, seed=data.eval_seed, **options)
    return Crops(CropSampler(store, training, seed=data.seed, **options), held.crops(0, data.eval_crops))


def prepare_clips(data: RecordingsRecipe, cache: Path) -> Clips:
    """Decodes the recordings into `cache` (once) and splits them by name."""
    root, names = _found(data, "recordings", find_recordings)
    store = RecordingStore.build(root, names, cache, sample_rate=data.sample_rate)
    training, held_out = split_recordings(store, data.held_out)
    held = ClipSampler(store, held_out or training, size=data.clip_samples, seed=data.eval_seed)
    sampler = ClipSampler(store, training, size=data.clip_samples, seed=data.seed)
    return Clips(data.sample_rate, sampler, held.batch(0, data.eval_clips), held_out)


def prepare_videos(data: ClipsRecipe, cache: Path) -> Videos:
    """Decodes the video files into `cache` (once) and splits them by name."""
    root, names = _found(data, "video files", find_clips)
    sizes = {"smallest": data.smallest, "largest": data.largest, "most_frames": data.most_frames}
    store = ClipStore.build(root, names, cache, **sizes)
    training, held_out = split_files(store, data.held_out)
    options: dict[str, Any] = {"frames": data.frames, "size": data.crop_size, "candidates": data.candidates}
    sampler = ClipCropSampler(store, training, seed=data.seed, **options)
    options |= {"frames": data.eval_frames or data.frames, "size": data.eval_size or data.crop_size}
    held = ClipCropSampler(store, held_out or training, seed=data.eval_seed, **options)
    return Videos(sampler, held.crops(0, data.eval_clips))


def prepare_texts(data: TextsRecipe, cache: Path) -> Texts:
    """Strips the manuals of their markup into `cache` (once) and splits them by document."""
    root, names = _found(data, "manuals", find_texts)
    store = TextStore.build(root, names, cache, held_out=data.held_out)
    sampler = WindowSampler(store.streams(held_out=False), window=data.window, seed=data.seed, flatten=data.flatten)
    held_out = {name: first_lines(stream, data.eval_bytes) for name, stream in store.streams(held_out=True).items()}
    return Texts(sampler, held_out)


def _found(
    data: MediaRecipe, kind: str, find: Callable[[Path, Sequence[str], Sequence[str]], list[str]]
) -> tuple[Path, list[str]]:
    """The folder of a recipe's media, and the names of its files.

    Raises:
        ConfigError: If there is no folder, or nothing in it.
    """
    if not data.folder:
        raise ConfigError(f"expected a folder of {kind}: pass --data, or set data.folder in the recipe")
    root = Path(data.folder)
    names = find(root, data.include, data.exclude)
    if not names:
        raise ConfigError(f"found no {kind} of {list(data.include)} in {root}: unpack them there, or change data.include")
    return root, names
