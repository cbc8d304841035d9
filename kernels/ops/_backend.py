"""Which implementation answers: compiled C++ on the CPU, Triton on CUDA, and plain PyTorch wherever those cannot be had.

The three have the same functions (`_reference` says what they compute): `pack` turns entries into the form that the others
search, which `PackCache` may keep; then `nearest`, `quantize`, `residual_quantize`, `assign`, `code_sums`, `fsq` and `lfq`.
"""

import functools
import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from tokenzoo.kernels import _native, _reference


def backend_for(rows: Tensor) -> Any:
    """The module, or namespace of operators, that answers for tensors on this device."""
    if rows.is_cpu:
        return _native.library() or _reference
    # Triton launches on the current device, wherever the tensors are.
    if rows.is_cuda and _has_triton() and rows.device.index == torch.cuda.current_device():
        from tokenzoo.kernels import _triton

        return _triton
    return _reference


@functools.cache
def _has_triton() -> bool:
    has_compiler = any(shutil.which(program) for program in (os.environ.get("CC", ""), "gcc", "clang"))  # of its launchers
    return importlib.util.find_spec("triton") is not None and has_compiler
