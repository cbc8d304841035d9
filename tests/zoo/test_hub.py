"""Published checkpoints, from a Hub on loopback."""

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

import tokenzoo
from tokenzoo.tokenizers.errors import ConfigError, DownloadError, UnknownTokenizerError, WeightsError

REPO = "org/tiny"


class Dangerous:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def as_pickle(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def files(tiny):
    """Both published layouts of the weights with a seed."""

    def make(seed):
        state = tiny.published(tiny.make(seed))
        return {"model.safetensors": safetensors.torch.save(state), "published.bin": as_pickle({"model": state})}

    return make


@pytest.fixture(params=["model.safetensors", "published.bin"])
def published(request, site, hub, files):
    """One checkpoint (seed 0) with a card, in either layout; returns the name of its file."""
    contents = files(0)[request.param]
    commit = hub.repo(REPO).commit({request.param: contents})
    digest = hashlib.sha256(contents).hexdigest()
    site.card(
        "tiny.a",
        source={"repo": REPO, "revision": commit, "file": request.param, "sha256": digest, "adapter": "published"},
    )
    return request.param


def cached(cache, file):
    (path,) = cache.glob(f"**/snapshots/*/{file}")
    return path


def test_the_first_load_downloads_and_the_second_works_offline(published, hub, tiny, monkeypatch):
    tok = tokenzoo.load("tiny.a")
    assert tok.digest == tiny.make(0).digest
    assert tok.revision == tokenzoo.info("tiny.a").source.revision
    assert [(r.server, r.method) for r in hub.log] == [("hub", "HEAD"), ("cdn", "GET")]
    hub.stop()
    assert tokenzoo.load("tiny.a").info == tok.info
    assert tokenzoo.load(f"hf-hub:{REPO}", local_files_only=True).info == tok.info
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tokenzoo.load("tiny").info == tok.info
    assert len(hub.log) == 2


def test_offline_and_not_cached_says_what_to_do(published, hub, monkeypatch):
    for options in ({"local_files_only": True}, {}):
        with pytest.raises(DownloadError, match=r"could not get org/tiny/.* from its cache: .*tokenzoo convert"):
            tokenzoo.load("tiny.a", **options)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.log


def test_a_server_that_is_gone_says_what_to_do(published, hub):
    hub.stop()
    with pytest.raises(DownloadError, match=r"the Hub cannot be reached .*load it once with a connection"):
        tokenzoo.load("tiny.a")


def test_a_pinned_revision_has_its_own_weights(site, hub, tiny, files):
    old, new = (hub.repo(REPO).commit({"published.bin": files(seed)["published.bin"]}) for seed in (1, 2))
    source = {"repo": REPO, "file": "published.bin", "adapter": "published"}
    site.card("tiny.old", source={**source, "revision": old})
    site.card("tiny.new", source={**source, "revision": new})
    site.card("tiny.main", source=source)
    for name, revision, seed in [("tiny.old", None, 1), ("tiny.main", None, 2), ("tiny.new", None, 2), ("tiny.new", old, 1)]:
        tok = tokenzoo.load(name, revision=revision)
        assert tok.digest == tiny.make(seed).digest
        assert tok.revision == {1: old, 2: new}[seed]


def test_a_revision_of_the_users_is_not_held_against_the_cards_sha256(published, hub, tiny, files):
    commit = hub.repo(REPO).commit({published: files(5)[published]})
    assert tokenzoo.load("tiny.a", revision=commit).digest == tiny.make(5).digest


def test_the_token_goes_to_the_endpoint_and_never_to_the_cdn(site, hub, files):
    hub.repo(REPO, token="secret").commit(files(0))
    site.card("tiny.a", source={"repo": REPO, "file": "model.safetensors", "adapter": "published"})
    with pytest.raises(DownloadError, match="no such repository, or it is private"):
        tokenzoo.load("tiny.a")
    tokenzoo.load("tiny.a", token="secret")
    assert {r.headers.get("authorization") for r in hub.seen("hub")} == {None, "Bearer secret"}
    assert hub.seen("cdn")
    assert not [r for r in hub.seen("cdn") if "secret" in str(r)]


def test_a_connection_that_breaks_off_is_resumed(published, hub, tiny, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)  # what is smaller than a chunk starts over
    hub.drops = 2
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest
    assert [r.headers.get("range") is not None for r in hub.seen("cdn")] == [False, True, True]


def test_a_truncated_download_is_refused_and_the_next_load_succeeds(published, hub, cache, tiny):
    hub.shorts = 1
    with pytest.raises(DownloadError, match="cut short; nothing of it was kept: try again"):
        tokenzoo.load("tiny.a")
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix in (".incomplete", ".bin", ".safetensors")]
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def test_a_sha256_mismatch_is_refused_and_the_repaired_file_loads(site, hub, cache, tiny, files):
    good = files(0)["model.safetensors"]
    hub.repo(REPO).commit({"model.safetensors": files(1)["model.safetensors"]})
    digest = hashlib.sha256(good).hexdigest()
    site.card("tiny.a", source={"repo": REPO, "file": "model.safetensors", "sha256": digest, "adapter": "published"})
    wrong = hashlib.sha256(files(1)["model.safetensors"]).hexdigest()
    with pytest.raises(WeightsError, match=f"sha256 {digest}, got {wrong}.*removed from the cache"):
        tokenzoo.load("tiny.a")
    assert not list(cache.glob("**/blobs/*"))
    assert not list(cache.glob("**/snapshots/*/*"))
    hub.repo(REPO).commit({"model.safetensors": good})
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def test_a_file_damaged_in_the_cache_is_noticed_and_downloaded_again(published, cache, hub, tiny):
    """Large files are named by their sha256 in the cache, so this needs none on the card."""
    tokenzoo.load("tiny.a")
    blob = cached(cache, published).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(WeightsError, match="removed from the cache: load again"):
        tokenzoo.load("tiny.a")
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def test_content_that_huggingface_hub_shares_between_repositories_is_not_taken_for_damaged(published, cache, hub, tiny):
    """Its name is then a hash of another kind."""
    tokenzoo.load("tiny.a")
    blob = cached(cache, published).parent / cached(cache, published).readlink()
    shared = cache / "hub" / ("e" * 64)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest
    assert tokenzoo.load("tiny.a", revision=hub.repos[REPO].refs["main"]).digest == tiny.make(0).digest
    shared.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="removed from the cache"):
        tokenzoo.load("tiny.a")
    assert not shared.exists()
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def test_a_file_is_hashed_once(published, monkeypatch):
    tokenzoo.load("tiny.a")
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("the file was read again"))
    tokenzoo.load("tiny.a")


