"""torchaudio beside a torch of another CUDA, as PyPI gives them: a process of its own pretends to have such a torch."""

import subprocess
import sys

import pytest
import torch

from tokenzoo.tokenizers._torchaudio import torchaudio

BUILT = torch.ops._torchaudio.cuda_version() if torchaudio._extension._IS_TORCHAUDIO_EXT_AVAILABLE else None

CODE = """
import torch
torch.version.cuda = {version!r}
try:
    import torchaudio
except RuntimeError:
    print("refused")
from tokenzoo.tokenizers._torchaudio import torchaudio
print(torchaudio.functional.resample(torch.ones(1, 441), 44100, 24000).shape)
"""


def imported(version: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE.format(version=version)], capture_output=True, text=True, check=False)


@pytest.mark.skipif(BUILT is None, reason="this torchaudio was built without CUDA")
def test_another_minor_version_of_cuda_will_do():
    found = imported(f"{BUILT // 1000}.{BUILT % 1000 // 10 + 1}")
    assert "torch.Size([1, 240])" in found.stdout, found.stderr


@pytest.mark.skipif(BUILT is None, reason="this torchaudio was built without CUDA")
def test_another_major_version_of_cuda_is_refused():
    found = imported(f"{BUILT // 1000 - 1}.0")
    assert f"ImportError: torch {torch.__version__} was built for CUDA {BUILT // 1000 - 1}.0" in found.stderr
