import hashlib
import os

import pytest
import safetensors.torch
import torch

import tokenzoo
from tokenzoo.tokenizers.errors import UnknownTokenizerError, WeightsError


class Dangerous:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def pickled(tiny, tmp_path):
    path = tmp_path / "published.bin"
    torch.save({"model": tiny.published(tiny.make(3, codes=8)), "epoch": 7}, path)
    return path


def test_a_published_pickle_becomes_a_folder_that_loads_offline(site, tiny, pickled, tmp_path, no_network):
    digest = hashlib.sha256(pickled.read_bytes()).hexdigest()
    source = {"repo": "org/tiny", "revision": "a" * 40, "file": "published.bin", "sha256": digest, "adapter": "published"}
    site.card("tiny.a", config={"codes": 8}, source=source)
    folder = tokenzoo.convert(pickled, "tiny", tmp_path / "made")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    tok = tokenzoo.load(folder)
    assert tok.name == "tiny.a"
    assert tok.digest == tiny.make(3, codes=8).digest
    assert tok.card_text == tokenzoo.info("tiny.a").text


def test_safetensors_are_converted_too(site, tiny, tmp_path):
    site.card("tiny.a", source={"repo": "org/tiny", "file": "model.safetensors", "adapter": "published"})
    safetensors.torch.save_file(tiny.published(tiny.make(3)), tmp_path / "m.safetensors")
    assert (
        tokenzoo.load(tokenzoo.convert(tmp_path / "m.safetensors", "tiny.a", tmp_path / "made")).digest == tiny.make(3).digest
    )


def test_a_file_that_is_not_the_cards_is_refused_and_kept(site, pickled, tmp_path):
    site.card("tiny.a", source={"repo": "org/tiny", "file": "published.bin", "sha256": "0" * 64, "adapter": "published"})
    with pytest.raises(WeightsError, match=f"sha256 {'0' * 64}, got"):
        tokenzoo.convert(pickled, "tiny.a", tmp_path / "made")
    assert pickled.exists()
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_converted_says_why(site, tiny, pickled, tmp_path):
    site.card("tiny.a")
    with pytest.raises(UnknownTokenizerError, match="'tiny'"):
        tokenzoo.convert(pickled, "tinny", tmp_path / "made")
    with pytest.raises(WeightsError, match="there is no file"):
        tokenzoo.convert(tmp_path / "gone.bin", "tiny.a", tmp_path / "made")
    torch.save(tiny.published(tiny.make()), pickled)  # the card names no adapter
    with pytest.raises(WeightsError, match=r"do not fit Tiny: 5 missing \(codebook, .*, \.\.\.\); 6 unexpected"):
        tokenzoo.convert(pickled, "tiny.a", tmp_path / "made")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_execute_code_is_refused(site, tmp_path, zipped):
    site.card("tiny.a")
    marker = tmp_path / "executed"
    torch.save({"model": Dangerous(marker)}, tmp_path / "bad.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"would execute code when read \(posix\.mkdir\): refused, nothing was executed"):
        tokenzoo.convert(tmp_path / "bad.bin", "tiny.a", tmp_path / "made")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b'{"a": 1}', b"PK\x03\x04 not a zip", b"\x80\x02."])
def test_a_damaged_file_is_refused(site, tmp_path, content):
    site.card("tiny.a")
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged|not a PyTorch checkpoint"):
        tokenzoo.convert(tmp_path / "bad.bin", "tiny.a", tmp_path / "made")
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        tokenzoo.convert(tmp_path / "bad.safetensors", "tiny.a", tmp_path / "made")


@pytest.mark.parametrize("content", [[1, 2], {"down.weight": "text"}, torch.ones(3)])
def test_a_file_without_a_state_dict_is_refused(site, tmp_path, content):
    site.card("tiny.a")
    torch.save(content, tmp_path / "bad.bin")
    with pytest.raises(WeightsError, match=r"expected (a state dict|tensors only)"):
        tokenzoo.convert(tmp_path / "bad.bin", "tiny.a", tmp_path / "made")
