"""Queries that read a memory (DETR, https://arxiv.org/abs/2005.12872), as GigaTok and ReToK build their 1D tokens.

Every layer is pre-norm: attention among the queries, attention from the queries to the memory, an MLP. Positions are added
where attention compares (queries and keys) and not where it reads (values); the memory is not normalised. Keys keep
PyTorch's packed layout of three projections. Where only the first queries are read in the end, the last layer computes
those alone; the result is the same.

Shapes: B batch, Q queries, M memory, D width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.vit import MLP


class QueryAttention(nn.Module):
    """Multi-head attention whose queries, keys and values come from different places."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"expected a width that {num_heads = } divides, got {dim = }")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, query_BQD: Tensor, key_BMD: Tensor, value_BMD: Tensor) -> Tensor:
        """`[B, Q, D]` attending to `[B, M, D]`: `[B, Q, D]`."""
        parts = zip((query_BQD, key_BMD, value_BMD), self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x, weight, bias in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QueryLayer(nn.Module):
    """Attention among the queries, attention to the memory, and an MLP, each residual and behind a LayerNorm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = QueryAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attention = QueryAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x_BQD: Tensor, positions: Tensor, key_BMD: Tensor, memory_BMD: Tensor, keep: int) -> Tensor:
        """The layer's output at the first `keep` queries: `[B, keep, D]`; `positions` are `[1, Q, D]`."""
        normed = self.norm1(x_BQD)
        placed = normed + positions
        x_BQD = x_BQD[:, :keep] + self.self_attention(placed[:, :keep], placed, normed)
        x_BQD = x_BQD + self.cross_attention(self.norm2(x_BQD) + positions[:, :keep], key_BMD, memory_BMD)
        return x_BQD + self.mlp(self.norm3(x_BQD))


class QueryTransformer(nn.Module):
    """Layers of queries over one memory, and a LayerNorm behind the last."""

    def __init__(self, dim: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QueryLayer(dim, num_heads) for _ in range(num_layers))
        self.norm_post = nn.LayerNorm(dim)

    def forward(
        self,
        queries_BQD: Tensor,
        query_positions: Tensor,
        memory_BMD: Tensor,
        memory_positions: Tensor,
        *,
        keep: int | None = None,
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries after every layer.

        Args:
            queries_BQD: `[B, Q, D]`.
            query_positions: `[1, Q, D]`.
            memory_BMD: `[B, M, D]`.
            memory_positions: `[1, M, D]`.
            keep: How many of the first queries are read afterwards; all by default.
            tap: Number of the layer, from 1, whose output is returned as well; the last one by default.

        Returns:
            The normalised output `[B, keep, D]`, and that of layer `tap`, not normalised: `[B, Q, D]`, or `[B, keep, D]` of
            the last one.
        """
        key_BMD = memory_BMD + memory_positions
        keep = queries_BQD.shape[1] if keep is None else keep
        x_BQD = tapped_BQD = queries_BQD
        for number, layer in enumerate(self.layers, 1):
            read = keep if number == len(self.layers) else x_BQD.shape[1]
            x_BQD = layer(x_BQD, query_positions, key_BMD, memory_BMD, read)
            if number == (tap or len(self.layers)):
                tapped_BQD = x_BQD
        return self.norm_post(x_BQD), tapped_BQD


def multi_level_queries(grid_BDhw: Tensor, count: int) -> Tensor:
    """Averages of a feature map over ever smaller blocks, coarse to fine: the queries that GigaTok starts from.

    The whole map, the whole map again, then 2, 4, 8, ... blocks, halving the width first; rows of blocks from the top.

    Args:
        grid_BDhw: `[B, D, h, w]`.
        count: Queries, a power of two; the finest blocks are `2 h w / count` cells.

    Returns:
        `[B, count, D]`.
    """
    height, width = grid_BDhw.shape[2:]
    levels = [F.avg_pool2d(grid_BDhw, (height, width))]
    for level in range(count.bit_length() - 1):
        blocks = (2 ** (level // 2), 2 ** ((level + 1) // 2))
        levels.append(F.avg_pool2d(grid_BDhw, (height // blocks[0], width // blocks[1])))
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)
