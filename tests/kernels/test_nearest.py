import pytest
import torch

from tokenzoo.kernels import nearest


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (3, 5, 4), (2000, 4)])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_agrees_with_exhaustive_search(shape, metric, size):
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(shape, generator=generator), torch.randn(size, 4, generator=generator)
    ids = nearest(x, codebook, metric=metric)
    a, b = x.double(), codebook.double()
    if metric == "cosine":
        a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    distances = torch.cdist(a.reshape(-1, 4), b)
    chosen = distances.gather(1, ids.reshape(-1, 1))[:, 0]
    assert ids.shape == shape[:-1]
    assert ids.dtype == torch.long
    assert torch.allclose(chosen, distances.min(1).values, atol=1e-6)


def test_ties_go_to_the_lowest_index():
    codebook = torch.randn(5, 3).repeat(3, 1)
    assert nearest(codebook, codebook).tolist() == [0, 1, 2, 3, 4] * 3


def test_half_precision_is_searched_in_float32():
    x = torch.randn(64, 8).bfloat16()
    codebook = torch.randn(128, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(x, codebook), nearest(x.float(), codebook))


@pytest.mark.parametrize(
    ("x", "codebook", "metric"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), "l2"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "l2"),
        (torch.zeros(2, 3), torch.zeros(4, 3), "dot"),
    ],
)
def test_misuse_is_refused(x, codebook, metric):
    with pytest.raises(ValueError, match="expected"):
        nearest(x, codebook, metric=metric)
