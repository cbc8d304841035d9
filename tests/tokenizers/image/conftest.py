"""Fixtures that the reference implementations computed: bytedance/1d-tokenizer@942a96f, turingmotors/One-D-Piece@473665d.

`<name>.state.safetensors` holds random weights under the published keys (float16 values, used as float32), and
`<name>.expected.safetensors` inputs, outputs and our config.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small lose more to the threads' meeting points than they gain, and most on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden():
    def load(name, cls, state=None, adapter="published"):
        with safe_open(GOLDEN / f"{name}.expected.safetensors", "pt") as file:
            expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config = json.loads(file.metadata()["config"])
        published = {key: tensor.float() for key, tensor in load_file(GOLDEN / f"{state or name}.state.safetensors").items()}
        tokenizer = cls(cls.config_class.from_dict(config)).eval()
        tokenizer.load_state_dict(cls.adapters[adapter].to_ours(published), strict=True)
        images = expected.pop("images")
        return SimpleNamespace(tok=tokenizer, published=published, images=images, expected=expected)

    return load
