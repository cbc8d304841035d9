"""How many tokens a picture takes to reach a quality: a measure of how complex it is.

A tokenizer of variable length answers it: by bisection over prefixes, or in one pass where the network itself decides (KARL).
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tokenzoo.loading import load
from tokenzoo.media import to_pil
from tokenzoo.tokenizers import Tokenizer, Tokens
from tokenzoo.tokenizers.errors import TokenizerError, TokensError
from tokenzoo.tokenizers.images import read_image

MODEL = "one_d_piece_nano"
TARGET = {"l1": 0.05}
THUMBNAIL = 200


def complexity(
    media: Any, *, tokenizer: str | Tokenizer = MODEL, target: Mapping[str, float] | None = None, seed: int = 0
) -> list[int]:
    """Tokens (or codebooks, whatever the tokenizer varies) that each item takes to reach a quality.

        >>> tokenzoo.complexity(["sky.jpg", "forest.jpg"])
        [9, 117]

    Args:
        media: One item or a list of items, as `Tokenizer.encode` takes them.
        tokenizer: A tokenizer of variable length, or a name for `tokenzoo.load`; by default the bundled one.
        target: The quality, by default a mean absolute error of `{"l1": 0.05}`. Where a search over prefixes misses it, the
            item gets the full length; a network that decides by itself may miss it at any length.
        seed: For encoders that sample.

    Returns:
        One length per item, in order; a single item gives a list of one.

    Raises:
        MediaError: If an item cannot be read.
        TokensError: If the tokenizer has a fixed length, or does not know the target, or its tokens do not tell how many they
            are.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load(tokenizer)
    return [int(n) for n in tokenizer.encode(media, target=target or TARGET, seed=seed).budgets]


@dataclass(frozen=True)
class Measured:
    """One picture of a folder: how many tokens it took, and whether they reached the target."""

    file: Path
    length: int
    met: bool
    tokens: Tokens


@dataclass
class Survey:
    """What was found in a folder.

    Attributes:
        model: The tokenizer's name.
        target: The quality asked for.
        limit: The longest code there is.
        unit: What is counted, in the plural: tokens, or codebooks.
        asked: Files there were; more than those read and those that failed if the survey was interrupted.
        pictures: Those that could be read.
        failed: Reasons of those that could not.
    """

    model: str
    target: Mapping[str, float]
    limit: int
    unit: str
    asked: int
    pictures: list[Measured] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def ordered(self) -> list[Measured]:
        """From the simplest to the most complex picture; of those of one length, those that miss the target come last."""
        return sorted(self.pictures, key=lambda picture: (picture.length, not picture.met, str(picture.file)))


def measure(tokenizer: Tokenizer, files: Sequence[Path], target: Mapping[str, float]) -> list[Measured]:
    """The pictures in these files, encoded to the target.

    Raises:
        MediaError: If one of them cannot be read.
    """
    encoded = tokenizer.encode(list(files), target=target)
    parts = [encoded[i] for i in range(len(files))]
    return [
        Measured(file, int(tokens.budgets[0]), _meets(tokenizer, tokens, file, target), tokens)
        for file, tokens in zip(files, parts, strict=True)
    ]


def _meets(tokenizer: Tokenizer, tokens: Tokens, file: Path, target: Mapping[str, float]) -> bool:
    """Whether the target was reached: as bisection found, or measured where the network only promised it."""
    note = tokens.meta[0].get("target", {})
    if "met" in note:
        return bool(note["met"])
    original = tokenizer.media.read(file)[0][None]
    decoded = tokenizer.decode(tokens, native=True)[0][None]
    qualities = ((tokenizer.qualities[name], wanted) for name, wanted in target.items())
    return all(bool(quality.meets(quality.measure(decoded, original), wanted)) for quality, wanted in qualities)


def limit_of(tokenizer: Tokenizer) -> tuple[int, str]:
    """The longest code of a picture, and what it is counted in.

    Raises:
        TokensError: If this tokenizer encodes no pictures, or all of them to one length.
    """
    info = tokenizer.info
    limit = info.num_codebooks if info.variable == "codebooks" else info.max_tokens
    if info.modality != "image" or info.variable == "none" or limit is None:
        raise TokensError(f"expected a tokenizer of images whose length varies, got {info.name or info.architecture}")
    return limit, "codebooks" if info.variable == "codebooks" else "tokens"


class Thumbnails:
    """Gives the thumbnails of pictures; none where a file is gone by now, and no more once interrupted.

    Attributes:
        tokenizer: Decodes the tokens.
        interrupted: Whether the user interrupted it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.interrupted = False

    def __call__(self, picture: Measured) -> tuple[bytes, bytes] | None:
        """The thumbnails of a picture and of its reconstruction, where they can be had."""
        if self.interrupted:
            return None
        try:
            return thumbnails(self.tokenizer, picture)
        except KeyboardInterrupt:
            self.interrupted = True
        except (TokenizerError, OSError):
            pass
        return None


def thumbnails(tokenizer: Tokenizer, picture: Measured) -> tuple[bytes, bytes]:
    """A picture and what its tokens decode to, in its proportions, as JPEGs of at most `THUMBNAIL` pixels."""
    original = read_image(picture.file)
    decoded = to_pil(tokenizer.decode(picture.tokens, native=True)[0])
    height, width = picture.tokens.meta[0].get("size", (decoded.height, decoded.width))
    scale = THUMBNAIL / max(height, width)
    shape = (max(1, round(scale * width)), max(1, round(scale * height)))
    whole = to_pil(original) if isinstance(original, Tensor) else original
    return _jpeg(whole), _jpeg(decoded.resize(shape, Image.Resampling.BICUBIC))


def _jpeg(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
