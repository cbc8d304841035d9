"""MrT5: a byte-level T5 encoder that deletes bytes after its third layer; without its gate it is ByT5.

Papers: MrT5, https://arxiv.org/abs/2410.20771 (repository jkallini/mrt5 at e79c3e7, Apache-2.0); ByT5,
https://arxiv.org/abs/2105.13626. The encoder and its gate are here. The decoder, which fills in masked spans and was never
taught to write the text again, is not: ids are bytes, so `decode` needs no network.

A gate in front of block `gate_layer` gives every byte a logit z. Soft deletion, as in training, adds `gate_scale * sigmoid(-z)`
to the scores of that key from there on. Hard deletion takes out bytes whose value is not above `threshold`; kept ones stay at
the distances that they had. `encode` runs the blocks before the gate and returns which bytes are kept in `extras["kept"]`;
`embed` runs all of them and returns the vectors of kept bytes.

What differs: a text longer than `context` is read in pieces of that length, each with its own end mark, as the network was
trained on pieces. Where everything is deleted there are no vectors, and no error.

Shapes: B batch, L positions, N bytes, D width, H heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.t5 import Block, DistanceBias, RMSNorm
from tokenzoo.tokenizers import Codes, ConfigError, Output, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.strings import to_tensor
from tokenzoo.tokenizers.text.base import Embedding, TextTokenizer, ragged

FIRST = 3  # id of byte 0; before it are padding, end and unknown
END = 1
_PIECES = 16  # that go through the network together


@strict
@dataclass(kw_only=True)
class MrT5Config(TokenizerConfig):
    """Size of the encoder, by default MrT5 small.

    Attributes:
        dim: Width D.
        num_layers: Blocks.
        num_heads: Attention heads H.
        head_dim: Width of a head.
        hidden_dim: Width of the MLPs.
        vocabulary: Rows of the embedding: 3 marks, 256 bytes and 125 sentinels of masked spans.
        num_buckets: Buckets of the distance bias.
        gate_layer: Block in front of which bytes are deleted; `None` for ByT5, which has no gate.
        gate_scale: Value of the gate for a byte that is deleted.
        threshold: Bytes with a value above it are kept.
        softmax1: Whether attention may attend to nothing.
        context: Positions of a piece, its end mark included.
    """

    dim: int = 1472
    num_layers: int = 12
    num_heads: int = 6
    head_dim: int = 64
    hidden_dim: int = 3584
    vocabulary: int = 384
    num_buckets: int = 32
    gate_layer: int | None = 3
    gate_scale: float = -30.0
    threshold: float = -15.0
    softmax1: bool = True
    context: int = 1024

    def validate_sizes(self) -> None:
        """Checks what the graph needs of the sizes."""
        if self.gate_layer is not None and not 0 < self.gate_layer < self.num_layers:
            raise ValueError(f"expected gate_layer from 1 to {self.num_layers - 1}, or null, got {self.gate_layer}")
        if self.context < 2 or self.vocabulary < FIRST + 256 or self.num_buckets < 4:
            raise ValueError("expected a context of at least 2 positions, 259 ids and 4 buckets")


class Gate(nn.Module):
    """A logit for every position; positive ones are kept."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.linear = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, L]` of `[B, L, D]`."""
        return self.linear(self.norm(x))[..., 0]


PUBLISHED = Adapter(
    rules=(
        ("shared.", "embedding."),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.", "bias.table."),
        ("encoder.block.3.delete_gate.layer_norm.", "gate.norm."),
        ("encoder.block.3.delete_gate.feed_forward.", "gate.linear."),
        ("encoder.block.{}.layer.0.SelfAttention.o.", "blocks.{}.attention.out."),
        ("encoder.block.{}.layer.0.SelfAttention.", "blocks.{}.attention."),
        ("encoder.block.{}.layer.0.layer_norm.", "blocks.{}.norm1."),
        ("encoder.block.{}.layer.1.layer_norm.", "blocks.{}.norm2."),
        ("encoder.block.{}.layer.1.DenseReluDense.wi_0.", "blocks.{}.gate."),
        ("encoder.block.{}.layer.1.DenseReluDense.wi_1.", "blocks.{}.up."),
        ("encoder.block.{}.layer.1.DenseReluDense.wo.", "blocks.{}.down."),
        ("encoder.final_layer_norm.", "norm."),
    ),
    dropped={
        "decoder.*": "fills masked spans; it does not write the text again",
        "lm_head.*": "the decoder's output",
        "encoder.embed_tokens.weight": "shared.weight a second time",
    },
)


