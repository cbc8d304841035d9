"""Folders and Hub repositories in tokenzoo's own layout: `config.json`, `model.safetensors` and `README.md` (the card).

`config.json` holds `{"tokenzoo": format version, "architecture": ..., "name": ..., "config": {...}}` and nothing else: it
picks an architecture and its numbers, and never names anything to import. All transport is huggingface_hub's.
"""

import functools
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import safetensors.torch
import torch
from huggingface_hub import CommitOperationAdd, HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor

from tokenzoo.tokenizers.building import build, parse_device, parse_dtype, place
from tokenzoo.tokenizers.download import DamagedError, fetch, first_line, forgetting_damaged
from tokenzoo.tokenizers.errors import ConfigError, DownloadError
from tokenzoo.tokenizers.files import replacing, write_atomically

if TYPE_CHECKING:
    from tokenzoo.tokenizers.tokenizer import Tokenizer

FORMAT_VERSION = 1
HUB_PREFIX = "hf-hub:"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"

_ARCHITECTURE = re.compile(r"[a-z0-9_]+")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

T = TypeVar("T", bound="Tokenizer")


@dataclass(frozen=True)
class Saved:
    """What a `config.json` says: the architecture (a key of the registry), the card name, and the config's values."""

    architecture: str
    name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Located:
    """A folder, or one commit of a repository, whose config has been read.

    Attributes:
        saved: The config.
        where: For messages.
        revision: The commit; `None` for a folder.
        files: Gets the weights and, where there is one, the card.
    """

    saved: Saved
    where: str
    revision: str | None
    files: Callable[[], tuple[Path, Path | None]]


# -- writing


def save(tokenizer: "Tokenizer", folder: str | Path) -> Path:
    """Writes config, weights and card; each file appears whole or not at all.

    Args:
        tokenizer: Any tokenizer; weights keep their dtype, and tied weights are written twice.
        folder: Made if missing; our three files in it are replaced, others are left alone.

    Returns:
        The folder.
    """
    folder = Path(folder)
    described = {
        "tokenzoo": FORMAT_VERSION,
        "architecture": tokenizer.architecture,
        "name": tokenizer.name,
        "config": tokenizer.config.to_dict(),
    }
    write_weights(tokenizer.state_dict(), folder / WEIGHTS_FILE)
    write_atomically(folder / CARD_FILE, (tokenizer.card_text or _minimal_card(tokenizer)).encode())
    write_atomically(folder / CONFIG_FILE, (json.dumps(described, indent=2) + "\n").encode())
    return folder


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes a state dict as safetensors, whole or not at all; views and tied tensors become tensors of their own."""
    storages: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with replacing(path) as temporary:
        safetensors.torch.save_file(separate, temporary, {"format": "pt"})


def push(tokenizer: "Tokenizer", repo: str, *, token: str | None = None, private: bool = False, message: str) -> str:
    """Uploads what `save` writes in one commit to a model repository, made if missing.

    Args:
        tokenizer: What to upload.
        repo: `org/name`.
        token: Of a user who may write there; by default the one that `hf auth login` stored.
        private: Make a new repository private; otherwise the organisation's default holds.
        message: Of the commit.

    Returns:
        The commit's URL.

    Raises:
        DownloadError: If the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(tokenizer, folder)
        files = [CommitOperationAdd(name, Path(folder, name)) for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)]
        try:
            api.create_repo(repo, private=private or None, exist_ok=True)
            return str(api.create_commit(repo, files, commit_message=message).commit_url)
        except Exception as error:  # huggingface_hub passes on errors of several libraries
            raise DownloadError(
                f"could not upload to {repo} on {api.endpoint}: {first_line(error)}: check the name, and that your token may "
                "write there"
            ) from error


def _minimal_card(tokenizer: "Tokenizer") -> str:
    name = tokenizer.name or tokenizer.architecture
    return f"""---
library_name: tokenzoo
license: unknown
tags: [tokenzoo, {tokenizer.modality}, tokenizer]
---
# {name}

Weights of the architecture `{tokenizer.architecture}` ({tokenizer.modality}), digest `{tokenizer.digest}`, saved by tokenzoo.

Nobody has written a card yet: the licence, the training data and the quality of these weights are not known.
"""


# -- reading


