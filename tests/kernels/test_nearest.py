import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tokenzoo.kernels import PackCache, nearest

fixtures_stay = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def excess(x, codebook, ids, metric="l2"):
    """How much farther than the nearest entry the chosen one is, relative to the scale of the data, in float64."""
    a, b = x.double().reshape(-1, x.shape[-1]), codebook.double()
    if metric == "cosine":
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances.gather(1, ids.reshape(-1, 1))[:, 0]
    return (
        ((chosen - distances.min(1).values) / (1 + a.square().sum(1) + b.square().sum(1).max())).max().item() if len(a) else 0
    )


@given(
    rows=st.integers(0, 200),
    size=st.one_of(st.integers(1, 70), st.integers(1, 3000)),
    dim=st.one_of(st.integers(1, 20), st.integers(1, 300)),
    metric=st.sampled_from(["l2", "cosine"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
@fixtures_stay
def test_odd_shapes_agree_with_exhaustive_search(lane, rows, size, dim, metric, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator).to(dtype)
    codebook = torch.randn(size, dim, generator=generator)
    ids = nearest(x, codebook, metric=metric)
    assert ids.shape == (rows,)
    assert ids.dtype == torch.long
    assert excess(x, codebook, ids, metric) < 1e-6


@pytest.mark.parametrize("shape", [(4096, 4096, 12), (300, 1024, 512), (16, 20000, 64), (70, 33, 2048)])
def test_large_shapes(lane, shape):
    rows, size, dim = shape
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(rows, dim, generator=generator), torch.randn(size, dim, generator=generator)
    ids = nearest(x, codebook)
    exact = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert int((ids != exact).sum()) == 0


def test_ties_go_to_the_lowest_index(lane):
    for rows in (1, 5, 16, 17, 300):
        codebook = torch.randn(50, 8).repeat(4, 1)
        chosen = torch.randint(0, 50, (rows,))
        assert torch.equal(nearest(codebook[chosen + 100], codebook), chosen)


def test_a_large_common_offset_loses_no_digits(lane):
    generator = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, 64, generator=generator) * 0.1 + 10 for n in (2000, 1024))
    exact = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(nearest(x, codebook), exact)


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_have_id_0_and_leave_the_others_alone(lane, rows, bad):
    x, codebook = torch.randn(rows, 8), torch.randn(100, 8)
    before = nearest(x, codebook)
    x[2, 3] = bad
    before[2] = 0
    assert torch.equal(nearest(x, codebook), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_never_chosen(lane, bad):
    x, codebook = torch.randn(60, 8), torch.randn(40, 8)
    codebook[7, 1] = bad
    ids = nearest(x, codebook)
    assert not (ids == 7).any()
    kept = [k for k in range(40) if k != 7]
    assert torch.equal(torch.tensor(kept)[nearest(x, codebook[kept])], ids)


def test_any_leading_shape_and_strides(lane):
    x, codebook = torch.randn(3, 8, 5, 6), torch.randn(30, 8)
    moved = x.permute(0, 2, 3, 1)
    assert torch.equal(nearest(moved, codebook), nearest(moved.contiguous(), codebook))
    assert torch.equal(nearest(moved[::2, 1:], codebook[::2]), nearest(moved[::2, 1:].clone(), codebook[::2].clone()))
    assert nearest(codebook[0], codebook).shape == ()
    assert nearest(x.new_zeros(2, 0, 8), codebook).shape == (2, 0)


def test_the_search_is_in_float32_under_autocast(lane):
    x, codebook = torch.randn(640, 8), torch.randn(4096, 8)
    expected = nearest(x, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(x, codebook), expected)


def test_ids_do_not_depend_on_the_number_of_threads(lane):
    x, codebook = torch.randn(999, 24), torch.randn(777, 24)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = nearest(x, codebook), nearest(x[:9], codebook)
        torch.set_num_threads(3)
        assert torch.equal(nearest(x, codebook), single[0])
        assert torch.equal(nearest(x[:9], codebook), single[1])
    finally:
        torch.set_num_threads(threads)


def test_the_cache_follows_the_codebook(lane):
    cache, x = PackCache(), torch.randn(20, 8)
    codebook = torch.nn.Parameter(torch.randn(50, 8))
    for _ in range(3):
        assert torch.equal(nearest(x, codebook, cache=cache), nearest(x, codebook))
        with torch.no_grad():
            codebook.mul_(-1.5)
    assert torch.equal(nearest(x, codebook[:7].clone(), cache=cache), nearest(x, codebook[:7]))
    with torch.inference_mode():
        inference = torch.randn(30, 8)
        assert torch.equal(nearest(x, inference, cache=cache), nearest(x, inference))


def test_the_registered_operator_is_sound(lane):
    torch.library.opcheck(torch.ops.tokenzoo.nearest.default, (torch.randn(4, 5, 8), torch.randn(40, 8), "l2"))


@pytest.mark.parametrize(
    ("x", "codebook", "metric"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), "l2"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "l2"),
        (torch.zeros(2, 0), torch.zeros(4, 0), "l2"),
        (torch.zeros(()), torch.zeros(4, 1), "l2"),
        (torch.zeros(2, 3), torch.zeros(4, 3), "dot"),
    ],
)
def test_misuse_is_refused(x, codebook, metric):
    with pytest.raises(ValueError, match="expected"):
        nearest(x, codebook, metric=metric)


