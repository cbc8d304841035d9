"""The networks of `word_pool`: bytes of a share to a vector, vectors to bytes, and words to the next word.

All of them stay in float32 when the module around them is cast: which byte wins must not depend on a precision.

Shapes: W words, S shares of words, N bytes, k vectors a word, D width, T words of a text.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.causal_transformer import CausalTransformer
from tokenzoo.encoders.streaming import State
from tokenzoo.tokenizers.quantizers import Quantizer
from tokenzoo.tokenizers.text._words import Words

END = 256  # the symbol behind a word's last byte; in front of its first one it stands for "nothing yet"
_FAR = -1e4


class ShareEncoder(Quantizer):
    """Bytes of each share of a word to a vector: byte transformer, pooling by learned queries, residual blocks.

    Padding is masked wherever bytes meet: a vector does not depend on the width its share is padded to.

    Args:
        longest: Bytes of the longest share.
        dim: Width of a byte.
        layers: Layers of the byte transformer.
        heads: Attention heads of a layer.
        queries: Learned queries.
        hidden_dim: Width of the blocks.
        blocks: Residual blocks behind the pooling.
        vector_dim: Width D of a vector.
    """

    def __init__(
        self,
        *,
        longest: int,
        dim: int,
        layers: int,
        heads: int,
        queries: int,
        hidden_dim: int,
        blocks: int,
        vector_dim: int,
    ) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, dim)
        self.positions = nn.Parameter(0.3 * torch.randn(longest, dim))
        self.lengths = nn.Parameter(0.3 * torch.randn(longest, dim))
        self.layers = nn.ModuleList(_ByteLayer(dim, heads) for _ in range(layers))
        self.scores = nn.Linear(dim, queries)
        self.values = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden_dim)
        self.blocks = nn.ModuleList(_Block(hidden_dim, hidden_dim) for _ in range(blocks))
        self.out_norm = nn.LayerNorm(hidden_dim)
        self.out = nn.Linear(hidden_dim, vector_dim)

    def forward(self, bytes_SN: Tensor, lengths: Tensor) -> Tensor:
        """Vectors `[S, D]` of bytes int64 `[S, N]`, of which the first `lengths` `[S]` count, at least one."""
        count, width = bytes_SN.shape
        real = torch.arange(width, device=lengths.device) < lengths[:, None]
        x = self.bytes(bytes_SN) + self.positions[:width] + self.lengths[lengths - 1][:, None]
        for layer in self.layers:
            x = layer(x, real)
        weights = self.scores(x).masked_fill(~real[..., None], _FAR).softmax(1)
        values = self.values(x).view(count, width, weights.shape[2], -1)
        x = self.up(self.norm((weights[..., None] * values).sum(1).flatten(1)))
        for block in self.blocks:
            x = block(x)
        vectors: Tensor = self.out(self.out_norm(x))
        return vectors


class Speller(Quantizer):
    """A condition to bytes, left to right within a share or a word, all of them at once.

    The condition says of each position what stands there. The distribution of a byte is a function of that and of all bytes
    before it, which a window as long as the longest word shows at once: nothing is kept between steps.

    Args:
        longest: Bytes of the longest word.
        condition_dim: Width of the condition.
        hidden_dim: Width of the blocks that read the condition.
        condition_blocks: How many of those there are.
        said_dim: Width of what they say of a position.
        byte_dim: Width of an earlier byte.
        dim: Width of a position.
        blocks: Residual blocks of a position.
    """

    def __init__(
        self,
        *,
        longest: int,
        condition_dim: int,
        hidden_dim: int,
        condition_blocks: int,
        said_dim: int,
        byte_dim: int,
        dim: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.longest, self.byte_dim = longest, byte_dim
        self.condition_in = nn.Linear(condition_dim, hidden_dim)
        self.condition_blocks = nn.ModuleList(_Block(hidden_dim, hidden_dim) for _ in range(condition_blocks))
        self.condition_norm = nn.LayerNorm(hidden_dim)
        self.condition_out = nn.Linear(hidden_dim, (longest + 1) * said_dim)
        self.said = nn.Linear(said_dim, dim)
        self.bytes = nn.Embedding(257, byte_dim)
        self.window = nn.Linear(longest * byte_dim, dim, bias=False)
        self.blocks = nn.ModuleList(_Block(dim, 2 * dim) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 257)

    def condition(self, x: Tensor) -> Tensor:
        """What is said of each position: `(..., C)` to `(..., (longest + 1) * S)`."""
        x = self.condition_in(x)
        for block in self.condition_blocks:
            x = block(x)
        out: Tensor = self.condition_out(self.condition_norm(x))
        return out

    def forward(self, condition: Tensor, bytes_WN: Tensor) -> Tensor:
        """Logits `[W, N + 1, 257]` of each byte and of the end behind the last, given the right bytes before it."""
        count, width = bytes_WN.shape
        nothing = bytes_WN.new_full((count, self.longest), END)
        past = self.bytes(torch.cat([nothing, bytes_WN], 1)).to(condition.dtype).flatten(1)
        windows = past.unfold(1, self.longest * self.byte_dim, self.byte_dim)[:, : width + 1]
        return self._logits(condition.view(count, self.longest + 1, -1)[:, : width + 1], windows)

    def next(self, condition: Tensor, symbols: Tensor, at: int) -> Tensor:
        """Logits `[W, 257]` of position `at`, behind the last `longest` symbols int64 `[W, longest]`."""
        return self._logits(condition.view(len(condition), self.longest + 1, -1)[:, at], self.bytes(symbols).flatten(1))

    def _logits(self, said: Tensor, window: Tensor) -> Tensor:
        x = F.gelu(self.window(window) + self.said(said))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class NextWord(Quantizer):
    """A causal transformer over words: vectors of the words so far to a condition for the next word's bytes.

    Args:
        in_dim: Width of a word's vectors, all k together.
        dim: Width of the transformer.
        layers: Its layers.
        heads: Its attention heads.
        context: Words that a word attends to.
        decoder: Reads the condition.
    """

    def __init__(self, *, in_dim: int, dim: int, layers: int, heads: int, context: int, decoder: Speller) -> None:
        super().__init__()
        self.start = nn.Parameter(0.02 * torch.randn(dim))
        self.up = nn.Linear(in_dim, dim)
        self.trunk = CausalTransformer(dim, layers, heads, 4 * dim, context)
        for name, parameter in self.trunk.named_parameters():
            if name.endswith(("scale1", "scale2")):
                nn.init.ones_(parameter)
        self.norm = nn.LayerNorm(dim)
        self.decoder = decoder

    def forward(self, vectors_BTD: Tensor, *, before: Tensor | None = None, state: State | None = None) -> Tensor:
        """Conditions `[B, T, ...]` of words 0 to T - 1, each from the vectors `[B, T, k * D]` of those before it.

        A long text may come in pieces, with one `state`; `before` is the last word of the piece before, `[B, 1, k * D]`.
        """
        first = self.start.expand(len(vectors_BTD), 1, -1) if before is None else self.up(before)
        rest = self.up(vectors_BTD[:, :-1])
        x = torch.cat([first.to(rest.dtype), rest], 1)
        return self.decoder.condition(self.norm(self.trunk(x.mT, state).mT))


class _ByteLayer(nn.Module):
    """Pre-norm attention among the bytes of a word, then an MLP.

    Attention is written out: fused kernels are made for long sequences, and are slower than this on words.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        count, width, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(count, width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) * (dim // self.heads) ** -0.5
        weights = scores.masked_fill(~real[:, None, None], _FAR).softmax(-1).to(v.dtype)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Block(nn.Module):
    """Pre-norm residual MLP."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def read(decoder: Speller, condition: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """Nats of each word and its end given conditions `[W, D]`, and the least margin of a right symbol, `[W]` both."""
    nats, margins, order = [], [], []
    for chosen, group in words.groups():
        filled = F.pad(condition[chosen], (0, 0, 0, len(group.lengths) - len(chosen)))
        found = read_group(decoder(filled, group.rows).float(), group.targets(END))
        nats.append(found[0][: len(chosen)])
        margins.append(found[1][: len(chosen)])
        order.append(chosen)
    back = torch.cat(order).argsort()
    return torch.cat(nats)[back], torch.cat(margins)[back]


def read_group(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `read`, from logits `[W, N, 257]` and targets `[W, N]`, -1 for what does not count."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    with torch.no_grad():
        right = targets.clamp_min(0)[..., None]
        others = logits.scatter(2, right, -torch.inf).amax(2)
        margins = (logits.gather(2, right)[..., 0] - others).masked_fill(targets < 0, torch.inf).amin(1)
    return losses.view(targets.shape).sum(1), margins
