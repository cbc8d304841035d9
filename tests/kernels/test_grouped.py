import pytest
import torch
from torch.nn import functional as F

from tokenzoo.kernels import PackCache, grouped_nearest, grouped_quantize


def one_by_one(x, codebooks, metric):
    """Ids, entries and loss in float64, group by group."""
    ids, entries, errors = [], [], []
    for part, codebook in zip(x.double().chunk(len(codebooks), -1), codebooks.double(), strict=True):
        if metric == "cosine":
            part, codebook = F.normalize(part, dim=-1), F.normalize(codebook, dim=-1)
        ids.append((part[..., None, :] - codebook).square().sum(-1).argmin(-1))
        entries.append(codebook[ids[-1]])
        errors.append((part - entries[-1]).square())
    return torch.stack(ids, -1), torch.cat(entries, -1), torch.stack(errors).mean() if x.numel() else torch.zeros(())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    ("shape", "groups", "size", "dim"), [((7,), 1, 5, 4), ((2, 30), 4, 50, 8), ((0,), 3, 9, 2), ((), 2, 3, 1)]
)
def test_groups_are_quantized_one_by_one(lane, shape, groups, size, dim, metric):
    x, codebooks = torch.randn(*shape, groups * dim), torch.randn(groups, size, dim)
    ids, entries, loss = one_by_one(x, codebooks, metric)
    for caches in (None, [PackCache() for _ in range(groups)]):
        found = grouped_quantize(x, codebooks, metric=metric, caches=caches)
        assert torch.equal(found.ids, ids)
        assert torch.equal(grouped_nearest(x, codebooks, metric=metric, caches=caches), ids)
        assert torch.allclose(found.vectors.double(), entries, atol=1e-6)
        assert torch.allclose(found.loss.double(), loss.double(), rtol=1e-5)


def test_gradients_reach_vectors_and_entries(lane):
    x, codebooks = torch.randn(20, 6, requires_grad=True), torch.randn(2, 9, 3, requires_grad=True)
    found = grouped_quantize(x, codebooks)
    (found.vectors.sum() + found.loss).backward()
    pull = 2 * (x - found.vectors).detach() / x.numel()
    assert torch.allclose(x.grad, 1 + pull, atol=1e-6)
    expected = torch.zeros(2, 9, 3)
    for g in range(2):
        expected[g].index_add_(0, found.ids[:, g], (1 - pull)[:, g * 3 : g * 3 + 3])
    assert torch.allclose(codebooks.grad, expected, atol=1e-5)


def test_caches_follow_the_codebooks(lane):
    x, codebooks, caches = torch.randn(40, 6), torch.randn(2, 9, 3), [PackCache(), PackCache()]
    grouped_nearest(x, codebooks, caches=caches)
    codebooks.copy_(torch.randn(2, 9, 3))
    assert torch.equal(grouped_nearest(x, codebooks, caches=caches), grouped_nearest(x, codebooks))


def test_misuse_is_refused(lane):
    for shape in ((2, 9, 3), (3, 0, 2), (0, 9, 6), (9, 6)):
        with pytest.raises(ValueError, match="expected x"):
            grouped_quantize(torch.zeros(4, 7), torch.zeros(shape))
    with pytest.raises(ValueError, match="a cache for each of 2 codebooks"):
        grouped_nearest(torch.zeros(4, 6), torch.zeros(2, 9, 3), caches=[PackCache()])
    with pytest.raises(ValueError, match="metric"):
        grouped_nearest(torch.zeros(4, 6), torch.zeros(2, 9, 3), metric="dot")
