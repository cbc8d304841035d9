"""torchaudio, also beside a torch of another minor version of CUDA: `from tokenzoo.tokenizers._torchaudio import torchaudio`.

Its releases up to 2.11 refuse to be imported there, which is what PyPI gives who installs the newest of both. Later ones
do not: versions of CUDA with the same major are compatible (https://github.com/pytorch/audio/pull/4226), and what is used
here, resampling and mel filters, is not compiled.
"""

import importlib
import sys

import torch

_CHECK = "_check_cuda_version"

try:
    import torchaudio
except RuntimeError as error:
    checks = sys.modules.get("torchaudio._extension.utils")
    if not hasattr(checks, _CHECK) or not torch.version.cuda:
        raise
    major, built = torch.version.cuda.split(".")[0], int(torch.ops._torchaudio.cuda_version())
    if built // 1000 != int(major):
        raise ImportError(
            f"torch {torch.__version__} was built for CUDA {torch.version.cuda}, torchaudio for CUDA {built // 1000}: install "
            "the torchaudio that comes with it, from the index where this torch is from (https://pytorch.org/get-started)"
        ) from error
    setattr(checks, _CHECK, lambda: built)
    torchaudio = importlib.import_module("torchaudio")

__all__ = ["torchaudio"]
