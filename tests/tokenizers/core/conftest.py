import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def blocks_module():
    spec = importlib.util.spec_from_file_location("blocks", Path(__file__).parent / "blocks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tok(blocks_module):
    return blocks_module.Blocks().eval()
