"""How fast a tokenizer encodes images or clips, beside another implementation of it in the same paired rounds.

    python benchmarks/encode.py one_d_piece_s.in1k_256 titok_b64.in1k --peer my_peer.py

Weights are random; nothing is downloaded. The peer is a file of yours with two functions:

    load_state(name, state)   # takes the card's name and a state dict under the published keys
    encode(batch)             # [B, 3, H, W] in [0, 1] to ids, or vectors, in any shape with B first

Of a tokenizer of clips, a batch is `[B, T, 3, H, W]`, T being the frames that the network sees at once.

Every round times each contender once, in turning order, so that what else the machine does falls on all of them; the ratios
are medians over rounds of peer time / our time, once by the clock and once by the processor time that this process took, which
other work on the machine disturbs less. Threads wait for each other asleep (`OMP_WAIT_POLICY=PASSIVE`, unless you set it),
since spinning would count as work. Where the ids differ there is nothing to compare, and the benchmark says so.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from torch import Tensor

from tokenzoo.registry import find_card, tokenizer_class
from tokenzoo.tokenizers import Tokenizer, TokenizerConfig

Contender = Callable[[], object]


def random_tokenizer(name: str, codebook_scale: float = 1.0) -> Tokenizer:
    """The tokenizer of a card, with seeded random weights: codebooks of a scale at which ids spread."""
    card = find_card(name)
    cls = tokenizer_class(card.architecture)
    torch.manual_seed(0)
    build: Callable[[TokenizerConfig], Tokenizer] = cls
    tokenizer = build(cls.config_class.from_dict(card.config)).eval().requires_grad_(False)
    for parameter, tensor in tokenizer.named_parameters():
        if parameter.endswith("codebook"):
            tensor.normal_(std=codebook_scale)
    return tokenizer


def load_peer(file: Path) -> ModuleType:
    """The peer's file as a module."""
    spec = importlib.util.spec_from_file_location("peer", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def agreement(tokenizer: Tokenizer, batch: Tensor, theirs: Tensor) -> float:
    """Fraction of ids that are equal, or of vector entries that are within 1e-4."""
    codes = tokenizer._encode(batch, length=None, seed=0)
    if codes.extras:
        return float(((codes.extras["vectors"] - theirs).abs() < 1e-4).float().mean())
    return float((codes.ids.reshape(len(batch), -1) == theirs.reshape(len(batch), -1)).float().mean())


def time_rounds(contenders: dict[str, Contender], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of processor time, of each contender in each round, after one round that does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(-1, rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter(), time.process_time()
            contenders[name]()
            if i >= 0:
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return seconds


def ratio(peer: list[tuple[float, float]], ours: list[tuple[float, float]], which: int) -> float:
    """Median over rounds of peer time / our time."""
    return statistics.median(a[which] / b[which] for a, b in zip(peer, ours, strict=True))


@torch.no_grad()
def measure(name: str, peer: ModuleType | None, *, batch_size: int, rounds: int) -> dict[str, Any]:
    """Images, or clips, per second of `_encode` on a batch, of `encode` on a list, and of the peer."""
    tokenizer = random_tokenizer(name)
    config = tokenizer.config.to_dict()
    frames = (config["num_frames"],) if tokenizer.modality == "video" else ()
    shape = (batch_size, *frames, 3, config["image_size"], config["image_size"])
    batch = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    contenders: dict[str, Contender] = {
        "_encode(batch)": lambda: tokenizer._encode(batch, length=None, seed=0),
        "encode(list)": lambda: tokenizer.encode(list(batch)),
    }
    result: dict[str, Any] = {"name": name, "batch": batch_size, "rounds": rounds, "threads": torch.get_num_threads()}
    if peer is not None:
        peer.load_state(name, tokenizer.adapters["published"].to_published(tokenizer.state_dict()))
        result["agreement"] = agreement(tokenizer, batch, peer.encode(batch))
        if result["agreement"] < 1:
            raise SystemExit(f"{name}: only {result['agreement']:.2%} of the tokens equal the peer's: nothing to compare")
        contenders = {"peer": lambda: peer.encode(batch), **contenders}
    seconds = time_rounds(contenders, rounds)
    result["images_per_second"] = {k: batch_size / statistics.median(t for t, _ in v) for k, v in seconds.items()}
    if peer is not None:
        result["ratio"] = {k: [ratio(seconds["peer"], v, which) for which in (0, 1)] for k, v in seconds.items() if k != "peer"}
    return result


def main() -> None:
    """Prints a table, and JSON to a file if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", help="card names")
    parser.add_argument("--peer", type=Path, help="a Python file with load_state and encode")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    peer = load_peer(options.peer) if options.peer else None
    results = []
    print(f"{'tokenizer':26} {'contender':16} {'images/s':>9} {'peer/ours, clock':>17} {'processor':>10}")
    for name in options.names:
        result = measure(name, peer, batch_size=options.batch, rounds=options.rounds)
        results.append(result)
        for contender, speed in result["images_per_second"].items():
            clock, processor = [f"{value:.2f}" for value in result.get("ratio", {}).get(contender, [])] or ["", ""]
            print(f"{name:26} {contender:16} {speed:9.2f} {clock:>17} {processor:>10}")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
