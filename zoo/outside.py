"""Weights published outside the Hub: at an address, or behind a page that only a person gets through.

Either way the file lies at one place, `tokenzoo/files/<card>/<file>` of huggingface_hub's assets cache or of `cache_dir`.
What has an address is downloaded to it; anything else, the user puts there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported lazily

from tokenzoo.card import Card
from tokenzoo.tokenizers.download import first_line
from tokenzoo.tokenizers.errors import DownloadError
from tokenzoo.tokenizers.files import replacing

_PAGE_STARTS = (b"<!doctype", b"<html", b"<?xml")


def published_file(card: Card, own_cache: Path, *, local_files_only: bool = False) -> Path:
    """The published file of a card whose source has a `url` or a `page`, downloaded where it is not there yet.

    Args:
        card: Says where the file is published.
        own_cache: The folder `tokenzoo` of the cache.
        local_files_only: Do not download.

    Raises:
        DownloadError: If the file cannot be had; says where to get it, and where to put it. No partial file is left.
    """
    path = own_cache / "files" / card.name / card.source.file
    if path.is_file():
        return path
    if card.source.url is None:
        raise DownloadError(f"{card.name} cannot be downloaded by a program: {_by_hand(card, path)}")
    if local_files_only or constants.is_offline_mode():
        reason = f"it is not at {path} and the network may not be used (HF_HUB_OFFLINE or local_files_only)"
        raise DownloadError(
            f"could not get the weights of {card.name}: {reason}: load it once with a connection, or {_by_hand(card, path)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                _download(card.source.url, path)
    except Exception as error:  # those of huggingface_hub, of its HTTP client, and of the file system
        raise DownloadError(
            f"could not download {card.source.url}: {type(error).__name__}: {first_line(error)}: try again, or "
            f"{_by_hand(card, path)}"
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    with replacing(path) as temporary:
        with temporary.open("wb") as file, _staying_with(urlsplit(url).scheme):
            http_get(url, file, displayed_filename=path.name)
        with temporary.open("rb") as file:
            if file.read(64).lstrip().lower().startswith(_PAGE_STARTS):
                raise OSError("the server answered with a web page instead of the file")


@contextmanager
def _staying_with(scheme: str) -> Iterator[None]:
    """Refuses redirects to another scheme: what came by http instead of https could be anybody's.

    The client is shared between threads, of which only this one is held to it.
    """
    thread, hooks = get_ident(), get_session().event_hooks["request"]

    def refuse(request: Any) -> None:
        if get_ident() == thread and request.url.scheme != scheme:
            raise OSError(f"refused a redirect from {scheme} to {request.url.scheme}://{request.url.host}")

    hooks.append(refuse)
    try:
        yield
    finally:
        hooks.remove(refuse)


def _by_hand(card: Card, path: Path) -> str:
    where = card.source.page or card.source.url
    return (
        f"get {path.name} from {where} with a browser and save it as {path}, or turn your copy into a folder with `tokenzoo "
        f"convert {path.name} {card.name} FOLDER` and load that"
    )
