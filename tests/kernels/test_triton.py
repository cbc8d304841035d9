import importlib.util
import os
import subprocess
import sys

import pytest

CHECK = """
import torch
from tokenzoo.kernels import _reference
from tokenzoo.kernels.nearest import _search_triton
torch.manual_seed(0)
for rows, size, dim in [(1, 1, 1), (5, 7, 3), (65, 300, 13), (130, 1000, 32), (64, 257, 70), (0, 9, 4)]:
    x, codebook = torch.randn(rows, dim), torch.randn(size, dim)
    for dot in (False, True):
        assert torch.equal(_search_triton(x, codebook, dot), _reference.nearest(x, codebook, dot=dot)), (rows, size, dim, dot)
codebook = torch.randn(40, 8).repeat(9, 1)
assert torch.equal(_search_triton(codebook[80:120], codebook, False), torch.arange(40))
x = torch.randn(20, 8)
x[3, 1], x[4, 0], codebook[2, 2] = float("nan"), float("inf"), float("nan")
ids = _search_triton(x, codebook, False)
assert torch.equal(ids, _reference.nearest(x, codebook, dot=False)) and ids[3] == ids[4] == 0 and not (ids == 2).any()
print("equal")
"""


def test_the_kernel_agrees_with_the_reference_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr
