"""Codebook lookup and its relatives: fast, exact about ties, and the same on every backend."""

from tokenzoo.kernels.fsq import fsq_codes, fsq_indices, fsq_quantize
from tokenzoo.kernels.grouped import grouped_nearest, grouped_quantize
from tokenzoo.kernels.kmeans import kmeans
from tokenzoo.kernels.lfq import lfq_codes, lfq_quantize
from tokenzoo.kernels.lookup import lookup
from tokenzoo.kernels.nearest import PackCache, nearest
from tokenzoo.kernels.pack_bits import pack_bits, unpack_bits
from tokenzoo.kernels.quantize import code_sums, quantize
from tokenzoo.kernels.residual_quantize import Projections, projected_residual_quantize, residual_quantize

__all__ = [
    "PackCache",
    "Projections",
    "code_sums",
    "fsq_codes",
    "fsq_indices",
    "fsq_quantize",
    "grouped_nearest",
    "grouped_quantize",
    "kmeans",
    "lfq_codes",
    "lfq_quantize",
    "lookup",
    "nearest",
    "pack_bits",
    "projected_residual_quantize",
    "quantize",
    "residual_quantize",
    "unpack_bits",
]
