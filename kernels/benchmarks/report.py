"""Reports as JSON files: what was measured on which machine, by which sources."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import faiss_core
from timing import processor

from tokenzoo.kernels import _native, csrc

ROOT = Path(__file__).parents[2]


@functools.cache
def sources() -> str:
    """Digest of the operations as they are installed, and of their tests."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in (Path(_native.__file__).parent, Path(csrc.__file__).parent, ROOT / "tests" / "kernels"):
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"cpu": processor(), "threads": torch.get_num_threads(), "kernels": _native.status(), "torch": torch.__version__,
            "FAISS's OpenBLAS": faiss_core()}  # fmt: skip


def merge(path: Path, rows: Sequence[dict[str, Any]], key: str, order: Sequence[Any]) -> None:
    """Puts rows into the report at `path`, in place of those with the same `key`, sorted as in `order`.

    What another machine or another torch measured is dropped: its ratios do not belong beside ours.
    """
    here = machine()
    old = json.loads(path.read_text()) if path.exists() else {"machine": here, "rows": []}
    if old["machine"] != here:
        print(f"{path} was measured elsewhere ({old['machine']}): starting anew")
        old["rows"] = []
    found = [dict(row) for row in old["rows"]]
    for row in rows:
        same = next((known for known in found if known[key] == row[key]), None)
        if same is None:
            found.append(dict(row))
        else:
            same.update(row)
    found.sort(key=lambda row: order.index(row[key]) if row[key] in order else len(order))
    path.write_text(json.dumps({"machine": here, "rows": found}, indent=1) + "\n")


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")
