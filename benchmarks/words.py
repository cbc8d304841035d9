"""How fast `word_pool_nano` encodes text, beside bytes and a BPE vocabulary of as many ids, in the same rounds.

    python benchmarks/words.py
    python benchmarks/words.py --megabytes 1 --threads 2 --json benchmarks/words.json

The text is that of `text.py`. `bytes` is what a byte-level model reads: bytes plus 3, as int64 ids. The BPE vocabulary (HF
`tokenizers`, byte-level) is trained on the text itself. `word_pool_nano` is timed right after it was loaded, where each share
of a word goes through the network once; on a text whose words are new, but made of shares that it met; and when all words
are known. Medians over rounds, by the processor time of all threads together and by the clock.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from encode import Contender, time_rounds
from text import mixed_text
from tokenizers import ByteLevelBPETokenizer

from tokenzoo import load


def contenders_for(text: str, vocabulary: int) -> dict[str, Contender]:
    """Everyone's own call that encodes this text."""
    tokenizer = load("word_pool_nano")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.splitlines(keepends=True), vocab_size=vocabulary, show_progress=False)
    lines = text.splitlines(keepends=True)

    def loaded() -> object:
        tokenizer.forget()
        return tokenizer.encode(text)

    def new() -> object:
        tokenizer._known.clear()
        return tokenizer.encode(text)

    return {
        "`word_pool_nano`, just loaded": loaded,
        "`word_pool_nano`, new words": new,
        "`word_pool_nano`, known words": lambda: tokenizer.encode(text),
        "bytes": lambda: torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 3),
        f"BPE of {vocabulary:,}, HF tokenizers": lambda: bpe.encode_batch(lines),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(a.threads)
    torch.set_num_threads(a.threads)
    text = mixed_text(round(a.megabytes * 1e6))
    size = len(text.encode())
    times = time_rounds(contenders_for(text, a.vocabulary), a.rounds)
    speeds = {
        name: [round(size / 1e6 / statistics.median(pair[which] for pair in mine), 4) for which in (1, 0)]
        for name, mine in times.items()
    }
    report = {"bytes": size, "threads": a.threads, "rounds": a.rounds, "megabytes_per_second": speeds}
    print(json.dumps(report, indent=1))
    if a.json:
        a.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
