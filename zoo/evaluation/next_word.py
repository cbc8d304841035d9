"""`python -m tokenzoo.evaluation.next_word`: next-word accuracy of words, BPE and bytes as what a language model reads.

Learn Your Tokens (https://arxiv.org/abs/2310.11628) reports more than three times the next-word accuracy of byte and subword
models, and thirty times on rare words. Here three models of nearly equal size are trained on the very same windows of text:

- `word`: `word_pool`'s encoder, word-level transformer and decoder, trained together, two vectors a word, not quantized;
- `bpe`: a BPE vocabulary of HF `tokenizers`, trained on the same text, its pieces kept within words;
- `byte`: bytes.

All have the same transformer, all see a window of the same bytes and no more. A word counts as right where greedy decoding from
the right text before it writes its bytes and then ends it: what is predicted behind it must begin a new word, or say that the
word ends. Models take turns of a few steps, so that all have seen the same bytes whenever the run is stopped; it goes on where
it stopped.

With `--card` the word model is bundled beside that card, and what was measured is written on it.

Shapes: B batch, T positions, V vocabulary, D width.
"""

import argparse
import collections
import json
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.causal_transformer import CausalTransformer
from tokenzoo.evaluation.bundling import built, bundle, half_precision, with_measured
from tokenzoo.tokenizers.files import replacing, write_atomically
from tokenzoo.tokenizers.text._word_config import WordPoolConfig
from tokenzoo.tokenizers.text._words import RAW, ROWS
from tokenzoo.tokenizers.text.splitters import words_of
from tokenzoo.tokenizers.text.word_pool import Score, WordPool
from tokenzoo.training.recipe import Recipe, TextsRecipe
from tokenzoo.training.sources import prepare_texts
from tokenzoo.training.texts import TextStore, WindowSampler, first_lines

DIM, HEADS, LAYERS = 192, 3, 3
VOCABULARY = 2560
TURN = 50
LOOK_BACK = 96  # words that the bundled model looks back on: about as many as a window of its training had
RARE = 10
WORDS = WordPoolConfig(
    num_vectors=2, stages=0, codebook_size=RAW, vector_dim=64, byte_dim=64, byte_layers=1, queries=8, hidden_dim=192, blocks=1,
    said_dim=16, past_dim=16, position_dim=160, position_blocks=1, model_dim=DIM, model_layers=LAYERS, model_heads=HEADS,
    context=1024,
)  # fmt: skip


@dataclass
class Judged:
    """Words of texts, in order: whether each was foreseen, and the nats of all of them."""

    right: list[bool]
    nats: float


class WordModel(nn.Module):
    """The words of `word_pool`, foreseen."""

    def __init__(self, tokenizer: WordPool) -> None:
        super().__init__()
        self.words = tokenizer

    def loss(self, windows: list[list[bytes]]) -> Tensor:
        """Nats per byte of windows of words."""
        return self.words.foresee(windows)[0].sum() / _size(windows)

    @torch.no_grad()
    def judge(self, windows: list[list[bytes]]) -> Judged:
        """As the model that it is: a word is right with its end."""
        nats, margins = self.words.foresee(windows)
        return Judged((margins > 0).tolist(), float(nats.sum()))


