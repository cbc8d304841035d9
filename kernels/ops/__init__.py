"""Codebook lookup and bit packing."""

from tokenzoo.kernels.nearest import nearest
from tokenzoo.kernels.pack_bits import pack_bits, unpack_bits

__all__ = ["nearest", "pack_bits", "unpack_bits"]
