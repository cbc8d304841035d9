"""The house rules that a program can check: the packaging map, import order, and names that PyPI owns."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ["zoo", "tokenizers", "encoders", "kernels", "cards"]


def packages_on_disk():
    folders = [path.parent for top in SOURCES for path in (ROOT / top).rglob("__init__.py")]
    return {folder.relative_to(ROOT).as_posix() for folder in folders}


def test_every_package_is_in_the_map():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    where = PROJECT["tool"]["setuptools"]["package-dir"]
    folders = set()
    for package in listed:
        parent = max((p for p in where if package == p or package.startswith(p + ".")), key=len)
        folders.add("/".join([where[parent], *package.removeprefix(parent).strip(".").split(".")]).strip("/"))
    assert folders == packages_on_disk()


@pytest.mark.parametrize("name", ["tokenizers", "kernels"])
def test_our_folders_do_not_shadow_the_packages_of_that_name(name, tmp_path):
    """With PyPI's package on the path behind the repository's root, Python started there imports that one."""
    assert not (ROOT / name / "__init__.py").exists()
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("origin = 'PyPI'")
    code = f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import {name}; print({name}.origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "PyPI", found.stderr


ORDER = {"kernels": 0, "encoders": 1, "tokenizers": 2, "zoo": 3, "cards": -1}
ROOM_OF = {"tokenzoo.kernels": 0, "tokenzoo.encoders": 1, "tokenzoo.tokenizers": 2, "tokenzoo.cards": -1}


@pytest.mark.parametrize("top", SOURCES)
def test_imports_point_one_way(top):
    for path in (ROOT / top).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"
            for module in modules:
                if module == "tokenzoo" or module.startswith("tokenzoo."):
                    room = max((r for p, r in ROOM_OF.items() if module.startswith(p)), default=3)
                    assert room <= ORDER[top], f"{path} imports {module}"


def test_importing_tokenzoo_is_light():
    code = "import tokenzoo, sys; print(sorted({m.split('.')[0] for m in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(found.stdout)
    assert not {"torch", "torchvision", "torchaudio", "timm", "numpy", "PIL", "huggingface_hub", "accelerate"} & set(loaded)
