"""Media on disk: finding the files of a modality, and writing decoded items."""

import io
import os
from collections.abc import Iterable
from fractions import Fraction
from importlib.util import find_spec
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
    "video": frozenset([".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"]),
}
DECODED_SUFFIX = {"audio": ".wav", "image": ".png", "text": ".txt", "video": ".mp4" if find_spec("av") else ".npy"}
FEATURES_SUFFIX = ".npy"


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


def write(item: Any, path: Path, modality: str, *, sample_rate: int | None = None, fps: float | None = None) -> None:
    """Writes a decoded item as a file, whole or not at all.

    Args:
        item: An image float32 `[3, H, W]` in [0, 1], audio float32 `[C, S]` in [-1, 1], a clip float32 `[T, 3, H, W]` in
            [0, 1], or a text, `str` (written as UTF-8, line ends as they are) or bytes.
        path: The file. A clip is written as H.264 (`.mp4`, needs PyAV) or as the array itself (`.npy`), in which any other
            tensor, such as features, can be written too.
        modality: What the item is.
        sample_rate: Of audio, in Hz.
        fps: Of a clip, in frames per second; 25 where it is not known.

    Raises:
        MediaError: If items of this modality cannot be written.
    """
    if path.suffix == FEATURES_SUFFIX:
        buffer = io.BytesIO()
        np.save(buffer, item.cpu().numpy())
        write_atomically(path, buffer.getvalue())
    elif modality == "image":
        write_atomically(path, encode_png(item))
    elif modality == "audio" and sample_rate is not None:
        write_atomically(path, encode_wav(item, sample_rate))
    elif modality == "video":
        write_atomically(path, encode_mp4(item, fps or 25.0))
    elif modality == "text":
        write_atomically(path, item if isinstance(item, bytes) else item.encode("utf-8", "surrogatepass"))
    else:
        raise MediaError(
            f"expected an image, a clip, a text, or audio with its sample rate, to write to {path}, got {modality}"
        )


def encode_mp4(clip: Tensor, fps: float) -> bytes:
    """A clip float32 `[T, 3, H, W]` in [0, 1] as H.264 in MP4, rounded to 8 bits, nearly lossless (x264's `crf` 10).

    Odd heights and widths, which H.264's usual colours cannot have, are stored with full colours (4:4:4).

    Raises:
        MediaError: If it is no clip, PyAV is not installed, or was built without an H.264 encoder.
    """
    if clip.dim() != 4 or clip.shape[1] != 3 or not clip.numel():
        raise MediaError(f"expected a clip [T, 3, H, W] to write as .mp4, got {tuple(clip.shape)}: write it as .npy")
    try:
        import av
    except ImportError:
        raise MediaError("writing .mp4 needs PyAV: pip install 'tokenzoo[video]', or write .npy") from None
    buffer = io.BytesIO()
    height, width = clip.shape[2:]
    try:
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "10"})
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            for frame in clip:
                container.mux(stream.encode(av.VideoFrame.from_image(to_pil(frame))))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(
            f"a clip of {width} x {height} at {fps:g} frames per second cannot be written as .mp4: {error}"
        ) from error
    return buffer.getvalue()


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
