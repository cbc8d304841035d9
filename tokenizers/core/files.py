"""Paths of media, and writing files so that a reader sees the whole file or none."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenzoo.tokenizers.errors import MediaError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` so that an interruption leaves no half file."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` for a writer that wants a file name; renamed to `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def media_path(item: str | os.PathLike[str]) -> Path:
    """The path of a file of media that somebody named.

    Raises:
        MediaError: If there is nothing there, or a folder.
    """
    path = Path(item)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        shown = str(path) if len(str(path)) < 200 else f"{str(path)[:100]}... ({len(str(path))} characters)"
        raise MediaError(f"{shown} does not exist, or cannot be read as a path: {error}") from error
    if path.is_dir():
        raise MediaError(f"{path} is a folder: pass its files, or use the command line, which takes folders")
    return path
