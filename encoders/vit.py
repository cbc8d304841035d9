"""Pre-norm vision transformer (https://arxiv.org/abs/2010.11929), as the encoder and as the decoder of 1D tokenizers.

The blocks are those of CLIP: packed query, key and value projections, exact GELU, LayerNorm with epsilon 1e-5. A tokenizer
reads only some positions of the output (the latents when it encodes, the patches when it decodes), so the last block
computes queries, output projections and the MLP for those alone; the result is the same.

Shapes: B batch, L tokens, D width, H heads.
"""

from torch import Tensor, nn
from torch.nn import functional as F

# How OpenAI's CLIP, and checkpoints of networks that grew out of it, call the parts of a block.
CLIP_BLOCK_KEYS = (
    ("ln_1.", "norm1."),
    ("attn.in_proj_", "attention.qkv."),
    ("attn.out_proj.", "attention.out."),
    ("ln_2.", "norm2."),
    ("mlp.c_fc.", "mlp.up."),
    ("mlp.c_proj.", "mlp.down."),
)
# How timm calls them.
TIMM_BLOCK_KEYS = (
    ("norm1.", "norm1."),
    ("attn.qkv.", "attention.qkv."),
    ("attn.proj.", "attention.out."),
    ("norm2.", "norm2."),
    ("mlp.fc1.", "mlp.up."),
    ("mlp.fc2.", "mlp.down."),
)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"expected a width that {num_heads = } divides, got {dim = }")
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, keep: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """Attention from the positions `keep` (all if `None`) to those where `mask`, bool `[B, L]`, is true: `[B, kept, D]`."""
        if keep is None:
            q, k, v = self._heads(self.qkv(x_BLD), 3)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            bias_q, bias_kv = (None, None) if bias is None else (bias[: self.dim], bias[self.dim :])
            (q,) = self._heads(F.linear(x_BLD[:, keep], weight[: self.dim], bias_q), 1)
            k, v = self._heads(F.linear(x_BLD, weight[self.dim :], bias_kv), 2)
        x_BHLD = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return self.out(x_BHLD.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`[B, L, parts * D]` as `parts` views `[B, H, L, D / H]`."""
        batch, length, _ = x.shape
        return x.view(batch, length, parts, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.up = nn.Linear(dim, int(dim * ratio))
        self.down = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Residual attention, then a residual MLP, each behind a LayerNorm."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x_BLD: Tensor, keep: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """The block's output at the positions `keep` (all if `None`): `[B, kept, D]`; `mask` as in `Attention`."""
        kept = x_BLD if keep is None else x_BLD[:, keep]
        x_BLD = kept + self.attention(self.norm1(x_BLD), keep, mask)
        return x_BLD + self.mlp(self.norm2(x_BLD))


class Transformer(nn.Module):
    """Blocks between a LayerNorm before the first and one after the last."""

    def __init__(self, dim: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.norm_pre = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.norm_post = nn.LayerNorm(dim)

    def forward(self, x_BLD: Tensor, keep: slice, mask: Tensor | None = None) -> Tensor:
        """Outputs at the positions `keep`, after attention over all of them (or those in `mask`, `[B, L]`): `[B, kept, D]`."""
        return self.norm_post(self.hidden(x_BLD, keep, mask))

    def hidden(self, x_BLD: Tensor, keep: slice, mask: Tensor | None = None) -> Tensor:
        """As `forward`, without the last LayerNorm."""
        x_BLD = self.norm_pre(x_BLD)
        *blocks, last = self.blocks
        for block in blocks:
            x_BLD = block(x_BLD, None, mask)
        return last(x_BLD, keep, mask)
