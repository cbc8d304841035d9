"""Training crops from a folder of photos.

Photos are decoded once into a pyramid (each level sqrt(2) times smaller than the one above), stored as one flat uint8
file beside an index. A crop is a window of one level, so a batch costs a few memory copies and a crop of a given size shows
anything from a detail to the whole scene. Batches are a pure function of (seed, step): resuming needs no sampler state.

Copies of one picture (other sizes, other crops) are grouped, and whole groups are held out.

Shapes: B batch, H W height and width.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import replacing, write_atomically

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
STORE_VERSION = 1
MAX_PIXELS = 100_000_000
SAME_PICTURE_BITS = 10


def find_files(root: Path, suffixes: Sequence[str], include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Files under `root` that end so and whose relative path matches `include` and not `exclude`.

    Args:
        root: The folder.
        suffixes: Lower case, with their dots; upper case in names counts as lower.
        include: `fnmatch` globs; `*` also matches `/`.
        exclude: The same.

    Returns:
        Sorted relative POSIX paths. Symbolic links are skipped: they name a file that is listed already.
    """
    found = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() not in suffixes or path.is_symlink() or not path.is_file():
            continue
        if any(fnmatch(name, glob) for glob in include) and not any(fnmatch(name, glob) for glob in exclude):
            found.append(name)
    return found