class MrT5(TextTokenizer):
    """The tokenizer: one id per byte, and which bytes the gate keeps.

    Attributes:
        deletion: What `embed` does with bytes that the gate does not keep: `"hard"` takes them out where the gate stands,
            `"soft"` lets all go through, as in training, and leaves them out of the result.
    """

    architecture: ClassVar[str] = "mrt5"
    config_class: ClassVar[type[TokenizerConfig]] = MrT5Config
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config: MrT5Config
    deletion: Literal["hard", "soft"] = "hard"

    def __init__(self, config: MrT5Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.bias = DistanceBias(config.num_buckets, config.num_heads)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.num_heads, config.head_dim, config.hidden_dim, softmax1=config.softmax1)
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim)
        self.gate = None if config.gate_layer is None else Gate(config.dim)

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.vocabulary,), "per_token": ("kept",)}

    # -- the network

    def gate_values(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, L, D]` in front of the gate, and its values float32 `[B, L]`, of ids int64 `[B, L]`.

        Without a gate, the hidden states are those of the input and all values 0.
        """
        x = self.embedding(ids)
        if self.gate is None:
            return x, torch.zeros(ids.shape, device=ids.device)
        bias = self.bias(torch.arange(ids.shape[1], device=ids.device)[None])
        for block in self.blocks[: self.config.gate_layer]:
            x = block(x, bias)
        return x, self.config.gate_scale * torch.sigmoid(-self.gate(x).float())

    def states(self, ids: Tensor, *, deletion: Literal["hard", "soft"] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the encoder makes of ids.

        Args:
            ids: int64 `[B, L]`, without padding; the encoder was trained with `END` as the last of them.
            deletion: `"hard"` or `"soft"`; by default as `self.deletion` says.

        Returns:
            Hidden states `[B, L', D]`, where L' is L or with hard deletion the most positions kept; the position of each,
            int64 `[B, L']`, -1 behind the last; and the gate's values, float32 `[B, L]`.
        """
        x, values = self.gate_values(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        real = torch.ones_like(positions, dtype=torch.bool)
        keys = values
        if (deletion or self.deletion) == "hard" and self.gate is not None:
            kept = values > self.config.threshold
            longest = int(kept.sum(1).max()) if kept.numel() else 0
            positions = kept.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
            real = torch.arange(longest, device=ids.device) < kept.sum(1, keepdim=True)
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[2]))
            keys = torch.zeros(real.shape, device=ids.device)
        bias = self.bias(positions) + keys.masked_fill(~real, -1e9)[:, None, None]
        for block in self.blocks[self.config.gate_layer or 0 :]:
            x = block(x, bias)
        return self.norm(x), positions.masked_fill(~real, -1), values

    # -- hooks

    def _encode_texts(self, texts: Sequence[bytes], *, seed: int) -> Codes:
        del seed
        rows = [to_tensor(text).long() + FIRST for text in texts]
        kept = [torch.cat([mask.reshape(-1) for mask in self._kept(row)])[: len(row)] for row in rows]
        masks = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.bool)
        for mask, one in zip(masks, kept, strict=True):
            mask[: len(one)] = one.cpu()
        return ragged(rows, {"kept": masks})

    def _kept(self, row: Tensor) -> Iterator[Tensor]:
        """Which positions of each piece are kept, end marks left out."""
        for pieces in self._pieces(row):
            if self.gate is None:
                yield torch.ones(pieces.shape[0], pieces.shape[1] - 1, dtype=torch.bool)
            else:
                yield (self.gate_values(pieces)[1] > self.config.threshold)[:, :-1]
        yield torch.zeros(0, dtype=torch.bool, device=self.device)

    def _pieces(self, row: Tensor) -> Iterator[Tensor]:
        """A text's ids int64 `[N]` as pieces of equal length with end marks, `[B, L]`, on this tokenizer's device."""
        size = self.config.context - 1
        whole = len(row) // size * size
        batches = [*row[:whole].view(-1, size).split(_PIECES), row[None, whole:]]
        for pieces in batches:
            if pieces.numel():
                yield F.pad(pieces, (0, 1), value=END).to(self.device)

    def _embed_texts(self, texts: Sequence[bytes]) -> list[Embedding]:
        return [self._embedding(to_tensor(text).long() + FIRST) for text in texts]

    def _embedding(self, row: Tensor) -> Embedding:
        vectors, places, begin = [torch.zeros(0, self.config.dim, dtype=self.dtype, device=self.device)], [], 0
        for pieces in self._pieces(row):
            found, positions, values = self.states(pieces)
            last = pieces.shape[1] - 1
            for state, at, value in zip(found, positions, values, strict=True):
                kept = (at >= 0) & (at < last) & (value[at.clamp(min=0)] > self.config.threshold)
                vectors.append(state[kept])
                places.append(at[kept].cpu() + begin)
                begin += last
        kept_at = torch.cat(places) if places else torch.zeros(0, dtype=torch.long)
        ends = torch.cat([kept_at[1:], torch.tensor([len(row)])]) if len(kept_at) else kept_at
        return Embedding(torch.cat(vectors)[:, None], torch.cat([torch.zeros(1, dtype=torch.long), ends]))

    def _decode_texts(self, tokens: Tokens) -> list[bytes]:
        return [_bytes(tokens.ids[b, 0, :length].cpu(), b) for b, length in enumerate(tokens.lengths[:, 0].tolist())]

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Refused: span corruption needs the decoder, which is not here.

        Raises:
            ConfigError: Always.
        """
        del batch, progress, generator
        raise ConfigError("mrt5 is here as an encoder: its objective, span corruption, needs the decoder of the repository")


def _bytes(ids: Tensor, item: int) -> bytes:
    wrong = (ids < FIRST) | (ids >= FIRST + 256)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        raise TokensError(
            f"item {item}: expected ids of bytes, {FIRST} to {FIRST + 255}, got {int(ids[at])} at token {at}, which is "
            f"{'a mark' if int(ids[at]) < FIRST else 'a sentinel of a masked span'} and stands for no byte"
        )
    return (ids - FIRST).to(torch.uint8).numpy().tobytes()
