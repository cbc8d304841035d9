# ruff: noqa: RUF001  # letters of other alphabets are meant
"""How fast texts are split into words, beside `regex`, `tiktoken` and Hugging Face's pre-tokenizers in the same paired rounds.

    python benchmarks/text.py
    python benchmarks/text.py --megabytes 8 --rounds 15 --json benchmarks/text.json

The text is the same for everyone: half of it this repository's sources and pages, half the first article of the Universal
Declaration of Human Rights in ten languages, in random lines. `space` and the others are ours, with where words end as an
array; every peer answers in its own form, `tiktoken` with ids too, since it does not split without. Nothing is downloaded.

Rounds as in `encode.py`: every round times each contender once, in turning order. Speeds are medians over rounds, by the
processor time of this process, which works on one thread here, and by the clock.
"""

import argparse
import json
import os
import platform
import random
import statistics
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import regex
import tiktoken
import torch
from encode import Contender, time_rounds
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Whitespace

from tokenzoo.kernels import _native
from tokenzoo.tokenizers.text.splitters import splitter, words_of

ROOT = Path(__file__).parents[1]
ARTICLE = (
    "All human beings are born free and equal in dignity and rights.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
OURS = ("space", "spacebyte", "unicode_word")


def mixed_text(num_bytes: int) -> str:
    """About so many bytes of code, prose about code, and ten languages."""
    sources = [path for kind in ("*.py", "*.md") for path in sorted(ROOT.glob(f"[a-z]*/**/{kind}"))]
    lines = "\n".join(path.read_text(encoding="utf-8") for path in sources).splitlines()
    rng = random.Random(0)
    halves = []
    for some in (lines, ARTICLE):
        mean = sum(len(line.encode()) + 1 for line in some) / len(some)
        halves += rng.choices(some, k=round(num_bytes / 2 / mean))
    rng.shuffle(halves)
    return "\n".join(halves)


def contenders_for(text: str, data: bytes) -> dict[str, Contender]:
    """Everyone's own call that splits this text; ours splits its bytes."""
    found: dict[str, Contender] = {}
    for name in OURS:
        split = splitter(name).split
        found[name] = lambda split=split: split(data)  # type: ignore[misc]
        limited = splitter(name, max_bytes=16).split
        found[f"{name}, 16 bytes at most"] = lambda split=limited: split(data)  # type: ignore[misc]
    for name, pattern in (("GPT-2", GPT2), ("cl100k", CL100K)):
        compiled = regex.compile(pattern)
        found[f"regex, {name} pattern"] = lambda compiled=compiled: compiled.findall(text)  # type: ignore[misc]
    boundary = regex.compile(r"(?w)\b")
    found["regex, Unicode's words"] = lambda: boundary.split(text)
    ranks = {bytes([value]): value for value in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={})
    found["tiktoken, cl100k pattern and 256 ids"] = lambda: encoding.encode_ordinary(text)
    for pre in (ByteLevel(add_prefix_space=False), Metaspace(), Whitespace()):
        found[f"HF tokenizers, {type(pre).__name__}"] = lambda pre=pre: pre.pre_tokenize_str(text)  # type: ignore[misc]
    return found


def measure(num_bytes: int, rounds: int) -> dict[str, object]:
    """MB/s of everyone, by processor time and by the clock, and bytes per word of ours."""
    text = mixed_text(num_bytes)
    data = text.encode()
    for name in OURS:
        assert b"".join(words_of(data, splitter(name).split(data))) == data
    contenders = contenders_for(text, data)
    seconds = time_rounds(contenders, rounds)
    return {
        "megabytes": len(data) / 1e6,
        "rounds": rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "kernels": _native.status(),
        "bytes_per_word": {name: len(data) / len(splitter(name).split(data)) for name in OURS},
        "megabytes_per_second": {
            name: [len(data) / 1e6 / statistics.median(times[which] for times in all_times) for which in (1, 0)]
            for name, all_times in seconds.items()
        },
    }


def main() -> None:
    """Prints a table, and JSON to a file if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(round(options.megabytes * 1e6), options.rounds)
    print(f"{result['megabytes']:.1f} MB, {options.rounds} rounds, {result['machine']}; {result['kernels']}")
    print(f"{'splitter':40} {'MB/s, processor':>16} {'clock':>8}")
    for name, (processor, clock) in result["megabytes_per_second"].items():  # type: ignore[attr-defined]
        print(f"{name:40} {processor:16.1f} {clock:8.1f}")
    for name, mean in result["bytes_per_word"].items():  # type: ignore[attr-defined]
        print(f"{name}: {mean:.2f} bytes per word")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
