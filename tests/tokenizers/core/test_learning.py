import subprocess
import sys

import pytest
import torch

from tokenzoo.kernels import kmeans, nearest
from tokenzoo.tokenizers.learning import Learning
from tokenzoo.tokenizers.quantizers import ResidualQuantizer, VectorQuantizer


def batches(count, rows=60, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=generator) for _ in range(count)]


def test_entries_are_smoothed_moving_averages():
    quantizer = VectorQuantizer(8, 4, commitment=0.5, learning=Learning(decay=0.9, smoothing=1e-2))
    codebook = quantizer.codebook.detach().clone()
    sizes, sums = torch.ones(8), codebook.clone()
    for x in batches(3):
        ids = nearest(x, codebook)
        found = quantizer(x)
        assert torch.equal(found.ids, ids)
        assert torch.allclose(found.vectors, codebook[ids], atol=1e-6)
        assert torch.allclose(found.loss, 0.5 * (x - codebook[ids]).square().mean())
        chosen = torch.nn.functional.one_hot(ids, 8).float()
        sizes, sums = 0.9 * sizes + 0.1 * chosen.sum(0), 0.9 * sums + 0.1 * chosen.T @ x
        codebook = sums / ((sizes + 1e-2) / (sizes.sum() + 8e-2) * sizes.sum())[:, None]
        assert torch.allclose(quantizer.codebook, codebook, atol=1e-5)
    assert not quantizer.codebook.requires_grad
    before = quantizer.codebook.clone()
    quantizer.eval()(x)
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_dead_codes_start_again_from_the_batch(decay):
    def run(seed):
        quantizer = VectorQuantizer(6, 4, learning=Learning(decay=decay, restart_after=2, seed=seed))
        with torch.no_grad():
            quantizer.codebook.copy_(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)))
            quantizer.codebook[[1, 4]] = 100.0
        if decay:
            quantizer.learner.cluster_sums.copy_(quantizer.codebook)
        first, second = batches(2)
        quantizer(first)
        assert (quantizer.codebook[[1, 4]] > 50).all()
        quantizer(second)
        return quantizer, second

    quantizer, x = run(0)
    restarted = quantizer.codebook.detach()[[1, 4]]
    assert all((x == row).all(1).any() for row in restarted)
    assert not torch.equal(*restarted)
    assert torch.equal(run(0)[0].codebook, quantizer.codebook)
    assert not torch.equal(run(1)[0].codebook, quantizer.codebook)
    ids = quantizer.ids(x)
    quantizer(x)
    assert {1, 4} <= set(ids.tolist())
    assert quantizer.learner.idle_steps[[1, 4]].tolist() == [0, 0]


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_first_batch_sets_the_codebook(metric, decay):
    learning = Learning(kmeans_iterations=5, decay=decay, smoothing=0, seed=7)
    quantizer = VectorQuantizer(8, 4, metric=metric, learning=learning)
    first, second = batches(2)
    expected = kmeans(first, 8, iterations=5, spherical=metric == "cosine", generator=torch.Generator().manual_seed(7))
    quantizer.eval()(first)
    quantizer.train()(first[:0])
    assert not quantizer.learner.started
    quantizer(first)
    assert torch.allclose(quantizer.lookup(torch.arange(8)), expected.centroids, atol=0.05)
    before = quantizer.codebook.detach().clone()
    quantizer(second)
    assert quantizer.learner.started
    assert torch.equal(quantizer.codebook, before) == (decay is None)


def test_training_does_not_depend_on_threads():
    learning, found, threads = Learning(decay=0.9, restart_after=1, kmeans_iterations=2), [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            quantizer = ResidualQuantizer(16, 4, 3, learning=learning)
            for x in batches(3, rows=500):
                quantizer(x)
            found.append(torch.stack([stage.codebook.detach() for stage in quantizer.stages]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_buffers_are_only_those_in_use():
    wanted = {
        Learning(): set(),
        Learning(decay=0.9): {"cluster_size", "cluster_sums"},
        Learning(restart_after=5): {"idle_steps", "steps"},
        Learning(kmeans_iterations=3): {"started"},
    }
    for learning, names in wanted.items():
        quantizer = VectorQuantizer(8, 4, learning=learning)
        assert set(quantizer.state_dict()) == {"codebook", *(f"learner.{name}" for name in names)}
    everything = Learning(decay=0.9, restart_after=1, kmeans_iterations=1)
    first, second = (VectorQuantizer(8, 4, learning=everything) for _ in range(2))
    one, two = batches(2)
    first(one)
    second.load_state_dict(first.state_dict())
    first(two)
    second(two)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    first.to(torch.bfloat16)
    assert all(tensor.dtype != torch.bfloat16 for tensor in first.state_dict().values())


@pytest.mark.parametrize("learning", [None, Learning(decay=0.8, kmeans_iterations=3, restart_after=3)])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_learning_reduces_the_error(learning, gradient):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(16, 4, 2, gradient=gradient, dropout=0.3, learning=learning)
    x = torch.randn(400, 4)
    before = (quantizer.lookup(quantizer.ids(x)) - x).square().mean()
    parameters = [p for p in quantizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05) if parameters else None
    for _ in range(40):
        loss = quantizer(x).loss
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    quantizer.eval()
    after = (quantizer.lookup(quantizer.ids(x)) - x).square().mean()
    assert after < 0.35 * before


def test_senseless_values_are_refused():
    for values in ({"decay": 1.0}, {"restart_after": 0}, {"smoothing": -1.0}, {"kmeans_iterations": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="expected"):
            Learning(**values)


WORKER = """
import sys, torch
from torch import distributed
from tokenzoo.tokenizers.learning import Learning
from tokenzoo.tokenizers.quantizers import VectorQuantizer
rank, address, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
torch.manual_seed(0)
x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
states = []
for learning in (Learning(decay=0.5), Learning(decay=0.5, restart_after=1, kmeans_iterations=2)):
    quantizer = VectorQuantizer(8, 4, learning=learning)
    for _ in range(2):
        quantizer(x[rank::2])
    states.append(quantizer.state_dict())
torch.save(states, result)
distributed.destroy_process_group()
"""


def test_processes_of_a_distributed_run_agree(tmp_path):
    results = [tmp_path / f"{rank}.pt" for rank in range(2)]
    runs = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meeting"), str(results[rank])])
        for rank in range(2)
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    first, second = (torch.load(path, weights_only=True) for path in results)
    for ours, theirs in zip(first, second, strict=True):
        for name, tensor in ours.items():
            assert torch.equal(theirs[name], tensor), name
    torch.manual_seed(0)
    alone = VectorQuantizer(8, 4, learning=Learning(decay=0.5))
    for _ in range(2):
        alone(torch.randn(60, 4, generator=torch.Generator().manual_seed(1)))
    for name, tensor in alone.state_dict().items():
        assert torch.allclose(first[0][name], tensor, atol=1e-5), name


def test_a_frozen_codebook_stays():
    quantizer = VectorQuantizer(8, 4, learning=Learning(kmeans_iterations=2, restart_after=1))
    quantizer.codebook.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    for x in batches(3):
        quantizer(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    quantizer.codebook.requires_grad_(True)
    quantizer(x)
    assert not torch.equal(before["codebook"], quantizer.codebook)