def test_a_pickle_is_read_once(published, cache, tiny, monkeypatch):
    tokenzoo.load("tiny.a")
    converted = list(cache.glob("assets/tokenzoo/converted/*.safetensors"))
    assert len(converted) == (published == "published.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("the pickle was read again"))
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def test_a_damaged_conversion_is_made_again(site, published, cache, tiny):
    tokenzoo.load("tiny.a")
    for converted in cache.glob("assets/tokenzoo/converted/*.safetensors"):
        converted.write_bytes(b"damaged")
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def test_everything_goes_where_cache_dir_says(published, cache, tmp_path, tiny):
    assert tokenzoo.load("tiny.a", cache_dir=tmp_path / "mine").digest == tiny.make(0).digest
    assert not cache.exists()
    assert (tmp_path / "mine/tokenzoo").is_dir()
    with pytest.raises(DownloadError, match=r"not in .*home"):
        tokenzoo.load("tiny.a", local_files_only=True)


def test_a_pickle_that_would_execute_code_is_refused(site, hub, cache, tmp_path, tiny, files):
    marker = tmp_path / "executed"
    state = tiny.published(tiny.make(0))
    hub.repo(REPO).commit({"published.bin": as_pickle({"model": state, "hook": Dangerous(marker)})})
    site.card("tiny.a", source={"repo": REPO, "file": "published.bin", "adapter": "published"})
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"would execute code when read \(posix\.mkdir\): refused, nothing was executed"):
            tokenzoo.load("tiny.a")
    assert not marker.exists()
    assert not list(cache.glob("assets/tokenzoo/converted/*.safetensors"))
    hub.repo(REPO).commit(files(0))
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


