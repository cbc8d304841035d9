"""What people use to look up the nearest entry, and what we offer, each as a function of nothing that can be timed.

Peers answer with ids alone, except vector-quantize-pytorch, whose forward is what its users call; ours is the whole
operation (ids, entries and loss, the codebook packed beforehand as in eval). All run without gradients.
"""

import ctypes
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import Contender, warm
from torch import Tensor

from tokenzoo.kernels import PackCache, _native, nearest, quantize

Factory = Callable[[Tensor, Tensor], Contender]
CHUNKS = (64, 256, 1024)


def ours(x: Tensor, codebook: Tensor) -> Contender:
    """The whole operation."""
    cache = PackCache()
    nearest(x[:1], codebook, cache=cache)
    return lambda: quantize(x, codebook, cache=cache)


def ids_alone(x: Tensor, codebook: Tensor) -> Contender:
    """Our search without entries and loss."""
    cache = PackCache()
    nearest(x[:1], codebook, cache=cache)
    return lambda: nearest(x, codebook, cache=cache)


def with_sums(x: Tensor, codebook: Tensor) -> Contender:
    """The whole operation, and the counts and sums that an EMA update of the codebook takes."""
    cache = PackCache()
    nearest(x[:1], codebook, cache=cache)
    return lambda: quantize(x, codebook, cache=cache, statistics=True)


def fallback(x: Tensor, codebook: Tensor) -> Contender:
    """Our ids where there is no compiler."""
    native, cache = _native.library, PackCache()

    def run() -> object:
        _native.library = lambda: None  # type: ignore[assignment]
        try:
            return nearest(x, codebook, cache=cache)
        finally:
            _native.library = native

    return run


def addmm(x: Tensor, codebook: Tensor) -> Contender:
    """The expanded square, its |x|^2 left out."""
    norms = codebook.square().sum(1)
    return lambda: torch.addmm(norms, x, codebook.T, alpha=-2).argmin(1)


def chunked_addmm(x: Tensor, codebook: Tensor) -> Contender:
    """The same by blocks of rows, in the best of a few sizes."""
    norms = codebook.square().sum(1)

    def search(rows: int) -> Tensor:
        return torch.cat([torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in x.split(rows)])

    sizes = [rows for rows in CHUNKS if rows < len(x)] or [len(x)]
    best = min(sizes, key=lambda rows: warm(lambda: search(rows))) if len(sizes) > 1 else sizes[0]
    return lambda: search(best)


def compiled_addmm(x: Tensor, codebook: Tensor) -> Contender:
    """The expanded square, compiled for these very shapes."""
    torch._dynamo.reset()
    norms = codebook.square().sum(1)
    search = torch.compile(lambda x, codebook, norms: torch.addmm(norms, x, codebook.T, alpha=-2).argmin(1), dynamic=False)
    return lambda: search(x, codebook, norms)


def cdist(x: Tensor, codebook: Tensor) -> Contender:
    """PyTorch's distances."""
    return lambda: torch.cdist(x, codebook).argmin(1)


def faiss_default(x: Tensor, codebook: Tensor) -> Contender:
    """FAISS's exact index, with the threshold it ships with."""
    return _faiss(x, codebook, None)


def faiss_blas(x: Tensor, codebook: Tensor) -> Contender:
    """FAISS's exact index, never in its loop over single queries, which is slow for many."""
    return _faiss(x, codebook, 1)


def _faiss(x: Tensor, codebook: Tensor, threshold: int | None) -> Contender:
    faiss = _load_faiss()
    index, queries = faiss.IndexFlatL2(codebook.shape[1]), x.numpy()
    index.add(codebook.numpy())
    wanted = threshold or faiss.cvar.distance_compute_blas_threshold

    def search() -> object:
        faiss.omp_set_num_threads(torch.get_num_threads())
        usual = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = wanted
        try:
            return index.search(queries, 1)
        finally:
            faiss.cvar.distance_compute_blas_threshold = usual

    return search


@functools.cache
def _load_faiss() -> Any:
    """FAISS, its OpenBLAS told which processor this is.

    The wheel's OpenBLAS is from 2021 and takes an AVX-512 processor it has never seen for one with SSE3 only, which makes its
    products three times slower. That is no fault of FAISS, so it is named the nearest core that it knows.
    """
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512vl" in flags:
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    import faiss

    return faiss


def faiss_core() -> str:
    """The processor that FAISS's OpenBLAS thinks this is; empty if FAISS is not installed or does not tell."""
    try:
        _load_faiss()
        paths = re.findall(r"\S*faiss\S*/libopenblas\S*", Path("/proc/self/maps").read_text())
        name = ctypes.CDLL(paths[0]).openblas_get_corename
    except (ImportError, OSError, IndexError, AttributeError):
        return ""
    name.restype = ctypes.c_char_p
    return str(name().decode())


def vector_quantize_pytorch(x: Tensor, codebook: Tensor) -> Contender:
    """The forward of its module in eval mode."""
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook)).eval()
    module._codebook.embed.data.copy_(codebook[None])
    return lambda: module(x[None])


def encodec(x: Tensor, codebook: Tensor) -> Contender:
    """The codebook of EnCodec in transformers."""
    from transformers import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook

    config = EncodecConfig(codebook_size=codebook.shape[0], codebook_dim=codebook.shape[1])
    module = EncodecEuclideanCodebook(config).eval()
    module.embed.copy_(codebook)
    return lambda: module.encode(x)


OURS: dict[str, Factory] = {"tokenzoo": ours, "ids alone": ids_alone, "and EMA": with_sums, "one thread": ours}
PEERS: dict[str, Factory] = {
    "fallback": fallback,
    "addmm + argmin": addmm,
    "chunked addmm": chunked_addmm,
    "torch.compile": compiled_addmm,
    "cdist + argmin": cdist,
    "FAISS": faiss_default,
    "FAISS, BLAS": faiss_blas,
    "vector-quantize-pytorch": vector_quantize_pytorch,
    "transformers EnCodec": encodec,
}


def contenders(x: Tensor, codebook: Tensor, factories: dict[str, Factory]) -> dict[str, Contender]:
    """Those whose library is installed."""
    found = {}
    for name, factory in factories.items():
        try:
            found[name] = factory(x, codebook)
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return found


def data(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Vectors `(N, D)` and a codebook `(K, D)`, normal, always the same."""
    count, size, width = shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=generator), torch.randn(size, width, generator=generator)
