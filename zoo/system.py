"""What runs here: versions, devices and caches, for `tokenzoo info --system` and for bug reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub import constants

from tokenzoo import __version__
from tokenzoo.kernels import _native

_PACKAGES = ("torchvision", "torchaudio", "timm", "huggingface-hub", "safetensors", "accelerate")


def describe() -> dict[str, str]:
    """Facts about this machine and installation, in words."""
    return {
        "tokenzoo": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}",
        "kernels": _native.status(),
        "accelerators": ", ".join(_accelerators()) or "none",
        "hub cache": str(constants.HF_HUB_CACHE),
        "hub endpoint": constants.ENDPOINT,
        "hub offline": "yes" if constants.HF_HUB_OFFLINE else "no",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _accelerators() -> list[str]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*names, "mps"] if torch.backends.mps.is_available() else names
