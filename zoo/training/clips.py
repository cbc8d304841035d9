"""Training clips from a folder of video files.

Files are decoded once into a pyramid (each level sqrt(2) times smaller than the one above), stored as one flat uint8 file
beside an index. A clip is a window of one level, of some frames on end, so a batch costs a few memory copies. Batches are
a pure function of (seed, step): resuming needs no sampler state. Whole files are held out, by their names.

Shapes: B batch, T frames, H W height and width.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import replacing, write_atomically
from tokenzoo.tokenizers.video_files import open_video
from tokenzoo.training.data import detail, find_files, is_held_out, level_sides

CLIP_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm")
STORE_VERSION = 1
_READ_AT_ONCE = 128


def find_clips(root: Path, include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Video files under `root` whose relative path matches `include` and not `exclude`, as `find_files` finds files."""
    return find_files(root, CLIP_SUFFIXES, include, exclude)


@dataclass(frozen=True)
class ClipLevel:
    """One pyramid level of a file in the store: `offset` in bytes, `frames`, `height` and `width` in pixels."""

    file: int
    offset: int
    frames: int
    height: int
    width: int


class ClipStore:
    """Decoded pyramids of a folder of video files, memory-mapped.

    Args:
        folder: A folder written by `ClipStore.build`.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.key: str = index["key"]
        self.names: list[str] = index["names"]
        self.levels = [ClipLevel(*row) for row in index["levels"]]
        self.pixels = np.memmap(folder / "pixels.u8", dtype=np.uint8, mode="r")

    @classmethod
    def build(
        cls, root: Path, names: Sequence[str], folder: Path, *, smallest: int, largest: int, most_frames: int
    ) -> "ClipStore":
        """Decodes the first `most_frames` of `names` under `root` into `folder`, or opens what an earlier call left there.

        Raises:
            MediaError: If a file cannot be decoded, or none is large enough.
        """
        facts = [(name, (status := (root / name).stat()).st_size, status.st_mtime_ns) for name in names]
        identity = [STORE_VERSION, str(root.resolve()), facts, smallest, largest, most_frames]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        if (folder / "index.json").exists() and (store := cls(folder)).key == key:
            return store
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        levels: list[tuple[int, int, int, int, int]] = []
        with replacing(folder / "pixels.u8") as temporary, temporary.open("wb") as file:
            for number, name in enumerate(names):
                try:
                    clips = _pyramid(root / name, smallest, largest, most_frames)
                except MediaError as error:
                    raise MediaError(f"{error}: leave it out with data.exclude") from error
                for clip in clips:
                    levels.append((number, file.tell(), *clip.shape[:3]))
                    file.write(clip.data)
            if not levels:
                raise MediaError(f"none of {len(names)} files has a short side of {smallest} pixels: lower data.smallest")
        index = {"key": key, "names": list(names), "levels": levels}
        write_atomically(folder / "index.json", json.dumps(index).encode())
        return cls(folder)

    def clip(self, level: ClipLevel) -> np.ndarray:
        """All frames of a level, uint8 `(T, H, W, 3)`."""
        shape = (level.frames, level.height, level.width, 3)
        return self.pixels[level.offset : level.offset + int(np.prod(shape))].reshape(shape)


def _pyramid(path: Path, smallest: int, largest: int, most_frames: int) -> list[np.ndarray]:
    """Levels of a file, uint8 `(T, H, W, 3)`, small to large."""
    with open_video(path) as reader:
        shortest = min(reader.height, reader.width)
        sizes = [
            (max(side, round(reader.width * side / shortest)), max(side, round(reader.height * side / shortest)))
            for side in level_sides(shortest, smallest, largest)
        ]
        count = min(len(reader.times), most_frames)
        levels = [np.empty((count, height, width, 3), np.uint8) for width, height in sizes]
        for start in range(0, count, _READ_AT_ONCE):
            frames = reader.frames(range(start, min(start + _READ_AT_ONCE, count)))
            for at, frame in enumerate(frames, start):
                picture = Image.fromarray(frame)
                for level, size in zip(levels, sizes, strict=True):
                    level[at] = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
    return levels


class ClipCropSampler:
    """Random crops in space and time: a file, then a level, then a time and a place, each uniformly; then a flip.

    Args:
        store: The decoded files.
        files: Indices into `store.names`.
        frames: Of a crop; shorter files are left out.
        size: Side of a crop in pixels; smaller levels are left out.
        seed: With the step, the whole state of the sampler.
        candidates: Crops drawn for each one returned, which is the one whose first frame has the most `detail`.

    Raises:
        ValueError: If no file is long and large enough.
    """

    def __init__(
        self, store: ClipStore, files: Sequence[int], *, frames: int, size: int, seed: int, candidates: int = 1
    ) -> None:
        by_file: dict[int, list[ClipLevel]] = {file: [] for file in files}
        for level in store.levels:
            if level.file in by_file and level.frames >= frames and min(level.height, level.width) >= size:
                by_file[level.file].append(level)
        self.levels = [levels for levels in by_file.values() if levels]
        if not self.levels:
            raise ValueError(f"no video of {len(files)} has {frames} frames of {size} pixels or more: check the data folder")
        self.store, self.frames, self.size, self.seed, self.candidates = store, frames, size, seed, candidates

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The clips of a step, float32 `(batch_size, frames, 3, size, size)` in [0, 1]."""
        return torch.from_numpy(self.crops(step, batch_size)).permute(0, 1, 4, 2, 3).float().div_(255)

    def crops(self, step: int, batch_size: int) -> np.ndarray:
        """The clips of a step, uint8 `(batch_size, frames, size, size, 3)`."""
        random = np.random.default_rng((self.seed, step))
        return np.stack([self._most_detailed(random) for _ in range(batch_size)])

    def _most_detailed(self, random: np.random.Generator) -> np.ndarray:
        return max((self._crop(random) for _ in range(self.candidates)), key=lambda crop: detail(crop[0]))

    def _crop(self, random: np.random.Generator) -> np.ndarray:
        levels = self.levels[random.integers(len(self.levels))]
        level = levels[random.integers(len(levels))]
        start, top, left = (
            int(random.integers(total - wanted + 1))
            for total, wanted in ((level.frames, self.frames), (level.height, self.size), (level.width, self.size))
        )
        crop = self.store.clip(level)[start : start + self.frames, top : top + self.size, left : left + self.size]
        return crop[:, :, ::-1] if random.random() < 0.5 else crop


def split_files(store: ClipStore, fraction: float) -> tuple[list[int], list[int]]:
    """Indices of (training, held-out) files; the last part of a name decides."""
    held_out = [i for i, name in enumerate(store.names) if is_held_out(name.rsplit("/", 1)[-1], fraction)]
    return [i for i in range(len(store.names)) if i not in set(held_out)], held_out
