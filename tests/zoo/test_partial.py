"""Some tensors of a checkpoint in several files, from a Hub on loopback."""

import json

import pytest
import safetensors.torch
import torch

import tokenzoo
from tokenzoo import partial
from tokenzoo.tokenizers.errors import ConfigError, DownloadError, WeightsError

REPO = "org/big"
INDEX = "model.safetensors.index.json"
WANTED = ["encoder.*", "decoder.*", "quantize.*"]


@pytest.fixture
def checkpoint(tiny):
    """A tokenizer's weights in two files, among tensors a hundred times as large."""
    state = tiny.published(tiny.make(0))
    names = sorted(state)
    shards = {
        "model-00001-of-00002.safetensors": {"backbone.0": torch.ones(5000), **{n: state[n] for n in names[:2]}},
        "model-00002-of-00002.safetensors": {**{n: state[n] for n in names[2:]}, "backbone.1": torch.ones(7000)},
    }
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    files = {file: safetensors.torch.save(tensors) for file, tensors in shards.items()}
    return {INDEX: json.dumps(index).encode(), **files}


@pytest.fixture
def card(site, hub, checkpoint):
    commit = hub.repo(REPO).commit(checkpoint)
    source = {"repo": REPO, "revision": commit, "file": INDEX, "adapter": "published", "tensors": WANTED}
    site.card("tiny.big", source=source)
    return "tiny.big"


def same_weights(tok, tiny):
    expected = tiny.make(0).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in tok.state_dict().items())


def test_only_the_wanted_bytes_travel(card, hub, tiny, checkpoint):
    tok = tokenzoo.load(card)
    assert same_weights(tok, tiny)
    assert tok.revision == hub.repos[REPO].refs["main"]
    asked = [r.headers["range"].removeprefix("bytes=").split("-") for r in hub.seen("cdn")]
    got = sum(int(last) - int(first) + 1 for first, last in asked)
    assert got < 6000 < sum(len(data) for data in checkpoint.values()) / 5


def test_what_was_got_is_kept(card, hub, tiny):
    tokenzoo.load(card)
    hub.log.clear()
    assert same_weights(tokenzoo.load(card, local_files_only=True), tiny)
    assert not hub.seen("cdn")


def test_a_file_in_the_cache_is_read_there(card, hub, tiny):
    from huggingface_hub import hf_hub_download

    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        hf_hub_download(REPO, file, revision=hub.repos[REPO].refs["main"])
    hub.log.clear()
    assert same_weights(tokenzoo.load(card), tiny)
    assert not hub.seen("cdn")


def test_without_a_network_the_missing_file_is_named(card, hub):
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, INDEX, revision=hub.repos[REPO].refs["main"])
    with pytest.raises(DownloadError, match=r"model-00001-of-00002\.safetensors"):
        tokenzoo.load(card, local_files_only=True)


def test_an_answer_that_breaks_off_is_asked_for_again(card, hub, tiny):
    hub.drops = 2
    assert same_weights(tokenzoo.load(card), tiny)


def test_a_server_without_ranges_is_not_downloaded_from(card, hub, monkeypatch):
    hub.shorts = 1000  # answers with status 200, whatever was asked
    with pytest.raises(DownloadError, match="gives no parts"):
        tokenzoo.load(card)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"not json", "not the index"),
        (b"{}", "not the index"),
        (b'{"weight_map": {"encoder.a": "../secret.safetensors"}}', "beside it"),
        (b'{"weight_map": {"other": "a.safetensors"}}', "knows no tensors"),
    ],
)
def test_damaged_indices_are_refused(site, hub, index, message):
    hub.repo(REPO).commit({INDEX: index})
    site.card("tiny.big", source={"repo": REPO, "file": INDEX, "adapter": "published", "tensors": WANTED})
    with pytest.raises(WeightsError, match=message):
        tokenzoo.load("tiny.big")


def test_files_that_lack_what_the_index_says_are_refused(site, hub, checkpoint):
    checkpoint["model-00002-of-00002.safetensors"] = safetensors.torch.save({"backbone.1": torch.ones(3)})
    hub.repo(REPO).commit(checkpoint)
    site.card("tiny.big", source={"repo": REPO, "file": INDEX, "adapter": "published", "tensors": WANTED})
    with pytest.raises(WeightsError, match="damaged"):
        tokenzoo.load("tiny.big")


def test_checkpoints_on_disk_are_converted_by_their_index(card, tiny, checkpoint, tmp_path):
    for name, data in checkpoint.items():
        (tmp_path / name).write_bytes(data)
    assert same_weights(tokenzoo.load(tokenzoo.convert(tmp_path / INDEX, card, tmp_path / "out")), tiny)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00001-of-00002\.safetensors is missing"):
        partial.read_tensors(tmp_path / INDEX, WANTED)


@pytest.mark.parametrize(
    "source",
    [
        {"repo": REPO, "file": "model.safetensors", "tensors": WANTED},
        {"file": "nano/a.safetensors", "tensors": WANTED},
        {"repo": REPO, "file": INDEX, "tensors": WANTED, "sha256": "0" * 64},
        {"repo": REPO, "file": INDEX, "tensors": []},
        {"repo": REPO, "file": INDEX, "tensors": [3]},
    ],
)
def test_cards_that_cannot_mean_it_are_refused(source):
    from tokenzoo.card import Source

    with pytest.raises(ConfigError, match=r"source\.tensors"):
        Source(**{**source, "tensors": tuple(source["tensors"])})
