"""Ids to bits and back: every id takes exactly `bits` bits, most significant first."""

import numpy as np
import torch
from torch import Tensor

MAX_BITS = 62


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"expected 0 to {MAX_BITS} bits per id, got {bits}")


def pack_bits(ids: Tensor, bits: int) -> Tensor:
    """Bits of `ids`, in order.

    Args:
        ids: int64 `(N,)`, each in `[0, 2**bits)`.
        bits: Bits per id.

    Returns:
        uint8 `(N * bits,)` of zeros and ones, ready for `numpy.packbits`; joining such tensors before packing keeps a
        stream of several codebooks free of padding.

    Raises:
        ValueError: If an id does not fit.
    """
    _check_bits(bits)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= 1 << bits):
        raise ValueError(f"expected ids in [0, {1 << bits}), got {int(ids.min())} to {int(ids.max())}")
    shifts = np.arange(bits - 1, -1, -1, dtype=np.int64)
    return torch.from_numpy(((ids.cpu().numpy()[:, None] >> shifts) & 1).astype(np.uint8).reshape(-1))


def unpack_bits(bits_stream: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 `(N * bits,)` to int64 `(N,)`."""
    _check_bits(bits)
    if not bits or bits_stream.numel() % bits:
        raise ValueError(f"expected a multiple of {bits} bits, got {bits_stream.numel()}")
    weights = np.int64(1) << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return torch.from_numpy(bits_stream.cpu().numpy().reshape(-1, bits).astype(np.int64) @ weights)
