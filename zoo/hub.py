"""Published checkpoints: downloaded, checked, read without executing anything, and adapted to our own layout.

Most lie on the Hub; `tokenzoo.outside` gets those that do not.

Safetensors are read as they are. A pickle is read once, with `weights_only=True`, and its adapted weights are kept as
safetensors in the cache. What was checked and converted lies in `tokenzoo/` of huggingface_hub's assets cache, or of
`cache_dir`.
"""

import argparse
import hashlib
import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported lazily
from safetensors import SafetensorError
from torch import Tensor

from tokenzoo.card import Card
from tokenzoo.outside import published_file
from tokenzoo.partial import fetch_tensors
from tokenzoo.published import with_published_config
from tokenzoo.registry import closest, tokenizer_class
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.building import build
from tokenzoo.tokenizers.download import DamagedError, fetch, forgetting_damaged
from tokenzoo.tokenizers.errors import ConfigError, DownloadError, UnknownTokenizerError, WeightsError
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.tokenizers.pretrained import read_weights, write_weights
from tokenzoo.tokenizers.torchscript import is_torchscript, read_torchscript

if TYPE_CHECKING:
    from tokenzoo.tokenizers import Tokenizer

CONVERTED_VERSION = 1

_ZIP_MAGIC = b"PK\x03\x04"
_REFUSED = re.compile(r"(?:GLOBAL|unrecognized function|instantiate) ([\w.]+)")  # in the words of torch's unpickler

_log = logging.getLogger(__name__)
State = dict[str, Tensor]


