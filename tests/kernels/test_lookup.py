import pytest
import torch

from tokenzoo.kernels import lookup


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0, 3), (2, 3, 4)])
def test_entries_of_any_shape_and_dtype(lane, shape, dtype):
    codebook, ids = torch.randn(9, 5).to(dtype), torch.randint(0, 9, shape)
    for kind in (torch.long, torch.int32, torch.uint8):
        found = lookup(ids.to(kind), codebook)
        assert found.dtype == dtype
        assert torch.equal(found, codebook[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(0, 4), (1, 1), (500, 7), (40, 900), (3, 900)])
def test_the_gradient_is_the_sum_for_each_code(lane, rows, size, dtype):
    codebook = torch.randn(size, 6).to(dtype).requires_grad_()
    ids, grad = torch.randint(0, size, (2, rows)), torch.randn(2, rows, 6)
    lookup(ids, codebook).backward(grad.to(dtype))
    expected = torch.zeros(size, 6).index_add_(0, ids.reshape(-1), grad.to(dtype).float().reshape(-1, 6))
    assert codebook.grad.dtype == dtype
    assert torch.allclose(codebook.grad.float(), expected, atol=1e-4, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("size", [50, 100_000])
def test_the_gradient_does_not_depend_on_threads(lane, size):
    ids, grad = torch.randint(0, 50, (2000,)), torch.randn(2000, 8)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            codebook = torch.zeros(size, 8, requires_grad=True)
            lookup(ids, codebook).backward(grad)
            found.append(codebook.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_gradients_of_gradients(lane):
    ids = torch.tensor([0, 2, 2, 1])
    codebook = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(lookup(ids, codebook).square().sum(), codebook, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), codebook)[0]
    assert torch.allclose(second, torch.tensor([[2.0], [2.0], [4.0]], dtype=torch.float64).expand(3, 2))


def test_opcheck(lane):
    codebook = torch.randn(9, 5, requires_grad=True)
    for ids in (torch.randint(0, 9, (2, 3)), torch.zeros(0, dtype=torch.long)):
        torch.library.opcheck(torch.ops.tokenzoo.lookup.default, (ids, codebook))
        x = torch.randn(*ids.shape, 5, requires_grad=True)
        torch.library.opcheck(torch.ops.tokenzoo.code_totals.default, (x, ids, 9))


def test_what_does_not_fit_is_refused(lane):
    for codebook in (torch.zeros(4, 2), torch.zeros(4, 2, requires_grad=True)):
        for ids in (torch.tensor([0, 4]), torch.tensor([-1, 0])):
            with pytest.raises(ValueError, match=rf"expected ids in \[0, 4\), got {int(ids.min())} to {int(ids.max())}"):
                lookup(ids, codebook)
        for ids in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
            with pytest.raises(ValueError, match="integer ids"):
                lookup(ids, codebook)
    with pytest.raises(ValueError, match="codebook"):
        lookup(torch.zeros(2, dtype=torch.long), torch.zeros(3))
