"""Weights published elsewhere than on the Hub, from a server on loopback."""

import argparse
import hashlib
import importlib
import io
import re
import shutil

import pytest
import torch
from huggingface_hub import constants, get_session

import tokenzoo
from tokenzoo.tokenizers.errors import ConfigError, DownloadError, WeightsError

FILE = "published.pth"
PAGE = "https://authors.example/weights"


def as_pickle(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def contents(tiny):
    """A training checkpoint with the weights of a seed, as scripts of the field write it."""

    def make(seed=0):
        arguments = argparse.Namespace(lr=1e-4, output_dir="out")
        return as_pickle({"model": tiny.published(tiny.make(seed)), "args": arguments, "epoch": 3})

    return make


@pytest.fixture
def server(hub, monkeypatch):
    """The Hub's file server, whose addresses a card may have although they are not https."""
    monkeypatch.setattr("tokenzoo.card._ADDRESS", re.compile(r"http://127\.0\.0\.1:\d+/\S+|https://\S+"))
    return hub


@pytest.fixture
def address(site, server, contents):
    server.uploads[FILE] = contents()
    source = {"url": f"{server.cdn}/{FILE}", "page": PAGE, "file": FILE, "adapter": "published"}
    site.card("tiny.a", source=source)
    return source


def place(cache, name="tiny.a"):
    return cache / "assets/tokenzoo/files" / name / FILE


def test_a_file_at_an_address_is_downloaded_and_converted_once(address, server, cache, tiny, monkeypatch):
    tok = tokenzoo.load("tiny.a")
    assert (tok.digest, tok.revision) == (tiny.make(0).digest, None)
    assert [(r.server, r.method, r.path) for r in server.log] == [("cdn", "GET", f"/{FILE}")]
    assert "authorization" not in server.log[0].headers
    assert place(cache).is_file()
    server.stop()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("the pickle was read again"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tokenzoo.load("tiny.a").info == tok.info


def test_two_cards_may_have_files_of_one_name(site, address, server, contents, tiny):
    server.uploads["other/" + FILE] = contents(1)
    site.card("tiny.b", source={**address, "url": f"{server.cdn}/other/{FILE}"})
    assert [tokenzoo.load(name).digest for name in ("tiny.a", "tiny.b")] == [tiny.make(seed).digest for seed in (0, 1)]


def test_offline_says_where_to_get_the_file_and_where_to_put_it(address, server, cache, monkeypatch):
    for options in ({"local_files_only": True}, {}):
        with pytest.raises(DownloadError, match=r"the network may not be used .*load it once with a connection") as caught:
            tokenzoo.load("tiny.a", **options)
        assert PAGE in str(caught.value)
        assert f"save it as {place(cache)}" in str(caught.value)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not server.log


def test_a_file_that_is_gone_or_a_server_that_is_says_what_to_do(site, address, server, cache):
    site.card("tiny.gone", source={**address, "url": f"{server.cdn}/gone.pth"})
    with pytest.raises(DownloadError, match=r"could not download .*/gone\.pth: .*404.* try again, or get published\.pth from"):
        tokenzoo.load("tiny.gone")
    server.stop()
    with pytest.raises(DownloadError, match=r"could not download .*/published\.pth: ConnectError"):
        tokenzoo.load("tiny.a")
    assert not [path for path in cache.rglob("*.pth*") if path.suffix != ".lock"]


def test_a_web_page_instead_of_the_file_is_refused(address, server, cache, contents, tiny):
    server.uploads[FILE] = b"\n<!DOCTYPE html><title>Sign in</title>"
    with pytest.raises(DownloadError, match="answered with a web page instead of the file"):
        tokenzoo.load("tiny.a")
    assert not place(cache).exists()
    server.uploads[FILE] = contents()
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def test_a_connection_that_breaks_off_leaves_nothing_half(address, server, cache, tiny, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    server.drops = 1
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest
    assert place(cache).read_bytes() == server.uploads[FILE]


def test_the_sha256_is_held_against_a_download_and_a_damaged_one_is_removed(site, address, server, cache, contents, tiny):
    site.card("tiny.a", source={**address, "sha256": hashlib.sha256(contents()).hexdigest()})
    server.uploads[FILE] = contents(1)
    with pytest.raises(WeightsError, match="removed from the cache: load again"):
        tokenzoo.load("tiny.a")
    server.uploads[FILE] = contents()
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def test_a_file_for_which_there_is_only_a_page_is_put_there_by_the_user(site, server, cache, contents, tiny):
    site.card("tiny.a", source={"page": PAGE, "file": FILE, "adapter": "published"})
    with pytest.raises(DownloadError, match=rf"cannot be downloaded by a program: get {FILE} from {PAGE} with a browser"):
        tokenzoo.load("tiny.a")
    place(cache).parent.mkdir(parents=True)
    place(cache).write_bytes(contents())
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest
    place(cache).write_bytes(contents(1) + b" ")
    assert tokenzoo.load("tiny.a").digest == tiny.make(1).digest  # not the conversion of the file that was there before
    place(cache).write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="is damaged"):
        tokenzoo.load("tiny.a")
    assert place(cache).read_bytes() == b"damaged"  # the user's, not ours to remove
    assert not server.log


def test_a_copy_can_be_converted_to_a_folder(site, contents, tmp_path, tiny, no_network):
    site.card("tiny.a", source={"page": PAGE, "file": FILE, "adapter": "published"})
    (tmp_path / FILE).write_bytes(contents())
    assert tokenzoo.load(tokenzoo.convert(tmp_path / FILE, "tiny.a", tmp_path / "folder")).digest == tiny.make(0).digest


def test_cache_dir_holds_the_file_too(address, cache, tmp_path, tiny):
    assert tokenzoo.load("tiny.a", cache_dir=tmp_path / "mine").digest == tiny.make(0).digest
    assert (tmp_path / "mine/tokenzoo/files/tiny.a" / FILE).is_file()
    assert not cache.exists()
    shutil.rmtree(tmp_path / "mine")


def test_a_file_put_there_by_the_user_is_read_anew_wherever_the_cache_is(site, contents, tmp_path, tiny, no_network):
    """The Hub's cache has folders named `snapshots` as well."""
    site.card("tiny.a", source={"page": PAGE, "file": FILE, "adapter": "published"})
    mine = tmp_path / "snapshots" / "mine"
    path = mine / "tokenzoo/files/tiny.a" / FILE
    path.parent.mkdir(parents=True)
    for seed in (0, 1):
        path.write_bytes(contents(seed) + b" " * seed)
        assert tokenzoo.load("tiny.a", cache_dir=mine).digest == tiny.make(seed).digest


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_redirect_may_not_leave_https(site, cache, contents, tiny, monkeypatch, scheme):
    http = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    asked = []

    def answer(request):
        asked.append(str(request.url))
        if request.url.path == "/moved":
            return http.Response(200, content=contents())
        return http.Response(302, headers={"Location": f"{scheme}://files.example/moved"})

    client = http.Client(transport=http.MockTransport(answer), follow_redirects=True)
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT", client)
    site.card("tiny.a", source={"url": f"https://files.example/{FILE}", "file": FILE, "adapter": "published"})
    if scheme == "https":
        assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest
    else:
        with pytest.raises(DownloadError, match=r"refused a redirect from https to http://files\.example"):
            tokenzoo.load("tiny.a")
        assert asked == [f"https://files.example/{FILE}"]
        assert not place(cache).exists()
    assert not client.event_hooks["request"]


def test_there_are_no_revisions(address):
    with pytest.raises(ConfigError, match="is not on the Hub and has no revisions"):
        tokenzoo.load("tiny.a", revision="main")
