"""Orders in which the tokens of several codebooks become one stream for a language model, and back.

One rule serves every layout and every mix of codebook rates. Token j of codebook k covers the steps that start at
`j * stride[k]` of the finest codebook, so its time is known, and a layout is nothing but a sort key or a column:

- `interleaved`: one row, sorted by (time, codebook). At equal rates this is frame after frame; at SNAC's rates it is
  the depth-first order of its tree. Any cut of the stream leaves whole past frames.
- `coarse_to_fine`: one row, sorted by (codebook, time).
- `parallel`: K rows, token j of codebook k in column `j * stride[k]`.
- `delay`: as `parallel`, with row k moved right by k columns (MusicGen, https://arxiv.org/abs/2306.05284).

Ids of one-row layouts are offset so that the codebooks do not collide, which makes them self-describing; rows of the
others keep the ids of their codebook. Shape letters: B batch, K codebooks, L tokens, N stream positions.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from tokenzoo.tokenizers.errors import TokensError
from tokenzoo.tokenizers.spec import TokenSpec

Layout = Literal["interleaved", "coarse_to_fine", "parallel", "delay"]
PAD = -1


def _check_layout(layout: str, spec: TokenSpec) -> None:
    if layout not in get_args(Layout):
        raise TokensError(f"expected a layout out of {', '.join(get_args(Layout))}, got {layout!r}")
    if not spec.num_codebooks:
        raise TokensError(f"{spec.name or spec.architecture} is continuous: it has vectors (tokens.extras), no ids to lay out")


def _order(lengths: Tensor, spec: TokenSpec, layout: str) -> tuple[Tensor, Tensor]:
    """Codebook and index of every token of one item, in stream order; `lengths` is [K]."""
    codebook = torch.repeat_interleave(torch.arange(spec.num_codebooks), lengths)
    index = torch.cat([torch.arange(int(n)) for n in lengths])
    if layout == "coarse_to_fine":
        return codebook, index
    time = index * torch.tensor(spec.strides)[codebook]
    order = torch.argsort(time * spec.num_codebooks + codebook, stable=True)
    return codebook[order], index[order]


def _columns(length: int, codebook: int, spec: TokenSpec, layout: str) -> Tensor:
    shift = codebook if layout == "delay" else 0
    return torch.arange(length) * spec.strides[codebook] + shift


def flatten(ids: Tensor, lengths: Tensor, spec: TokenSpec, layout: Layout) -> Tensor:
    """Lays the ids of a batch out as streams.

    Args:
        ids: int64 `[B, K, L]`.
        lengths: int64 `[B, K]`.
        spec: What the ids mean.
        layout: One of the layouts above.

    Returns:
        int64 `[B, N]` for one-row layouts, `[B, K, N]` for the others; positions without a token hold `PAD`.

    Raises:
        TokensError: If the layout is unknown or the tokens are continuous.
    """
    _check_layout(layout, spec)
    ids, lengths = ids.cpu(), lengths.cpu()
    if layout in ("interleaved", "coarse_to_fine"):
        offsets = torch.tensor(spec.offsets)
        rows = []
        for item, item_lengths in zip(ids, lengths, strict=True):
            codebook, index = _order(item_lengths, spec, layout)
            rows.append(item[codebook, index] + offsets[codebook])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD) if rows else ids.new_zeros(0, 0)
    width = 0
    for k in range(spec.num_codebooks):
        longest = int(lengths[:, k].max()) if len(lengths) else 0
        if longest:
            width = max(width, int(_columns(longest, k, spec, layout)[-1]) + 1)
    flat = ids.new_full((len(ids), spec.num_codebooks, width), PAD)
    for b, item_lengths in enumerate(lengths.tolist()):
        for k, length in enumerate(item_lengths):
            flat[b, k, _columns(length, k, spec, layout)] = ids[b, k, :length]
    return flat


def unflatten(flat: Tensor, spec: TokenSpec, layout: Layout) -> tuple[Tensor, Tensor]:
    """The exact inverse of `flatten`, also for streams that a language model wrote.

    Args:
        flat: int64 `[B, N]` or `[B, K, N]`, as the layout has it; `PAD` marks positions without a token.
        spec: What the ids mean.
        layout: The layout of `flat`.

    Returns:
        ids `[B, K, L]` and lengths `[B, K]`.

    Raises:
        TokensError: If the stream could not have come from `flatten`: a wrong shape, an id out of range, a gap, or
            codebooks in an order the layout does not have.
    """
    _check_layout(layout, spec)
    one_row = layout in ("interleaved", "coarse_to_fine")
    expected = "[B, N]" if one_row else f"[B, {spec.num_codebooks}, N]"
    if flat.dim() != (2 if one_row else 3) or (not one_row and flat.shape[1] != spec.num_codebooks):
        raise TokensError(f"expected a {layout} stream {expected}, got {tuple(flat.shape) = }")
    read = _read_row if one_row else _read_columns
    items = [read(row, spec, layout) for row in flat.cpu().long()]
    counts = [[len(codes) for codes in item] for item in items]
    lengths = torch.tensor(counts, dtype=torch.long).reshape(len(items), spec.num_codebooks)
    ids = torch.zeros(len(items), spec.num_codebooks, int(lengths.max()) if lengths.numel() else 0, dtype=torch.long)
    for b, item in enumerate(items):
        for k, codes in enumerate(item):
            ids[b, k, : len(codes)] = codes
    return ids, lengths


def _read_row(row: Tensor, spec: TokenSpec, layout: str) -> list[Tensor]:
    keep = row != PAD
    length = int(keep.sum())
    if not bool(keep[:length].all()):
        raise TokensError(f"expected padding only at the end of a {layout} stream, found it between tokens")
    row = row[:length]
    total = sum(spec.codebook_sizes)
    if length and (int(row.min()) < 0 or int(row.max()) >= total):
        raise TokensError(f"expected stream ids in [0, {total}), got {int(row.min())} to {int(row.max())}")
    starts = torch.tensor(spec.offsets)
    codebook = torch.searchsorted(starts, row, right=True) - 1
    codes = [row[codebook == k] - spec.offsets[k] for k in range(spec.num_codebooks)]
    expected, _ = _order(torch.tensor([len(c) for c in codes]), spec, layout)
    if not torch.equal(expected, codebook):
        at = int((expected != codebook).nonzero()[0, 0])
        raise TokensError(
            f"position {at} of this {layout} stream holds an id of codebook {int(codebook[at])}, expected one of codebook "
            f"{int(expected[at])}: was it written in another layout?"
        )
    return codes


def _read_columns(rows: Tensor, spec: TokenSpec, layout: str) -> list[Tensor]:
    codes = []
    for k, row in enumerate(rows):
        columns = (row != PAD).nonzero()[:, 0]
        if not torch.equal(columns, _columns(len(columns), k, spec, layout)):
            raise TokensError(f"row {k} of this {layout} stream has gaps, or tokens where the layout has none")
        code = row[columns]
        if len(code) and (int(code.min()) < 0 or int(code.max()) >= spec.codebook_sizes[k]):
            raise TokensError(
                f"expected ids of codebook {k} in [0, {spec.codebook_sizes[k]}), got {int(code.min())} to {int(code.max())}"
            )
        codes.append(code)
    return codes
