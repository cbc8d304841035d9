import copy

import pytest
import torch
from torch.nn import functional as F

from tokenzoo.kernels import nearest
from tokenzoo.tokenizers.quantizers import (
    FactorizedQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ProjectedResidualQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    carry_gradient,
)


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


def rotation_gradient(x, entry, grad):
    """The gradient at x by the formula of arXiv 2410.06424, with the matrix written out, in float64."""
    e, q = x / x.norm(), entry / entry.norm()
    r = (e + q) / (e + q).norm()
    matrix = torch.eye(len(x), dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)
    assert torch.allclose(matrix @ e, q)
    return entry.norm() / x.norm() * matrix.T @ grad


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_rotation_trick_is_its_formula(metric):
    quantizer = VectorQuantizer(16, 6, metric=metric, gradient="rotation")
    x, grads = torch.randn(12, 6, requires_grad=True), torch.randn(12, 6)
    found = quantizer(x)
    (gradient,) = torch.autograd.grad(found.vectors, x, grads)
    assert torch.equal(found.vectors.detach(), quantizer.lookup(found.ids).detach())
    for row, entry, grad, ours in zip(x.detach(), found.vectors.detach(), grads, gradient, strict=True):
        if metric == "l2":
            expected = rotation_gradient(row.double(), entry.double(), grad.double())
        else:
            unit = row.double().requires_grad_()
            normalised = F.normalize(unit, dim=0)
            turned = rotation_gradient(normalised.detach(), entry.double(), grad.double())
            (expected,) = torch.autograd.grad(normalised, unit, turned)
        assert torch.allclose(ours.double(), expected, atol=1e-5)


def test_the_rotation_of_degenerate_vectors_is_finite():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], requires_grad=True)
    entries = torch.tensor([[1.0, 1.0], [-3.0, 0.0], [0.0, 0.0]])
    vectors = carry_gradient(x, entries, "rotation")
    vectors.backward(torch.ones(3, 2))
    assert torch.equal(vectors.detach(), entries)
    assert torch.equal(x.grad[0], torch.ones(2))
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad[2], torch.zeros(2))