@pytest.mark.parametrize("file", ["model.safetensors", "published.bin"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_damaged_file_on_the_hub_is_refused_and_leaves_the_cache_usable(site, hub, tiny, files, file, keep):
    contents = files(0)[file]
    hub.repo(REPO).commit({file: contents[: int(len(contents) * keep)]})
    site.card("tiny.a", source={"repo": REPO, "file": file, "adapter": "published"})
    with pytest.raises(WeightsError, match="removed from the cache"):
        tokenzoo.load("tiny.a")
    hub.repo(REPO).commit(files(0))
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


@pytest.mark.parametrize("file", ["model.safetensors", "published.bin"])
def test_weights_that_do_not_fit_are_refused(site, hub, tiny, file):
    state = tiny.published(tiny.make(0))
    del state["encoder.conv.bias"]
    state["encoder.extra"] = torch.ones(1)
    state["quantize.embedding"] = torch.ones(3, 4)
    hub.repo(REPO).commit({"model.safetensors": safetensors.torch.save(state), "published.bin": as_pickle({"model": state})})
    site.card("tiny.a", source={"repo": REPO, "file": file, "adapter": "published"})
    with pytest.raises(
        WeightsError, match=r"tiny\.a do not fit Tiny: 1 missing \(down\.bias\); 1 unexpected \(encoder\.extra\)"
    ):
        tokenzoo.load("tiny.a")
    with pytest.raises(WeightsError, match=r"1 misshapen \(codebook \(3, 4\) instead of \(16, 4\)\)"):
        tokenzoo.load("tiny.a")


def test_a_card_with_a_wrong_config_or_adapter_is_refused(site, hub, files):
    hub.repo(REPO).commit(files(0))
    source = {"repo": REPO, "file": "model.safetensors", "adapter": "published"}
    site.card("tiny.config", config={"code": 16}, source=source)
    with pytest.raises(ConfigError, match="no key 'code': did you mean 'codes'"):
        tokenzoo.load("tiny.config")
    site.card("tiny.adapter", source={**source, "adapter": "publish"})
    with pytest.raises(UnknownTokenizerError, match="no adapter 'publish': did you mean 'published'"):
        tokenzoo.load("tiny.adapter")
    site.card("tiny.architecture", architecture="tinny", source=source)
    with pytest.raises(UnknownTokenizerError, match="no architecture 'tinny': did you mean 'tiny'"):
        tokenzoo.load("tiny.architecture")
    assert len(hub.seen()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo": "org/gone"}, "no such repository, or it is private"),
        ({"file": "gone.safetensors"}, "no such file at this revision"),
        ({"revision": "f" * 40}, "no such revision"),
        ({"repo": "org/gated"}, r"gated: accept its terms at http://127\.0\.0\.1:\d+/org/gated"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(site, hub, files, change, message):
    hub.repo(REPO).commit(files(0))
    hub.repo("org/gated", gated=True, token="granted").commit(files(0))
    site.card("tiny.a", source={"repo": REPO, "file": "model.safetensors", "adapter": "published", **change})
    with pytest.raises(DownloadError, match=message) as caught:
        tokenzoo.load("tiny.a")
    assert f"could not get {change.get('repo', REPO)}/" in str(caught.value)
    assert isinstance(caught.value, OSError)
    if "repo" in change and change["repo"] in hub.repos:
        tokenzoo.load("tiny.a", token="granted")


def test_several_cards_of_one_repository_are_not_guessed_between(site, hub, files):
    hub.repo(REPO).commit(files(0))
    for file in ("model.safetensors", "published.bin"):
        site.card(f"tiny.{file[0]}", source={"repo": REPO, "file": file, "adapter": "published"})
    with pytest.raises(UnknownTokenizerError, match=r"several checkpoints: choose one of tiny\.m, tiny\.p"):
        tokenzoo.load(f"hf-hub:{REPO}")


# -- read-only caches. Tests may run as root, whom permissions do not stop: a file where a folder should be stops anyone.


def test_a_conversion_that_cannot_be_cached_is_made_each_time_with_one_warning(site, hub, cache, tiny, files, caplog):
    hub.repo(REPO).commit(files(0))
    site.card("tiny.a", source={"repo": REPO, "file": "published.bin", "adapter": "published"})
    cache.mkdir()
    (cache / "assets").write_text("a file where the folder should be")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="tokenzoo"):
            assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest
        assert [record.message for record in caplog.records if "cannot be written" in record.message] == [
            record.message for record in caplog.records
        ]
        assert len(caplog.records) == 1


def test_a_full_disk_while_converting_costs_one_warning(site, hub, cache, tiny, files, caplog, monkeypatch):
    hub.repo(REPO).commit(files(0))
    site.card("tiny.a", source={"repo": REPO, "file": "published.bin", "adapter": "published"})

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with caplog.at_level(logging.WARNING, logger="tokenzoo"):
        assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest
    assert len(caplog.records) == 1
    assert not list(cache.glob("assets/tokenzoo/converted/*.safetensors"))


def test_a_cache_that_became_read_only_still_loads(published, cache, tiny, monkeypatch):
    tokenzoo.load("tiny.a")
    for name in ("mkdir", "touch", "unlink", "rename", "replace"):
        monkeypatch.setattr(Path, name, _read_only)
    for name in ("mkdir", "makedirs", "symlink", "replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, _read_only)
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


def _read_only(*args, **kwargs):
    raise OSError(30, "Read-only file system")


def test_a_cache_that_cannot_be_written_says_so(published, cache, tiny):
    cache.mkdir()
    (cache / "hub").write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=r"the cache .*home/hub cannot be written .*pass cache_dir=.* or set HF_HOME"):
        tokenzoo.load("tiny.a")
    (cache / "hub").unlink()
    assert tokenzoo.load("tiny.a").digest == tiny.make(0).digest


# -- processes of their own, configured by nothing but environment variables

SCRIPT = """
import sys, tokenzoo, tokenzoo.hub, tiny
print("ready", flush=True)
sys.stdin.readline()
tok = tokenzoo.load("tiny.a")
print(tok.digest, tok.revision)
"""


def start(site, hub, cache, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP"))}
    clean |= {"HF_HOME": str(cache), "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(site.folder), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=clean,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_at_once_then_one_offline(site, hub, cache, tiny, files):
    commit = hub.repo(REPO).commit(files(0))
    site.card("tiny.a", source={"repo": REPO, "file": "published.bin", "adapter": "published"})
    expected = f"{tiny.make(0).digest} {commit}"
    *both, later = [start(site, hub, cache), start(site, hub, cache), start(site, hub, cache, HF_HUB_OFFLINE="1")]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        out, err = process.communicate(timeout=60)
        assert out.strip() == expected, err
    assert len(list(cache.glob("assets/tokenzoo/converted/*.safetensors"))) == 1
    hub.stop()
    out, err = later.communicate("go\n", timeout=60)
    assert out.split("\n")[1] == expected, err


def test_cards_are_listed_without_torch():
    code = (
        "import sys, json, tokenzoo; names = tokenzoo.list_models(); tokenzoo.info(names[0]).summary() if names else None;"
        "print(json.dumps([m for m in ('torch', 'numpy', 'huggingface_hub') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []
