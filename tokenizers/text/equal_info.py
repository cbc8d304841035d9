"""Equal-information windows: text cut into windows that an arithmetic coder compresses into equally many bits each.

Paper: Training LLMs over Neurally Compressed Text, https://arxiv.org/abs/2404.03626 (no code, no weights). From it: a small
byte model drives an arithmetic coder; a window takes in bytes until the next one would need more than its bits, then coder
and model start anew; the bits are the tokens, 16 at a time, so that windows of 16 bits are one token out of 65,536 each.
What differs here:

- The byte model is counted, and it is integers throughout (`_byte_model`): the published one is a transformer, whose floating
  point gives other codes on another machine.
- Every string owns its code, the first of its interval (the paper's appendix delays a byte that would share one instead: see
  `tokenzoo.kernels.windows`), so that decoding is exact and all ids but the empty window's decode. The paper's greedy rule,
  where several strings share a code and not every text comes back, is there as `paper_mode`.
- Windows of 16 bits are frozen into a table of 65,536 strings: encoding looks up the longest one, decoding copies it.

Shapes: B batch, L tokens, N bytes, W windows, S strings.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from tokenzoo.kernels.windows import TOKEN_BITS, Trie, WindowCode, match_strings
from tokenzoo.tokenizers import Codes, ConfigError, Output, TokenizerConfig, Tokens, TokensError, WeightsError
from tokenzoo.tokenizers.strings import to_tensor
from tokenzoo.tokenizers.text._byte_model import DIRECT, LIMIT, freeze
from tokenzoo.tokenizers.text.base import TextTokenizer, ragged

SIZE = 1 << TOKEN_BITS
_HASHED_BITS = (8, 28)
_TOGETHER = 64


@strict
@dataclass(kw_only=True)
class EqualInfoConfig(TokenizerConfig):
    """What windows there are.

    Attributes:
        window_bits: Of a window: 16, 32, 64 or 128; each 16 bits are a token.
        frozen: Windows of 16 bits by a table of strings instead of the byte model.
        orders: Tables of the byte model, for 0 to `orders - 1` bytes of context; at most 8.
        hashed_bits: Each of them from order 2 on has `2**hashed_bits` places.
        paper_mode: The published greedy rule, which does not always decode to the text, for windows of up to 64 bits.
    """

    window_bits: Literal[16, 32, 64, 128] = 16
    frozen: bool = True
    orders: int = 6
    hashed_bits: int = 19
    paper_mode: bool = False

    def validate_windows(self) -> None:
        """Checks what goes together."""
        if self.frozen and (self.window_bits != TOKEN_BITS or self.paper_mode):
            raise ValueError("expected frozen windows to have 16 bits and no paper_mode: both others need the byte model")
        if self.paper_mode and self.window_bits > 64:
            raise ValueError(f"expected windows of at most 64 bits in paper_mode, got {self.window_bits}")
        if not 2 <= self.orders <= 8 or not _HASHED_BITS[0] <= self.hashed_bits <= _HASHED_BITS[1]:
            raise ValueError(
                f"expected 2 to 8 orders and hashed_bits of {_HASHED_BITS[0]} to {_HASHED_BITS[1]}, got {self.orders} and "
                f"{self.hashed_bits}"
            )


class EqualInfo(TextTokenizer):
    """The tokenizer: one codebook of 65,536 ids, `window_bits / 16` of them per window."""

    architecture: ClassVar[str] = "equal_info"
    config_class: ClassVar[type[TokenizerConfig]] = EqualInfoConfig
    config: EqualInfoConfig
    parents: Tensor
    labels: Tensor
    corrections: Tensor
    checks: Tensor
    odds: Tensor

    def __init__(self, config: EqualInfoConfig) -> None:
        super().__init__(config)
        if config.frozen:
            # Strings of one byte; all others are empty until they are loaded.
            self.register_buffer("parents", torch.zeros(SIZE, dtype=torch.int32))
            self.register_buffer("labels", torch.zeros(SIZE, dtype=torch.uint8))
        else:
            hashed = (config.orders - 2) << config.hashed_bits
            self.register_buffer("corrections", torch.zeros(DIRECT + hashed, dtype=torch.int8))
            self.register_buffer("checks", torch.zeros(hashed, dtype=torch.uint8))
            self.register_buffer("odds", torch.full((2 * LIMIT + 1,), SIZE // 2, dtype=torch.int32))
        self.register_load_state_dict_post_hook(_forget_strings)

    @classmethod
    def frozen(cls, tokenizer: "EqualInfo") -> Self:
        """The table of all 16-bit windows of a tokenizer that has a byte model; their ids are that model's."""
        parents, labels = freeze(tokenizer.windows(TOKEN_BITS))
        made = cls(EqualInfoConfig(orders=tokenizer.config.orders, hashed_bits=tokenizer.config.hashed_bits))
        made.load_state_dict({"parents": parents.int(), "labels": labels})
        return made.eval()

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (SIZE,)}

    @property
    def digest(self) -> str:
        """As `Tokenizer.digest`, and of the rule: the same byte model gives other windows other ids."""
        rule = f"{super().digest} {self.config.window_bits} {self.config.paper_mode}"
        return hashlib.sha256(rule.encode()).hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        """Where the tables are; the work is done on the CPU."""
        return next(self.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of nothing: the tables are integers."""
        return torch.float32

    @property
    def _batch_size(self) -> int:
        """Texts together: nothing is rounded, so that one never depends on the others."""
        return _TOGETHER

    def windows(self, bits: int | None = None) -> WindowCode:
        """The code of the windows, or of windows of other `bits` with the same byte model.

        Raises:
            ConfigError: If this tokenizer has the table of 16-bit windows only.
        """
        if self.config.frozen:
            raise ConfigError("expected a tokenizer with a byte model: this one has only a table of 16-bit windows")
        config = self.config
        return WindowCode(
            corrections=self.corrections.cpu(),
            checks=self.checks.cpu(),
            odds=self.odds.cpu(),
            orders=config.orders,
            hashed_bits=config.hashed_bits,
            bits=bits or config.window_bits,
            greedy=config.paper_mode,
        )

    @functools.cached_property
    def _strings(self) -> "Strings":
        return Strings.of(self.parents.cpu().long(), self.labels.cpu())

    # -- encode and decode

    def _encode_texts(self, texts: Sequence[bytes], *, seed: int) -> Codes:
        del seed
        if self.config.frozen:
            return ragged([match_strings(to_tensor(text), self._strings.trie) for text in texts])
        windows = self.windows()
        return ragged([windows.encode(to_tensor(text)) for text in texts])

    def _decode_texts(self, tokens: Tokens) -> list[bytes]:
        return [self._text(tokens.ids[b, 0, :length].cpu(), b) for b, length in enumerate(tokens.lengths[:, 0].tolist())]

    def _text(self, ids: Tensor, item: int) -> bytes:
        width = self.config.window_bits // TOKEN_BITS
        if len(ids) % width:
            raise TokensError(
                f"item {item}: expected windows of {width} tokens each, got {len(ids)} tokens: the end is cut off; leave out "
                f"the last {len(ids) % width}"
            )
        text, lengths = self._strings.read(ids) if self.config.frozen else self.windows().decode(ids)
        if bool((lengths == 0).any()):
            at = int((lengths == 0).nonzero()[0, 0]) * width
            raise TokensError(
                f"item {item}: expected tokens of windows that hold text, got {ids[at : at + width].tolist()} at token {at}, "
                "which stand for none; encode writes no such tokens"
            )
        return text.numpy().tobytes()

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Refused: the byte model is counted, not trained.

        Raises:
            ConfigError: Always.
        """
        del batch, progress, generator
        raise ConfigError("equal_info is counted, not trained by steps: see python -m tokenzoo.training.equal_info --help")


@dataclass(frozen=True)
class Strings:
    """The strings of all 16-bit windows.

    Attributes:
        trie: For the longest string at a place of a text.
        text: All strings, one behind the other, uint8.
        starts: Where each string starts there, int64 `(S,)`.
        lengths: int64 `(S,)`; 0 for string 0.
    """

    trie: Trie
    text: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, parents: Tensor, labels: Tensor) -> Self:
        """From the parent of each string, int64 `(S,)`, which comes before it, and its last byte, uint8 `(S,)`.

        Raises:
            WeightsError: If these are not the strings of a window code.
        """
        try:
            trie = Trie.of(parents, labels)
        except ValueError as error:
            raise WeightsError(f"the table of strings is damaged: {error}") from error
        above, lengths = parents, (torch.arange(len(parents)) > 0).long()
        while bool(above.any()):
            lengths += above > 0
            above = parents[above]
        ends = lengths.cumsum(0)
        text, node = torch.zeros(int(ends[-1]), dtype=torch.uint8), torch.arange(len(parents))
        for back in range(1, int(lengths.max()) + 1):
            inside = lengths >= back
            text[(ends - back)[inside]] = labels[node[inside]]
            node = parents[node]
        return cls(trie, text, ends - lengths, lengths)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes of ids int64 `(W,)`, uint8 `(N,)`, and how many are each id's, int64 `(W,)`."""
        lengths = self.lengths[ids]
        begins = self.starts[ids] - (lengths.cumsum(0) - lengths)
        place = np.repeat(begins.numpy(), lengths.numpy()) + np.arange(int(lengths.sum()))
        return self.text[torch.from_numpy(place)], lengths


def _forget_strings(module: EqualInfo, incompatible_keys: Any) -> None:
    del incompatible_keys
    module.__dict__.pop("_strings", None)
