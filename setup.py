"""Compiles the CPU kernels while a wheel is built, where torch and a C++ compiler are at hand.

That takes `pip install --no-build-isolation`; a wheel built without is complete too, and compiles the kernels on first use.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def native() -> ModuleType | None:
    """The module that compiles the kernels, if it can be imported here, which takes torch."""
    spec = importlib.util.spec_from_file_location("_native", ROOT / "kernels" / "ops" / "_native.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module if module.compiler() else None


NATIVE = native()


class BuildKernels(build_py):
    """Copies the Python files, then compiles the kernels beside them."""

    def run(self) -> None:
        super().run()
        if NATIVE is None or self.editable_mode:
            return
        target = Path(self.build_lib) / "tokenzoo" / "kernels" / NATIVE.LIBRARY_NAME
        try:
            NATIVE.compile_library(NATIVE.compiler(), ROOT / "kernels" / "csrc", target)
        except Exception as error:  # a wheel without compiled kernels works
            self.announce(f"the CPU kernels were not compiled: {error}", level=3)


class PlatformWheel(bdist_wheel):
    """Any Python will do, but not any platform, where the wheel holds compiled kernels."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = NATIVE is None

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


commands: dict[str, Any] = {"build_py": BuildKernels, "bdist_wheel": PlatformWheel}
setup(cmdclass=commands)
