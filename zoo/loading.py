"""`load`, `list_models` and `info`: from a name to a tokenizer or its card."""

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenzoo import registry
from tokenzoo.card import Card
from tokenzoo.tokenizers.errors import UnknownTokenizerError

if TYPE_CHECKING:
    import torch

    from tokenzoo.tokenizers import Tokenizer

_HUB = "hf-hub:"


def load(
    name: str | os.PathLike[str],
    *,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | str | None" = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> "Tokenizer":
    """Loads a tokenizer.

    Args:
        name: A card's name (`one_d_piece_s.in1k_256`, the tag may be left out where there is a default), a Hub repository
            (`hf-hub:org/name`), or a folder that `save_pretrained` or `convert` wrote (`./name`, if a card has that name).
        device: Where to put the weights.
        dtype: Precision of the weights, as a `torch.dtype` or its name; by default float32.
        revision: Branch, tag or commit of the Hub repository; by default the card's, or the main branch.
        cache_dir: Instead of huggingface_hub's cache.
        token: Instead of the one that `hf auth login` stored.
        local_files_only: Use the cache only.

    Returns:
        The tokenizer, in eval mode.

    Raises:
        UnknownTokenizerError: If nothing has this name; the closest names are given.
        ConfigError: If a config is not one that the architecture takes.
        DownloadError: If a file cannot be had.
        WeightsError: If weights are damaged, do not fit, or would execute code when read.
    """
    from tokenzoo.tokenizers.building import parse_device, parse_dtype, place

    where, precision = parse_device(device), parse_dtype(dtype)
    options = {
        "revision": revision,
        "cache_dir": None if cache_dir is None else Path(cache_dir).expanduser(),
        "token": token,
        "local_files_only": local_files_only,
    }
    return place(_load(name, options), where, precision)


def list_models(pattern: str | None = None, *, modality: str | None = None, commercial: bool | None = None) -> list[str]:
    """Names of cards.

    Args:
        pattern: Wildcards, such as `"*flex*"`; all names by default.
        modality: `"image"`, `"video"`, `"audio"` or `"text"`.
        commercial: Only weights whose licence allows (`True`) or does not allow (`False`) commercial use.

    Returns:
        The names, sorted; loading one downloads its weights unless `info(name).bundled`.
    """
    return [
        card.name
        for card in registry.cards().values()
        if (pattern is None or fnmatchcase(card.name, pattern))
        and (modality is None or card.modality == modality)
        and (commercial is None or card.commercial == commercial)
    ]


def info(name: str) -> Card:
    """The card of a name, whose tag may be left out as in `load`.

    Raises:
        UnknownTokenizerError: If no card has this name; the closest names are given.
    """
    return registry.find_card(name)


def _load(name: str | os.PathLike[str], options: dict[str, Any]) -> "Tokenizer":
    """The tokenizer on the CPU, from whichever kind of place `name` is."""
    from tokenzoo.hub import load_card

    if not isinstance(name, str):
        return _load_own_layout(Path(name), options)
    if name.startswith(_HUB):
        return _load_repository(name.removeprefix(_HUB), options)
    if "/" in name or os.sep in name:
        return _load_folder(name, options)
    try:
        card = registry.find_card(name)
    except UnknownTokenizerError:
        if name and Path(name).is_dir():
            return _load_folder(name, options)
        raise
    return load_card(card, **options)


def _load_folder(name: str, options: dict[str, Any]) -> "Tokenizer":
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _load_own_layout(folder, options)
    hint = f": for a Hub repository write {_HUB}{name}" if name.count("/") == 1 else ""
    raise UnknownTokenizerError(f"there is no folder {name!r}{hint}")


def _load_repository(repo: str, options: dict[str, Any]) -> "Tokenizer":
    from tokenzoo.hub import load_card

    known = [card for card in registry.cards().values() if card.source.repo == repo]
    if len(known) > 1:
        names = ", ".join(card.name for card in known)
        raise UnknownTokenizerError(f"{repo} holds several checkpoints: choose one of {names}")
    return load_card(known[0], **options) if known else _load_own_layout(f"{_HUB}{repo}", options)


def _load_own_layout(source: str | Path, options: dict[str, Any]) -> "Tokenizer":
    """A folder or repository whose `config.json` picks the architecture from the registry."""
    from tokenzoo.tokenizers import pretrained

    located = pretrained.locate(source, **options)
    return pretrained.restore(registry.tokenizer_class(located.saved.architecture), located)
