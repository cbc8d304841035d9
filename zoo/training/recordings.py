"""Training clips from a folder of recordings.

Recordings are decoded once, resampled, and stored as one flat int16 file beside an index; a clip is a stretch of it. Batches
are a pure function of (seed, step): resuming needs no sampler state. Whole recordings are held out, by their names.

Shapes: B batch, S samples.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import replacing, write_atomically
from tokenzoo.tokenizers.waveforms import Audio
from tokenzoo.training.data import find_files, is_held_out

RECORDING_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
STORE_VERSION = 1
_FULL_SCALE = 32767


def find_recordings(root: Path, include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Recordings under `root` whose relative path matches `include` and not `exclude`, as `find_files` finds files."""
    return find_files(root, RECORDING_SUFFIXES, include, exclude)


class RecordingStore:
    """Decoded mono recordings of one sample rate, memory-mapped.

    Args:
        folder: A folder written by `RecordingStore.build`.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.key: str = index["key"]
        self.names: list[str] = index["names"]
        self.offsets: list[int] = index["offsets"]
        self.samples = np.memmap(folder / "samples.i16", dtype=np.int16, mode="r")

    @classmethod
    def build(cls, root: Path, names: Sequence[str], folder: Path, *, sample_rate: int) -> "RecordingStore":
        """Decodes `names` under `root` into `folder`, or opens what an earlier call left there.

        Raises:
            MediaError: If a recording cannot be decoded.
        """
        facts = [(name, (status := (root / name).stat()).st_size, status.st_mtime_ns) for name in names]
        identity = [STORE_VERSION, str(root.resolve()), facts, sample_rate]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        if (folder / "index.json").exists() and (store := cls(folder)).key == key:
            return store
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        media, offsets = Audio(sample_rate), [0]
        with replacing(folder / "samples.i16") as temporary, temporary.open("wb") as file:
            for name in names:
                try:
                    waveform, _ = media.read(root / name)
                except MediaError as error:
                    raise MediaError(f"{error}: leave it out with data.exclude") from error
                samples = (waveform[0].clamp(-1, 1) * _FULL_SCALE).round().short().numpy()
                file.write(samples.tobytes())
                offsets.append(offsets[-1] + len(samples))
        index = {"key": key, "names": list(names), "offsets": offsets}
        write_atomically(folder / "index.json", json.dumps(index).encode())
        return cls(folder)

    def recording(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Samples [start, stop) of a recording, float32 `[S]` in [-1, 1]."""
        first, end = self.offsets[index], self.offsets[index + 1]
        last = end if stop is None else min(end, first + stop)
        return torch.from_numpy(self.samples[first + start : last].astype(np.float32)) / _FULL_SCALE


class ClipSampler:
    """Random clips of some recordings: every stretch is equally likely; what is too short is filled with zeros.

    Args:
        store: The decoded recordings.
        recordings: Indices into `store.names`.
        size: Samples of a clip.
        seed: With the step, the whole state of the sampler.

    Raises:
        ValueError: If there are no recordings.
    """

    def __init__(self, store: RecordingStore, recordings: Sequence[int], *, size: int, seed: int) -> None:
        if not recordings:
            raise ValueError("expected at least one recording to take clips of: check the data folder and data.held_out")
        self.store, self.recordings, self.size, self.seed = store, list(recordings), size, seed
        # A recording has as many clips as samples, but for its end; short ones have one, of about their length.
        lengths = [store.offsets[i + 1] - store.offsets[i] for i in recordings]
        self.starts = [max(1, length - size + 1) for length in lengths]
        weights = np.maximum(lengths, 1)
        self.cumulative = np.cumsum(weights / weights.sum())

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The clips of a step, float32 `(batch_size, 1, size)` in [-1, 1]."""
        random = np.random.default_rng((self.seed, step))
        return torch.stack([self._clip(random) for _ in range(batch_size)])[:, None]

    def _clip(self, random: np.random.Generator) -> Tensor:
        chosen = min(int(np.searchsorted(self.cumulative, random.random(), side="right")), len(self.recordings) - 1)
        start = int(random.integers(self.starts[chosen]))
        samples = self.store.recording(self.recordings[chosen], start, start + self.size)
        return torch.nn.functional.pad(samples, (0, self.size - len(samples)))


def split_recordings(store: RecordingStore, fraction: float) -> tuple[list[int], list[int]]:
    """Indices of (training, held-out) recordings.

    Names without their first folder decide, so that one text is held out in all languages and voices.
    """
    held_out = [i for i, name in enumerate(store.names) if is_held_out(name.split("/", 1)[-1], fraction)]
    return [i for i in range(len(store.names)) if i not in set(held_out)], held_out
