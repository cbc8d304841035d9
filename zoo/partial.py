"""Some tensors of a published checkpoint in several safetensors files, without downloading or reading the rest.

A checkpoint of many gigabytes may hold a tokenizer of a few hundred megabytes. Its index says which file has which tensor, the
start of each file where in it the tensor lies, and those bytes alone are asked for; what was got is kept in the cache as one
safetensors file. Where a whole file is in the Hub's cache already, it is read from there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenzoo.tokenizers.download import DamagedError, fetch, first_line
from tokenzoo.tokenizers.errors import DownloadError, WeightsError
from tokenzoo.tokenizers.files import replacing

INDEX_SUFFIX = ".safetensors.index.json"

_AT_ONCE = 32 << 20
_LONGEST_HEADER = 100_000_000
_TIMEOUT = 60.0
_TRIES = 3


class _Place(NamedTuple):
    """Where a tensor lies in a remote file, and what it is."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int


def fetch_tensors(
    repo: str,
    index: str,
    patterns: Sequence[str],
    *,
    own_cache: Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str]:
    """The tensors whose names match, as one safetensors file in the cache.

    Args:
        repo: `org/name`.
        index: Path of the `.safetensors.index.json` in the repository.
        patterns: Names of tensors (`fnmatch`).
        own_cache: Where to keep what was got.
        revision: Branch, tag or commit; by default the main branch.
        cache_dir: Instead of huggingface_hub's cache.
        token: Instead of the one that `hf auth login` stored.
        local_files_only: Use the cache only.

    Returns:
        The file, and the commit that it is from.

    Raises:
        DownloadError: If something cannot be had.
        WeightsError: If the index or a file is damaged.
    """
    path = fetch(repo, index, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    commit = path.parents[len(PurePosixPath(index).parts) - 1].name
    identity = hashlib.sha256(json.dumps([repo, commit, index, list(patterns)]).encode()).hexdigest()[:32]
    kept = own_cache / "partial" / f"{identity}.safetensors"
    if kept.exists():
        return kept, commit
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                parts = _parts(path, index, patterns)
                _write(kept, [_source(repo, file, names, commit, cache_dir, token, local_files_only) for file, names in parts])
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"the cache {own_cache} cannot be written ({error}): make room, or pass cache_dir=...") from error
    return kept, commit


def read_tensors(index: Path, patterns: Sequence[str]) -> dict[str, Tensor]:
    """The tensors whose names match, from files beside their index; nothing else is read.

    Raises:
        WeightsError: If the index or a file is missing or damaged.
    """
    found: dict[str, Tensor] = {}
    for file, names in _parts(index, index.name, patterns):
        path = index.with_name(PurePosixPath(file).name)
        try:
            with safe_open(path, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} is missing, or not a readable safetensors file: {error}") from error
    return found


def _parts(path: Path, index: str, patterns: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Paths of files in the repository, each with the names of the tensors wanted from it."""
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(file), str(name)) for name, file in where.items() if any(fnmatchcase(name, p) for p in patterns)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not the index of a checkpoint: expected JSON with a weight_map") from error
    files: dict[str, list[str]] = {}
    for file, name in sorted(pairs):
        if PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise WeightsError(f"{path}: expected safetensors files beside it, got {file!r}")
        files.setdefault(str(PurePosixPath(index).with_name(file)), []).append(name)
    if not files:
        raise WeightsError(f"{path} knows no tensors {', '.join(patterns)}: it is of another checkpoint")
    return list(files.items())


class _Source(NamedTuple):
    places: list[_Place]
    chunks: Iterator[bytes]


def _source(
    repo: str,
    file: str,
    names: Sequence[str],
    commit: str,
    cache_dir: str | Path | None,
    token: str | None,
    local_files_only: bool,
) -> _Source:
    """Where a file's tensors lie, in order, and their bytes: from the Hub's cache, or over the network."""
    cached = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=commit)
    if not isinstance(cached, str) and (local_files_only or constants.is_offline_mode()):
        cached = str(fetch(repo, file, revision=commit, cache_dir=cache_dir, local_files_only=True))
    reader: _Local | _Remote = _Local(Path(cached)) if isinstance(cached, str) else _Remote(repo, file, commit, token)
    length = int.from_bytes(reader.read(0, 8), "little")
    if not 2 <= length <= _LONGEST_HEADER:
        raise WeightsError(f"{repo}/{file} is not a safetensors file: its header would have {length} bytes")
    places = _places(reader.read(8, 8 + length), names, f"{repo}/{file}", 8 + length)
    return _Source(places, _chunks(reader, places))


def _places(header: bytes, names: Sequence[str], where: str, base: int) -> list[_Place]:
    places = []
    try:
        facts: Mapping[str, Any] = json.loads(header)
        for name in names:
            start, end = facts[name]["data_offsets"]
            places.append(_Place(name, facts[name]["dtype"], facts[name]["shape"], base + start, base + end))
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{where} is damaged, or has not the tensors of its index: {error}") from error
    return sorted(places, key=lambda place: place.start)


def _chunks(reader: "_Local | _Remote", places: Sequence[_Place]) -> Iterator[bytes]:
    """The bytes of all places in order, neighbours together, some megabytes at a time."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place.start:
            runs[-1][1] = place.end
        else:
            runs.append([place.start, place.end])
    for start, end in runs:
        for at in range(start, end, _AT_ONCE):
            yield reader.read(at, min(end, at + _AT_ONCE))


class _Local:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, start: int, end: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        if len(data) != end - start:
            raise WeightsError(f"{self.path} is truncated: expected bytes {start} to {end}, got {len(data)} of them")
        return data


class _Remote:
    def __init__(self, repo: str, file: str, commit: str, token: str | None) -> None:
        self.what = f"{repo}/{file} at revision {commit}"
        self.url, self.headers = hf_hub_url(repo, file, revision=commit), build_hf_headers(token=token)

    def read(self, start: int, end: int) -> bytes:
        for _ in range(_TRIES - 1):
            with suppress(DownloadError):
                return self._read(start, end)
        return self._read(start, end)

    def _read(self, start: int, end: int) -> bytes:
        headers = {**self.headers, "Range": f"bytes={start}-{end - 1}"}
        try:
            with http_stream_backoff("GET", self.url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
                hf_raise_for_status(response)
                partial = response.status_code == 206
                data = bytes(response.read()) if partial else b""
        except Exception as error:  # huggingface_hub passes on errors of several libraries
            raise DownloadError(f"could not get bytes {start} to {end} of {self.what}: {first_line(error)}") from error
        if not partial:
            raise DownloadError(f"the server gives no parts of {self.what}: get it whole with `hf download`, then load again")
        if len(data) != end - start:
            raise DownloadError(f"expected bytes {start} to {end} of {self.what}, got {len(data)} of them: try again")
        return data


def _write(path: Path, sources: Sequence[_Source]) -> None:
    """One safetensors file of all sources' tensors."""
    header: dict[str, Any] = {}
    at = 0
    for place in (place for source in sources for place in source.places):
        end = at + place.end - place.start
        header[place.name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, Path(temporary).open("wb") as file:
        _copy(file, [len(text).to_bytes(8, "little") + text])
        for source in sources:
            _copy(file, source.chunks)


def _copy(file: BinaryIO, chunks: Iterator[bytes] | list[bytes]) -> None:
    for chunk in chunks:
        file.write(chunk)