def load(
    cls: type[T],
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> T:
    """Loads what `save` or `push` wrote.

    Args:
        cls: The architecture's class.
        source: A folder, or a Hub repository: `org/name` or `hf-hub:org/name`.
        device: Where to put the weights.
        dtype: Precision of the weights, as a `torch.dtype` or its name; by default the architecture's own.
        revision: Branch, tag or commit of a Hub repository; by default its main branch.
        cache_dir: Instead of huggingface_hub's cache.
        token: Instead of the one that `hf auth login` stored.
        local_files_only: Use the cache only.

    Returns:
        The tokenizer, in eval mode.

    Raises:
        ConfigError: If the config is damaged, is of another architecture or a newer format, or has unknown keys.
        DownloadError: If a file cannot be had.
        WeightsError: If the weights are damaged or do not fit.
    """
    where, precision = parse_device(device), parse_dtype(dtype)
    located = locate(source, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    if located.saved.architecture != getattr(cls, "architecture", None):
        raise ConfigError(
            f"{located.where} holds the architecture {located.saved.architecture!r}, and {cls.__name__} is "
            f"{getattr(cls, 'architecture', 'none')!r}: tokenzoo.load picks the class by itself"
        )
    return place(restore(cls, located), where, precision)


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Located:
    """Finds a folder or repository in our layout and reads its config, but not yet its weights.

    Raises:
        ConfigError: If there is no such folder, or its config is damaged, not ours, or of a newer format.
        DownloadError: If the config cannot be had.
    """
    if not str(source).startswith(HUB_PREFIX) and (Path(source).is_dir() or isinstance(source, Path)):
        return _locate_folder(Path(source), revision)
    repo = str(source).removeprefix(HUB_PREFIX)
    if not _REPOSITORY.fullmatch(repo):
        raise ConfigError(f"expected an existing folder, or a Hub repository org/name, got {str(source)!r}")
    options: _Transport = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    config = fetch(repo, CONFIG_FILE, revision=revision, **options)
    commit = config.parent.name
    files = functools.partial(_files_of_commit, repo, commit, options)
    return Located(read_config(config), f"{repo}@{commit[:12]}", commit, files)


def restore(cls: type[T], located: Located) -> T:
    """The tokenizer that a folder or repository holds, in eval mode on the CPU; errors as `load`."""
    weights, card = located.files()
    with forgetting_damaged(weights) if located.revision else nullcontext():
        state = read_weights(weights)
    tokenizer = build(cls, located.saved.config, state, located.where)
    tokenizer.name, tokenizer.revision = located.saved.name, located.revision
    if card is not None:
        tokenizer.card_text = card.read_text(encoding="utf-8", errors="replace")
    return tokenizer


def read_config(path: Path) -> Saved:
    """Reads a `config.json`, from a source that need not be trusted.

    Raises:
        ConfigError: If it is damaged, is not ours, is of a newer format, or names anything but a registry key.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(values, dict) or "tokenzoo" not in values:
        raise ConfigError(
            f"{path} was not written by tokenzoo: expected the key 'tokenzoo' with a format version. Weights published in "
            "another layout are loaded by their card's name: see tokenzoo.list_models()"
        )
    version = values["tokenzoo"]
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise ConfigError(f"{path} has format {version!r}, expected 1 to {FORMAT_VERSION}: a newer one needs a newer tokenzoo")
    if unknown := values.keys() - {"tokenzoo", "architecture", "name", "config"}:
        raise ConfigError(f"{path} has unknown keys: {', '.join(sorted(unknown))}")
    return _checked(values, path)


def _checked(values: Mapping[str, Any], path: Path) -> Saved:
    architecture, name, config = values.get("architecture"), values.get("name", ""), values.get("config")
    if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
        raise ConfigError(
            f"{path}: expected 'architecture' to be a key of the registry, never an import path, got {architecture!r}"
        )
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ConfigError(f"{path}: expected 'name' to be a string and 'config' an object, got {name!r} and {config!r}")
    return Saved(architecture, name, config)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not yet read.

    Raises:
        WeightsError: If the file is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedError(f"{path} is not a readable safetensors file: {error}") from error


# -- parts


class _Transport(TypedDict):
    cache_dir: str | Path | None
    token: str | None
    local_files_only: bool


def _locate_folder(folder: Path, revision: str | None) -> Located:
    if revision is not None:
        raise ConfigError(f"a folder has no revisions: expected {folder} without revision={revision!r}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} has no {name}: expected a folder that save_pretrained or convert wrote")
    card = folder / CARD_FILE
    files = (folder / WEIGHTS_FILE, card if card.is_file() else None)
    return Located(read_config(folder / CONFIG_FILE), str(folder), None, lambda: files)


def _files_of_commit(repo: str, commit: str, options: _Transport) -> tuple[Path, Path | None]:
    """The weights, and the card, which may be missing; it is asked for over the network only along with the weights."""
    cached = try_to_load_from_cache(repo, WEIGHTS_FILE, cache_dir=options["cache_dir"], revision=commit)
    weights = fetch(repo, WEIGHTS_FILE, revision=commit, **options)
    if isinstance(cached, str):
        options = {**options, "local_files_only": True}
    try:
        return weights, fetch(repo, CARD_FILE, revision=commit, **options)
    except DownloadError:
        return weights, None
