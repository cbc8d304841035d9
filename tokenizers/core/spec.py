"""What a stream of tokens means: which checkpoint made it, over which codebooks, at which rate."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenzoo.tokenizers.errors import TokensError

Modality = Literal["image", "video", "audio", "text"]
Variable = Literal["none", "prefix", "codebooks"]


@dataclass(frozen=True, kw_only=True)
class TokenSpec:
    """Describes the tokens of one checkpoint.

    Attributes:
        name: Card name, such as `one_d_piece_s.in1k_256`; empty for a tokenizer that was never named.
        architecture: Key of the registry.
        modality: What is encoded.
        codebook_sizes: Entries of each of the K codebooks; empty for a continuous tokenizer, whose vectors travel in
            `Tokens.extras["vectors"]`.
        digest: Hexadecimal digest of the weights; tokens are decoded only by the weights that made them.
        revision: Commit of the Hub repository the weights came from, where known.
        strides: Steps of the finest codebook that one token of each codebook covers (SNAC: `(4, 2, 1)`).
        variable: What may be cut off the end without making the rest undecodable: nothing, tokens (`"prefix"`), or
            whole codebooks from the last one on (`"codebooks"`).
        max_tokens: Tokens per item and codebook, or `None` where they follow the media's length.
        rate: Frames (steps of the finest codebook) per second, for media that last.
        grid: Shape of the token grid, for tokenizers that have one.
        decodes_to: What `decode` returns: media, or only features that describe them.
        per_token: Names of the extras that have a value for each token, `[B, L, ...]`: what goes for ids goes for them.
    """

    name: str
    architecture: str
    modality: Modality
    codebook_sizes: tuple[int, ...]
    digest: str = ""
    revision: str | None = None
    strides: tuple[int, ...] = ()
    variable: Variable = "none"
    max_tokens: int | None = None
    rate: float | None = None
    grid: tuple[int, ...] | None = None
    decodes_to: Literal["media", "features"] = "media"
    per_token: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.codebook_sizes):
            raise TokensError(f"expected codebooks of at least one entry, got {self.codebook_sizes = }")
        if not self.strides:
            object.__setattr__(self, "strides", (1,) * self.num_codebooks)
        if len(self.strides) != self.num_codebooks or any(stride < 1 for stride in self.strides):
            raise TokensError(f"expected one positive stride per codebook ({self.num_codebooks}), got {self.strides = }")

    @property
    def num_codebooks(self) -> int:
        """K, the number of codebooks; 0 for a continuous tokenizer."""
        return len(self.codebook_sizes)

    @property
    def bits_per_id(self) -> tuple[int, ...]:
        """Bits that one id of each codebook takes when packed: ceil(log2 size)."""
        return tuple((size - 1).bit_length() for size in self.codebook_sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First id of each codebook when the codebooks are laid one after another."""
        return tuple(sum(self.codebook_sizes[:k]) for k in range(self.num_codebooks))

    @property
    def bits_per_second(self) -> float | None:
        """Information per second of media, in bits; `None` for media that do not last."""
        if self.rate is None:
            return None
        per_step = (math.log2(size) / stride for size, stride in zip(self.codebook_sizes, self.strides, strict=True))
        return self.rate * sum(per_step)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, without the values that are defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in defaults}
        if all(stride == 1 for stride in self.strides):
            del values["strides"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != defaults[name]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TokenSpec":
        """The inverse of `to_dict`.

        Raises:
            TokensError: If a field is missing, unknown, or of the wrong kind.
        """
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise TokensError(f"expected the fields of a TokenSpec, got {sorted(values)}: {error}") from None