class TokenModel(nn.Module):
    """A transformer over the tokens of words; with no merges, tokens are bytes."""

    def __init__(self, splitter: WordPool, bpe: Any, layers: int) -> None:
        super().__init__()
        self.bpe, self.split = bpe, splitter.split
        self.pieces = _pieces(bpe) if bpe else [bytes([value]) for value in range(256)]
        self.embedding = nn.Parameter(0.02 * torch.randn(len(self.pieces) + 1, DIM))
        self.trunk = CausalTransformer(DIM, layers, HEADS, 4 * DIM, 1 << 20)
        for name, parameter in self.trunk.named_parameters():
            if name.endswith(("scale1", "scale2")):
                nn.init.ones_(parameter)
        self.norm = nn.LayerNorm(DIM)

    def tokens(self, words: list[bytes]) -> list[list[int]]:
        """Ids of each word."""
        if self.bpe is None:
            return [list(word) for word in words]
        return [found.ids for found in self.bpe.encode_batch([word.decode("latin-1") for word in words])]

    def logits(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Logits `[B, T, V]` of padded rows of ids, and the ids `[B, T]`, -1 for padding."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)
        ids = F.pad(ids, (0, -ids.shape[1] % ROWS), value=-1)  # few shapes are faster than many
        start = ids.new_full((len(ids), 1), len(self.pieces))
        x = self.embedding[torch.cat([start, ids[:, :-1].clamp_min(0)], 1)]
        x = self.norm(self.trunk(x.mT).mT)
        return F.linear(x, self.embedding[:-1]), ids

    def loss(self, windows: list[list[bytes]]) -> Tensor:
        """Nats per byte of windows of words."""
        logits, ids = self.logits([[i for word in self.tokens(words) for i in word] for words in windows])
        nats = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), ignore_index=-1, reduction="sum")
        return nats / _size(windows)

    @torch.no_grad()
    def judge(self, windows: list[list[bytes]]) -> Judged:
        """A word is right where each of its tokens is the likeliest, and the likeliest token behind them begins a word."""
        tokens = [self.tokens(words) for words in windows]
        logits, ids = self.logits([[i for word in row for i in word] for row in tokens])
        nats = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), ignore_index=-1, reduction="sum")
        right = []
        for guesses, row, words in zip(logits.argmax(-1).tolist(), tokens, windows, strict=True):
            at = 0
            for word, mine in zip(words, row, strict=True):
                found = guesses[at : at + len(mine)] == mine
                at += len(mine)
                behind = self.pieces[guesses[at]] if at < len(guesses) else b""
                right.append(found and (not behind or len(word) in self.split(word + behind).tolist()))
        return Judged(right, float(nats))


def _pieces(bpe: Any) -> list[bytes]:
    vocabulary = bpe.get_vocab()
    return [piece.encode("latin-1") for piece in sorted(vocabulary, key=vocabulary.__getitem__)]


def _size(windows: list[list[bytes]]) -> int:
    return sum(len(word) for words in windows for word in words)


def train_bpe(words: list[bytes], size: int) -> Any:
    """A BPE vocabulary of HF `tokenizers` (extra `bench`) within words; bytes stand as the first 256 characters of Unicode."""
    bpe = import_module("tokenizers").Tokenizer(import_module("tokenizers.models").BPE())
    alphabet = [chr(value) for value in range(256)]
    trainer = import_module("tokenizers.trainers").BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator((word.decode("latin-1") for word in words), trainer)
    return bpe


class Experiment:
    """The three models, their optimizers, and how far they are."""

    def __init__(self, store: TextStore, language: str, folder: Path, *, window: int, batch_size: int, rate: float) -> None:
        self.folder, self.batch_size, self.window = folder, batch_size, window
        torch.manual_seed(0)
        self.splitter = WordPool(WORDS)
        training = store.streams(held_out=False)[language]
        self.sampler = WindowSampler({language: training}, window=window, seed=1)
        self.text = store.streams(held_out=True)[language]
        self.held_out = self.text.tobytes()
        words = self._words(training.tobytes())
        self.counts = collections.Counter(words)
        bpe = train_bpe(words, VOCABULARY)
        self.models: dict[str, Any] = {
            "word": WordModel(WordPool(WORDS)),
            "bpe": TokenModel(self.splitter, bpe, LAYERS),
            "byte": TokenModel(self.splitter, None, LAYERS + 1),
        }
        self.optimizers = {
            name: torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
            for name, model in self.models.items()
        }
        self.rate, self.step = rate, 0
        if (folder / "checkpoint.pt").exists():
            self._load()

    def _words(self, data: bytes) -> list[bytes]:
        return words_of(data, self.splitter.split(data))

    def turn(self) -> None:
        """Some steps of each model, on the same windows."""
        for name, model in self.models.items():
            model.train()
            for step in range(self.step, self.step + TURN):
                batch = self.sampler.batch(step, self.batch_size).numpy()
                windows = [self._words(row.tobytes())[:-1] for row in batch]
                for group in self.optimizers[name].param_groups:
                    group["lr"] = self.rate * min(1.0, (step + 1) / 100)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model.loss(windows)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                self.optimizers[name].step()
                self.optimizers[name].zero_grad()
        self.step += TURN
        self._save()

    def measure(self, num_bytes: int) -> dict[str, Any]:
        """What the models foresee of held-out text, in windows of the training's size."""
        data = self.held_out[:num_bytes]
        starts = range(0, len(data) - self.window + 1, self.window)
        windows = [self._words(data[at : at + self.window])[:-1] for at in starts]
        words = [word for row in windows for word in row]
        rare = [self.counts[word] <= RARE for word in words]
        result: dict[str, Any] = {
            "steps": self.step,
            "training_bytes": self.step * self.batch_size * self.window,
            "training_text": int(self.sampler.streams[0].size),
            "window": self.window,
            "held_out_words": len(words),
            "rare_words": sum(rare),
        }
        for name, model in self.models.items():
            model.eval()
            judged = [model.judge(windows[at : at + 16]) for at in range(0, len(windows), 16)]
            right = [value for part in judged for value in part.right]
            result[name] = {
                "params": sum(p.numel() for p in model.parameters()),
                "next_word_accuracy": sum(right) / len(right),
                "rare_word_accuracy": sum(a and b for a, b in zip(right, rare, strict=True)) / max(1, sum(rare)),
                "bits_per_byte": sum(part.nats for part in judged) / 0.6931471805599453 / _size(windows),
            }
        return result

    def _save(self) -> None:
        state = {name: (model.state_dict(), self.optimizers[name].state_dict()) for name, model in self.models.items()}
        with replacing(self.folder / "checkpoint.pt") as temporary:
            torch.save({"step": self.step, "state": state}, temporary)

    def _load(self) -> None:
        kept = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.step = kept["step"]
        for name, (model, optimizer) in kept["state"].items():
            self.models[name].load_state_dict(model)
            self.optimizers[name].load_state_dict(optimizer)