def find_photos(root: Path, include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Photos under `root` whose relative path matches `include` and not `exclude`, as `find_files` finds files."""
    return find_files(root, PHOTO_SUFFIXES, include, exclude)


def open_photo(path: Path, shortest: int) -> Image.Image:
    """Decode to upright RGB, over white where transparent; a JPEG is decoded no larger than `shortest` needs."""
    image = Image.open(path)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{path}: {image.size} is over {MAX_PIXELS} pixels: shrink it, or leave it out")
    image.draft("RGB", (shortest, shortest))
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    rgba = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def fingerprint(image: Image.Image) -> int:
    """64-bit difference hash of the central square: near-copies differ in few bits, whatever their size or aspect."""
    side = min(image.size)
    square = ImageOps.fit(image, (side, side)).convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(square, dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def group_copies(fingerprints: Sequence[int]) -> list[int]:
    """Label each picture with the index of the first one that it is a near-copy of (itself when there is none)."""
    labels: list[int] = []
    for index, bits in enumerate(fingerprints):
        same = (j for j in range(index) if (bits ^ fingerprints[j]).bit_count() <= SAME_PICTURE_BITS)
        first = next(same, None)
        labels.append(index if first is None else labels[first])
    return labels


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the picture is held out: decided by its name alone, so that adding photos moves none across the split."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def level_sides(shortest: int, smallest: int, largest: int) -> list[int]:
    """Shortest sides of the pyramid levels: `smallest` times powers of sqrt(2), never larger than the photo."""
    top = min(shortest, largest)
    sides: list[int] = []
    while (side := round(smallest * 2 ** (len(sides) / 2))) <= top:
        sides.append(side)
    return sides


def pyramid(image: Image.Image, smallest: int, largest: int) -> Iterator[np.ndarray]:
    """Levels of a photo, uint8 `(H, W, 3)`, small to large."""
    for side in level_sides(min(image.size), smallest, largest):
        scale = side / min(image.size)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        yield np.asarray(image.resize(size, Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Level:
    """One pyramid level in the store: `offset` in bytes, `height` and `width` in pixels."""

    picture: int
    offset: int
    height: int
    width: int


class PhotoStore:
    """Decoded pyramids of a folder of photos, memory-mapped.

    Args:
        folder: A folder written by `PhotoStore.build`.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.names: list[str] = index["names"]
        self.key: str = index["key"]
        self.levels = [Level(*row) for row in index["levels"]]
        self.pixels = np.memmap(folder / "pixels.u8", dtype=np.uint8, mode="r")

    @classmethod
    def build(cls, root: Path, names: Sequence[str], folder: Path, *, smallest: int, largest: int) -> "PhotoStore":
        """Decode `names` under `root` into `folder`, or open what an earlier call left there.

        Pictures that cannot be decoded raise; the first of several near-copies is kept.
        """
        facts = [(name, (status := (root / name).stat()).st_size, status.st_mtime_ns) for name in names]
        identity = [STORE_VERSION, str(root.resolve()), facts, smallest, largest]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        if (folder / "index.json").exists() and (store := cls(folder)).key == key:
            return store
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        kept: list[str] = []
        levels: list[tuple[int, int, int, int]] = []
        fingerprints: list[int] = []
        with replacing(folder / "pixels.u8") as temporary, temporary.open("wb") as file:
            for name in names:
                try:
                    image = open_photo(root / name, largest)
                except Exception as error:  # Pillow's readers raise anything on damaged files
                    raise MediaError(f"{root / name}: {error}: leave it out with data.exclude") from error
                fingerprints.append(fingerprint(image))
                if group_copies(fingerprints)[-1] != len(fingerprints) - 1:
                    continue
                for level in pyramid(image, smallest, largest):
                    levels.append((len(kept), file.tell(), level.shape[0], level.shape[1]))
                    file.write(level.tobytes())
                kept.append(name)
            if not levels:
                raise MediaError(f"none of {len(names)} photos has a short side of {smallest} pixels: lower data.smallest")
        write_atomically(folder / "index.json", json.dumps({"key": key, "names": kept, "levels": levels}).encode())
        return cls(folder)

    def window(self, level: Level, top: int, left: int, size: int) -> np.ndarray:
        """uint8 `(size, size, 3)` at (`top`, `left`) of a level."""
        end = level.offset + level.height * level.width * 3
        pixels = self.pixels[level.offset : end].reshape(level.height, level.width, 3)
        return pixels[top : top + size, left : left + size]


def detail(crop: np.ndarray) -> float:
    """Mean absolute difference between neighbouring pixels of a uint8 `(H, W, 3)` crop, in grey levels."""
    grey = crop.astype(np.int16)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


class CropSampler:
    """Random crops of some pictures of a store: a picture, then a level, then a place, each uniformly; then a flip.

    Args:
        store: The decoded photos.
        pictures: Indices into `store.names`.
        size: Side of a crop in pixels; smaller levels are left out.
        seed: With the step, the whole state of the sampler.
        candidates: Crops drawn for each one returned, which is the one with the most `detail`: 1 takes photos as they
            are, with their skies and blur; more makes a harder set.

    Raises:
        ValueError: If no picture has a level of `size` pixels.
    """

    def __init__(self, store: PhotoStore, pictures: Sequence[int], *, size: int, seed: int, candidates: int = 1) -> None:
        by_picture: dict[int, list[Level]] = {picture: [] for picture in pictures}
        for level in store.levels:
            if level.picture in by_picture and min(level.height, level.width) >= size:
                by_picture[level.picture].append(level)
        self.levels = [levels for levels in by_picture.values() if levels]
        if not self.levels:
            raise ValueError(f"no photo of {len(pictures)} has a side of {size} pixels or more: check the data folder")
        self.store, self.size, self.seed, self.candidates = store, size, seed, candidates

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The crops of a step, float32 `(batch_size, 3, size, size)` in `[0, 1]`."""
        return torch.from_numpy(self.crops(step, batch_size)).permute(0, 3, 1, 2).float().div_(255)

    def crops(self, step: int, batch_size: int) -> np.ndarray:
        """The crops of a step, uint8 `(batch_size, size, size, 3)`."""
        random = np.random.default_rng((self.seed, step))
        return np.stack([max((self._crop(random) for _ in range(self.candidates)), key=detail) for _ in range(batch_size)])

    def _crop(self, random: np.random.Generator) -> np.ndarray:
        levels = self.levels[random.integers(len(self.levels))]
        level = levels[random.integers(len(levels))]
        top = random.integers(level.height - self.size + 1)
        left = random.integers(level.width - self.size + 1)
        window = self.store.window(level, int(top), int(left), self.size)
        return window[:, ::-1] if random.random() < 0.5 else window


def split_pictures(store: PhotoStore, fraction: float, never: Sequence[str] = ()) -> tuple[list[int], list[int]]:
    """Indices of (training, held-out) pictures; names matching a glob in `never` are never held out."""
    held_out = [
        index
        for index, name in enumerate(store.names)
        if is_held_out(name, fraction) and not any(fnmatch(name, glob) for glob in never)
    ]
    return [index for index in range(len(store.names)) if index not in set(held_out)], held_out
