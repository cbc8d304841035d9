"""Every op in a traced graph: `torch.export` with a free number of vectors, and `torch.compile` without a graph break."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tokenzoo.kernels import (
    Projections,
    code_sums,
    fsq_codes,
    fsq_indices,
    fsq_quantize,
    grouped_nearest,
    grouped_quantize,
    lfq_codes,
    lfq_quantize,
    lookup,
    nearest,
    projected_residual_quantize,
    quantize,
    residual_quantize,
)

GENERATOR = torch.Generator().manual_seed(0)
CODEBOOK, CODEBOOKS = (torch.randn(shape, generator=GENERATOR) for shape in ((20, 6), (2, 20, 6)))
MAPS = Projections(*(torch.randn(shape, generator=GENERATOR) for shape in ((2, 6, 12), (2, 6), (2, 12, 6), (2, 12))))
LEVELS = (8, 8, 5)


def ids_of(x):
    """Ids that depend on the vectors."""
    return (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0)


CALLS = {
    "nearest": (6, lambda x: nearest(x, CODEBOOK)),
    "nearest_cosine": (6, lambda x: nearest(x, CODEBOOK, metric="cosine")),
    "quantize": (6, lambda x: quantize(x, CODEBOOK)[:3]),
    "quantize_cosine": (6, lambda x: quantize(x, CODEBOOK, metric="cosine")[:3]),
    "residual_quantize": (6, lambda x: tuple(residual_quantize(x, CODEBOOKS))),
    "projected_residual_quantize": (12, lambda x: tuple(projected_residual_quantize(x, CODEBOOKS, MAPS))),
    "grouped_nearest": (12, lambda x: grouped_nearest(x, CODEBOOKS)),
    "grouped_quantize": (12, lambda x: tuple(grouped_quantize(x, CODEBOOKS))),
    "fsq_quantize": (3, lambda x: tuple(fsq_quantize(x, LEVELS))),
    "fsq_codes": (3, lambda x: fsq_codes(ids_of(x), LEVELS)),
    "fsq_indices": (3, lambda x: fsq_indices(x.sign(), LEVELS)),
    "lfq_quantize": (6, lambda x: tuple(lfq_quantize(x))),
    "lfq_codes": (6, lambda x: lfq_codes(ids_of(x), 6)),
    "lookup": (6, lambda x: lookup(ids_of(x), CODEBOOK)),
}


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x * 2)


def agree(found, expected):
    found, expected = (one if isinstance(one, tuple) else (one,) for one in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_export_and_compile(name):
    torch.compiler.reset()
    dim, function = CALLS[name]
    module = Call(function).eval()
    with torch.no_grad():
        rows = torch.export.Dim("rows", min=2, max=4096)
        program = torch.export.export(module, (torch.randn(10, dim),), dynamic_shapes={"x": {0: rows}}).module()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for count in (10, 33):
            x = torch.randn(count, dim)
            agree(program(x), module(x))
        agree(compiled(x), module(x))


@pytest.mark.parametrize("name", ["quantize", "grouped_quantize", "fsq_quantize", "lfq_quantize", "lookup"])
def test_gradients_in_compiled_graphs(name):
    dim = CALLS[name][0]

    def loss(x, codebooks):
        found = {
            "quantize": lambda: quantize(x, codebooks[0]).vectors + quantize(x, codebooks[0]).loss,
            "grouped_quantize": lambda: grouped_quantize(x, codebooks).vectors,
            "fsq_quantize": lambda: fsq_quantize(x, LEVELS).codes,
            "lfq_quantize": lambda: lfq_quantize(x).codes,
            "lookup": lambda: lookup(ids_of(x), codebooks[0]) + x,
        }[name]()
        return (found * torch.arange(1.0, dim + 1)).sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = torch.randn(30, dim, generator=torch.Generator().manual_seed(1), requires_grad=True)
        codebooks = CODEBOOKS.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(x, codebooks), (x, codebooks), materialize_grads=True))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_one_graph_through_the_real_compiler():
    def all_of_them(x):
        ids, vectors = residual_quantize(x, CODEBOOKS)
        return (
            lookup(ids, CODEBOOK),
            vectors,
            quantize(x, CODEBOOK).loss,
            fsq_quantize(x[:, :3], LEVELS).codes,
            lfq_quantize(x).ids,
        )

    x = torch.randn(30, 6)
    agree(torch.compile(all_of_them, fullgraph=True)(x), all_of_them(x))


def test_code_sums_follow_an_exported_search():
    x = torch.randn(30, 6)
    program = torch.export.export(Call(lambda x: nearest(x, CODEBOOK)), (x,)).module()
    counts, sums = code_sums(x, program(x / 2), len(CODEBOOK))
    assert torch.equal(counts, torch.bincount(nearest(x, CODEBOOK), minlength=len(CODEBOOK)).float())
    assert torch.allclose(sums.sum(0), x.sum(0), atol=1e-4)


@pytest.mark.parametrize("name", ["nearest", "quantize", "residual_quantize", "fsq_quantize", "lfq_quantize", "lookup"])
def test_shapes_without_data(name):
    """Fake tensors go through the registered operators, outside of any compiler too."""
    width, call = CALLS[name]
    x = torch.randn(4, 5, width, generator=GENERATOR)
    real = call(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x))
    for ours, theirs in zip(*((t if isinstance(t, tuple) else (t,)) for t in (fake, real)), strict=True):
        assert isinstance(ours, FakeTensor)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
