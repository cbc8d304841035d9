"""Configs: flat, typed, validated dataclasses, read from JSON without importing anything they name."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from huggingface_hub.errors import StrictDataclassError

from tokenzoo.tokenizers.errors import ConfigError


@dataclass(kw_only=True)
class TokenizerConfig:
    """Base of every config. Subclasses are `@strict @dataclass(kw_only=True)`, with published defaults."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form with every field."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the config from JSON values.

        Raises:
            ConfigError: If a key is unknown, or a value has the wrong type or breaks a rule of the architecture.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                close = difflib.get_close_matches(str(key), fields, 1)
                hint = f": did you mean {close[0]!r}?" if close else f": the keys are {', '.join(sorted(fields))}"
                raise ConfigError(f"{cls.__name__} has no key {key!r}{hint}")
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        except (StrictDataclassError, ValueError, TypeError) as error:
            reason = error.__cause__ or error
            raise ConfigError(f"{cls.__name__} refuses these values: {reason}") from error
