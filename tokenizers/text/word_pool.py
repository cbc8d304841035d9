"""WordPool: bytes of each word pooled into k vectors, that decode back into the word and that predict the next one.

Paper: Learn Your Tokens, https://arxiv.org/abs/2310.11628 (repository avi-jit/eTok at 31c680b, MIT; no weights were published).
From it: k learned queries pool the bytes of a word, a causal transformer reads one word after the other, and a decoder writes
the bytes of all words at once, each from its vectors and from the bytes before it. What differs here:

- Words come from a lossless splitter, spaces and line breaks included, and are cut after `longest` bytes; the published
  cleaning loses white space and "=". Characters of scripts without spaces are joined to words of a few.
- Padding is masked everywhere (published: real bytes attend to it), and queries are parameters rather than ids (published:
  they collide with bytes).
- Vectors decode: they are residual-quantized, and their k * Q ids are the tokens. The published decoder only ever saw the
  vectors of other words.
- What would not come back is written as raw bytes in the same ids (`_words`), so `decode` is exact for any text.

A word's logits are computed in float32 whatever the precision around, and a code counts as decodable only if each of its bytes
beats all others by `margin`, thousands of times what rounding changes in other batches or on other processors: no decision that
`encode` relied on can turn in `decode`.

Shapes: B batch, K = k * Q codebooks, L frames, W words, T words of a text, N bytes, D width of a vector.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.streaming import State
from tokenzoo.tokenizers import Codes, Output, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.learning import Learning
from tokenzoo.tokenizers.quantizers import Quantized, ResidualQuantizer
from tokenzoo.tokenizers.strings import read_text
from tokenzoo.tokenizers.text._word_network import END, NextWord, WordDecoder, WordEncoder
from tokenzoo.tokenizers.text._words import RAW, ROWS, Words, joined, raw_bytes, raw_frames
from tokenzoo.tokenizers.text.base import Embedding, TextTokenizer
from tokenzoo.tokenizers.text.splitters import Ends, splitter, words_of
from tokenzoo.tokenizers.tokens import pad_and_cat

_KNOWN = 1 << 18  # words whose frames are kept
_PIECE = 256  # words of a text that are scored at a time
_TEXTS, _BYTES = 256, 1 << 20  # texts, and their bytes, whose words are computed together
_LN2 = 0.6931471805599453


@strict
@dataclass(kw_only=True)
class WordPoolConfig(TokenizerConfig):
    """Size of the tokenizer.

    Attributes:
        splitter: Name of the splitter.
        longest: Bytes of the longest word; longer ones are cut.
        joined: Kana or Chinese characters in a row, words by themselves, that become one word.
        num_vectors: Vectors k of a word.
        stages: Stages Q of the residual quantizer of each vector.
        codebook_size: Ids of each codebook, of which 257 are raw bytes and nothing.
        vector_dim: Width D of a vector.
        byte_dim: Width of a byte in the encoder.
        byte_layers: Layers of its byte transformer.
        byte_heads: Attention heads of those.
        queries: Learned queries of each vector.
        hidden_dim: Width of the blocks between bytes and vectors.
        blocks: How many of those there are, on each side.
        said_dim: Width of what the decoder's blocks say of a position.
        past_dim: Width of an earlier byte in the decoder.
        position_dim: Width of a position in the decoder.
        position_blocks: Residual blocks of a position.
        margin: By how much, in nats, each byte must beat all others for a code to count as decodable.
        model_dim: Width of the word-level model.
        model_layers: Its layers; without any there is no such model.
        model_heads: Its attention heads.
        context: Words that it looks back on.
        commitment: Weight of the commitment loss.
        decay: Of the codebooks' moving averages; 0: they follow gradients.
        restart_after: Training steps without a word after which a code is set anew; 0: never.
        kmeans_iterations: Rounds of k-means that set the codebooks when they are first used.
        continuous: Share of the training before vectors are quantized.
        batch_words: Words of a training batch that are read and written, chosen at random among those that differ.
    """

    splitter: str = "unicode_word"
    longest: int = 16
    joined: int = 2
    num_vectors: int = 4
    stages: int = 2
    codebook_size: int = 2048
    vector_dim: int = 64
    byte_dim: int = 512
    byte_layers: int = 2
    byte_heads: int = 4
    queries: int = 16
    hidden_dim: int = 1024
    blocks: int = 2
    said_dim: int = 64
    past_dim: int = 64
    position_dim: int = 512
    position_blocks: int = 2
    margin: float = 0.05
    model_dim: int = 512
    model_layers: int = 8
    model_heads: int = 8
    context: int = 192
    commitment: float = 0.25
    decay: float = 0.99
    restart_after: int = 20
    kmeans_iterations: int = 4
    continuous: float = 0.01
    batch_words: int = 4096

    def validate_sizes(self) -> None:
        """Checks what the graph needs of the sizes."""
        if self.codebook_size <= RAW:
            raise ValueError(f"expected a codebook_size above {RAW}, which are raw bytes, got {self.codebook_size}")
        if not 4 <= self.longest <= 256:
            raise ValueError(f"expected longest from 4 to 256 bytes, got {self.longest}")
        if self.byte_dim % self.byte_heads or self.byte_dim % self.queries:
            raise ValueError(f"expected byte_dim to be a multiple of byte_heads and of queries, got {self.byte_dim = }")
        if min(self.num_vectors, self.stages, self.queries, self.position_dim) < 1 or self.margin <= 0:
            raise ValueError("expected at least one vector, stage, query and channel, and a margin above 0")


@dataclass(frozen=True)
class Score:
    """How well the word-level model foresees a text.

    Attributes:
        bits_per_byte: Of the text's bytes and word ends, in bits per byte of the text.
        next_word_accuracy: Share of words that greedy decoding names right, whole, from the right words before them.
        words: How many there are.
    """

    bits_per_byte: float
    next_word_accuracy: float
    words: int


class WordPool(TextTokenizer):
    """The tokenizer: one frame of K ids per word, or per K raw bytes."""

    architecture: ClassVar[str] = "word_pool"
    config_class: ClassVar[type[TokenizerConfig]] = WordPoolConfig
    config: WordPoolConfig

    def __init__(self, config: WordPoolConfig) -> None:
        super().__init__(config)
        self.codes = config.codebook_size - RAW
        self.num_codebooks = config.num_vectors * config.stages
        self.splitter = splitter(config.splitter, max_bytes=config.longest)
        self.encoder = WordEncoder(
            longest=config.longest,
            dim=config.byte_dim,
            layers=config.byte_layers,
            heads=config.byte_heads,
            num_vectors=config.num_vectors,
            queries=config.queries,
            hidden_dim=config.hidden_dim,
            blocks=config.blocks,
            vector_dim=config.vector_dim,
        )
        learning = None
        if config.decay or config.restart_after or config.kmeans_iterations:
            learning = Learning(
                decay=config.decay or None,
                restart_after=config.restart_after or None,
                kmeans_iterations=config.kmeans_iterations,
            )
        self.quantizers = nn.ModuleList(
            ResidualQuantizer(self.codes, config.vector_dim, config.stages, commitment=config.commitment, learning=learning)
            for _ in range(config.num_vectors)
        )
        self.decoder = self._word_decoder(config.num_vectors * config.vector_dim)
        self.next_word = None
        if config.model_layers:
            self.next_word = NextWord(
                in_dim=config.num_vectors * config.vector_dim,
                dim=config.model_dim,
                layers=config.model_layers,
                heads=config.model_heads,
                context=config.context,
                decoder=self._word_decoder(config.model_dim),
            )
        self._known: dict[bytes, bytes] = {}
        self.register_load_state_dict_post_hook(_forget_words)

    def _word_decoder(self, condition_dim: int) -> WordDecoder:
        config = self.config
        return WordDecoder(
            longest=config.longest,
            condition_dim=condition_dim,
            hidden_dim=config.hidden_dim,
            condition_blocks=config.blocks,
            said_dim=config.said_dim,
            byte_dim=config.past_dim,
            dim=config.position_dim,
            blocks=config.position_blocks,
        )

    def train(self, mode: bool = True) -> "WordPool":
        """As `nn.Module.train`; frames of words are kept in eval mode only."""
        self._known.clear()
        return super().train(mode)

    @property
    def _quantizers(self) -> list[Any]:
        return list(self.quantizers)

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.codebook_size,) * self.num_codebooks}

    def split(self, data: bytes) -> Ends:
        """Where each word of a text ends, int64 `[W]`: as the splitter says, with characters joined."""
        return joined(data, self.splitter.split(data), self.config.joined)

    # -- encode

    def _batches(self, items: Sequence[Any]) -> Iterator[tuple[list[int], Tensor, list[dict[str, Any]]]]:
        """As in `TextTokenizer`; the words of many texts are computed together, which changes no id and takes less time."""
        waiting: list[Any] = []
        size = 0
        for batch in super()._batches(items):
            waiting.append(batch)
            size += batch[1].numel()
            if len(waiting) >= _TEXTS or size >= _BYTES:
                self._learn(waiting)
                yield from waiting
                waiting, size = [], 0
        self._learn(waiting)
        yield from waiting

    def _learn(self, batches: Iterable[tuple[list[int], Tensor, list[dict[str, Any]]]]) -> None:
        words: set[bytes] = set()
        for _, rows, meta in batches:
            for row, about in zip(rows, meta, strict=True):
                text = row[: about["bytes"]].numpy().tobytes()
                words.update(words_of(text, self.split(text)))
        self._frames(sorted(words))

    def _encode_texts(self, texts: Sequence[bytes], *, seed: int) -> Codes:
        del seed
        rows = []
        for text in texts:
            words = words_of(text, self.split(text))
            known = self._frames(words)
            frames = np.frombuffer(b"".join([known[word] for word in words]), np.int32).reshape(-1, self.num_codebooks)
            rows.append(torch.from_numpy(frames.T.astype(np.int64))[None])
        lengths = torch.tensor([[row.shape[2]] * self.num_codebooks for row in rows])
        return Codes(pad_and_cat(rows), lengths)

    def _frames(self, words: Iterable[bytes]) -> dict[bytes, bytes]:
        """Frames of words, int32 `[L, K]` as bytes, by word; each word that was not met before is computed once."""
        if len(self._known) > _KNOWN:
            self._known.clear()
        known = self._known
        unknown = [word for word in dict.fromkeys(words) if word not in known]
        readable = [word for word in unknown if _is_utf8(word)]
        known.update((word, raw_frames(word, self.num_codebooks, self.codes).tobytes()) for word in unknown)
        if readable:
            codes_WK, margins = self.codes_of(readable)
            rows = codes_WK.cpu().numpy().astype(np.int32)
            for at in (margins >= self.config.margin).nonzero()[:, 0].tolist():
                known[readable[at]] = rows[at].tobytes()
        return known

    @torch.no_grad()
    def codes_of(self, words: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Codes of words, and whether they come back.

        Args:
            words: Words of 1 to `longest` bytes.

        Returns:
            Codes int64 `[W, K]`, and by how much the right byte beats all others where that is least, in nats `[W]`; a word
            with a negative margin does not come back.
        """
        codes = torch.zeros(len(words), self.num_codebooks, dtype=torch.long, device=self.device)
        margins = torch.zeros(len(words), device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            for chosen, group in Words.of(words, self.device).groups():
                targets = group.targets(END)
                for at in range(0, len(chosen), ROWS):
                    part, rows = slice(at, at + ROWS), chosen[at : at + ROWS]
                    vectors = self.encoder(group.rows[part], group.lengths[part])
                    found = torch.cat([q.ids(vectors[:, i]) for i, q in enumerate(self._quantizers)], 1)
                    condition = self.decoder.condition(self.vectors_of(found).flatten(1))
                    _, least = _read_group(self.decoder(condition, group.rows[part]), targets[part])
                    codes[rows], margins[rows] = found[: len(rows)], least[: len(rows)]
        return codes, margins

    def reconstructed(self, media: Any) -> list[float]:
        """Share of the words of each text that come back from their codes and need no raw bytes; of no words, 1."""
        shares = []
        for item in self.media.items(media):
            data, _ = read_text(item)
            words = words_of(data, self.split(data))
            come_back = self.comes_back(words)
            shares.append(sum(come_back) / len(words) if words else 1.0)
        return shares

    def comes_back(self, words: Sequence[bytes]) -> list[bool]:
        """Whether each word is written as codes, and not as raw bytes."""
        known = self._frames(words)
        return [int.from_bytes(known[word][:4], sys.byteorder) < self.codes for word in words]

    def vectors_of(self, codes_WK: Tensor) -> Tensor:
        """Vectors float32 `[W, k, D]` of codes int64 `[W, K]`: all that a downstream model needs of the ids."""
        parts = codes_WK.view(len(codes_WK), self.config.num_vectors, self.config.stages).unbind(1)
        return torch.stack([q.lookup(ids) for q, ids in zip(self._quantizers, parts, strict=True)], 1)

    def _embed_texts(self, texts: Sequence[bytes]) -> list[Embedding]:
        found = []
        for text in texts:
            ends = self.split(text)
            unique, index = _indexed(words_of(text, ends))
            vectors = self.vectors_of(self.codes_of(unique)[0])[index.to(self.device)]
            found.append(Embedding(vectors, torch.from_numpy(np.concatenate([[0], ends]))))
        return found

    # -- decode

    @torch.no_grad()
    def decode(self, tokens: Tokens, *, native: bool = False) -> list[str | bytes]:
        """As `TextTokenizer.decode`; the words of many texts are spelled together."""
        self._check_tokens(tokens)
        results: list[str | bytes] = []
        for at in range(0, len(tokens), _TEXTS):
            for i, data in enumerate(self._decode_texts(tokens[at : at + _TEXTS]), at):
                results.append(data if native else self._restore(data, tokens, i))
        return results

    def _decode_texts(self, tokens: Tokens) -> list[bytes]:
        if bool((tokens.lengths != tokens.lengths[:, :1]).any()):
            raise TokensError(f"expected as many ids of each codebook, got lengths {tokens.lengths.tolist()}")
        lengths = tokens.lengths[:, 0].tolist()
        frames = [tokens.ids[b, :, :length].mT.cpu().numpy() for b, length in enumerate(lengths)]
        parts = self._bytes_of(np.concatenate(frames))
        ends = np.cumsum(lengths).tolist()
        return [b"".join(parts[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def _bytes_of(self, frames_LK: npt.NDArray[np.int64]) -> list[bytes]:
        """What each frame stands for."""
        raw, parts = raw_bytes(frames_LK, self.codes)
        codes, index = np.unique(frames_LK[~raw], axis=0, return_inverse=True)
        words = self.spell(torch.from_numpy(codes).to(self.device))
        bytes_of_raw, words_of_codes = iter(parts), iter(index.ravel().tolist())
        return [next(bytes_of_raw) if is_raw else words[next(words_of_codes)] for is_raw in raw.tolist()]

    @torch.no_grad()
    def spell(self, codes_WK: Tensor) -> list[bytes]:
        """The words that codes int64 `[W, K]` stand for.

        Raises:
            TokensError: If codes lead to no end within the longest word, or to no byte at all; `encode` writes no such codes.
        """
        words = []
        longest = self.config.longest
        with torch.autocast(self.device.type, enabled=False):
            for at in range(0, len(codes_WK), ROWS):
                part = codes_WK[at : at + ROWS]
                padded = F.pad(part, (0, 0, 0, ROWS - len(part)))
                condition = self.decoder.condition(self.vectors_of(padded).flatten(1))
                symbols = padded.new_full((ROWS, longest), END)
                for place in range(longest + 1):
                    logits = self.decoder.next(condition, symbols[:, -longest:], place)
                    symbols = torch.cat([symbols, logits.argmax(-1, keepdim=True)], 1)
                for codes, row in zip(part.tolist(), symbols[:, longest:].tolist(), strict=False):
                    length = row.index(END) if END in row else 0
                    if not length:
                        raise TokensError(
                            f"expected the codes of a word, got {codes}, which spell none of 1 to {longest} bytes"
                        )
                    words.append(bytes(row[:length]))
        return words

    # -- the word-level model

    @torch.no_grad()
    def score(self, media: Any) -> list[Score]:
        """How well the word-level model foresees texts: bits per byte, and how many next words it names right.

        Args:
            media: One text or a list of texts, as `encode` takes them.

        Raises:
            MediaError: If an item is not a text.
            TokensError: If this tokenizer has no word-level model, or a text is empty.
        """
        return [self._score(read_text(item)[0]) for item in self.media.items(media)]

    def _score(self, text: bytes) -> Score:
        if self.next_word is None:
            raise TokensError(f"{self.name or self.architecture} has no word-level model: model_layers is 0")
        if not text:
            raise TokensError("expected a text of at least one byte to score, got none")
        unique, index = _indexed(words_of(text, self.split(text)))
        index = index.to(self.device)
        vectors, words = self.vectors_of(self.codes_of(unique)[0]).flatten(1), Words.of(unique, self.device)
        state: State = {}
        nats, right, before = 0.0, 0, None
        for piece in index.split(_PIECE):
            conditions = self.next_word(vectors[piece][None], before=before, state=state)[0]
            before = vectors[piece[-1:]][None]
            loss, margins = _read(self.next_word.decoder, conditions, Words(words.rows[piece], words.lengths[piece]))
            nats, right = nats + float(loss.double().sum()), right + int((margins > 0).sum())
        return Score(nats / _LN2 / len(text), right / len(index), len(index))

    # -- training

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Nats per symbol of words decoded from their own vectors, and of next words; frozen parts have no loss.

        Args:
            batch: Texts, uint8 `[B, N]`; the word that the end of a text cuts is left out.
            progress: Below `continuous`, vectors are not quantized.
            generator: Chooses the words.
        """
        texts = [row.tobytes() for row in batch.to(torch.uint8).cpu().numpy()]
        rows = [[word for word in words_of(text, self.split(text))[:-1] if _is_utf8(word)] for text in texts]
        losses, metrics = {}, {}
        if not self.training or self.decoder.head.weight.requires_grad:
            words = Words.of(self._some([word for row in rows for word in row], generator), self.device)
            vectors, quantized = self._quantized(words, continuous=self.training and progress < self.config.continuous)
            nats, margins = _read(self.decoder, self.decoder.condition(vectors.flatten(1)), words)
            losses["words"] = nats.sum() / (words.lengths + 1).sum()
            metrics["words_right"] = (margins > 0).float().mean()
            if quantized:
                losses["codes"] = torch.stack([q.loss for q in quantized]).sum()
                metrics["codes_used"] = torch.stack([_used(q.ids) for q in quantized]).mean() / self.codes
        if self.next_word is not None and (not self.training or self.next_word.start.requires_grad):
            nats, margins = self.foresee(rows)
            losses["next_word"] = nats.sum() / sum(len(word) for row in rows for word in row)
            metrics["next_word_right"] = (margins > 0).float().mean()
        return Output(None, losses, metrics)

    def _some(self, words: Iterable[bytes], generator: torch.Generator | None) -> list[bytes]:
        """At most `batch_words` of the words that differ."""
        unique = list(dict.fromkeys(words))
        if len(unique) <= self.config.batch_words:
            return unique
        device = generator.device if generator is not None else "cpu"
        order = torch.randperm(len(unique), generator=generator, device=device)[: self.config.batch_words]
        return [unique[i] for i in order.tolist()]

    def _quantized(self, words: Words, *, continuous: bool) -> tuple[Tensor, list[Quantized]]:
        """Vectors `[W, k, D]` of words, and what each quantizer made of them; none, where they are to stay continuous."""
        parts, order = [], []
        for chosen, group in words.groups():
            parts.append(self.encoder(*group).float()[: len(chosen)])
            order.append(chosen)
        vectors = torch.cat(parts)[torch.cat(order).argsort()]
        quantized = [] if continuous else [q(vectors[:, i]) for i, q in enumerate(self._quantizers)]
        if not quantized:
            return vectors, []
        return torch.stack([q.vectors for q in quantized], 1), quantized

    def foresee(self, texts: Sequence[Sequence[bytes]]) -> tuple[Tensor, Tensor]:
        """How well each word of texts is foreseen, with gradients to all that takes part; for training a model end to end.

        Args:
            texts: Words of each text; vectors are quantized unless the quantizers were taken out.

        Returns:
            Nats of each word and its end, text after text, and the margin of its least certain byte (above 0: greedy decoding
            names the word right), float32 `[W]` both.
        """
        unique, index = _indexed([word for words in texts for word in words])
        words = Words.of(unique, self.device)
        vectors, _ = self._quantized(words, continuous=not len(self.quantizers))
        return self._next_words(vectors, words, index, [len(row) for row in texts])

    def _next_words(self, vectors: Tensor, words: Words, index: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Nats and margins `[W]` of the words `index` of texts of `counts` words each, from vectors `[W', k, D]`."""
        assert self.next_word is not None, "checked by the callers"
        index, vectors = index.to(self.device), vectors.flatten(1)
        rows = nn.utils.rnn.pad_sequence([vectors[part] for part in index.split(counts)], batch_first=True)
        conditions = self.next_word(F.pad(rows, (0, 0, 0, -rows.shape[1] % ROWS)))
        flat = torch.cat([condition[:count] for condition, count in zip(conditions, counts, strict=True)])
        return _read(self.next_word.decoder, flat, Words(words.rows[index], words.lengths[index]))


def _read(decoder: WordDecoder, condition: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """Nats of each word and its end given conditions `[W, D]`, and the least margin of a right symbol, `[W]` both."""
    nats, margins, order = [], [], []
    for chosen, group in words.groups():
        filled = F.pad(condition[chosen], (0, 0, 0, len(group.lengths) - len(chosen)))
        found = _read_group(decoder(filled, group.rows).float(), group.targets(END))
        nats.append(found[0][: len(chosen)])
        margins.append(found[1][: len(chosen)])
        order.append(chosen)
    back = torch.cat(order).argsort()
    return torch.cat(nats)[back], torch.cat(margins)[back]


def _read_group(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    with torch.no_grad():
        right = targets.clamp_min(0)[..., None]
        others = logits.scatter(2, right, -torch.inf).amax(2)
        margins = (logits.gather(2, right)[..., 0] - others).masked_fill(targets < 0, torch.inf).amin(1)
    return losses.view(targets.shape).sum(1), margins


def _indexed(words: Sequence[bytes]) -> tuple[list[bytes], Tensor]:
    """Each word once, in order of appearance, and where each of `words` is among them, int64 `[W]`."""
    places: dict[bytes, int] = {}
    index = [places.setdefault(word, len(places)) for word in words]
    return list(places), torch.tensor(index, dtype=torch.long)


def _used(ids: Tensor) -> Tensor:
    """Codes that a batch used, the mean over the stages of `ids` `[W, Q]`."""
    return torch.tensor([float(len(stage.unique())) for stage in ids.unbind(1)]).mean()


def _is_utf8(word: bytes) -> bool:
    try:
        word.decode()
    except UnicodeDecodeError:
        return False
    return True


def _forget_words(module: WordPool, _: Any) -> None:
    module._known.clear()
