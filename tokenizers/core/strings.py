"""Reading texts into UTF-8 bytes, and bytes back into what they were: `str` or `bytes`.

A `str` is always text and never a path: a file is given as a `pathlib.Path`. Nothing is normalised and no byte is changed,
neither line ends nor a byte order mark.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenzoo.tokenizers.errors import MediaError, TokensError

_SHOWN = 8


@dataclass(frozen=True)
class Strings:
    """The text side of a tokenizer.

    `meta` says what a text was: `{"bytes": length in bytes, "type": "str" or "bytes"}`, and `"surrogates": True` for a `str`
    with surrogates, which UTF-8 has no place for: they are written as CPython's `surrogatepass` does, in three bytes each.
    """

    def items(self, media: Any) -> Sequence[Any]:
        """The texts in what the user passed: a list, or the one text."""
        return media if isinstance(media, (list, tuple)) else [media]

    def read(self, item: Any) -> tuple[Tensor, dict[str, Any]]:
        """One text as uint8 `[N]`.

        Args:
            item: A `str`, bytes, or the path of a file, whose content is a `str` where it is UTF-8, and bytes otherwise.

        Raises:
            MediaError: If it is none of these, or the file cannot be read.
        """
        data, meta = read_text(item)
        return to_tensor(data), meta

    def restore(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> str | bytes:
        """Bytes, uint8 `[N]`, as what the original was, `str` or bytes; without `meta`, as of a language model's tokens, `str`.

        Raises:
            TokensError: If a `str` is wanted and the bytes are not UTF-8.
        """
        data = to_bytes(reconstruction)
        if meta.get("type") == "bytes":
            return data
        try:
            return data.decode("utf-8", "surrogatepass" if meta.get("surrogates") else "strict")
        except UnicodeDecodeError as error:
            found = data[error.start : error.start + _SHOWN].hex(" ")
            raise TokensError(
                f"expected tokens that decode to UTF-8, got bytes that break it at offset {error.start} of {len(data)} "
                f"({error.reason}): {found}. Pass native=True to decode() for the bytes as they are, or leave out the tokens "
                "from there on"
            ) from None


def read_text(item: Any) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a text, and what restores it; see `Strings.read`."""
    if isinstance(item, str):
        return _encoded(item)
    if isinstance(item, (bytes, bytearray, memoryview)):
        data = bytes(item)
        return data, {"bytes": len(data), "type": "bytes"}
    if isinstance(item, os.PathLike):
        data = _content(Path(item))
        return data, {"bytes": len(data), "type": "str" if _is_utf8(data) else "bytes"}
    raise MediaError(f"expected a text: a str, bytes, or the pathlib.Path of a file, got {type(item).__name__}")


def to_tensor(data: bytes) -> Tensor:
    """Bytes as uint8 `[N]`."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def to_bytes(tensor: Tensor) -> bytes:
    """The inverse of `to_tensor`."""
    return tensor.cpu().numpy().tobytes()


def _encoded(text: str) -> tuple[bytes, dict[str, Any]]:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = text.encode("utf-8", "surrogatepass")
        return data, {"bytes": len(data), "type": "str", "surrogates": True}
    return data, {"bytes": len(data), "type": "str"}


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise MediaError(f"{path} is a folder: pass its files, or use the command line, which takes folders")
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path} cannot be read: {reason}: pass a text as a str, and only files as a path") from error
