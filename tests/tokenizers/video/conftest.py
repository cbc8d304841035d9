"""Fixtures that the reference implementations computed.

`<name>.state.safetensors` holds random weights under the published keys (float16 values, used as float32), and
`<name>.expected.safetensors` clips `clip.<i>`, uint8 `(T, H, W, 3)`, their `ids.<i>` and what these decode to,
`reconstruction.<i>`, and our config and adapter.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden():
    def load(name, cls):
        with safe_open(GOLDEN / f"{name}.expected.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config, adapter = json.loads(file.metadata()["config"]), file.metadata()["adapter"]
        published = {
            key: tensor.float() if tensor.is_floating_point() else tensor
            for key, tensor in load_file(GOLDEN / f"{name}.state.safetensors").items()
        }
        tokenizer = cls(cls.config_class.from_dict(config)).eval()
        tokenizer.load_state_dict(cls.adapters[adapter].to_ours(published), strict=True)
        cases = [
            SimpleNamespace(**{key.rpartition(".")[0]: value for key, value in tensors.items() if key.endswith(f".{i}")})
            for i in range(sum(key.startswith("clip.") for key in tensors))
        ]
        return SimpleNamespace(tok=tokenizer, published=published, adapter=cls.adapters[adapter], cases=cases)

    return load
