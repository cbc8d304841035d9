import pytest
import torch
from torch.nn import functional as F

from tokenzoo.kernels import (
    PackCache,
    Projections,
    code_sums,
    kmeans,
    nearest,
    projected_residual_quantize,
    quantize,
    residual_quantize,
)
from tokenzoo.kernels._backend import backend_for


@pytest.mark.parametrize("rows", [0, 1, 7, 500])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_ids_entries_and_loss(lane, rows, metric):
    x, codebook = torch.randn(rows, 24), torch.randn(99, 24)
    found = quantize(x, codebook, metric=metric)
    assert torch.equal(found.ids, nearest(x, codebook, metric=metric))
    if metric == "cosine":
        x, codebook = F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)
    assert torch.equal(found.vectors, codebook[found.ids])
    assert float(found.loss) == pytest.approx(float((found.vectors - x).square().mean()) if rows else 0, rel=1e-5)


def test_shapes_dtypes_and_cache(lane):
    x, codebook, cache = torch.randn(2, 3, 4, 8).half(), torch.randn(30, 8), PackCache()
    found = quantize(x, codebook, cache=cache)
    assert found.ids.shape == (2, 3, 4)
    assert found.vectors.shape == x.shape
    assert found.vectors.dtype == torch.float32
    codebook.mul_(2)
    assert torch.equal(quantize(x, codebook, cache=cache).ids, nearest(x, codebook))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_gradients_are_straight_through_and_exact_gather(lane, metric):
    def plain(x, codebook):
        if metric == "cosine":
            x, codebook = F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)
        entries = codebook[nearest(x, codebook)]
        return entries + x - x.detach(), F.mse_loss(entries, x)

    def loss_of(function):
        x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
        codebook = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        vectors, loss = function(x, codebook)
        weights = torch.arange(6.0)
        (weights * vectors).sum().add(3 * loss).backward()
        return x.grad, codebook.grad

    ours = loss_of(lambda x, codebook: quantize(x, codebook, metric=metric)[1:3])
    for a, b in zip(ours, loss_of(plain), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_opcheck_and_compile(lane):
    x, codebook = torch.randn(10, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    for statistics in (False, True):
        torch.library.opcheck(torch.ops.tokenzoo.quantize.default, (x, codebook, statistics))
    torch.library.opcheck(torch.ops.tokenzoo.residual_quantize.default, (x.detach(), torch.randn(3, 9, 6)))
    compiled = torch.compile(lambda x, c: quantize(x * 2, c).vectors.sum(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, codebook), quantize(x * 2, codebook).vectors.sum())


def test_second_derivatives_of_the_loss(lane):
    x, codebook = torch.randn(12, 4, requires_grad=True), torch.randn(9, 4)
    (gradient,) = torch.autograd.grad(quantize(x, codebook).loss, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 0], x)
    assert float(second[0, 0]) == pytest.approx(2 / x.numel())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [0, 3, 400])
def test_statistics_on_request(lane, rows, grad):
    x, codebook = torch.randn(rows, 10, requires_grad=grad), torch.randn(30, 10)
    found = quantize(x, codebook, statistics=True)
    counts, sums = code_sums(x, found.ids, 30)
    assert torch.equal(found.counts, counts)
    assert torch.equal(found.sums, sums)
    assert quantize(x, codebook).sums is None


def test_code_sums_do_not_depend_on_threads(lane):
    x, ids = torch.randn(1000, 12), torch.randint(0, 70, (1000,))
    counts, sums = code_sums(x, ids, 80)
    assert torch.equal(counts, torch.bincount(ids, minlength=80).float())
    assert torch.allclose(sums, torch.zeros(80, 12).index_add_(0, ids, x), atol=1e-4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(code_sums(x, ids, 80)[1], sums)
    finally:
        torch.set_num_threads(threads)
    assert code_sums(x[:0], ids[:0], 5)[0].tolist() == [0] * 5


@pytest.mark.parametrize(("rows", "stages", "dim"), [(0, 2, 8), (1, 3, 8), (300, 8, 16), (65, 4, 130), (10, 0, 4)])
def test_residual_stages_are_quantizers_in_a_row(lane, rows, stages, dim):
    x, codebooks = torch.randn(rows, dim), torch.randn(stages, 64, dim)
    found = residual_quantize(x, codebooks)
    residual, total = x, torch.zeros(rows, dim)
    assert found.ids.shape == (rows, stages)
    for stage, codebook in enumerate(codebooks):
        ids = nearest(residual, codebook)
        assert torch.equal(found.ids[:, stage], ids)
        residual, total = residual - codebook[ids], total + codebook[ids]
    assert torch.allclose(found.vectors, total, atol=1e-5)
    apart, caches = [codebook.clone() for codebook in codebooks], [PackCache() for _ in range(stages)]
    for _ in range(2):
        assert torch.equal(residual_quantize(x, apart, caches=caches).ids, found.ids)
    for codebook in apart:
        codebook.mul_(0.5)
    assert torch.equal(residual_quantize(x, apart, caches=caches).ids, residual_quantize(x, codebooks / 2).ids)
    with pytest.raises(ValueError, match="expected x"):
        residual_quantize(x, torch.randn(2, 5, dim + 1))
    for empty in (torch.zeros(2, 3, 0), torch.zeros(2, 0, 4), [torch.zeros(3, 4), torch.zeros(5, 4)], torch.zeros(3, 4)):
        with pytest.raises(ValueError, match="K, D > 0"):
            residual_quantize(torch.zeros(4, empty[0].shape[-1]), empty)
    with pytest.raises(ValueError, match="a cache for each of 2"):
        residual_quantize(torch.zeros(4, 3), torch.zeros(2, 5, 3), caches=[PackCache()])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("rows", "stages"), [(0, 2), (1, 3), (300, 9), (5, 0)])
