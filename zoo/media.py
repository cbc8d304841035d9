"""Media on disk: finding the files of a modality, and writing decoded items."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import write_atomically

EXTENSIONS = {
    "audio": frozenset([".aif", ".aiff", ".au", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"]),
    "image": frozenset([".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"]),
    "text": frozenset([".csv", ".htm", ".html", ".json", ".jsonl", ".log", ".md", ".py", ".rst", ".tex", ".txt", ".xml"]),
    "tokens": frozenset([".tok", ".safetensors"]),
}
DECODED_SUFFIX = {"audio": ".wav", "image": ".png", "text": ".txt"}


def find(paths: Iterable[str | os.PathLike[str]], kind: str) -> list[tuple[Path, Path]]:
    """Files of one kind, and where each lies relative to the folder it was found in.

    Args:
        paths: Files, taken whatever their extension, and folders, searched for the kind's extensions; hidden files and
            folders are passed over.
        kind: A modality, or `"tokens"`.

    Returns:
        Pairs (file, relative path), sorted within each folder.

    Raises:
        MediaError: If a path does not exist, or no file was found.
    """
    found: list[tuple[Path, Path]] = []
    given = [Path(path) for path in paths]
    for path in given:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS[kind] and file.is_file())
            relative = [(file, file.relative_to(path)) for file in inside]
            found += [(file, rest) for file, rest in relative if not any(part.startswith(".") for part in rest.parts)]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise MediaError(f"{path} does not exist")
    if not found:
        wanted = " ".join(sorted(EXTENSIONS[kind]))
        raise MediaError(f"no {kind} files in {', '.join(map(str, given)) or 'an empty list'}: looked for {wanted}")
    return found


def write(item: Any, path: Path, modality: str, *, sample_rate: int | None = None) -> None:
    """Writes a decoded item as a file, whole or not at all.

    Args:
        item: An image float32 `[3, H, W]` in [0, 1], audio float32 `[C, S]` in [-1, 1], or a text, `str` (written as UTF-8,
            line ends as they are) or bytes.
        path: The file.
        modality: What the item is.
        sample_rate: Of audio, in Hz.

    Raises:
        MediaError: If items of this modality cannot be written.
    """
    if modality == "image":
        write_atomically(path, encode_png(item))
    elif modality == "audio" and sample_rate is not None:
        write_atomically(path, encode_wav(item, sample_rate))
    elif modality == "text":
        write_atomically(path, item if isinstance(item, bytes) else item.encode("utf-8", "surrogatepass"))
    else:
        raise MediaError(f"expected an image, a text, or audio with its sample rate, to write to {path}, got {modality}")


def encode_wav(waveform: Tensor, sample_rate: int) -> bytes:
    """Audio float32 `[C, S]` in [-1, 1] as WAV, rounded to 16 bits."""
    import soundfile

    samples = (waveform.clamp(-1, 1) * 32767).round().short().T
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.cpu().numpy(), sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def encode_png(image: Tensor) -> bytes:
    """An image float32 `[3, H, W]` in [0, 1] as PNG, rounded to 8 bits."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def to_pil(image: Tensor) -> Image.Image:
    """An image float32 `[3, H, W]` in [0, 1] as a Pillow image, rounded to 8 bits."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy()))
