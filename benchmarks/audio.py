"""How fast an audio codec encodes and decodes, beside another implementation of it in the same paired rounds.

    python benchmarks/audio.py encodec_24khz.meta mimi.kyutai --seconds 10
    python benchmarks/audio.py wavtokenizer_small_320.libritts --peer my_peer.py
    python benchmarks/audio.py encodec_24khz.meta --memory 1

Weights are random; nothing is downloaded. The peers of EnCodec, DAC and Mimi are those of transformers and that of SNAC is
snac, where these are installed. For what they do not have, the peer is a file of yours with four functions:

    load_state(name, state)   # takes the card's name and a state dict under the published keys
    encode(batch)             # [B, C, S] to whatever its decode takes, all codebooks
    ids(codes)                # that to one sequence [B, T] per codebook
    decode(codes)             # that to audio [B, C, S']

Rounds and ratios as in `encode.py`: medians of peer time / our time, by the clock and by processor time. `speed` is seconds of
audio per second. Where ids or audio differ there is nothing to compare, and the benchmark says so. With `--memory HOURS` the
peak resident memory of encoding and then decoding that much noise is measured instead: all that this process holds, Python,
torch, the weights, the recording and its reconstruction included.
"""

import argparse
import json
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from audio_peers import installed_peer
from encode import Contender, load_peer, random_tokenizer, ratio, time_rounds
from torch import Tensor

from tokenzoo.registry import find_card
from tokenzoo.tokenizers.audio.codec import Codec


def random_codec(name: str) -> Codec:
    """The codec of a card with seeded random weights: codebooks at the scale of the latents, so that ids spread."""
    codec = random_tokenizer(name, codebook_scale=0.1)
    if not isinstance(codec, Codec):
        raise SystemExit(f"{name} is no audio codec")
    return codec


def peer_of(name: str, codec: Codec, file: Path | None) -> Any | None:
    """The installed peer, or that in the file, with our weights; `None` for what was not published elsewhere."""
    adapter = codec.adapters.get(find_card(name).source.adapter or "")
    if adapter is None:
        return None  # our own
    state = adapter.to_published(codec.state_dict())
    peer = installed_peer(codec, state)
    if peer is None and file is not None:
        peer = load_peer(file)
        peer.load_state(name, state)
    return peer


def same(codec: Codec, batch: Tensor, peer: Any) -> tuple[float, float]:
    """Fraction of equal ids, and the largest difference of the audio that the peer's codes decode to."""
    codes = peer.encode(batch)
    ours = codec._encode(batch, length=None, seed=0)
    equal = total = 0
    for k, theirs in enumerate(peer.ids(codes)):
        mine = ours.ids[:, k, : theirs.shape[-1]]
        equal, total = equal + int((mine == theirs).sum()), total + theirs.numel()
    assert ours.lengths is not None
    theirs = peer.decode(codes)
    mine = codec._decode(ours.ids, ours.lengths, ours.extras)[..., : theirs.shape[-1]]
    return equal / total, float((mine - theirs).abs().max())


@torch.no_grad()
def measure(name: str, file: Path | None, *, seconds: float, rounds: int) -> dict[str, Any]:
    """Seconds of audio per second of `_encode` and `_decode`, and how much longer the peer takes."""
    codec = random_codec(name)
    peer = peer_of(name, codec, file)
    noise = torch.randn(1, codec.channels, round(seconds * codec.sample_rate), generator=torch.Generator().manual_seed(1))
    batch = 0.3 * noise
    codes = codec._encode(batch, length=None, seed=0)
    assert codes.lengths is not None
    lengths = codes.lengths
    contenders: dict[str, Contender] = {
        "encode": lambda: codec._encode(batch, length=None, seed=0),
        "decode": lambda: codec._decode(codes.ids, lengths, codes.extras),
    }
    result: dict[str, Any] = {"name": name, "seconds": seconds, "rounds": rounds, "threads": torch.get_num_threads()}
    if peer is not None:
        agreement, difference = same(codec, batch, peer)
        result |= {"agreement": agreement, "difference": difference}
        if agreement < 0.999 or difference > 1e-3:
            raise SystemExit(f"{name}: {agreement:.2%} of the ids agree, audio differs by {difference:.1g}: nothing to compare")
        theirs = peer.encode(batch)
        contenders |= {"peer encode": lambda: peer.encode(batch), "peer decode": lambda: peer.decode(theirs)}
    timed = time_rounds(contenders, rounds)
    result["speed"] = {k: seconds / statistics.median(t for t, _ in v) for k, v in timed.items()}
    if peer is not None:
        result["ratio"] = {k: [ratio(timed[f"peer {k}"], timed[k], which) for which in (0, 1)] for k in ("encode", "decode")}
    return result


def measure_memory(name: str, hours: float) -> dict[str, Any]:
    """Peak resident memory in GB of this process, after encoding and after decoding so much noise."""
    codec = random_codec(name)
    samples = round(hours * 3600 * codec.sample_rate)
    wave = torch.rand(codec.channels, samples, generator=torch.Generator().manual_seed(1)).sub_(0.5)
    tokens = codec.encode((wave, codec.sample_rate))
    memory = {"hours": hours, "encode_gb": _peak()}
    print(json.dumps({"name": name, "memory": memory}), flush=True)
    del wave
    (audio,) = codec.decode(tokens)
    assert audio.shape == (codec.channels, samples)
    return {"name": name, "memory": memory | {"decode_gb": _peak()}}


def merge(results: list[dict[str, Any]], file: Path) -> None:
    """Writes results to a report, over those of the same codecs: speed and memory are measured in processes of their own."""
    rows = {row["name"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    for result in results:
        rows[result["name"]] = rows.get(result["name"], {}) | result
    file.write_text(json.dumps(list(rows.values()), indent=2) + "\n")


def _peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def main() -> None:
    """Prints a table, and JSON to a file if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", help="card names")
    parser.add_argument("--peer", type=Path, help="a Python file with load_state, encode, ids and decode")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=float, help="hours of audio whose peak memory to measure instead; one name only")
    parser.add_argument("--json", type=Path, help="write the results here too, over earlier ones of the same codecs")
    options = parser.parse_args()
    if options.memory is not None:
        if len(options.names) > 1:
            parser.error("a process has one peak: measure the memory of one codec at a time")
        results = [measure_memory(options.names[0], options.memory)]
        print(json.dumps(results[0]))
    else:
        results = []
        print(f"{'codec':32} {'':14} {'x real time':>12} {'peer/ours, clock':>17} {'processor':>10}")
        for name in options.names:
            results.append(measure(name, options.peer, seconds=options.seconds, rounds=options.rounds))
            for contender, speed in results[-1]["speed"].items():
                clock, processor = [f"{value:.2f}" for value in results[-1].get("ratio", {}).get(contender, [])] or ["", ""]
                print(f"{name:32} {contender:14} {speed:12.1f} {clock:>17} {processor:>10}")
            sys.stdout.flush()
    if options.json:
        merge(results, options.json)


if __name__ == "__main__":
    main()