def test_folded_projections_are_the_stages_one_by_one(lane, rows, stages, metric):
    x, codebooks = torch.randn(2, rows, 32), torch.randn(stages, 64, 8)
    maps = Projections(
        torch.randn(stages, 8, 32) / 6, torch.randn(stages, 8), torch.randn(stages, 32, 8) / 3, torch.randn(stages, 32)
    )
    found = projected_residual_quantize(x, codebooks, maps, metric=metric)
    residual, total, same = x.double(), torch.zeros_like(x).double(), torch.ones(2, rows, dtype=torch.bool)
    for q in range(stages):
        narrow = residual @ maps.in_weight[q].double().T + maps.in_bias[q]
        ids = nearest(narrow, codebooks[q], metric=metric)
        same &= found.ids[..., q] == ids
        step = codebooks[q][ids].double() @ maps.out_weight[q].double().T + maps.out_bias[q]
        residual, total = residual - step, total + step
    assert (~same).sum() <= rows // 100  # folding rounds otherwise, so that a near-tie may go the other way
    assert torch.allclose(found.vectors[same].double(), total[same], atol=1e-4)
    with pytest.raises(ValueError, match="expected projections"):
        projected_residual_quantize(x[..., :-1], codebooks, maps)


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_finds_separate_clusters_and_repeats(lane, spherical):
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(6) * 10
    truth = torch.arange(600) % 6
    x = centres[truth] + torch.randn(600, 6, generator=generator)
    first = kmeans(x, 6, spherical=spherical, generator=torch.Generator().manual_seed(1))
    again = kmeans(x, 6, spherical=spherical, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.centroids, again.centroids)
    pairs = {(int(a), int(b)) for a, b in zip(truth, first.ids, strict=True)}
    assert len(pairs) == 6
    if spherical:
        assert torch.allclose(first.centroids.norm(dim=1), torch.ones(6), atol=1e-5)


def test_kmeans_with_more_centroids_than_vectors(lane):
    x = torch.randn(3, 4)
    found = kmeans(x, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.centroids[found.ids], x, atol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        kmeans(x[:0], 2)
    with pytest.raises(ValueError, match="at least one"):
        kmeans(x, 0)


def test_code_sums_refuse_what_does_not_fit(lane):
    x = torch.ones(4, 2)
    assert code_sums(x, torch.tensor([0, 1, 1, 3], dtype=torch.int32), 4)[0].tolist() == [1, 2, 0, 1]
    for ids in (torch.zeros(1, dtype=torch.long), torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, -1])):
        with pytest.raises(ValueError, match=r"expected an id in \[0, 4\)"):
            code_sums(x, ids, 4)


def test_kmeans_does_not_depend_on_threads(lane):
    x = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kmeans(x, 20, generator=torch.Generator().manual_seed(1)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.ids, found[0].ids)
        assert torch.equal(other.centroids, found[0].centroids)


@pytest.mark.parametrize(("rows", "size", "dim"), [(5000, 20, 40), (300, 64, 8)])
def test_sums_move_with_the_rows_that_changed(lane, rows, size, dim):
    generator = torch.Generator().manual_seed(0)
    x, old, new = (torch.randn(count, dim, generator=generator) for count in (rows, size, size))
    backend, none = backend_for(x), torch.empty(0, dtype=torch.long)
    before, counts, sums = backend.assign(x, backend.pack(old, False), size, none)
    ids, more, added = backend.assign(x, backend.pack(new, False), size, before)
    assert torch.equal(ids, nearest(x, new))
    expected = code_sums(x, ids, size)
    assert torch.equal(counts + more, expected[0])
    assert torch.allclose(sums + added, expected[1], atol=1e-3)
