import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenzoo.kernels import fsq_codes, fsq_indices, fsq_quantize, lfq_codes, lfq_quantize

LEVELS = [(8, 8, 8, 5, 5, 5), (2,), (3,), (7, 5, 5, 5, 5), (2, 2), (16, 9), (8, 6, 5), (1000, 2)]


def published(z, levels):
    """Finite scalar quantization as its paper writes it."""
    count = torch.tensor(levels, dtype=torch.float32)
    half = (count - 1) * (1 + 1e-3) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0)
    bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
    width = count // 2
    level = bounded.round() + width
    basis = torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)
    return (bounded + (bounded.round() - bounded).detach()) / width, (level.long() * basis).sum(-1)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 5000])
def test_fsq_is_the_published_form(lane, levels, rows):
    z = torch.randn(rows, len(levels), generator=torch.Generator().manual_seed(rows)) * 2
    codes, ids = fsq_quantize(z, levels)
    expected_codes, expected_ids = published(z, levels)
    assert torch.equal(ids, expected_ids)
    assert torch.allclose(codes, expected_codes, atol=1e-6)
    assert torch.equal(fsq_indices(codes, levels), ids)
    assert torch.allclose(fsq_codes(ids, levels), codes, atol=1e-6)


@pytest.mark.parametrize("levels", LEVELS[:7])
def test_fsq_ids_cover_the_codebook(lane, levels):
    size = int(torch.tensor(levels).prod())
    ids = torch.arange(0, size, max(1, size // 5000))
    assert torch.equal(fsq_indices(fsq_codes(ids, levels), levels), ids)
    assert int(fsq_quantize(torch.full((1, len(levels)), 99.0), levels).ids) == size - 1
    assert int(fsq_quantize(torch.full((1, len(levels)), -99.0), levels).ids) == 0
    assert int(fsq_quantize(torch.full((1, len(levels)), float("nan")), levels).ids) == 0


def test_fsq_ids_stay_in_range_whatever_the_input(lane):
    z = torch.tensor([[float("inf")] * 3, [float("-inf")] * 3, [float("nan")] * 3])
    assert fsq_quantize(z, (8, 5, 2)).ids.tolist() == [79, 0, 0]
    assert fsq_quantize(z, (8, 5, 2)).codes.abs().max() == 1


def test_fsq_gradients_are_those_of_the_published_form(lane):
    levels = (8, 5, 3)
    gradients = []
    for function in (lambda z: fsq_quantize(z, levels).codes, lambda z: published(z, levels)[0]):
        z = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        (function(z) * torch.arange(1.0, 4)).sum().backward()
        gradients.append(z.grad)
    assert torch.allclose(*gradients, atol=1e-6)


@given(st.integers(0, 70), st.integers(1, 62), st.integers(0, 100))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lfq_is_the_sign_of_every_dimension(lane, rows, dim, seed):
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    codes, ids = lfq_quantize(x, scale=0.5)
    assert torch.equal(codes, torch.where(x > 0, 0.5, -0.5))
    assert ids.tolist() == [int("".join(str(int(v > 0)) for v in row), 2) for row in x.tolist()]
    assert torch.equal(lfq_codes(ids, dim, scale=0.5), codes)


def test_shapes_dtypes_and_graphs(lane):
    z = torch.randn(2, 3, 6).half().transpose(0, 1)
    assert fsq_quantize(z, LEVELS[0]).ids.shape == (3, 2)
    assert lfq_quantize(z).codes.dtype == torch.float32
    for op, *rest in ((torch.ops.tokenzoo.fsq_quantize, [8, 8, 8, 5, 5, 5]), (torch.ops.tokenzoo.lfq_quantize, 1.0)):
        torch.library.opcheck(op.default, (torch.randn(7, 6, requires_grad=True), *rest))
    graph = torch.compile(lambda x: fsq_quantize(x * 2, [8] * 6).ids + lfq_quantize(x).ids, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(z), fsq_quantize(z * 2, [8] * 6).ids + lfq_quantize(z).ids)


def test_misuse_is_refused(lane):
    for levels in ((8, 1, 5), (), (2**20, 2**20)):
        with pytest.raises(ValueError, match="levels"):
            fsq_quantize(torch.zeros(2, len(levels)), levels)
    with pytest.raises(ValueError, match="one value for each"):
        fsq_quantize(torch.zeros(2, 5), (8, 8))
    for dim in (0, 63):
        with pytest.raises(ValueError, match="1 to 62"):
            lfq_quantize(torch.zeros(2, dim))
