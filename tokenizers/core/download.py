"""One file from the Hub or its cache, with errors that say what was tried and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, errors, hf_hub_download

from tokenzoo.tokenizers.errors import DownloadError, WeightsError


class DamagedError(WeightsError):
    """A file whose content is not what was published: a cached copy of it is worth downloading again."""


def fetch(
    repo: str,
    file: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Downloads a file of a model repository, or finds it in the cache.

    Args:
        repo: `org/name`.
        file: Path inside the repository.
        revision: Branch, tag or commit; by default the main branch.
        cache_dir: Instead of huggingface_hub's cache.
        token: Instead of the one that `hf auth login` stored.
        local_files_only: Use the cache only.

    Returns:
        Path in the cache, `.../snapshots/<commit>/<file>`.

    Raises:
        DownloadError: If the file cannot be had. What was cached before stays usable, and no partial file is left.
    """
    try:
        return Path(
            hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        )
    except Exception as error:  # huggingface_hub passes on errors of several libraries
        what = f"{repo}/{file}" + (f" at revision {revision}" if revision else "")
        tried = "its cache" if local_files_only or constants.is_offline_mode() else constants.ENDPOINT
        raise DownloadError(f"could not get {what} from {tried}: {_reason(error, repo, cache_dir)}") from error


@contextmanager
def forgetting_damaged(path: Path) -> Iterator[None]:
    """Removes a file from the cache when the block finds it damaged, so that the next load downloads it again.

    Raises:
        WeightsError: What the block raised, and whether the file is gone.
    """
    try:
        yield
    except DamagedError as error:
        try:
            _forget(path)
        except OSError as problem:
            raise WeightsError(f"{error}; it could not be removed from the cache ({problem}): delete it by hand") from error
        raise WeightsError(f"{error}; it was removed from the cache: load again to download it again") from error


def _forget(path: Path) -> None:
    """Removes a cached file: the name in the snapshot, and the content that it links to."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _reason(error: Exception, repo: str, cache_dir: str | Path | None) -> str:
    """What went wrong, and what to do. The order matters: some of these classes derive from others."""
    page = f"{constants.ENDPOINT}/{repo}"
    match error:
        case errors.GatedRepoError():
            return f"the repository is gated: accept its terms at {page}, then pass token=... or run `hf auth login`"
        case errors.RepositoryNotFoundError():
            return "no such repository, or it is private: check the name, or pass token=... of a user who may read it"
        case errors.RevisionNotFoundError():
            return f"no such revision: see {page}/commits/main"
        case errors.RemoteEntryNotFoundError():
            return f"no such file at this revision: see {page}/tree/main"
        case errors.LocalEntryNotFoundError():
            return _reason_not_cached(error, cache_dir)
        case errors.HFValidationError():
            return f"expected a repository org/name: {error}"
        case errors.HfHubHTTPError():
            return f"the server answered {error.response.status_code}: {first_line(error)}"
        case PermissionError() | FileExistsError() | NotADirectoryError():
            return (
                f"the cache {_cache(cache_dir)} cannot be written ({first_line(error)}): "
                "pass cache_dir=... or set HF_HOME to a folder of yours"
            )
        case OSError() if error.errno is not None:
            return f"the cache {_cache(cache_dir)} cannot be used ({first_line(error)}): make room, or pass cache_dir=..."
        case OSError() if "Consistency check failed" in str(error):
            return "the download was cut short; nothing of it was kept: try again"
        case _:
            return f"{type(error).__name__}: {first_line(error)}: check the connection and proxy settings, and try again"


def _reason_not_cached(error: Exception, cache_dir: str | Path | None) -> str:
    advice = "load it once with a connection, or run `tokenzoo convert` on a copy that you have"
    if error.__cause__ is None or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return (
            f"it is not in {_cache(cache_dir)} and the network may not be used (HF_HUB_OFFLINE or local_files_only): {advice}"
        )
    return f"it is not in {_cache(cache_dir)} and the Hub cannot be reached ({first_line(error.__cause__)}): {advice}"


def _cache(cache_dir: str | Path | None) -> str:
    return str(cache_dir or constants.HF_HUB_CACHE)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; huggingface_hub's go on with advice of their own."""
    return str(error).strip().split("\n", 1)[0]