MODULES = {
    "vector": lambda: VectorQuantizer(32, 8),
    "vector_cosine": lambda: VectorQuantizer(32, 8, metric="cosine", gradient="rotation"),
    "factorized": lambda: FactorizedQuantizer(32, 3, 8),
    "residual": lambda: ResidualQuantizer(32, 8, 4),
    "residual_cosine": lambda: ResidualQuantizer(32, 8, 4, metric="cosine"),
    "residual_narrow": lambda: ResidualQuantizer(32, 5, 4, input_dim=8, gradient="rotation"),
    "projected": lambda: ProjectedResidualQuantizer(32, 3, 8, 4),
    "finite": lambda: FiniteScalarQuantizer((4, 4, 3, 3, 2, 2, 2, 2)),
    "lookup_free": lambda: LookupFreeQuantizer(8),
    "spherical": lambda: LookupFreeQuantizer(8, spherical=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_no_two_parameters_share_memory(name):
    quantizer = MODULES[name]().eval()
    quantizer.ids(torch.randn(5, 8))
    storages = [tensor.untyped_storage().data_ptr() for tensor in quantizer.state_dict().values()]
    assert len(set(storages)) == len(storages)  # accelerate saves one of those that do, and drops the others


@pytest.mark.parametrize("name", MODULES)
def test_every_module_keeps_one_contract(name):
    torch.manual_seed(0)
    quantizer = MODULES[name]()
    for parameter in quantizer.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 20, 8, requires_grad=True)
    found = quantizer(x)
    (found.vectors.square().sum() + found.loss).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    quantizer.eval()
    ids = quantizer.ids(x)
    assert torch.equal(ids, found.ids)
    assert ids.dtype == torch.long
    assert not ids.requires_grad
    assert torch.allclose(quantizer.lookup(ids), found.vectors, atol=1e-4)
    assert torch.equal(torch.stack([quantizer.ids(item) for item in x]), ids)
    assert quantizer.ids(x[:, :0]).shape == (3, 0, *ids.shape[2:])
    assert float(quantizer(x[:, :0]).loss.detach()) == 0
    quantizer.to(torch.bfloat16)
    assert torch.equal(quantizer.ids(x), ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.ids(x), ids)
        assert torch.equal(quantizer(x).ids, ids)
        assert quantizer.lookup(ids).dtype == torch.float32


@pytest.mark.parametrize("name", ["vector_cosine", "residual_narrow", "projected", "finite", "spherical"])
def test_modules_compile_without_a_graph_break(name):
    torch.compiler.reset()
    quantizer, x = MODULES[name](), torch.randn(3, 20, 8)
    found, expected = torch.compile(quantizer, fullgraph=True, backend="eager")(x), quantizer(x)
    assert torch.equal(found.ids, expected.ids)
    assert torch.allclose(found.vectors, expected.vectors, atol=1e-5)
    quantizer.eval()
    assert torch.equal(torch.compile(quantizer.ids, fullgraph=True, backend="eager")(x), quantizer.ids(x))


def test_state_dicts_hold_weights_only():
    stage = {"codebook", "in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}
    expected = {
        "vector": {"codebook"},
        "factorized": stage,
        "residual": {f"stages.{q}.codebook" for q in range(4)},
        "residual_narrow": {f"stages.{q}.codebook" for q in range(4)} | {"in_proj.weight", "out_proj.weight"},
        "projected": {f"stages.{q}.{key}" for q in range(4) for key in stage},
        "finite": set(),
        "lookup_free": set(),
    }
    for name, keys in expected.items():
        assert set(MODULES[name]().state_dict()) == keys


@pytest.mark.parametrize("name", ["residual", "residual_cosine", "residual_narrow", "projected"])
def test_stages_may_be_a_prefix(name):
    quantizer, x = MODULES[name]().eval(), torch.randn(2, 10, 8)
    ids = quantizer.ids(x)
    assert torch.equal(quantizer.ids(x, 2), ids[..., :2])
    assert torch.equal(quantizer.ids(x), ids)
    assert quantizer.lookup(ids[..., :2]).shape == x.shape
    for count in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 stages"):
            quantizer.ids(x, count)
    with torch.no_grad():
        for stage in quantizer.stages:
            stage.codebook.normal_()
    changed = quantizer.ids(x)
    assert not torch.equal(changed, ids)
    assert torch.equal(quantizer.train().ids(x), changed)


@pytest.mark.parametrize("name", ["residual", "projected"])
def test_dropout_leaves_out_the_last_stages_of_some_items(name):
    torch.manual_seed(0)
    quantizer = MODULES[name]()
    for parameter in quantizer.parameters():
        parameter.data.normal_()
    quantizer.dropout = 0.5
    x = torch.randn(200, 5, 8)
    found, whole = quantizer(x), quantizer.ids(x)
    used = (found.ids >= 0).sum(-1)
    assert torch.equal(used, used[:, :1].expand(200, 5))
    assert set(used[:, 0].tolist()) == {1, 2, 3, 4}
    assert 0.5 < (used[:, 0] == 4).float().mean() < 0.75
    assert torch.equal(torch.where(found.ids >= 0, found.ids, whole), whole)
    for item in range(5):
        kept = int(used[item, 0])
        assert torch.allclose(found.vectors[item], quantizer.lookup(whole[item, :, :kept]), atol=1e-4)
    assert (quantizer.eval()(x).ids >= 0).all()


def test_one_gradient_for_all_stages():
    quantizer, x = ResidualQuantizer(32, 8, 4, commitment=0, dropout=1.0), torch.randn(6, 8, requires_grad=True)
    found = quantizer(x)
    found.vectors.sum().backward()
    assert torch.allclose(x.grad, torch.ones(6, 8))
    found = quantizer(x)
    found.loss.backward()
    for stage, chosen in zip(quantizer.stages, found.ids.unbind(-1), strict=True):
        assert set(stage.codebook.grad.abs().sum(1).nonzero()[:, 0].tolist()) == set(chosen[chosen >= 0].tolist())


def test_entropies_are_those_of_all_codes():
    quantizer = LookupFreeQuantizer(5, commitment=0, entropy=1.0, diversity=0.0, temperature=0.7)
    x = torch.randn(40, 5, dtype=torch.float64)
    codes = quantizer.lookup(torch.arange(32)).double()
    p = (-(x[:, None] - codes).square().sum(-1) / 0.7).softmax(-1)
    assert float(quantizer(x).loss) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    quantizer.diversity = 1.0
    bits = torch.stack([(p.mean(0) * (codes[:, d] > 0)).sum() for d in range(5)])
    together = -(bits * bits.log() + (1 - bits) * (1 - bits).log()).sum()
    assert float(quantizer(x).loss) == pytest.approx(float(-(p * p.log()).sum(-1).mean() - together), rel=1e-4)
    x = torch.tensor([[1e4] * 5, [-1e4] * 5], requires_grad=True)
    quantizer(x).loss.backward()
    assert x.grad.isfinite().all()


def test_choices_that_cannot_be_are_refused():
    for build in (
        lambda: VectorQuantizer(8, 4, metric="dot"),
        lambda: ResidualQuantizer(8, 4, 2, gradient="none"),
        lambda: ResidualQuantizer(8, 4, 0),
        lambda: ProjectedResidualQuantizer(8, 2, 4, 2, dropout=1.5),
        lambda: FiniteScalarQuantizer((8, 1)),
        lambda: LookupFreeQuantizer(63),
    ):
        with pytest.raises(ValueError, match="expected"):
            build()
