"""`python -m tokenzoo.evaluation.words`: bundles a run of `word_pool` and writes on its card which words come back.

The run may still be going on: its last checkpoint is read. Everything between the markers on the card, and the figures of its
front matter, is rewritten; the prose around them is not. A BPE vocabulary of as many ids, of HF `tokenizers` (extra `bench`),
is trained on the windows in which the pieces were found, and measured on the same words.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenzoo.evaluation.bundling import averaged_weights, built, bundle, command_line, recipe_of, with_measured
from tokenzoo.evaluation.next_word import train_bpe
from tokenzoo.tokenizers.text.splitters import words_of
from tokenzoo.tokenizers.text.word_pool import WordPool
from tokenzoo.training.recipe import Recipe, TextsRecipe
from tokenzoo.training.sources import prepare_texts
from tokenzoo.training.texts import TextStore

LEAST, PIECE = 10_000, 4000


@dataclass(frozen=True)
class Measured:
    """Words of held-out text of one language.

    Attributes:
        num_bytes: Of the text.
        words: How many words.
        right: How many of them come back from their codes.
        distinct: How many words that differ.
        distinct_right: How many of those come back.
        ids: Ids, raw bytes included.
        bpe_ids: Ids of BPE, cut into the same words.
    """

    num_bytes: int
    words: int
    right: int
    distinct: int
    distinct_right: int
    ids: int
    bpe_ids: int

    def row(self, name: str, bits: float) -> str:
        """A line of the card's table, with ids of so many bits."""
        values = [
            f"{self.num_bytes / 1e3:.0f}",
            f"{self.right / self.words:.2%}",
            f"{self.distinct_right / self.distinct:.2%}",
            f"{self.num_bytes / self.words:.2f}",
            f"{self.ids / self.words:.2f}",
            f"{self.num_bytes / self.ids:.2f}",
            f"{self.num_bytes / self.bpe_ids:.2f}",
            f"{bits * self.ids / self.num_bytes:.2f}",
        ]
        return f"| {name} | " + " | ".join(values) + " |"


def spread(stream: npt.NDArray[np.uint8], most: int) -> bytes:
    """About `most` bytes of a stream, in pieces of whole lines that are spread over all of it; all, if it is shorter."""
    if len(stream) <= most:
        return stream.tobytes()
    count = -(-most // PIECE)
    starts = [at * (len(stream) - PIECE) // count for at in range(count)]
    pieces = [stream[start : start + PIECE].tobytes() for start in starts]
    return b"".join(piece[piece.find(b"\n") + 1 : piece.rfind(b"\n") + 1] for piece in pieces)


def measure(tokenizer: WordPool, text: bytes, bpe: Any) -> Measured:
    """What comes back of a text, and what it costs; checks that all of it is decoded exactly."""
    words = words_of(text, tokenizer.split(text))
    tokens = tokenizer.encode(text)
    if tokenizer.decode(tokens, native=True) != [text]:
        raise AssertionError("expected an exact round trip")
    distinct = list(dict.fromkeys(words))
    right = sum(tokenizer.comes_back(words))
    distinct_right = sum(tokenizer.comes_back(distinct))
    bpe_ids = sum(len(found.ids) for found in bpe.encode_batch([word.decode("latin-1") for word in words]))
    return Measured(len(text), len(words), right, len(distinct), distinct_right, int(tokens.lengths.sum()), bpe_ids)


def release(run: Path, recipe: Recipe, card: Path, most: int) -> dict[str, Measured]:
    """Writes `nano/<card>.safetensors` beside `card` and refreshes the card; what was measured, by language."""
    assert isinstance(recipe.data, TextsRecipe)
    state, step = averaged_weights(run)
    state = {name: tensor for name, tensor in state.items() if ".learner." not in name}
    tokenizer = built(recipe.architecture, {**recipe.config, "decay": 0.0, "restart_after": 0, "kmeans_iterations": 0}, state)
    assert isinstance(tokenizer, WordPool)
    windows = prepare_texts(recipe.data, run / "texts").initial(recipe.initialise_items).numpy()
    texts = (window.tobytes() for window in windows)
    words = [word for text in texts for word in words_of(text, tokenizer.split(text))]
    bpe = train_bpe(words, tokenizer.config.codebook_size)
    store = TextStore(run / "texts")
    found = {}
    for name, stream in store.streams(held_out=True).items():
        if len(stream) >= LEAST:
            found[name] = measure(tokenizer, spread(stream, most), bpe)
            print(name, found[name], flush=True)
    bundle(card, refreshed(card.read_text(), tokenizer, found, step, store.copied), state, tokenizer)
    return found


def refreshed(text: str, tokenizer: WordPool, found: dict[str, Measured], steps: int, copied: int) -> str:
    """The card with the measured part replaced.

    Raises:
        ValueError: If the card has no markers.
    """
    size = tokenizer.config.codebook_size
    rows = "\n".join(one.row(name, float(np.log2(size))) for name, one in found.items())
    rest = [one for name, one in found.items() if name != "en"]
    mine, theirs = (
        f"{found['en'].num_bytes / getattr(found['en'], ids):.2f} bytes of English and, on average over languages, "
        f"{np.mean([one.num_bytes / getattr(one, ids) for one in rest]):.2f} of the others"
        for ids in ("ids", "bpe_ids")
    )
    english = found["en"].right / found["en"].words
    missed = [name for name, one in found.items() if name != "en" and one.right < 0.95 * one.words]
    part = f"""\
Measured on up to {max(one.num_bytes for one in found.values()) / 1e3:.0f} kB of each language, spread over its held-out
manuals, by the bundled float16 weights, after {steps:,} training steps. Every text was decoded again,
and was equal to the original.

| language | kB | words without raw bytes | distinct ones | bytes/word | ids/word | bytes/id | bytes/id of BPE | bits/byte |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

- The aims were 99 % of English words and 95 % of the others': English has {english:.2%}, and {len(rest) - len(missed)} of the
  {len(rest)} others have reached theirs{": all but " + ", ".join(missed) if missed else ""}.
- An id stands for {mine}.
  An id of a BPE vocabulary of {size:,} ids stands for {theirs};
  it was trained on the windows in which the pieces were found, and keeps within the same words.
- {copied} held-out documents that were mostly copies of training documents were left out before."""
    return with_measured(text, part)


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, "manuals")
    parser.add_argument("--bytes", type=int, default=16_000, help="of each language")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    found = release(arguments.run, recipe_of(arguments), arguments.card, arguments.bytes)
    print(json.dumps({name: vars(one) for name, one in found.items()}, indent=1))


if __name__ == "__main__":
    main()
