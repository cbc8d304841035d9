"""TorchScript archives give their tensors, and nothing in them is executed."""

import io
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from tokenzoo.tokenizers.errors import WeightsError
from tokenzoo.tokenizers.torchscript import is_torchscript, read_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.second = nn.Linear(4, 2).to(torch.bfloat16)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("view", torch.arange(12.0).view(3, 4).mT[1:, ::2])
        self.numbers = [1, 2]

    def forward(self, x):
        return self.second(self.first(x).to(torch.bfloat16)) + self.steps.sum() + self.view.sum() + self.numbers[0]


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "network.jit"
    torch.jit.trace(Network(), torch.ones(1, 3)).save(path)
    return path


def rewritten(path, target, **entries):
    """A copy of an archive with other entries in place of those that end in these names."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for entry in source.infolist():
            data = next((new for name, new in entries.items() if entry.filename.endswith(f"/{name}")), source.read(entry))
            if data is not None:
                copy.writestr(entry.filename, data)
    return target


def pickled(value):
    return pickle.dumps(value, 2)


def test_tensors_are_those_that_torch_reads(archive):
    state, expected = read_torchscript(archive), torch.jit.load(archive).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert all(state[name].dtype == tensor.dtype for name, tensor in expected.items())


def test_scripted_modules_are_read_too(tmp_path):
    path = tmp_path / "scripted.pt"
    torch.jit.script(Network()).save(path)
    assert read_torchscript(path).keys() == Network().state_dict().keys()


def test_other_files_are_not_taken_for_archives(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    (tmp_path / "text").write_text("PK\x03\x04 and no more")
    assert not is_torchscript(tmp_path / "weights.pt")
    assert not is_torchscript(tmp_path / "text")


def test_an_archive_is_recognised_by_its_content(archive):
    assert is_torchscript(archive)


class Dangerous:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_nothing_is_executed(archive, tmp_path):
    bad = rewritten(archive, tmp_path / "bad.jit", **{"data.pkl": pickled(Dangerous(tmp_path / "made"))})
    with pytest.raises(WeightsError, match=r"would execute code when read \(posix\.mkdir\): refused"):
        read_torchscript(bad)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch load", "torch.jit._pickle __loader__", "torch._utils _import_dotted_name"]
)
def test_only_what_is_known_is_found(archive, tmp_path, name):
    module, attribute = name.split()
    data = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    with pytest.raises(WeightsError, match="refused"):
        read_torchscript(rewritten(archive, tmp_path / "bad.jit", **{"data.pkl": data}))


@pytest.mark.parametrize("entries", [{"data.pkl": b"\x80\x02"}, {"data.pkl": None}, {"0": b"1"}, {"0": None}])
def test_damage_is_told(archive, tmp_path, entries):
    with pytest.raises(WeightsError, match="damaged"):
        read_torchscript(rewritten(archive, tmp_path / "bad.jit", **entries))


def test_a_truncated_archive_is_told(archive, tmp_path):
    cut = tmp_path / "cut.jit"
    cut.write_bytes(archive.read_bytes()[:-200])
    assert not is_torchscript(cut)
    with pytest.raises(WeightsError, match="damaged"):
        read_torchscript(cut)


def test_compressed_tensors_are_refused(archive, tmp_path):
    target = tmp_path / "bomb.jit"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for entry in source.infolist():
            copy.writestr(entry.filename, source.read(entry))
    with pytest.raises(WeightsError, match="not to be compressed"):
        read_torchscript(target)


def test_views_beyond_their_storage_are_refused(archive, tmp_path):
    with zipfile.ZipFile(archive) as source:
        data = source.read("network/data.pkl")
    assert data.count(b"(K\x03K\x02t") == 1  # the sizes of the view
    bad = data.replace(b"(K\x03K\x02t", b"(K\x03K\xfft")
    with pytest.raises(WeightsError, match="damaged"):
        read_torchscript(rewritten(archive, tmp_path / "bad.jit", **{"data.pkl": bad}))


def test_modules_within_themselves_end(archive, tmp_path):
    module = b"c__torch__\nM\n)\x81"  # one of its class
    data = b"\x80\x02" + module + b"q\x00}U\x04selfh\x00sb."
    with pytest.raises(WeightsError, match="without end"):
        read_torchscript(rewritten(archive, tmp_path / "bad.jit", **{"data.pkl": data}))


def test_an_archive_without_tensors_is_told(archive, tmp_path):
    data = b"\x80\x02c__torch__\nM\n)\x81}b."
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_torchscript(rewritten(archive, tmp_path / "bad.jit", **{"data.pkl": data}))


def test_the_exporter_writes_nothing_else(archive):
    """So that this reader fails here first if a release of torch writes archives otherwise."""
    with zipfile.ZipFile(archive) as source:
        data = io.BytesIO(source.read("network/data.pkl"))

    class Names(pickle.Unpickler):
        def find_class(self, module, name):
            assert module.split(".")[0] in ("__torch__", "torch", "collections")
            return dict if name == "OrderedDict" else type("M", (), {"__init__": lambda self, *_: None})

        def persistent_load(self, pid):
            return pid[2]

    Names(data).load()