CHECK = """
import torch
from tokenzoo.kernels import _native, nearest
torch.manual_seed(0)
x, c = torch.randn(100, 13), torch.randn(500, 13)
exact = torch.cdist(x.double(), c.double()).argmin(1)
assert torch.equal(nearest(x, c), exact) and torch.equal(nearest(x[:5], c), exact[:5])
print(_native.status())
"""


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({"TOKENZOO_NATIVE": "0"}, "turned off by TOKENZOO_NATIVE=0"),
        ({"PATH": "/nonexistent", "CXX": ""}, "no C++ compiler was found"),
        ({"CXX": "false"}, "compiling the kernels failed"),
        ({"TOKENZOO_ISA": "portable"}, "128-bit"),
        ({"TOKENZOO_ISA": "avx2"}, "256-bit"),
        ({"TOKENZOO_ISA": "avx512"}, "512-bit"),
    ],
)
def test_every_lane_gives_the_same_ids(environment, answer, tmp_path):
    if "bit" in answer:
        from tokenzoo.kernels import _native

        wanted = environment["TOKENZOO_ISA"]
        if _native.library() is None or (wanted != "portable" and wanted not in _cpu_flags()):
            pytest.skip(f"not on this machine: {_native.status()}")
    else:
        environment = {**environment, "TOKENZOO_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert answer in done.stdout


def _cpu_flags():
    return torch.backends.cpu.get_cpu_capability().lower().replace("avx512", "avx2 avx512")


HARD = """
import sys
import torch
from tokenzoo.kernels import kmeans, nearest, residual_quantize
torch.manual_seed(0)
found = []
for size, dim in ((1, 40), (2, 33), (17, 64), (33, 100), (300, 32), (600, 256), (70, 896)):
    codes, rows = torch.randn(size, dim), torch.randn(200, dim)
    between = (codes[torch.randint(size, (200,))] + codes[torch.randint(size, (200,))]) / 2
    near = codes[torch.randint(size, (200,))] * (1 + 1e-6 * torch.randn(200, 1))
    broken = rows.clone()
    broken[3, 5], broken[70, 0], broken[100, -1] = float("nan"), float("inf"), -float("inf")
    twice = torch.cat([codes, codes])
    odd = codes.clone()
    odd[size // 2] = float("nan")
    for x in (rows, between, near, broken, rows + 1000, 30 * rows):
        for c in (codes, twice, odd, codes + 1e-5 * torch.randn(size, dim), torch.zeros(size, dim), codes + 1000):
            found.append(nearest(x, c))
            found.append(nearest(x, c, metric="cosine"))
    for scale in (1e-38, 1e-30, 1e-20, 1e15, 1e18, 1e19, 3e38):
        found += [nearest(rows * scale, codes * scale), nearest(rows, codes * scale), nearest(rows * scale, codes)]
    found.append(nearest(rows[:20], codes))
    found.append(residual_quantize(rows, torch.stack([codes, codes / 2, codes / 4])).ids.flatten())
found.append(nearest(torch.randn(100, 64), torch.randn(40000, 64)))
found.append(kmeans(torch.randn(3000, 40), 20, generator=torch.Generator().manual_seed(0)).ids)
torch.save(found, sys.argv[1])
"""


def test_the_screen_finds_what_the_full_search_finds(tmp_path):
    from tokenzoo.kernels import _native

    if "AMX" not in _native.status():
        pytest.skip(f"not on this machine: {_native.status()}")
    for name in ("amx", "avx512"):
        environment = {**os.environ, "TOKENZOO_ISA": name}
        subprocess.run([sys.executable, "-c", HARD, str(tmp_path / name)], env=environment, check=True)
    screened, full = (torch.load(tmp_path / name, weights_only=True) for name in ("amx", "avx512"))
    assert [i for i, (one, other) in enumerate(zip(screened, full, strict=True)) if not torch.equal(one, other)] == []


def test_two_processes_compile_at_once(tmp_path):
    from tokenzoo.kernels import _native

    if _native.library() is None:
        pytest.skip(_native.status())
    environment = {**os.environ, "TOKENZOO_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", CHECK], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert all(b"native" in process.communicate()[0] for process in running)
    assert len(list(tmp_path.rglob("*.so"))) == 1
    assert not list(tmp_path.rglob("*.o"))


def test_the_cache_never_answers_for_a_codebook_that_is_gone(lane):
    cache, x = PackCache(), torch.randn(50, 8)
    for _ in range(30):
        codebook = torch.randn(256, 8)
        assert torch.equal(nearest(x, codebook, cache=cache), nearest(x, codebook))
        del codebook


@pytest.mark.parametrize("dim", [3, 12, 100, 193, 300, 513])
def test_a_row_gets_the_same_id_in_any_company(lane, dim):
    """Few rows, tiles that share the codes among threads, and blocks of tiles are three ways through the kernel."""
    generator = torch.Generator().manual_seed(dim)
    x, codebook = torch.randn(300, dim, generator=generator), torch.randn(700, dim, generator=generator)
    x[7], codebook[650] = torch.nan, codebook[13]
    together = nearest(x, codebook)
    for count in (1, 5, 16, 17, 33, 64, 200):
        for first in (0, 100):
            assert torch.equal(nearest(x[first : first + count], codebook), together[first : first + count])
    distances = torch.cdist(x.double(), codebook.double())
    distances[7] = torch.arange(700)
    assert torch.equal(together, distances.argmin(1))


def test_the_cache_sees_the_layout(lane):
    cache, x, codebook = PackCache(), torch.randn(40, 8), torch.randn(40, 8)
    for view in (codebook[:20], codebook[::2], codebook[:8], codebook[:8].T):
        assert torch.equal(nearest(x, view, cache=cache), nearest(x, view))


def test_the_cache_keeps_nothing_of_a_codebook_in_training(lane):
    cache, x, codebook = PackCache(), torch.randn(40, 8), torch.randn(20, 8, requires_grad=True)
    nearest(x, codebook, cache=cache)
    codebook.data.neg_()
    assert torch.equal(nearest(x, codebook, cache=cache), nearest(x, codebook))
    with torch.no_grad():
        nearest(x, codebook, cache=cache)
    assert len(pickle.dumps(cache)) < 200


def test_threads_share_a_cache(lane):
    cache, x = PackCache(), torch.randn(30, 8)
    codebooks = [torch.randn(50, 8) for _ in range(4)]
    expected = [nearest(x, codebook) for codebook in codebooks]

    def search(turn):
        return torch.equal(nearest(x, codebooks[turn % 4], cache=cache), expected[turn % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(search, range(400)))


def test_one_broken_entry_does_not_cost_the_others_their_digits(lane):
    x, codebook = torch.randn(200, 8) / 10 + 1000, torch.randn(64, 8) / 10 + 1000
    expected = torch.cdist(x.double(), codebook[1:].double()).argmin(1) + 1
    codebook[0] = torch.nan
    assert torch.equal(nearest(x, codebook), expected)


def test_coarser_products_are_not_used(lane):
    x, codebook = torch.randn(500, 64), torch.randn(500, 64)
    expected = nearest(x, codebook)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest(x, codebook), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
