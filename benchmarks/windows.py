"""Bytes per token of equal-information windows on held-out text, beside gzip and a BPE of the same training text; and speed.

    python -m tokenzoo.training.equal_info --data manuals --out cards/nano --store texts
    python benchmarks/windows.py --store texts --bpe bpe.json --json out/windows.json --card cards/equal_info_nano.manuals.md

`--bpe` is Hugging Face's `tokenizers` with 65,536 entries, trained on the very bytes that the byte model counted (GPT-2's
splitting, byte alphabet) and kept in that file. gzip compresses the held-out text of each language as a whole, at its best,
and counts a token for every 16 bits. Speeds are those of one thread, by processor time.
"""

import argparse
import gzip
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, pre_tokenizers, trainers

import tokenzoo
from tokenzoo.kernels.windows import WindowCode
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.tokenizers.strings import to_bytes, to_tensor
from tokenzoo.training.equal_info import BYTES
from tokenzoo.training.texts import TextStore

NAMES = {
    "equal_info_nano.manuals": "16 bits, table",
    "equal_info_nano_b32.manuals": "32 bits",
    "equal_info_nano_b64.manuals": "64 bits",
    "equal_info_nano_b128.manuals": "128 bits",
    "equal_info_nano_greedy.manuals": "16 bits, greedy (`paper_mode`)",
}
SHOWN = ("en", "de", "ru", "ja", "zh")
VOCABULARY = 65536
TRIED = 4000  # bytes of each language whose greedy windows are read again
LONGEST = 256  # bytes, more than any of them has
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def bpe(store: TextStore, path: Path) -> HuggingFace:
    """The BPE, trained where the file is not there yet."""
    if not path.exists():
        fresh = HuggingFace(models.BPE())
        fresh.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fresh.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
        texts = (bytes(stream[:BYTES]).decode(errors="ignore") for stream in store.streams(held_out=False).values())
        fresh.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
        fresh.save(str(path))
    return HuggingFace.from_file(str(path))


def mixed(store: TextStore, size: int) -> bytes:
    """Held-out text of all languages, a fifth of it cut up by random bytes."""
    streams = list(store.streams(held_out=True).values())
    rng, parts, total = random.Random(0), [], 0
    while total < size:
        stream = rng.choice(streams)
        start = rng.randrange(len(stream))
        parts += [bytes(stream[start : start + 8000]), rng.randbytes(2000)]
        total += sum(map(len, parts[-2:]))
    return b"".join(parts)[:size]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it answers, and its seconds of processor time."""
    start = time.process_time()
    return work(), time.process_time() - start


def measure(name: str, held: dict[str, bytes], trip: bytes) -> dict[str, Any]:
    """Tokens by language, whether everything comes back, and megabytes per second."""
    tok = tokenzoo.load(name)
    found: dict[str, Any] = {"tokens": {language: int(tok.encode(text).counts[0]) for language, text in held.items()}}
    texts = list(held.values())
    tokens, encode = timed(lambda: tok.encode(texts))
    if not tok.config.paper_mode:  # type: ignore[attr-defined]
        back, decode = timed(lambda: tok.decode(tokens))
        assert back == texts
        packed, _ = timed(lambda: tok.encode(trip))
        assert tok.decode(packed)[0] == trip
        found |= {"round_trip_bytes": len(trip), "decode_mb_s": sum(map(len, texts)) / 1e6 / decode}
    else:
        found["windows_right"] = share_right(tok.windows(), b"".join(text[:TRIED] for text in texts))  # type: ignore[attr-defined]
    return found | {"encode_mb_s": sum(map(len, texts)) / 1e6 / encode}


def share_right(windows: WindowCode, data: bytes) -> float:
    """Share of windows of 16 bits whose code is read as the very bytes that it was written for."""
    ids = windows.encode(to_tensor(data))
    text, lengths = windows.decode(ids)
    pieces, right, at = to_bytes(text), 0, 0
    for length, end in zip(lengths.tolist(), lengths.cumsum(0).tolist(), strict=True):
        size = written(windows, data[at : at + LONGEST])
        right += data[at : at + size] == pieces[end - length : end]
        at += size
    assert at == len(data)
    return right / len(ids)


def written(windows: WindowCode, data: bytes) -> int:
    """How many bytes go into the first window: the most that take one by themselves."""
    low, high = 1, len(data)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(windows.encode(to_tensor(data[:middle]))) == 1 else (low, middle - 1)
    return low


def table(report: dict[str, Any]) -> str:
    """Bytes per token by language."""
    sizes = report["bytes"]
    lines = ["| | all | " + " | ".join(SHOWN) + " | encode, MB/s | decode, MB/s |", "|" + "---|" * (len(SHOWN) + 4)]
    for name, row in report["rows"].items():
        tokens = row["tokens"]
        cells = [sum(sizes.values()) / sum(tokens.values()), *(sizes[language] / tokens[language] for language in SHOWN)]
        speeds = [f"{row[key]:.1f}" if key in row else "-" for key in ("encode_mb_s", "decode_mb_s")]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + f" | {' | '.join(speeds)} |")
    return "\n".join(lines)


def notes(report: dict[str, Any]) -> str:
    """What the table stands on."""
    rows = report["rows"]
    right = rows[NAMES["equal_info_nano_greedy.manuals"]]["windows_right"]
    trips = [row["round_trip_bytes"] for row in rows.values() if "round_trip_bytes" in row]
    return (
        f"Bytes per token of 16 bits on {sum(report['bytes'].values()):,} bytes of held-out manuals in {len(report['bytes'])} "
        f"languages. {len(trips)} of the rows were also tried on {trips[0]:,} bytes of text cut up by random bytes: all came "
        f"back exactly. With the greedy rule {right:.1%} of windows are read as they were written; all others decode exactly."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--store", type=Path, required=True, help="texts that `tokenzoo.training.equal_info` stored")
    parser.add_argument("--bpe", type=Path, required=True, help="file of the BPE, written if it is not there")
    parser.add_argument("--bytes", type=int, default=60_000, help="held-out bytes of each language")
    parser.add_argument("--trip", type=int, default=10_000_000, help="bytes of the round trip")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--card", type=Path, help="card whose measured block is rewritten")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = TextStore(options.store)
    held = {language: bytes(np.asarray(s[: options.bytes])) for language, s in store.streams(held_out=True).items()}
    trip = mixed(store, options.trip)
    report: dict[str, Any] = {"bytes": {language: len(text) for language, text in held.items()}, "rows": {}}
    for name, title in NAMES.items():
        report["rows"][title] = measure(name, held, trip)
    merges = bpe(store, options.bpe)
    counts, seconds = timed(lambda: {k: len(merges.encode(text.decode(errors="ignore")).ids) for k, text in held.items()})
    report["rows"]["BPE of 65,536, same text"] = {"tokens": counts, "encode_mb_s": sum(map(len, held.values())) / 1e6 / seconds}
    zipped, seconds = timed(lambda: {language: len(gzip.compress(text, 9)) / 2 for language, text in held.items()})
    report["rows"]["gzip -9, 16 bits a token"] = {"tokens": zipped, "encode_mb_s": sum(map(len, held.values())) / 1e6 / seconds}
    block = f"{table(report)}\n\n{notes(report)}"
    print(block)
    if options.json:
        write_atomically(options.json, json.dumps(report, indent=1).encode())
    if options.card:
        card = options.card.read_text()
        before, after = card.split(BEGIN)[0], card.split(END)[1]
        write_atomically(options.card, f"{before}{BEGIN}\n{block}\n{END}{after}".encode())


if __name__ == "__main__":
    main()
