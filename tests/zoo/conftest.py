import importlib.util
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from tokenzoo import registry

HERE = Path(__file__).parent
ENTRY_POINTS = "[tokenzoo.tokenizers]\ntiny = tiny:Tiny\n\n[tokenzoo.cards]\ntiny = tiny_cards\n"


def _module(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hub_server():
    return _module("hub_server")


class Site:
    """A folder on `sys.path` that holds an installed distribution: `tiny`, its cards, and its entry points."""

    def __init__(self, folder):
        self.folder = folder
        self.cards = folder / "tiny_cards"
        self.cards.mkdir(parents=True)
        (self.cards / "__init__.py").touch()
        shutil.copy(HERE / "tiny.py", folder)
        self.entry_points(ENTRY_POINTS)

    def entry_points(self, text, dist="tiny_tokenizers"):
        info = self.folder / f"{dist}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(text)
        registry.refresh()

    def card(self, name, *, config=None, license="mit", text="# A tiny one\n", source=None, **ours):
        front = {
            "license": license,
            "tokenzoo": {
                "architecture": "tiny",
                "modality": "image",
                "config": config or {},
                "source": source or {"repo": "org/tiny", "file": "model.safetensors"},
                **ours,
            },
        }
        (self.cards / f"{name}.md").write_text(f"---\n{yaml.safe_dump(front)}---\n{text}")
        registry.refresh()


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(str(site.folder))
    for name in ("tiny", "tiny_cards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    registry.refresh()
    yield site
    for name in ("tiny", "tiny_cards"):
        sys.modules.pop(name, None)
    registry.refresh()


@pytest.fixture
def tiny(site):
    return importlib.import_module("tiny")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """huggingface_hub with an empty cache, nobody logged in, and no endpoint."""
    home = tmp_path / "home"
    for name, value in {
        "ENDPOINT": "http://127.0.0.1:9",
        "HUGGINGFACE_CO_URL_TEMPLATE": "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "AGENT_HARNESSES_PATH": str(tmp_path / "agents.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield home
    huggingface_hub.close_session()


@pytest.fixture
def hub(cache, hub_server, monkeypatch):
    """A running Hub that huggingface_hub talks to."""
    server = hub_server.HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield server
    server.stop()


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
