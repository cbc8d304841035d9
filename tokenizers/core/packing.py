"""The `.tok` container: ids at ceil(log2 size) bits each behind a self-describing header.

    b"TKZ1" | crc32 of the rest, u32 | header length, u32 | header, zlib of JSON | ids | extras, safetensors

The ids of all items and codebooks form one run of bits, in order, padded with zeros to a whole byte once, so that the
ids of a file take `ceil(sum(length * bits) / 8)` bytes. All integers are little-endian.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from tokenzoo.kernels import pack_bits, unpack_bits
from tokenzoo.tokenizers.errors import TokensError
from tokenzoo.tokenizers.spec import TokenSpec

MAGIC = b"TKZ1"
_PREFIX = struct.Struct("<4sII")


def pack(
    ids: Tensor, lengths: Tensor, spec: TokenSpec, extras: Mapping[str, Tensor], meta: Sequence[Mapping[str, Any]]
) -> bytes:
    """Writes a batch of tokens; see the module's docstring for the format."""
    ids, lengths = ids.cpu(), lengths.cpu()
    header = {
        "spec": spec.to_dict(),
        "lengths": lengths.tolist(),
        "batch": len(ids),
        "meta": list(meta),
        "extras": bool(extras),
    }
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    runs = [
        pack_bits(ids[b, k, :length], bits).numpy()
        for b, item in enumerate(lengths.tolist())
        for k, (length, bits) in enumerate(zip(item, spec.bits_per_id, strict=True))
    ]
    body = np.packbits(np.concatenate(runs)).tobytes() if runs else b""
    tail = write_tensors({name: t.cpu().contiguous() for name, t in extras.items()}) if extras else b""
    rest = struct.pack("<I", len(text)) + text + body + tail
    return MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def unpack(data: bytes) -> tuple[Tensor, Tensor, TokenSpec, dict[str, Tensor], list[dict[str, Any]]]:
    """Reads what `pack` wrote: ids, lengths, spec, extras and meta.

    Raises:
        TokensError: If the data is not a `.tok` container, or is truncated or damaged.
    """
    if len(data) < _PREFIX.size or data[:4] != MAGIC:
        raise TokensError(
            f"expected a .tok container, which starts with {MAGIC!r}, got {bytes(data[:4])!r} ({len(data)} bytes)"
        )
    _, checksum, header_length = _PREFIX.unpack_from(data)
    if zlib.crc32(memoryview(data)[8:]) != checksum:
        raise TokensError(f"this .tok container is truncated or damaged ({len(data)} bytes): its checksum does not match")
    start = _PREFIX.size + header_length
    try:
        header = json.loads(zlib.decompress(data[_PREFIX.size : start]))
        spec = TokenSpec.from_dict(header["spec"])
        lengths = torch.tensor(header["lengths"], dtype=torch.long).reshape(header["batch"], spec.num_codebooks)
        longest = max(8 * len(data), spec.max_tokens or 0)
        if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= longest:
            raise ValueError(f"lengths from {int(lengths.min())} to {int(lengths.max())} in {len(data)} bytes")
        ids, end = _read_ids(data, start, lengths, spec)
        extras = read_tensors(data[end:]) if header["extras"] else {}
        return ids, lengths, spec, extras, header["meta"]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, zlib.error, SafetensorError) as error:
        raise TokensError(f"this .tok container was not written by tokenzoo: {error}") from error


def _read_ids(data: bytes, start: int, lengths: Tensor, spec: TokenSpec) -> tuple[Tensor, int]:
    counts = [n * bits for item in lengths.tolist() for n, bits in zip(item, spec.bits_per_id, strict=True)]
    end = start + (sum(counts) + 7) // 8
    bits = np.unpackbits(np.frombuffer(data, np.uint8, end - start, start))
    ids = torch.zeros(len(lengths), spec.num_codebooks, int(lengths.max()) if lengths.numel() else 0, dtype=torch.long)
    position = 0
    for b, item in enumerate(lengths.tolist()):
        for k, (length, width) in enumerate(zip(item, spec.bits_per_id, strict=True)):
            if width and length:
                ids[b, k, :length] = unpack_bits(torch.from_numpy(bits[position : position + length * width]), width)
            position += length * width
    return ids, end
