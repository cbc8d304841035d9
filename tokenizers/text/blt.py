"""BLT's patcher: a small byte-level language model cuts a text where it is unsure what comes next.

Paper: Byte Latent Transformer, https://arxiv.org/abs/2412.09871 (repository facebookresearch/blt at 9774ed4, CC-BY-NC-4.0). Its
entropy model and the rules by which entropies become patches are here; the latent transformer on top is not. Ids are bytes,
`extras` say which byte starts a patch and how unsure the model was before it, and the tokenizer is a splitter too:
`tok.split(data)` is where each patch ends.

Position 0 is a mark, the text's bytes are 1 to N, and H(p) is the entropy, in nats, of the model's guess at byte p + 1. The
first byte starts a patch; byte p + 1 does where H(p) is above `threshold` (rule `global`), or rises by more than `rise` too
(`global_monotonic`), or rises by more than `threshold` (`monotonic`). As published, the latter two start one at byte 2. Rule
`top_k` knows the whole text: it has `N // patch_size` patches, of which the mark is one and the first byte starts another; the
others start at the bytes about which the model is least sure, the earlier of two that are equal.

What differs: every text is read by itself (published: the rows of a batch are one long text, and change each other's patches),
with the window that the model was trained with whatever runs the attention, and without starting anew every 8,192 bytes.
Patches follow the weights' rounding where an entropy is close to the threshold: keep them with the text, in float32.

Shapes: B batch, L tokens, N bytes, P patches, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from tokenzoo.encoders.byte_transformer import ByteTransformer, Rotary
from tokenzoo.tokenizers import Codes, Output, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.strings import to_tensor
from tokenzoo.tokenizers.text.base import TextTokenizer, ragged
from tokenzoo.tokenizers.text.splitters import Ends
from tokenzoo.tokenizers.tokens import pad_and_cat

FIRST = 4  # id of byte 0; before it are the marks of an example, a text and its end, and of BPE
BEGIN = 1
VOCABULARY = FIRST + 256
_PIECE = 4096  # positions whose guesses are in memory together


@strict
@dataclass(kw_only=True)
class BLTConfig(TokenizerConfig):
    """Size of the entropy model, and the rule of patches; as published by default.

    Attributes:
        dim: Width D.
        num_layers: Blocks.
        num_heads: Attention heads.
        hidden_dim: Width of the MLPs.
        window: Bytes that a byte attends to, itself included.
        rope_theta: Base of the rotary positions.
        norm_eps: Of the RMS norms.
        rule: How entropies become patches: `global`, `monotonic`, `global_monotonic` or `top_k`.
        threshold: In nats.
        rise: In nats, for `global_monotonic`.
        longest: Longer patches are cut after so many bytes; `None` for no limit.
        patch_size: Bytes of a patch on average, for `top_k`.
    """

    dim: int = 768
    num_layers: int = 14
    num_heads: int = 12
    hidden_dim: int = 2048
    window: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    rule: Literal["global", "monotonic", "global_monotonic", "top_k"] = "global"
    threshold: float = 1.335442066192627
    rise: float = 0.0
    longest: int | None = None
    patch_size: float = 4.5

    def validate_sizes(self) -> None:
        """Checks what the graph and the rule need."""
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"expected an even width per head, got {self.dim = } and {self.num_heads = }")
        if self.patch_size < 1:
            raise ValueError(f"expected patches of at least one byte on average, got {self.patch_size = }")
        if self.window < 1 or (self.longest is not None and self.longest < 1):
            raise ValueError(f"expected a window and a longest patch of at least 1, got {self.window} and {self.longest}")


PUBLISHED = Adapter(
    rules=(
        ("tok_embeddings.", "embedding."),
        ("layers.{}.attention.wq.", "transformer.layers.{}.query."),
        ("layers.{}.attention.wk.", "transformer.layers.{}.key."),
        ("layers.{}.attention.wv.", "transformer.layers.{}.value."),
        ("layers.{}.attention.wo.", "transformer.layers.{}.out."),
        ("layers.{}.feed_forward.w1.", "transformer.layers.{}.gate."),
        ("layers.{}.feed_forward.w3.", "transformer.layers.{}.up."),
        ("layers.{}.feed_forward.w2.", "transformer.layers.{}.down."),
        ("layers.{}.attention_norm.", "transformer.layers.{}.norm1."),
        ("layers.{}.ffn_norm.", "transformer.layers.{}.norm2."),
        ("output.", "head."),
    ),
    dropped={"rope_embeddings.freqs_cis": "rotary positions, which are computed"},
    inside=("model",),
)


class BLT(TextTokenizer):
    """The tokenizer: one id per byte, and which bytes start a patch."""

    architecture: ClassVar[str] = "blt"
    config_class: ClassVar[type[TokenizerConfig]] = BLTConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config: BLTConfig

    def __init__(self, config: BLTConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.transformer = ByteTransformer(
            config.dim,
            config.num_layers,
            config.num_heads,
            config.hidden_dim,
            window=config.window,
            rotary=Rotary(config.rope_theta, neighbours=True),
            norm_eps=config.norm_eps,
        )
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (VOCABULARY,), "per_token": ("entropies", "starts")}

    # -- entropies and patches

    def logits(self, ids: Tensor) -> Tensor:
        """Log-odds of what follows each position, `[B, L, 260]`, of ids int64 `[B, L]`."""
        return self.head(self.norm(self.transformer(self.embedding(ids))))

    @torch.no_grad()
    def entropies(self, data: bytes) -> Tensor:
        """How unsure the model is about each byte before it sees it, in nats: float32 `[N]`."""
        if not data:
            return torch.zeros(0)
        ids = torch.cat([torch.tensor([BEGIN]), to_tensor(data)[:-1].long() + FIRST]).to(self.device)
        found = []
        for states in self.transformer(self.embedding(ids[None]))[0].split(_PIECE):
            shares = self.head(self.norm(states)).float().log_softmax(-1)
            found.append(-(shares.exp() * shares).sum(-1).cpu())
        return torch.cat(found)

    def starts(self, entropies: Tensor) -> Tensor:
        """Which bytes start a patch, bool `[N]`, by how unsure the model was about each, float32 `[N]`."""
        config = self.config
        starts = torch.zeros(len(entropies), dtype=torch.bool)
        above = entropies > config.threshold
        if config.rule == "global":
            starts |= above
        elif config.rule == "top_k":
            count = max(0, int(len(entropies) // config.patch_size) - 2)
            starts[1 + entropies[1:].argsort(descending=True, stable=True)[:count]] = True
        else:
            rise = torch.cat([entropies[:1], entropies.diff()])
            starts |= (above & (rise > config.rise)) if config.rule == "global_monotonic" else rise > config.threshold
            starts[1:2] = True
            if config.rule == "global_monotonic":
                starts[2:3] = False
        starts[:1] = True
        if config.longest is not None:
            place = torch.arange(len(starts))
            begin = torch.where(starts, place, 0).cummax(0).values if len(starts) else place
            starts |= (place - begin) % config.longest == 0
        return starts

    def split(self, data: bytes) -> Ends:
        """Where each patch of a text ends, int64 `[P]`; see `tokenzoo.tokenizers.text.splitters.Splitter`."""
        begins = self.starts(self.entropies(data)).numpy().nonzero()[0]
        return np.append(begins[1:], len(data)).astype(np.int64) if data else np.zeros(0, np.int64)

    # -- hooks

    def _encode_texts(self, texts: Sequence[bytes], *, seed: int) -> Codes:
        del seed
        entropies = [self.entropies(text) for text in texts]
        extras = {
            "entropies": pad_and_cat([row[None] for row in entropies]),
            "starts": pad_and_cat([self.starts(row)[None] for row in entropies]),
        }
        return ragged([to_tensor(text).long() + FIRST for text in texts], extras)

    def _decode_texts(self, tokens: Tokens) -> list[bytes]:
        return [_bytes(tokens.ids[b, 0, :length].cpu(), b) for b, length in enumerate(tokens.lengths[:, 0].tolist())]

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Nats per byte of the entropy model.

        Args:
            batch: Texts, uint8 `[B, N]`.
            progress: Of no effect.
            generator: Of no effect.
        """
        del progress, generator
        ids = batch.long() + FIRST
        before = torch.cat([torch.full_like(ids[:, :1], BEGIN), ids[:, :-1]], 1)
        loss = nn.functional.cross_entropy(self.logits(before).float().flatten(0, 1), ids.flatten())
        return Output(None, {"bytes": loss}, {"bits_per_byte": loss.detach() / np.log(2)})


def _bytes(ids: Tensor, item: int) -> bytes:
    if bool((ids < FIRST).any()):
        at = int((ids < FIRST).nonzero()[0, 0])
        raise TokensError(
            f"item {item}: expected ids of bytes, {FIRST} to {VOCABULARY - 1}, got {int(ids[at])} at token {at}, which is a "
            "mark and stands for no byte"
        )
    return (ids - FIRST).to(torch.uint8).numpy().tobytes()
