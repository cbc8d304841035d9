"""A checkpoint published as a TorchScript archive, from a Hub on loopback: Cosmos with random weights."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import tokenzoo
from tokenzoo.tokenizers.errors import WeightsError

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCE = {"repo": "org/cosmos", "file": "autoencoder.jit", "adapter": "archive_8x8x8"}
CONFIG = {"channels": 4, "multipliers": [1, 2, 2]}

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


class Tree(nn.Module):
    """Modules that hold a state dict under its names, and use all of it."""

    def forward(self, x):
        return x + sum(tensor.sum() for tensor in self.state_dict(keep_vars=True).values())


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    state = safetensors.torch.load_file(GOLDEN / "cosmos_8x8x8.state.safetensors")
    state = {**state, "encoder.patcher3d.wavelets": torch.ones(2), "quantizer._levels": torch.ones(6)}
    root = Tree()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, tensor)
    path = tmp_path_factory.mktemp("archive") / "autoencoder.jit"
    torch.jit.trace(root, torch.ones(1)).save(path)
    return path


@pytest.fixture(scope="module")
def expected():
    return safetensors.torch.load_file(GOLDEN / "cosmos_8x8x8.expected.safetensors")


def test_an_archive_is_loaded_and_kept_as_safetensors(hub, site, archive, expected):
    hub.repo("org/cosmos").commit({"autoencoder.jit": archive.read_bytes()})
    site.card("tinycosmos.a", architecture="cosmos", modality="video", config=CONFIG, source=SOURCE)
    tok = tokenzoo.load("tinycosmos")
    assert torch.equal(tok.encode(expected["clip.1"].numpy()).ids[0, 0], expected["ids.1"].flatten())
    hub.stop()
    assert tokenzoo.load("tinycosmos").digest == tok.digest


def test_an_archive_on_disk_is_converted(site, archive, expected, tmp_path):
    site.card("tinycosmos.a", architecture="cosmos", modality="video", config=CONFIG, source=SOURCE)
    tok = tokenzoo.load(tokenzoo.convert(archive, "tinycosmos", tmp_path / "out"))
    assert torch.equal(tok.encode(expected["clip.1"].numpy()).ids[0, 0], expected["ids.1"].flatten())


def test_an_archive_that_would_execute_something_is_refused(site, archive, tmp_path):
    site.card("tinycosmos.a", architecture="cosmos", modality="video", config=CONFIG, source=SOURCE)

    class Dangerous:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    bad = tmp_path / "autoencoder.jit"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(bad, "w") as copy:
        for entry in source.infolist():
            replaced = entry.filename.endswith("/data.pkl")
            copy.writestr(entry.filename, pickle.dumps(Dangerous(), 2) if replaced else source.read(entry))
    with pytest.raises(WeightsError, match="would execute code when read"):
        tokenzoo.convert(bad, "tinycosmos", tmp_path / "out")
    assert not (tmp_path / "made").exists()
