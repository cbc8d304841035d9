"""How fast a tokenizer decodes images, beside another implementation of it in the same paired rounds.

    python benchmarks/decode.py flextok_d12_d12.in1k --steps 4 --guidance 7.5 --peer my_peer.py

As `encode.py`, with ids that are drawn at random; what a fresh network starts as zeros is random here too, since it would hide
what comes before. The peer is a file of yours with two functions:

    load_state(name, state)         # takes the card's name and a state dict under the published keys
    decode(ids, **options)          # [B, L] to images [B, 3, H, W] in [0, 1]; options as given: steps, guidance, seed

Where the images differ by more than 1e-3 there is nothing to compare, and the benchmark says so.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from encode import Contender, load_peer, random_tokenizer, ratio, time_rounds

from tokenzoo.tokenizers import Tokenizer, Tokens

TOLERANCE = 1e-3


def prepared(name: str, options: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a card with random weights, decoding as the options say."""
    tokenizer = random_tokenizer(name)
    for parameter in tokenizer.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    if options:
        from tokenzoo.tokenizers.image.flextok import Sampling

        tokenizer.sampling = Sampling(**options)  # type: ignore[assignment]
    return tokenizer


@torch.no_grad()
def measure(name: str, peer: ModuleType | None, options: dict[str, Any], *, length: int, batch_size: int, rounds: int) -> Any:
    """Images per second of `_decode` on a batch, of `decode` on as many items, and of the peer."""
    tokenizer = prepared(name, options)
    spec = tokenizer.info
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(spec.codebook_sizes[0], (batch_size, 1, length), generator=generator)
    lengths = torch.full((batch_size, 1), length)
    tokens = Tokens(ids, lengths, spec)
    contenders: dict[str, Contender] = {
        "_decode(batch)": lambda: tokenizer._decode(ids, lengths, {}),
        "decode(tokens)": lambda: tokenizer.decode(tokens, native=True),
    }
    result: dict[str, Any] = {"name": name, "batch": batch_size, "rounds": rounds, "threads": torch.get_num_threads()}
    result |= {"length": length, **options}
    if peer is not None:
        peer.load_state(name, tokenizer.adapters["published"].to_published(tokenizer.state_dict()))
        theirs = peer.decode(ids[:, 0], **options)
        result["difference"] = float((theirs - torch.stack(tokenizer.decode(tokens, native=True))).abs().max())
        if result["difference"] > TOLERANCE:
            raise SystemExit(f"{name}: images differ by {result['difference']:.1e} from the peer's: nothing to compare")
        contenders = {"peer": lambda: peer.decode(ids[:, 0], **options), **contenders}
    seconds = time_rounds(contenders, rounds)
    result["images_per_second"] = {k: batch_size / statistics.median(t for t, _ in v) for k, v in seconds.items()}
    if peer is not None:
        result["ratio"] = {k: [ratio(seconds["peer"], v, which) for which in (0, 1)] for k, v in seconds.items() if k != "peer"}
    return result


def main() -> None:
    """Prints a table, and JSON to a file if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", help="card names")
    parser.add_argument("--peer", type=Path, help="a Python file with load_state and decode")
    parser.add_argument("--length", type=int, default=256, help="tokens per image")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a flow")
    parser.add_argument("--guidance", type=float, help="of a flow")
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    options = {key: value for key in ("steps", "guidance") if (value := getattr(arguments, key)) is not None}
    peer = load_peer(arguments.peer) if arguments.peer else None
    results = []
    print(f"{'tokenizer':26} {'contender':16} {'images/s':>9} {'peer/ours, clock':>17} {'processor':>10}")
    for name in arguments.names:
        result = measure(name, peer, options, length=arguments.length, batch_size=arguments.batch, rounds=arguments.rounds)
        results.append(result)
        for contender, speed in result["images_per_second"].items():
            clock, processor = [f"{value:.2f}" for value in result.get("ratio", {}).get(contender, [])] or ["", ""]
            print(f"{name:26} {contender:16} {speed:9.3f} {clock:>17} {processor:>10}")
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
