"""The tensors of a TorchScript archive (`torch.jit.save`), read without executing anything in it.

Such a file is a zip of compiled code, a pickle of the module tree, and the tensors' bytes. `torch.jit.load` prepares the code
to be run, and `torch.load(weights_only=True)` refuses these files. Here the code is never looked at, and of the pickle only
modules (as attributes without a class), numbers, strings, lists and tensors are understood; anything else is refused.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenzoo.tokenizers.download import DamagedError
from tokenzoo.tokenizers.errors import WeightsError

_PICKLE, _MARK = "data.pkl", "constants.pkl"
_MOST_VISITS, _LONGEST_NAME = 100_000, 1000
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
# What reading a damaged pickle or zip may raise.
_DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, LookupError, ValueError, TypeError, AttributeError)


def is_torchscript(path: Path) -> bool:
    """Whether a file is such an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{_MARK}") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The state dict of an archive, constants that were not meant to be saved included.

    Raises:
        WeightsError: If the archive is damaged, holds no tensors, or would execute code when read; nothing was executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith(f"/{_PICKLE}") and name.count("/") == 1]
            if len(pickled) != 1:
                raise pickle.UnpicklingError(f"expected one {_PICKLE}, found {len(pickled)}")
            root = _Reader(archive, pickled[0].removesuffix(_PICKLE)).load()
    except WeightsError as error:
        raise WeightsError(f"{path} {error}") from None
    except _DAMAGED as error:
        raise DamagedError(f"{path} is damaged, or not a TorchScript archive; nothing in it was executed: {error}") from error
    state = dict(_tensors(root, path))
    if not state:
        raise WeightsError(f"{path} holds no tensors: a frozen archive keeps them in its code, which is not read")
    return state


class _Module:
    """A module of the archive: its attributes, and nothing of its class."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"expected a module's attributes, got {type(state).__name__}")
        self.attributes = state


class _Reader(pickle.Unpickler):
    """Understands what the exporter writes. Every global is one of ours, made anew for each file, and does nothing."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(_stored(archive, f"{folder}{_PICKLE}")))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}
        self.module = type("Module", (_Module,), {})

    def find_class(self, module: str, name: str) -> Any:
        """What a global of the pickle stands for."""
        if module == "__torch__" or module.startswith("__torch__."):
            return self.module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): lambda: OrderedDict(),
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _tag: value,
            **{("torch.jit._pickle", f"build_{kind}list"): lambda value: value for kind in ("int", "tensor", "double", "bool")},
        }
        if (module, name) not in known:
            raise WeightsError(f"would execute code when read ({module}.{name}): refused, nothing was executed")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The bytes of one storage as a flat tensor."""
        kind, dtype, key, _location, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"expected a storage, got {kind!r}")
        if key not in self.storages:
            data = bytearray(_stored(self.archive, f"{self.folder}data/{key}"))
            if sys.byteorder == "big":
                raise pickle.UnpicklingError("expected a little-endian machine")
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        storage = self.storages[key]
        if storage.dtype != dtype or len(storage) < length:
            raise pickle.UnpicklingError(f"expected {length} values of {dtype} in storage {key}, got {len(storage)}")
        return storage


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry that is not compressed, so that a small file cannot become a large one."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"expected {name} not to be compressed")
    return archive.read(name)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: Any) -> Tensor:
    """A view of a storage; what it does not hold is refused by torch itself."""
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("expected a tensor's storage")
    try:
        return torch.as_strided(storage, size, stride, offset)
    except RuntimeError as error:
        raise pickle.UnpicklingError(str(error)) from error


def _tensors(root: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a module, by the dotted names that its state dict would have."""
    waiting, visits = [("", root)], 0
    while waiting:
        name, value = waiting.pop()
        visits += 1
        if visits > _MOST_VISITS or len(name) > _LONGEST_NAME:
            raise WeightsError(f"{path} holds modules without end, such as one within itself")
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, _Module):
            waiting += [(f"{name}.{key}" if name else str(key), part) for key, part in value.attributes.items()]
