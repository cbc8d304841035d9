"""Compiling and loading the CPU kernels.

The wheel carries C++ sources and needs no compiler. On first use they are compiled once into the user's cache, keyed on
the sources, the compiler and the flags; where there is no compiler, or `TOKENZOO_NATIVE=0`, the PyTorch fallback answers.
The library is written against LibTorch's stable ABI, so torch may be upgraded without a rebuild.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

log = logging.getLogger("tokenzoo.kernels")

_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wno-psabi", "-Wno-ignored-attributes", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
_AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=512", "-mfma"]
_UNITS: dict[str, list[str]] = {"ops.cpp": [], "search_portable.cpp": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    _UNITS |= {"search_avx2.cpp": ["-mavx2", "-mfma"], "search_avx512.cpp": _AVX512}
_COMPILE_SECONDS = 120
_status = "not loaded yet"


def status() -> str:
    """Which implementation answers on the CPU, and why, in words."""
    library()
    return _status


@functools.cache
def library() -> Any | None:
    """The native operators (`torch.ops.tokenzoo_native`), compiled if need be; `None` where they cannot be had."""
    global _status
    if os.environ.get("TOKENZOO_NATIVE", "1") == "0":
        return _settle("PyTorch fallback: native kernels are turned off by TOKENZOO_NATIVE=0", logging.INFO)
    compiler = _compiler()
    if compiler is None:
        return _settle("PyTorch fallback: no C++ compiler was found (set CXX, or install g++ or clang++)", logging.WARNING)
    try:
        torch.ops.load_library(str(_build(compiler)))
        lanes = torch.ops.tokenzoo_native.instruction_set()
    except (OSError, RuntimeError, Timeout, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return _settle(f"PyTorch fallback: compiling with {compiler} failed: {reason.strip()[:500]}", logging.WARNING)
    _status = f"native C++ kernels ({lanes}-bit vectors)"
    log.info(_status)
    return torch.ops.tokenzoo_native


def _settle(reason: str, level: int) -> None:
    global _status
    _status = reason
    log.log(level, reason)


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    candidates = [wanted] if wanted else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def _build(compiler: str) -> Path:
    """Path of the compiled library; compiled under a lock and renamed into place, so that any number of processes may ask."""
    with resources.as_file(resources.files("tokenzoo.kernels.csrc")) as sources:
        folder = _cache_folder() / _fingerprint(compiler, sources)
        built = folder / "tokenzoo_native.so"
        if built.exists():
            return built
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=_COMPILE_SECONDS):
            if not built.exists():
                log.info("compiling the CPU kernels (once, a few seconds)")
                _compile(compiler, sources, built)
    return built


def _cache_folder() -> Path:
    if given := os.environ.get("TOKENZOO_CACHE"):
        return Path(given) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenzoo" / "kernels"


def _fingerprint(compiler: str, sources: Path) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    digest = hashlib.sha256(f"{version} {_FLAGS} {_UNITS}".encode())
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, sources: Path, built: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{torch_folder / 'include'}", f"-I{sources}"]
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:

        def compile_unit(unit: str) -> str:
            target = str(Path(scratch) / f"{unit}.o")
            _run([compiler, *_FLAGS, *_UNITS[unit], *include, "-c", str(sources / unit), "-o", target])
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_unit, _UNITS))
        finished = Path(scratch) / built.name
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([compiler, "-shared", *objects, *libraries, "-o", str(finished)])
        finished.replace(built)


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS)
