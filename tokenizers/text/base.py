"""What the text tokenizers share: ragged batches of bytes, decoding to `str` or bytes, and vectors for a downstream model.

Shapes: B batch, K codebooks, L tokens, N bytes, W words, k vectors a word, D width.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenzoo.tokenizers import Codes, MediaError, Tokenizer, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.spec import Modality
from tokenzoo.tokenizers.strings import Strings, read_text, to_bytes, to_tensor
from tokenzoo.tokenizers.tokens import pad_and_cat


@dataclass(frozen=True)
class Embedding:
    """Vectors of one text, for a model that reads vectors instead of ids.

    Attributes:
        vectors: Of each word (or patch, or byte that was kept), `[W, k, D]`.
        offsets: int64 `[W + 1]`: word `w` is the bytes from `offsets[w]` up to `offsets[w + 1]`.
        byte_vectors: Of each byte, `[N, D']`, where the system has them.
    """

    vectors: Tensor
    offsets: Tensor
    byte_vectors: Tensor | None = None


class TextTokenizer(Tokenizer):
    """Bytes to ids and back.

    Texts are ragged, so a system implements `_encode_texts` and `_decode_texts`, which take and give lists; `_embed_texts`
    where it has vectors; and `_describe` and `objective` (on uint8 `[B, N]`) like any other.
    """

    modality: ClassVar[Modality] = "text"
    may_be_empty: ClassVar[bool] = True
    media: Strings

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config, Strings())
        self.qualities = {}

    @abstractmethod
    def _encode_texts(self, texts: Sequence[bytes], *, seed: int) -> Codes:
        """Ids int64 `[B, K, L]` of texts, with their lengths: see `ragged`."""

    @abstractmethod
    def _decode_texts(self, tokens: Tokens) -> list[bytes]:
        """The bytes of each item; ids and lengths were checked to be in range.

        Raises:
            TokensError: If no text has these ids.
        """

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        """Codes of texts of one length, uint8 `[B, N]`."""
        del length  # refused before: the tokens follow the text
        return self._encode_texts([to_bytes(row) for row in batch], seed=seed)

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """The bytes of texts, uint8 `[B, N]`, filled with zeros up to the longest."""
        texts = self._decode_texts(Tokens(ids, lengths, self.info, extras))
        return pad_and_cat([to_tensor(text)[None] for text in texts])

    def _embed_texts(self, texts: Sequence[bytes]) -> list[Embedding]:
        """Vectors of each text, on this tokenizer's device."""
        del texts
        raise TokensError(f"{self.name or self.architecture} makes ids and no vectors: embed with word_pool_nano instead")

    @torch.no_grad()
    def embed(self, media: Any) -> list[Embedding]:
        """Vectors of texts, and which bytes each vector stands for.

        Args:
            media: One text or a list of texts, as `encode` takes them.

        Returns:
            One `Embedding` per text, with the vectors it would have alone.

        Raises:
            MediaError: If an item is not a text.
            TokensError: If this tokenizer has no vectors.
        """
        texts = [read_text(item)[0] for item in self.media.items(media)]
        size = self._batch_size
        return [found for at in range(0, len(texts), size) for found in self._embed_texts(texts[at : at + size])]

    @torch.no_grad()
    def decode(self, tokens: Tokens, *, native: bool = False) -> list[str | bytes]:
        """Decodes tokens into texts, one each.

        Args:
            tokens: Tokens that these weights made, or that were built with this tokenizer's `info`.
            native: Return bytes, whatever the original was.

        Returns:
            A `str` for what was a `str` and bytes for what were bytes; a `str` for tokens without `meta`, such as a language
            model's.

        Raises:
            WrongTokenizerError: If another checkpoint made the tokens.
            TokensError: If an id or length is out of range, no text has these ids, or a `str` is wanted of bytes that are not
                UTF-8; the message says where.
        """
        self._check_tokens(tokens)
        results: list[str | bytes] = []
        for at in range(0, len(tokens), self._batch_size):
            part = tokens[at : at + self._batch_size]
            for i, data in enumerate(self._decode_texts(part.to(self.device)), at):
                results.append(data if native else self._restore(data, tokens, i))
        return results

    def _restore(self, data: bytes, tokens: Tokens, item: int) -> str | bytes:
        try:
            return self.media.restore(to_tensor(data), tokens.meta[item])
        except TokensError as error:
            raise TokensError(f"item {item}: {error}" if len(tokens) > 1 else str(error)) from None

    def _batches(self, items: Sequence[Any]) -> Iterator[tuple[list[int], Tensor, list[dict[str, Any]]]]:
        """Texts in order, those of a batch filled with zeros up to the longest; `meta["bytes"]` tells their lengths."""
        size = self._batch_size
        for at in range(0, len(items), size):
            texts, meta = [], []
            for index, item in enumerate(items[at : at + size], at):
                try:
                    text, about = self.media.read(item)
                except MediaError as error:
                    raise MediaError(f"item {index}: {error}" if len(items) > 1 else str(error)) from error
                texts.append(text[None])
                meta.append(about)
            yield list(range(at, at + len(texts))), pad_and_cat(texts), meta

    def _encode_batch(
        self,
        batch: Tensor,
        meta: list[dict[str, Any]],
        budgets: list[int] | None,
        target: Mapping[str, float] | None,
        seed: int,
    ) -> Tokens:
        del budgets, target  # refused before: the tokens follow the text
        texts = [to_bytes(row[: about["bytes"]]) for row, about in zip(batch, meta, strict=True)]
        codes = self._encode_texts(texts, seed=seed)
        assert codes.lengths is not None, "texts are ragged"
        return Tokens(codes.ids, codes.lengths, self.info, codes.extras, meta).to("cpu")


def ragged(rows: Sequence[Tensor], extras: Mapping[str, Tensor] | None = None) -> Codes:
    """Codes of texts from the ids of each, int64 `[L]` (one codebook), filled with zeros up to the longest."""
    lengths = torch.tensor([[len(row)] for row in rows])
    return Codes(pad_and_cat([row[None, None] for row in rows]), lengths.to(rows[0].device), extras or {})
