"""WordPool: bytes of each word pooled into k vectors, that decode back into the word and that predict the next one.

Paper: Learn Your Tokens, https://arxiv.org/abs/2310.11628 (repository avi-jit/eTok at 31c680b, MIT; no weights were published).
From it: learned queries pool the bytes of a word into at most k vectors, a causal transformer reads one word after the other,
and a decoder writes the bytes of all words at once, each from its vectors and from the bytes before it. What differs here:

- Words come from a lossless splitter, spaces and line breaks included, and are cut after `longest` bytes; the published
  cleaning loses white space and "=". Characters of scripts without spaces are joined to words of a few.
- Each vector pools a share of the word, and a word has as many vectors as it has shares. Shares are the cheapest of the pieces
  (`_pieces`) that were found in the training text, or equal parts of words that no k pieces make up.
- Padding is masked everywhere (published: real bytes attend to it), and queries are parameters rather than ids (published:
  they collide with bytes).
- Vectors decode: they are residual-quantized, and the ids of their stages are the tokens. The codebooks start as the vectors
  of the pieces. The published decoder only ever saw the vectors of other words.
- What would not come back is written as raw bytes in the same ids (`_words`), so `decode` is exact for any text.

Logits of bytes are computed in float32 whatever the precision around, and a code counts as decodable only if each of its bytes
beats all others by `margin`, thousands of times what rounding changes in other batches or on other processors: no decision that
`encode` relied on can turn in `decode`.

Shapes: B batch, Q stages, L frames, W words, S shares of words, N bytes, k vectors of a word, D width of a vector.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.streaming import State
from tokenzoo.tokenizers import Codes, Output, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.learning import Learning
from tokenzoo.tokenizers.quantizers import Quantized, ResidualQuantizer
from tokenzoo.tokenizers.strings import read_text
from tokenzoo.tokenizers.text._pieces import Pieces, equal_parts, fit
from tokenzoo.tokenizers.text._word_config import WordPoolConfig
from tokenzoo.tokenizers.text._word_network import END, NextWord, ShareEncoder, Speller, read, read_group
from tokenzoo.tokenizers.text._words import (
    RAW,
    ROWS,
    Words,
    check_order,
    choice,
    indexed,
    is_utf8,
    joined,
    raw_bytes,
    raw_frames,
)
from tokenzoo.tokenizers.text.base import Embedding, TextTokenizer
from tokenzoo.tokenizers.text.splitters import Ends, splitter, words_of
from tokenzoo.tokenizers.tokens import pad_and_cat

_KNOWN = 1 << 18  # words, and shares, whose frames are kept
_FADED = 0.75  # words count as often as they occur to this power when pieces are sought
_PIECE = 256  # words of a text that are scored at a time
_TEXTS, _BYTES = 256, 1 << 20  # texts, and their bytes, whose words are computed together
_LN2 = 0.6931471805599453

Key = tuple[bool, bytes]  # a share: whether it is a later one of its word, and its bytes


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
    """The tokenizer: one frame of ids per vector of a word, or per Q raw bytes."""

    architecture: ClassVar[str] = "word_pool"
    config_class: ClassVar[type[TokenizerConfig]] = WordPoolConfig
    config: WordPoolConfig
    piece_bytes: Tensor
    piece_lengths: Tensor

    def __init__(self, config: WordPoolConfig) -> None:
        super().__init__(config)
        self.codes = config.codebook_size - RAW
        self.num_codebooks = max(1, config.stages)
        self.splitter = splitter(config.splitter, max_bytes=config.longest)
        self.encoder = ShareEncoder(
            longest=config.longest,
            dim=config.byte_dim,
            layers=config.byte_layers,
            heads=config.byte_heads,
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
            ResidualQuantizer(size, config.vector_dim, config.stages, commitment=config.commitment, learning=learning)
            for size in self._sizes
        )
        self.decoder = self._speller(config.vector_dim) if config.stages else None
        self.register_buffer("piece_bytes", torch.zeros(self.codes, config.longest, dtype=torch.uint8))
        self.register_buffer("piece_lengths", torch.zeros(self.codes, dtype=torch.int16))
        self.next_word = None
        if config.model_layers:
            self.next_word = NextWord(
                in_dim=config.num_vectors * config.vector_dim,
                dim=config.model_dim,
                layers=config.model_layers,
                heads=config.model_heads,
                context=config.context,
                decoder=self._speller(config.model_dim),
            )
        self._pieces: Pieces | None = None
        self._known: dict[bytes, bytes] = {}
        self._known_shares: dict[Key, bytes] = {}
        self._spelled: dict[bytes, bytes] = {}
        self.register_load_state_dict_post_hook(_forget)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Codes of first and of later vectors."""
        return (self.config.starts, self.codes - self.config.starts) if self.config.stages else ()

    def _speller(self, condition_dim: int) -> Speller:
        config = self.config
        return Speller(
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
        """As `nn.Module.train`; what was found out about words is kept in eval mode only."""
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Forgets the frames of words that were met; they cost time to find again, and nothing else."""
        for known in (self._known, self._known_shares, self._spelled):
            known.clear()

    @property
    def _quantizers(self) -> list[Any]:
        return list(self.quantizers)

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.codebook_size,) * self.num_codebooks}

    def split(self, data: bytes) -> Ends:
        """Where each word of a text ends, int64 `[W]`: as the splitter says, with characters joined."""
        return joined(data, self.splitter.split(data), self.config.joined)

    # -- shares

    def initialise(self, windows: Tensor, generator: torch.Generator) -> None:
        """Finds the pieces of texts, uint8 `[B, N]`, where vectors are quantized."""
        del generator
        if not self.config.stages:
            return
        counts: Counter[bytes] = Counter()
        for row in windows.numpy():
            text = row.tobytes()
            counts.update(words_of(text, self.split(text))[:-1])
        weights = {word: count**_FADED for word, count in counts.items() if is_utf8(word)}
        starts, rest = self._sizes
        pieces = fit(weights, (starts, rest), self.config.num_vectors)
        for first, found in ((0, pieces.first), (starts, pieces.later)):
            rows = Words.of(found, torch.device("cpu"))
            self.piece_bytes[first : first + len(found), : rows.rows.shape[1]] = rows.rows.to(torch.uint8)
            self.piece_lengths[first : first + len(found)] = rows.lengths.to(torch.int16)
        self._pieces = None

    @property
    def pieces(self) -> Pieces | None:
        """What words are made up of, if that was found out; the place of a piece is its code before codes are trained."""
        if self._pieces is None and bool(self.piece_lengths.any()):
            lengths, data = self.piece_lengths.tolist(), self.piece_bytes.cpu().numpy()
            found = [row[:length].tobytes() for row, length in zip(data, lengths, strict=True)]
            starts = self.config.starts
            first, later = ([piece for piece in part if piece] for part in (found[:starts], found[starts:]))
            self._pieces = Pieces(first, later, self.config.num_vectors)
        return self._pieces

    def shares(self, words: Sequence[bytes]) -> list[list[bytes]]:
        """The shares of each word, one to k: pieces, or equal parts where it has none."""
        most, pieces = self.config.num_vectors, self.pieces
        found = pieces.shares(words) if pieces is not None else [None] * len(words)
        return [shares or equal_parts(word, most) for shares, word in zip(found, words, strict=True)]

    def _indexed_shares(self, words: Sequence[bytes]) -> tuple[list[Key], Tensor]:
        """Shares of words, each once, and which of them each word has, int64 `[W, k]`, -1 behind its last."""
        most = self.config.num_vectors
        places: dict[Key, int] = {}
        rows = [
            [places.setdefault((at > 0, share), len(places)) for at, share in enumerate(shares)]
            for shares in self.shares(words)
        ]
        index = torch.tensor([row + [-1] * (most - len(row)) for row in rows], dtype=torch.long)
        return list(places), index.view(len(rows), most).to(self.device)

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
        """Frames of words, int32 `[L, Q]` as bytes, by word; each word that was not met before is computed once."""
        if len(self._known) > _KNOWN:
            self._known.clear()
        known = self._known
        unknown = [word for word in dict.fromkeys(words) if word not in known]
        readable = [word for word in unknown if is_utf8(word)] if self.config.stages else []
        cuts = [[(at > 0, share) for at, share in enumerate(shares)] for shares in self.shares(readable)]
        frames = self._share_frames(key for keys in cuts for key in keys)
        for word, keys in zip(readable, cuts, strict=True):
            mine = [frames[key] for key in keys]
            if all(mine):
                known[word] = b"".join(mine)
        for word in unknown:
            if word not in known:
                known[word] = raw_frames(word, self.num_codebooks, self.codes).tobytes()
        return known

    def _share_frames(self, keys: Iterable[Key]) -> dict[Key, bytes]:
        """The frame of each share as bytes; none where the share would not come back."""
        if len(self._known_shares) > _KNOWN:
            self._known_shares.clear()
        known = self._known_shares
        unknown = [key for key in dict.fromkeys(keys) if key not in known]
        if unknown:
            codes, margins = self.codes_of(unknown)
            rows, right = codes.cpu().numpy().astype(np.int32), (margins >= self.config.margin).tolist()
            known.update((key, row.tobytes() if good else b"") for key, row, good in zip(unknown, rows, right, strict=True))
        return known

    @torch.no_grad()
    def codes_of(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Codes of shares, and whether they come back.

        Args:
            keys: Whether each share is a later one of its word, and its 1 to `longest` bytes.

        Returns:
            Codes int64 `[S, Q]`, and by how much the right byte beats all others where that is least, in nats `[S]`; a share
            with a negative margin does not come back.

        Raises:
            TokensError: If vectors are not quantized.
        """
        decoder = self._decoder()
        codes = torch.zeros(len(keys), self.num_codebooks, dtype=torch.long, device=self.device)
        margins = torch.zeros(len(keys), device=self.device)
        later = torch.tensor([later for later, _ in keys], dtype=torch.bool, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            for rows, shares in _in_rows(keys, self.device):
                vectors = self.encoder(*shares)
                first, second = (quantizer.ids(vectors) for quantizer in self._quantizers)
                is_later = F.pad(later[rows], (0, ROWS - len(rows)))
                found = torch.where(is_later[:, None], second + self.config.starts, first)
                logits = decoder(decoder.condition(self.vectors_of(found)), shares.rows)
                _, least = read_group(logits, shares.targets(END))
                codes[rows], margins[rows] = found[: len(rows)], least[: len(rows)]
        return codes, margins

    def _decoder(self) -> Speller:
        if self.decoder is None:
            raise TokensError(f"vectors of {self.name or self.architecture} are not quantized and have no codes: stages is 0")
        return self.decoder

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

    def vectors_of(self, codes: Tensor) -> Tensor:
        """Vectors float32 `[..., D]` of codes int64 `[..., Q]`."""
        starts, (first, later) = self.config.starts, self._quantizers
        one, other = first.lookup(codes.clamp_max(starts - 1)), later.lookup((codes - starts).clamp_min(0))
        return torch.where(codes[..., :1] < starts, one, other)

    def _word_vectors(self, words: Sequence[bytes]) -> Tensor:
        """Vectors float32 `[W, k, D]` of words, quantized if there are codes; zeros behind a word's last."""
        keys, index = self._indexed_shares(words)
        if self.config.stages:
            return _gather(self.vectors_of(self.codes_of(keys)[0]), index)
        vectors = torch.zeros(len(keys), self.config.vector_dim, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            for rows, shares in _in_rows(keys, self.device):
                vectors[rows] = self.encoder(*shares)[: len(rows)]
        return _gather(vectors, index)

    def _embed_texts(self, texts: Sequence[bytes]) -> list[Embedding]:
        found = []
        for text in texts:
            ends = self.split(text)
            unique, index = indexed(words_of(text, ends))
            vectors = self._word_vectors(unique)[index.to(self.device)]
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
        for rows in frames:
            check_order(rows, self.config.starts, self.codes, self.config.num_vectors)
        parts = self._bytes_of(np.concatenate(frames))
        ends = np.cumsum(lengths).tolist()
        return [b"".join(parts[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def _bytes_of(self, frames_LQ: npt.NDArray[np.int64]) -> list[bytes]:
        """What each frame stands for."""
        raw, parts = raw_bytes(frames_LQ, self.codes)
        codes, index = np.unique(frames_LQ[~raw], axis=0, return_inverse=True)
        if len(self._spelled) > _KNOWN:
            self._spelled.clear()
        known, keys = self._spelled, [row.tobytes() for row in codes]
        unknown = [at for at, key in enumerate(keys) if key not in known]
        if unknown:
            spelled = self.spell(torch.from_numpy(codes[unknown]).to(self.device))
            known.update((keys[at], share) for at, share in zip(unknown, spelled, strict=True))
        bytes_of_raw, places = iter(parts), iter(index.ravel().tolist())
        return [next(bytes_of_raw) if is_raw else known[keys[next(places)]] for is_raw in raw.tolist()]

    @torch.no_grad()
    def spell(self, codes: Tensor) -> list[bytes]:
        """The shares that codes int64 `[S, Q]` stand for.

        Raises:
            TokensError: If codes lead to no end within the longest word, or to no byte at all; `encode` writes no such codes.
        """
        decoder, longest, shares = self._decoder(), self.config.longest, []
        with torch.autocast(self.device.type, enabled=False):
            for at in range(0, len(codes), ROWS):
                part = codes[at : at + ROWS]
                padded = F.pad(part, (0, 0, 0, ROWS - len(part)))
                condition = decoder.condition(self.vectors_of(padded))
                symbols = padded.new_full((ROWS, longest), END)
                for place in range(longest + 1):
                    logits = decoder.next(condition, symbols[:, -longest:], place)
                    symbols = torch.cat([symbols, logits.argmax(-1, keepdim=True)], 1)
                    if bool((symbols[:, longest:] == END).any(1).all()):
                        break
                for row_codes, row in zip(part.tolist(), symbols[:, longest:].tolist(), strict=False):
                    length = row.index(END) if END in row else 0
                    if not length:
                        raise TokensError(
                            f"expected the codes of bytes, got {row_codes}, which spell none of 1 to {longest} bytes"
                        )
                    shares.append(bytes(row[:length]))
        return shares

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
            name = self.name or self.architecture
            raise TokensError(f"{name} has no word-level model (model_layers is 0): score with word_pool_nano_lm instead")
        if not text:
            raise TokensError("expected a text of at least one byte to score, got none")
        unique, index = indexed(words_of(text, self.split(text)))
        index = index.to(self.device)
        vectors, words = self._word_vectors(unique).flatten(1), Words.of(unique, self.device)
        state: State = {}
        nats, right, before = 0.0, 0, None
        for piece in index.split(_PIECE):
            conditions = self.next_word(vectors[piece][None], before=before, state=state)[0]
            before = vectors[piece[-1:]][None]
            loss, margins = read(self.next_word.decoder, conditions, Words(words.rows[piece], words.lengths[piece]))
            nats, right = nats + float(loss.double().sum()), right + int((margins > 0).sum())
        return Score(nats / _LN2 / len(text), right / len(index), len(index))

    # -- training

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Nats per symbol of shares decoded from their own vectors, and of next words; frozen parts have no loss.

        Args:
            batch: Texts, uint8 `[B, N]`; the word that the end of a text cuts is left out.
            progress: Below `continuous`, vectors are not quantized.
            generator: Chooses words and pieces.
        """
        texts = [row.tobytes() for row in batch.to(torch.uint8).cpu().numpy()]
        rows = [[word for word in words_of(text, self.split(text))[:-1] if is_utf8(word)] for text in texts]
        losses, metrics = {}, {}
        if self.decoder is not None and (not self.training or self.decoder.head.weight.requires_grad):
            keys, _ = self._indexed_shares(self._some([word for row in rows for word in row], generator))
            keys = list(dict.fromkeys([*keys, *self._some_pieces(generator)]))
            vectors, quantized = self._quantized(keys, continuous=self.training and progress < self.config.continuous)
            shares = Words.of([share for _, share in keys], self.device)
            nats, margins = read(self.decoder, self.decoder.condition(vectors), shares)
            losses["shares"] = nats.sum() / (shares.lengths + 1).sum()
            metrics["shares_right"] = (margins > 0).float().mean()
            if quantized:
                losses["codes"] = torch.stack([q.loss for q in quantized]).sum()
                metrics["codes_used"] = torch.stack([_used(q.ids) for q in quantized]).sum() / self.codes
        if self.next_word is not None and (not self.training or self.next_word.start.requires_grad):
            nats, margins = self.foresee(rows)
            losses["next_word"] = nats.sum() / sum(len(word) for row in rows for word in row)
            metrics["next_word_right"] = (margins > 0).float().mean()
        return Output(None, losses, metrics)

    def _some(self, words: Iterable[bytes], generator: torch.Generator | None) -> list[bytes]:
        """At most `batch_words` of the words that differ."""
        unique = list(dict.fromkeys(words))
        return [unique[i] for i in choice(len(unique), self.config.batch_words, generator)]

    def _some_pieces(self, generator: torch.Generator | None) -> list[Key]:
        """`batch_pieces` of the pieces, as shares."""
        pieces = self.pieces
        if pieces is None:
            return []
        first, most = len(pieces.first), self.config.batch_pieces
        chosen = choice(first + len(pieces.later), most, generator)
        return [(False, pieces.first[i]) if i < first else (True, pieces.later[i - first]) for i in chosen]

    def _quantized(self, keys: Sequence[Key], *, continuous: bool) -> tuple[Tensor, list[Quantized]]:
        """Vectors `[S, D]` of shares, and what each quantizer made of them; none, where they are to stay continuous."""
        parts, order = [], []
        for chosen, group in Words.of([share for _, share in keys], self.device).groups():
            parts.append(self.encoder(*group).float()[: len(chosen)])
            order.append(chosen)
        vectors = torch.cat(parts)[torch.cat(order).argsort()]
        if continuous or not self.config.stages:
            return vectors, []
        if self.training:
            self._start_codes()
        later = torch.tensor([later for later, _ in keys], device=self.device)
        kinds = [(~later).nonzero()[:, 0], later.nonzero()[:, 0]]
        quantized = [quantizer(vectors[kind]) for quantizer, kind in zip(self._quantizers, kinds, strict=True)]
        return torch.cat([q.vectors for q in quantized])[torch.cat(kinds).argsort()], quantized

    @torch.no_grad()
    def _start_codes(self) -> None:
        """Before codes are first used: those of the first stage become the vectors of the pieces."""
        pieces = self.pieces
        learners = [quantizer.stages[0].learner for quantizer in self._quantizers]
        if pieces is None or any(learner is None or not learner.is_waiting for learner in learners):
            return
        for quantizer, learner, part in zip(self._quantizers, learners, (pieces.first, pieces.later), strict=True):
            vectors, _ = self._quantized([(False, piece) for piece in part], continuous=True)
            codebook = quantizer.stages[0].codebook
            learner.start_at(codebook, vectors[torch.arange(len(codebook), device=vectors.device) % len(vectors)])

    def foresee(self, texts: Sequence[Sequence[bytes]]) -> tuple[Tensor, Tensor]:
        """How well each word of texts is foreseen, with gradients to all that takes part; for training a model end to end.

        Args:
            texts: Words of each text.

        Returns:
            Nats of each word and its end, text after text, and the margin of its least certain byte (above 0: greedy decoding
            names the word right), float32 `[W]` both.
        """
        unique, index = indexed([word for words in texts for word in words])
        keys, shares = self._indexed_shares(unique)
        vectors = _gather(self._quantized(keys, continuous=False)[0], shares)
        return self._next_words(vectors, Words.of(unique, self.device), index, [len(row) for row in texts])

    def _next_words(self, vectors: Tensor, words: Words, index: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Nats and margins `[W]` of the words `index` of texts of `counts` words each, from vectors `[W', k, D]`."""
        assert self.next_word is not None, "checked by the callers"
        index, vectors = index.to(self.device), vectors.flatten(1)
        rows = nn.utils.rnn.pad_sequence([vectors[part] for part in index.split(counts)], batch_first=True)
        conditions = self.next_word(F.pad(rows, (0, 0, 0, -rows.shape[1] % ROWS)))
        flat = torch.cat([condition[:count] for condition, count in zip(conditions, counts, strict=True)])
        return read(self.next_word.decoder, flat, Words(words.rows[index], words.lengths[index]))


def _used(ids: Tensor) -> Tensor:
    """Codes that a batch used, the mean over the stages of `ids` `[W, Q]`."""
    return torch.tensor([float(len(stage.unique())) for stage in ids.unbind(1)]).mean()


def _in_rows(keys: Sequence[Key], device: torch.device) -> Iterator[tuple[Tensor, Words]]:
    """Shares of similar length, `ROWS` at a time so that they are computed alike in any company, with their indices."""
    for chosen, group in Words.of([share for _, share in keys], device).groups():
        for at in range(0, len(chosen), ROWS):
            part = slice(at, at + ROWS)
            yield chosen[part], Words(group.rows[part], group.lengths[part])


def _gather(vectors: Tensor, index: Tensor) -> Tensor:
    """Rows of `vectors` `[S, D]`, in the shape of `index` and D; zeros for -1."""
    return F.pad(vectors, (0, 0, 0, 1))[index]


def _forget(module: WordPool, _: Any) -> None:
    module.forget()
    module._pieces = None
