"""Memory that one call takes beyond its inputs and outputs, each contender in a process of its own.

The figure is the growth of the peak resident size during the call (Linux: VmHWM after a reset through clear_refs), the least of
three calls after a first one that starts libraries and threads. Codebooks in a form of their own (our packed one, FAISS's
copy) are made before, and ours is reported apart.
"""

import ctypes
import multiprocessing
import re
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from peers import OURS, PEERS, data

from tokenzoo.kernels import _native

MIB = 1 << 20
TIMEOUT_SECONDS = 300
CALLS = 3


def extra_memory(shape: tuple[int, int, int], name: str) -> float | None:
    """MiB, or `None` where it cannot be measured or the contender is not installed."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tokenzoo.kernels"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(shape, name, torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(TIMEOUT_SECONDS) else None
    except EOFError:
        found = None
    process.kill()
    process.join()
    return found


def packed_codebook(shape: tuple[int, int, int]) -> float | None:
    """MiB of the form that the native kernels search, kept from call to call in eval."""
    native = _native.library()
    return native and round(native.pack(data(shape)[1], False).nbytes / MIB, 2)


def _child(shape: tuple[int, int, int], name: str, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    x, codebook = data(shape)
    factory = {**OURS, **PEERS}[name]
    with torch.no_grad():
        try:
            run = factory(x, codebook)
        except ImportError:
            return sender.send(None)
        run()
        grown = []
        for _ in range(CALLS):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _peak_bytes()
            result = run()
            grown.append(_peak_bytes() - before - sum(_bytes(result)))
            del result
    return sender.send(round(max(0, min(grown)) / MIB, 1))


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _bytes(result: object) -> Iterator[int]:
    """Sizes of the tensors and arrays in nested tuples."""
    if isinstance(result, tuple):
        for part in result:
            yield from _bytes(part)
    elif hasattr(result, "nbytes"):
        yield int(result.nbytes)
