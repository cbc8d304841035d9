"""The Triton kernels in Triton's interpreter, on small shapes; and that `torch.compile` sees them as kernels."""

import importlib.util
import os
import subprocess
import sys

import pytest

SEARCH = """
from tokenzoo.kernels import _triton

def nearest(backend, x, codebook, dot=False):
    return backend.nearest(x, backend.pack(codebook, dot), len(codebook))

def quantize(backend, x, codebook):
    return backend.quantize(x, backend.pack(codebook, False), codebook)

for rows, size, dim in [(1, 1, 1), (5, 7, 3), (35, 70, 13), (0, 9, 4), (18, 33, 32), (20, 40, 37), (3, 600, 8), (300, 3, 5)]:
    x, codebook = torch.randn(rows, dim), torch.randn(size, dim)
    for dot in (False, True):
        assert torch.equal(nearest(_triton, x, codebook, dot), nearest(_reference, x, codebook, dot)), (rows, size, dim)
    expected = nearest(_reference, x, codebook)
    ids, vectors, loss = quantize(_triton, x, codebook)
    assert torch.equal(ids, expected) and torch.equal(vectors, codebook[expected])
    assert not rows and loss == 0 or torch.allclose(loss, torch.nn.functional.mse_loss(vectors, x))
for repeats in (2, 9):  # the same entry in one block of codes, in several, and in several splits
    codebook = torch.randn(40, 8).repeat(repeats, 1)
    assert torch.equal(nearest(_triton, codebook[50:80], codebook), torch.arange(50, 80) % 40)
    assert torch.equal(quantize(_triton, codebook[50:80], codebook)[0], torch.arange(50, 80) % 40)
x, codebook = torch.randn(20, 20) + 1000, torch.randn(40, 20) + 1000
assert torch.equal(nearest(_triton, x, codebook), torch.cdist(x.double(), codebook.double()).argmin(1))
x[3, 1], x[4, 18], codebook[2, 2] = float("nan"), float("-inf"), float("nan")
for found in (nearest(_triton, x, codebook), quantize(_triton, x, codebook)[0]):
    assert torch.equal(found, nearest(_reference, x, codebook))
    assert found[3] == found[4] == 0 and not (found == 2).any()
x, mean = torch.randn(20, 8), torch.zeros(8)
codes, bias = torch.randn(300, 8), torch.randn(300)
for op, args in ((torch.ops.tokenzoo.triton_search, ()), (torch.ops.tokenzoo.triton_quantize, (codes,))):
    torch.library.opcheck(op.default, (x, mean, codes, bias, *args), test_utils="test_schema")
"""

STAGES = """
from tokenzoo.kernels import _triton
for rows, stages, size, dim in [(0, 2, 5, 8), (1, 3, 5, 8), (40, 4, 70, 16), (18, 3, 20, 40), (7, 0, 5, 4), (5, 2, 3, 1)]:
    x, codebooks = torch.randn(rows, dim), torch.randn(stages, size, dim)
    if rows > 2:
        x[1, 0] = float("nan")
    ours, expected = (
        backend.residual_quantize(x, [backend.pack(codebook, False) for codebook in codebooks], codebooks)
        for backend in (_triton, _reference)
    )
    for ours, expected in zip(ours, expected, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5), (rows, stages, size, dim)
x, mean, codes, bias = torch.randn(20, 8), torch.zeros(2, 8), torch.randn(2, 30, 8), torch.randn(2, 30)
torch.library.opcheck(
    torch.ops.tokenzoo.triton_residual.default, (x, mean, codes, bias, codes), test_utils="test_schema"
)
"""

SUMS = """
from tokenzoo.kernels import _triton
for rows, size, dim in [(0, 4, 3), (1, 1, 1), (100, 7, 40), (60, 90, 5)]:
    x, ids = torch.randn(rows, dim), torch.randint(0, size, (rows,)) // 2
    for ours, expected in zip(_triton.code_sums(x, ids, size), _reference.code_sums(x, ids, size), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5), (rows, size, dim)
x, order, ends = torch.randn(9, 4), torch.arange(9), torch.tensor([0, 3, 3, 9])
torch.library.opcheck(
    torch.ops.tokenzoo.triton_segment_sums.default, (x, order, ends), test_utils="test_schema"
)
"""

SCALAR = """
from tokenzoo.kernels import _triton_scalar, fsq_quantize, lfq_quantize
from tokenzoo.kernels.fsq import _steps
for levels in [(8, 8, 8, 5, 5, 5), (2,), (16, 9), (8, 6, 5)]:
    for rows in (0, 1, 70):
        z = torch.randn(rows, len(levels)) * 2
        if rows > 3:
            z[0, 0], z[1, -1], z[2, 0] = float("nan"), float("inf"), float("-inf")
        codes, ids = _triton_scalar.fsq(z, *_steps(levels, z.device))
        expected = fsq_quantize(z, levels)
        assert torch.equal(ids, expected.ids) and torch.allclose(codes, expected.codes, atol=1e-6), (levels, rows)
for dim in (1, 5, 18, 33, 62):
    for rows in (0, 1, 70):
        x = torch.randn(rows, dim)
        codes, ids = _triton_scalar.lfq(x, 0.5)
        expected = lfq_quantize(x, scale=0.5)
        assert torch.equal(ids, expected.ids) and torch.equal(codes, expected.codes), (dim, rows)
torch.library.opcheck(torch.ops.tokenzoo.triton_lfq.default, (x, 1.0), test_utils="test_schema")
"""

TRACE = """
import logging
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from tokenzoo.kernels import _triton, _triton_scalar
logging.getLogger("torch").setLevel(logging.CRITICAL)  # without a driver, it warns that it takes every argument as written to
graphs = []

def keep(module, inputs):
    graphs.append(module.print_readable(print_output=False))
    return module.forward

with FakeTensorMode(allow_non_fake_inputs=True):
    x, mean, codes, bias = (torch.empty(shape, device="cuda") for shape in ((500, 8), (8,), (50, 8), (50,)))
    ids = torch.empty(500, dtype=torch.long, device="cuda")
    calls = [
        (_triton.search, (x, mean, codes, bias)),
        (_triton.search_and_gather, (x, mean, codes, bias, codes)),
        (_triton.search_stages, (x, mean[None], codes[None], bias[None], codes[None])),
        (_triton.segment_sums, (x, ids, ids)),
        (lambda x: _triton_scalar.lfq(x, 1.0), (x,)),
    ]
    for function, args in calls:
        torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*args)
assert len(graphs) == len(calls) and all("triton_kernel_wrapper_functional" in graph for graph in graphs)
"""

CHECKS = {"interpreter": SEARCH + STAGES + SUMS + SCALAR, "compiler": TRACE}


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_without_a_gpu(name):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    code = f"import torch\nfrom tokenzoo.kernels import _reference\ntorch.manual_seed(0)\n{CHECKS[name]}\nprint('equal')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1" if name == "interpreter" else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-3000:]
