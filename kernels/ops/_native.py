"""Compiling and loading the CPU kernels.

The wheel carries C++ sources and needs no compiler. Where torch and a compiler are there when it is built, the library is
compiled then and lies beside this file; otherwise it is compiled on first use into the user's cache, keyed on the sources,
the compiler and the flags. Where there is no compiler, or `TOKENZOO_NATIVE=0`, the PyTorch fallback answers.
The library is written against LibTorch's stable ABI, so torch may be upgraded without a rebuild.
"""

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import FileLock, Timeout

log = logging.getLogger("tokenzoo.kernels")

_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wno-psabi", "-Wno-ignored-attributes", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
_AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=512", "-mfma"]
_UNITS: dict[str, list[str]] = {
    unit: [] for unit in ("ops.cpp", "search_portable.cpp", "screen_amx.cpp", "split.cpp", "windows.cpp")
}
if platform.machine().lower() in ("x86_64", "amd64"):
    _UNITS |= {"search_avx2.cpp": ["-mavx2", "-mfma"], "search_avx512.cpp": _AVX512, "screen_amx.cpp": _AVX512}
_OPERATORS = (
    "pack",
    "nearest",
    "quantize",
    "residual_quantize",
    "assign",
    "code_sums",
    "fsq",
    "lfq",
    "match_strings",
    "encode_windows",
    "decode_windows",
    "split_bytes",
    "split_characters",
)
_COMPILE_SECONDS = 300  # a crowded machine takes minutes
_LOCK_SECONDS = 3 * _COMPILE_SECONDS  # units, then the link
LIBRARY_NAME = "tokenzoo_native.so"
_PREBUILT = Path(__file__).with_name(LIBRARY_NAME)
_status = "not loaded yet"


def status() -> str:
    """Which implementation answers on the CPU, and why, in words."""
    library()
    return _status


@functools.cache
def library() -> Any | None:
    """The native operators, compiled if need be; `None` where they cannot be had."""
    if os.environ.get("TOKENZOO_NATIVE", "1") == "0":
        _settle("PyTorch fallback: native kernels are turned off by TOKENZOO_NATIVE=0", logging.INFO)
        return None
    try:
        if not _load_prebuilt():
            path = _build()
            if path is None:
                _settle("PyTorch fallback: no C++ compiler was found (set CXX, or install g++ or clang++)", logging.WARNING)
                return None
            torch.ops.load_library(str(path))
        vectors = f"{torch.ops.tokenzoo_native.instruction_set()}-bit vectors"
        if torch.ops.tokenzoo_native.has_screen():
            vectors += ", AMX"
    except (OSError, RuntimeError, Timeout, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        _settle(f"PyTorch fallback: compiling the kernels failed: {reason.strip()[:500]}", logging.WARNING)
        return None
    _settle(f"native C++ kernels ({vectors})", logging.INFO)
    # Calling the overload itself saves a microsecond of choosing it.
    return SimpleNamespace(**{name: getattr(torch.ops.tokenzoo_native, name).default for name in _OPERATORS})


def _load_prebuilt() -> bool:
    if not _PREBUILT.exists():
        return False
    try:
        torch.ops.load_library(str(_PREBUILT))
    except (OSError, RuntimeError) as error:
        log.warning("the kernels that were compiled at install do not load, so they are compiled again: %s", error)
        return False
    return True


def _settle(reason: str, level: int) -> None:
    global _status
    _status = reason
    log.log(level, reason)


def compiler() -> list[str] | None:
    """Command of the C++ compiler: what `CXX` says, or the first that is found."""
    for candidate in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        program, *arguments = shlex.split(candidate)
        if found := shutil.which(program):
            return [found, *arguments]
    return None


def _build() -> Path | None:
    """Path of the library in the cache, compiled if need be; `None` without a compiler.

    It is compiled under a lock and renamed into place, so that any number of processes may ask.
    """
    command = compiler()
    if command is None:
        return None
    with resources.as_file(resources.files("tokenzoo.kernels.csrc")) as sources:
        built = _cache_folder() / _fingerprint(command, sources) / LIBRARY_NAME
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(built.with_name("lock"), timeout=_LOCK_SECONDS):
                if not built.exists():
                    log.info("compiling the CPU kernels (once, a few seconds)")
                    compile_library(command, sources, built)
        return built


def _cache_folder() -> Path:
    if given := os.environ.get("TOKENZOO_CACHE"):
        return Path(given) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenzoo" / "kernels"


def _fingerprint(command: list[str], sources: Path) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    digest = hashlib.sha256(f"{version} {_FLAGS} {_UNITS}".encode())
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(command: list[str], sources: Path, built: Path) -> None:
    """Compiles the sources in a folder and puts the library in place once it is whole.

    Raises:
        subprocess.SubprocessError: If the compiler fails; its `stderr` says why.
    """
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{torch_folder / 'include'}", f"-I{sources}"]
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:

        def compile_unit(unit: str) -> str:
            target = str(Path(scratch) / f"{unit}.o")
            _run([*command, *_FLAGS, *_UNITS[unit], *include, "-c", str(sources / unit), "-o", target])
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_unit, _UNITS))
        finished = Path(scratch) / built.name
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*command, "-shared", *objects, *libraries, "-o", str(finished)])
        finished.replace(built)


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS)
