import pytest
import torch

from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.errors import WeightsError

ADAPTER = Adapter(
    rules=(("enc.layers.{}.ln_1.", "encoder.blocks.{}.norm1."), ("head.", "out.")),
    dropped={"ema.*": "running averages that only training reads"},
    pointwise=("out.weight",),
)


def test_keys_are_renamed_both_ways():
    published = {"enc.layers.10.ln_1.weight": torch.ones(2), "head.weight": torch.ones(3, 2, 1, 1), "other": torch.ones(1)}
    ours = ADAPTER.to_ours({**published, "ema.decay": torch.ones(1)})
    assert {name: tuple(t.shape) for name, t in ours.items()} == {
        "encoder.blocks.10.norm1.weight": (2,), "out.weight": (3, 2), "other": (1,),
    }  # fmt: skip
    back = ADAPTER.to_published(ours)
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in published.items()}


def test_two_keys_never_become_one():
    with pytest.raises(WeightsError, match=r"out\.bias"):
        ADAPTER.to_ours({"head.bias": torch.ones(1), "out.bias": torch.ones(1)})
