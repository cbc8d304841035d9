"""How fast a video tokenizer encodes and decodes clips, beside another implementation of it in the same paired rounds.

    python benchmarks/clips.py cosmos_dv8x8x8.v0_1 vidtok_causal_488_262144.v1_0 --peer my_peer.py

Weights are random; nothing is downloaded. The peer is a file of yours with three functions:

    load_state(name, state)   # takes the card's name and a state dict under the published keys
    encode(clip)              # [B, 3, T, H, W] in [-1, 1] to ids [B, t, h, w]
    decode(ids)               # that to [B, 3, T, H, W] in [-1, 1]

Rounds and ratios as in `encode.py`: medians of peer time / our time, by the clock and by processor time. Where ids differ there
is nothing to compare, and the benchmark says so.
"""

import argparse
import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from encode import Contender, load_peer, random_tokenizer, ratio, time_rounds
from torch import Tensor

from tokenzoo.registry import find_card
from tokenzoo.tokenizers.video.pixels import GridVideo


def random_grid(name: str) -> GridVideo:
    """The tokenizer of a card with seeded random weights of one gain for all, so that ids spread."""
    tokenizer = random_tokenizer(name)
    if not isinstance(tokenizer, GridVideo):
        raise SystemExit(f"{name} is no tokenizer of clips over a grid")
    for parameter in tokenizer.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.4 * parameter[0].numel() ** -0.5)
    return tokenizer


def smooth_clip(frames: int, size: int) -> Tensor:
    """A clip `[1, T, 3, H, W]` in [0, 1] that changes slowly in space and time."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, max(2, frames // 4), size // 16, size // 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, (frames, size, size), mode="trilinear").transpose(1, 2).contiguous()


@torch.no_grad()
def measure(name: str, peer: ModuleType | None, *, frames: int, size: int, rounds: int) -> dict[str, Any]:
    """Frames per second of `encode` and `decode`, and of the peer's."""
    tokenizer = random_grid(name)
    clip, _ = tokenizer.media.read(smooth_clip(frames, size)[0])
    tokens = tokenizer.encode(clip)
    contenders: dict[str, Contender] = {
        "encode": lambda: tokenizer.encode(clip),
        "decode": lambda: tokenizer.decode(tokens, native=True),
    }
    result: dict[str, Any] = {"name": name, "frames": len(clip), "size": size, "rounds": rounds}
    result["threads"] = torch.get_num_threads()
    if peer is not None:
        adapter = tokenizer.adapters[find_card(name).source.adapter or ""]
        peer.load_state(name, adapter.to_published(tokenizer.state_dict()))
        batch = clip[None].transpose(1, 2) * 2 - 1
        ids = peer.encode(batch)
        same = float((tokens.ids.flatten() == ids.flatten()).float().mean())
        result |= {"agreement": same, "distinct": len(ids.unique())}
        if same < 1:
            raise SystemExit(f"{name}: only {same:.2%} of the ids equal the peer's: nothing to compare")
        contenders |= {"peer encode": lambda: peer.encode(batch), "peer decode": lambda: peer.decode(ids)}
    seconds = time_rounds(contenders, rounds)
    result["frames_per_second"] = {k: len(clip) / statistics.median(t for t, _ in v) for k, v in seconds.items()}
    if peer is not None:
        pairs = {way: (seconds[f"peer {way}"], seconds[way]) for way in ("encode", "decode")}
        result["ratio"] = {way: [ratio(*pair, which) for which in (0, 1)] for way, pair in pairs.items()}
    return result


def main() -> None:
    """Prints a table, and JSON to a file if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", help="card names")
    parser.add_argument("--peer", type=Path, help="a Python file with load_state, encode and decode")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    peer = load_peer(options.peer) if options.peer else None
    results = []
    print(f"{'tokenizer':34} {'':12} {'frames/s':>9} {'peer/ours, clock':>17} {'processor':>10}")
    for name in options.names:
        result = measure(name, peer, frames=options.frames, size=options.size, rounds=options.rounds)
        results.append(result)
        for contender, speed in result["frames_per_second"].items():
            clock, processor = [f"{value:.2f}" for value in result.get("ratio", {}).get(contender, [])] or ["", ""]
            print(f"{name:34} {contender:12} {speed:9.2f} {clock:>17} {processor:>10}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