def load_card(
    card: Card,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> "Tokenizer":
    """The tokenizer of a card, in eval mode on the CPU; bundled weights need no network and write nothing.

    Args:
        card: Says where the weights are and how they are laid out.
        revision: Instead of the card's; the card's sha256 then says nothing, and is not checked.
        cache_dir: Instead of huggingface_hub's cache.
        token: Instead of the one that `hf auth login` stored.
        local_files_only: Use the cache only.

    Raises:
        ConfigError: If the card's config is not one that the architecture takes, or weights that are not on the Hub are asked
            for by revision.
        DownloadError: If the file cannot be had.
        UnknownTokenizerError: If the card's architecture or adapter is not known.
        WeightsError: If the weights are damaged, do not fit, or would execute code when read.
    """
    cls = tokenizer_class(card.architecture)
    adapter = find_adapter(card, cls)
    own_cache = (cache_dir or Path(constants.HF_ASSETS_CACHE)) / "tokenzoo"
    if card.source.repo is None and revision is not None:
        where = "came with the package" if card.bundled else "is not on the Hub"
        raise ConfigError(f"{card.name} {where} and has no revisions: expected no revision={revision!r}")
    if card.source.outside:
        return _load_outside(card, cls, adapter, own_cache, local_files_only)
    if card.bundled:
        return assemble(card, cls, _bundled_state(card, adapter), None)
    wanted = revision or card.source.revision

    def get(repo: str, file: str) -> Path:
        return fetch(
            repo,
            file,
            revision=wanted if repo == card.source.repo else None,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )

    card = with_published_config(card, cls, get)
    if card.source.tensors is not None:
        path, commit = fetch_tensors(
            str(card.source.repo),
            card.source.file,
            card.source.tensors,
            own_cache=own_cache,
            revision=wanted,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        with forgetting_damaged(path):
            return assemble(card, cls, read_published(path, adapter), commit)
    path = get(str(card.source.repo), card.source.file)
    trusted = card.source.sha256 if wanted == card.source.revision else None
    with forgetting_damaged(path):
        _verify_once(path, trusted or _sha256_by_name(path), own_cache)
        state = _adapted(path, adapter, own_cache, in_hub=card.source.file)
        return assemble(card, cls, state, _commit_of(path, card.source.file))


def assemble(card: Card, cls: "type[Tokenizer]", state: Mapping[str, Tensor], revision: str | None) -> "Tokenizer":
    """A card's tokenizer from weights in our own layout."""
    tokenizer = build(cls, card.config, state, card.name)
    tokenizer.name, tokenizer.revision, tokenizer.card_text = card.name, revision, card.text
    return tokenizer


def find_adapter(card: Card, cls: "type[Tokenizer]") -> Adapter:
    """The adapter that a card names; one that changes nothing where it names none.

    Raises:
        UnknownTokenizerError: If the architecture has no adapter of this name.
    """
    if card.source.adapter is None:
        return Adapter()
    if card.source.adapter not in cls.adapters:
        known = closest(card.source.adapter, set(cls.adapters))
        raise UnknownTokenizerError(f"card {card.name!r}: {card.architecture} has no adapter {card.source.adapter!r}{known}")
    return cls.adapters[card.source.adapter]


def read_published(path: Path, adapter: Adapter) -> State:
    """A published checkpoint in our own layout; `.safetensors` by its name, anything else a PyTorch pickle.

    Raises:
        WeightsError: If the file is damaged, holds no state dict, or would execute code when read; nothing is executed.
    """
    published = read_weights(path) if path.suffix == ".safetensors" else _read_pickle(path, adapter)
    ours = adapter.to_ours(published)
    for key, value in ours.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{path}: expected tensors only, got {key!r} of type {type(value).__name__}")
    return ours


def verify(path: Path, expected: str | None) -> None:
    """Compares a file's sha256 with the one expected, where one is.

    Raises:
        WeightsError: If they differ.
    """
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DamagedError(f"expected {path} to have sha256 {expected}, got {found}: it is damaged, or another file")


# -- parts


def _load_outside(card: Card, cls: "type[Tokenizer]", adapter: Adapter, own_cache: Path, local_files_only: bool) -> "Tokenizer":
    """A damaged file is forgotten only if it can be downloaded again: the user's own copy is left where it is."""
    path = published_file(card, own_cache, local_files_only=local_files_only)
    with forgetting_damaged(path) if card.source.url else nullcontext():
        _verify_once(path, card.source.sha256, own_cache)
        return assemble(card, cls, _adapted(path, adapter, own_cache), None)


def _bundled_state(card: Card, adapter: Adapter) -> State:
    entry = files(card.package).joinpath(card.source.file)
    if not entry.is_file():
        raise DownloadError(f"the weights of {card.name} are missing from {card.package}: reinstall the package")
    with as_file(entry) as path:
        verify(path, card.source.sha256)
        return {name: tensor.clone() for name, tensor in read_published(path, adapter).items()}


def _commit_of(path: Path, file: str) -> str:
    """The commit in a cached file's path, `.../snapshots/<commit>/<file>`."""
    return path.parents[len(Path(file).parts) - 1].name


def _content_name(path: Path) -> str:
    """The name of the content that a cached file links to; what that may link to in turn is named otherwise."""
    return path.readlink().name if path.is_symlink() else path.name


def _sha256_by_name(path: Path) -> str | None:
    """The cache names the content of large files by its sha256."""
    name = _content_name(path)
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def _verify_once(path: Path, expected: str | None, own_cache: Path) -> None:
    """As `verify`, leaving a note in the cache by which the same file is not read again."""
    path = path.resolve()
    status = path.stat()
    note = own_cache / "verified" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    facts = json.dumps({"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": expected}).encode()
    with suppress(OSError):
        if note.read_bytes() == facts:
            return
    verify(path, expected)
    if expected is not None:
        with suppress(OSError):
            write_atomically(note, facts)


def _adapted(path: Path, adapter: Adapter, own_cache: Path, *, in_hub: str | None = None) -> State:
    """The weights in our own layout: straight from safetensors, by way of the conversion cache from a pickle.

    `in_hub` is the file's path in its repository, where it lies in the Hub's cache.
    """
    if path.suffix == ".safetensors":
        return read_published(path, adapter)
    converted = own_cache / "converted" / f"{_key(path, adapter, in_hub)}.safetensors"
    if (state := _read_converted(converted)) is not None:
        return state
    with _locked(converted) as writable:
        if writable and (state := _read_converted(converted)) is not None:
            return state
        state = read_published(path, adapter)
        if writable:
            _keep(state, converted)
        return state


def _key(path: Path, adapter: Adapter, in_hub: str | None) -> str:
    """Names a conversion by its content, its place in the repository, and the adapter's rules.

    A file from elsewhere than the Hub has no name that tells its content, but a size and a date.
    """
    if in_hub is not None:  # .../<repository>/snapshots/<commit>/<file>
        place, content = "/".join(path.parts[-len(Path(in_hub).parts) - 3 :]), _content_name(path)
    else:
        place, content = str(path), f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    rules = re.sub(r"0x[0-9a-f]+", "", repr(adapter))
    identity = f"{CONVERTED_VERSION}|{place}|{content}|{rules}"
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _read_converted(path: Path) -> State | None:
    """Converted weights, unless there are none, or the file is damaged, which is then removed."""
    if not path.exists():
        return None
    try:
        return read_weights(path)
    except WeightsError:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Keeps other processes from converting the same file; `False` where the cache cannot be written."""
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(path.with_suffix(".lock")))
        except OSError as error:
            _warn_uncached(path, error)
            yield False
            return
        yield True


def _keep(state: State, path: Path) -> None:
    try:
        write_weights(state, path)
    except (OSError, SafetensorError) as error:
        _warn_uncached(path, error)


def _warn_uncached(path: Path, error: Exception) -> None:
    _log.warning("%s cannot be written (%s): the published pickle is read anew at each load", path.parent, error)


def _read_pickle(path: Path, adapter: Adapter) -> Mapping[str, Any]:
    """The state dict in a pickle or a TorchScript archive; of classes, only that of training scripts' arguments is known."""
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        with torch.serialization.safe_globals([argparse.Namespace]):  # attributes, nothing else
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        if match := _REFUSED.search(str(error)):
            raise WeightsError(f"{path} would execute code when read ({match[1]}): refused, nothing was executed") from error
        raise DamagedError(f"{path} is damaged, or not a PyTorch checkpoint; nothing in it was executed") from error
    for key in adapter.inside:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{path}: expected a state dict, got {type(checkpoint).__name__}")
    return {str(key): value.detach() if isinstance(value, Tensor) else value for key, value in checkpoint.items()}
