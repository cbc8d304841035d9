import copy

import pytest
import torch
from torch.nn import functional as F

from tokenzoo.kernels import nearest
from tokenzoo.tokenizers.quantizers import VectorQuantizer


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_vectors_ids_and_loss(metric):
    quantizer = VectorQuantizer(32, 6, metric=metric, commitment=0.25)
    x = torch.randn(4, 10, 6)
    found = quantizer(x)
    a, b = (F.normalize(t, dim=-1) if metric == "cosine" else t for t in (x, quantizer.codebook.detach()))
    assert torch.equal(found.ids, nearest(x, quantizer.codebook, metric=metric))
    assert torch.allclose(found.vectors, b[found.ids], atol=1e-6)
    assert float(found.loss.detach()) == pytest.approx(1.25 * float((a - b[found.ids]).square().mean()), rel=1e-5)
    assert torch.allclose(quantizer.lookup(found.ids), b[found.ids])


def test_gradients_pass_straight_through_and_move_the_codebook():
    quantizer = VectorQuantizer(32, 6, commitment=0)
    x = torch.randn(10, 6, requires_grad=True)
    found = quantizer(x)
    (found.vectors.sum() + found.loss).backward()
    assert torch.allclose(x.grad, torch.ones(10, 6))
    assert set(quantizer.codebook.grad.abs().sum(1).nonzero()[:, 0].tolist()) == set(found.ids.tolist())


def test_half_precision_modules_still_search_in_float32():
    quantizer = VectorQuantizer(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(torch.randn(5, 8).bfloat16()).vectors.dtype == torch.float32


def test_eval_follows_changes_and_copies():
    quantizer = VectorQuantizer(64, 8).eval()
    x = torch.randn(50, 8)
    quantizer.ids(x)
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(64, 8))
    assert torch.equal(quantizer.ids(x), nearest(x, quantizer.codebook))
    assert torch.equal(twin.ids(x), nearest(x, twin.codebook))
    quantizer.load_state_dict(twin.state_dict())
    assert torch.equal(quantizer.ids(x), twin.ids(x))
    assert list(quantizer.state_dict()) == ["codebook"]


def test_the_codebook_stays_in_float32_when_the_module_is_cast():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), VectorQuantizer(64, 8))
    before = model[1].codebook.detach().clone()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].codebook.dtype == torch.float32
    assert torch.equal(model[1].codebook, before)
    assert isinstance(model[1].codebook, torch.nn.Parameter)
    assert model[1](torch.randn(3, 8).bfloat16()).vectors.dtype == torch.float32
