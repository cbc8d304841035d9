"""The config that a repository publishes beside its weights, read into a card.

It is JSON and stays data: the architecture's `config_from_published` takes the values that it knows out of it, and refuses
everything else.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenzoo.card import Card
from tokenzoo.tokenizers.errors import ConfigError

if TYPE_CHECKING:
    from tokenzoo.tokenizers import Tokenizer


def with_published_config(card: Card, cls: "type[Tokenizer]", get: Callable[[str, str], Path]) -> Card:
    """The card with the values of the published config that its source names, which go before its own.

    Args:
        card: Left as it is where its source names no config.
        cls: The class of its architecture.
        get: Takes a repository and the name of a file in it, and gives the file's path here.

    Raises:
        ConfigError: If the architecture has no published configs, or the file is not JSON, or says what it does not know.
        DownloadError: If the file cannot be had.
    """
    if card.source.config is None:
        return card
    reader = getattr(cls, "config_from_published", None)
    if reader is None:
        raise ConfigError(f"card {card.name!r}: {card.architecture} reads no published config: leave source.config out")
    published = _read(get(str(card.source.repo), card.source.config))
    values = reader(published, lambda repo: _read(get(repo, "config.json")))
    return dataclasses.replace(card, config={**card.config, **values})


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected an object of keys and values, got {type(values).__name__}")
    return values