def release(model: WordModel, result: dict[str, Any], card: Path, text: bytes) -> None:
    """Writes the word model's `nano/<card>.safetensors` beside `card`, and on the card how it and the others did."""
    state = half_precision({name.removeprefix("words."): tensor for name, tensor in model.state_dict().items()})
    tokenizer = built("word_pool", {**asdict(WORDS), "context": LOOK_BACK}, state)
    assert isinstance(tokenizer, WordPool), "that is what the architecture says"
    bundle(card, refreshed(card.read_text(), result, tokenizer.score(text)[0], len(text)), state, tokenizer)


def refreshed(text: str, result: dict[str, Any], score: Score, num_bytes: int) -> str:
    """The card with the measured part replaced.

    Raises:
        ValueError: If the card has no markers.
    """
    names = {"word": "words, pooled", "bpe": f"BPE of {VOCABULARY:,}", "byte": "bytes"}
    rows = "\n".join(
        f"| {label} | {one['params'] / 1e6:.2f} M | {one['next_word_accuracy']:.1%} | {one['rare_word_accuracy']:.2%} | "
        f"{one['bits_per_byte']:.2f} |"
        for label, one in ((label, result[name]) for name, label in names.items())
    )
    part = f"""\
After {result["steps"]:,} steps, in which each model read the same {result["training_bytes"] / 1e6:.1f} MB of English manuals in
windows of {result["window"]} bytes (there are {result["training_text"] / 1e6:.1f} MB of them), on
{result["held_out_words"]:,} words of held-out ones; {result["rare_words"]:,} of those words are rare: they occur at most {RARE}
times in the training text.

| what the model reads | parameters | next word right | rare words right | bits/byte |
| --- | ---: | ---: | ---: | ---: |
{rows}

`tok.score` with the bundled float16 weights, on the first {num_bytes / 1e3:.0f} kB of the held-out English manuals as one text:
{score.bits_per_byte:.2f} bits per byte, {score.next_word_accuracy:.1%} of {score.words:,} next words."""
    return with_measured(text, part)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of manuals, as the recipe word_pool_nano says")
    parser.add_argument("--cache", type=Path, required=True, help="output folder of the training run, whose texts are used")
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and the result")
    parser.add_argument("--language", default="en")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--window", type=int, default=512, help="bytes of context")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out-bytes", type=int, default=200_000)
    parser.add_argument("--card", type=Path, help="the card of the word model to refresh")
    a = parser.parse_args()
    a.run.mkdir(parents=True, exist_ok=True)
    data = Recipe.read("word_pool_nano").data
    assert isinstance(data, TextsRecipe)
    plan = TextsRecipe(**{**vars(data), "folder": a.data})
    prepare_texts(plan, a.cache / "texts")
    store = TextStore(a.cache / "texts")
    run = Experiment(store, a.language, a.run, window=a.window, batch_size=a.batch_size, rate=a.learning_rate)
    while run.step < a.steps:
        run.turn()
        if run.step % (4 * TURN) == 0 or run.step >= a.steps:
            result = run.measure(a.held_out_bytes)
            write_atomically(a.run / "result.json", json.dumps(result, indent=1).encode())
            print(json.dumps(result), flush=True)
    if a.card:
        release(run.models["word"], run.measure(a.held_out_bytes), a.card, first_lines(run.text, a.held_out_bytes))


if __name__ == "__main__":
    main()
