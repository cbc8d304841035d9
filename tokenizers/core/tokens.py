"""`Tokens`: what `encode` returns and `decode` takes, always a batch."""

import dataclasses
import json
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import safetensors
import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from tokenzoo.tokenizers import layouts, packing
from tokenzoo.tokenizers.errors import TokensError
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.tokenizers.spec import TokenSpec

_HEADER_KEY = "tokenzoo"


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token sequences. B items, K codebooks, L tokens.

    Attributes:
        ids: int64 `[B, K, L]`; entries past an item's length are padding, kept at 0.
        lengths: int64 `[B, K]`.
        spec: What the ids mean, and which checkpoint made them.
        extras: What decoding needs besides the ids; the first dimension of each tensor is B. Those that `spec.per_token` names
            are `[B, L, ...]`, padded and cut as the ids are, so that an item of a batch has what it has alone.
        meta: Per item, what restores the original: size, samples, sample rate, frames per second.
    """

    ids: Tensor
    lengths: Tensor
    spec: TokenSpec
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        batch, num_codebooks = len(self.ids), self.spec.num_codebooks
        if self.ids.dim() != 3 or self.ids.shape[1] != num_codebooks or self.ids.dtype != torch.long:
            raise TokensError(f"expected int64 ids [B, {num_codebooks}, L], got {self.ids.dtype} {tuple(self.ids.shape)}")
        if self.lengths.shape != (batch, num_codebooks) or self.lengths.dtype != torch.long:
            raise TokensError(
                f"expected int64 lengths {(batch, num_codebooks)}, got {self.lengths.dtype} {tuple(self.lengths.shape)}"
            )
        for name, extra in self.extras.items():
            if len(extra) != batch:
                raise TokensError(f"expected extras[{name!r}] to have {batch} items, got {tuple(extra.shape)}")
        if not self.meta:
            object.__setattr__(self, "meta", tuple({} for _ in range(batch)))
        if len(self.meta) != batch:
            raise TokensError(f"expected meta for {batch} items, got {len(self.meta)}")

    # -- a batch, and its items

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: SupportsIndex | slice | Sequence[int]) -> "Tokens":
        """Some items, as a batch again; padding beyond their longest sequence is cut off."""
        if isinstance(index, slice):
            chosen = list(range(len(self)))[index]
        else:
            wanted = list(index) if isinstance(index, Sequence) else [index]
            if any(isinstance(i, bool) for i in wanted):
                raise TokensError(f"expected item numbers, got the mask {index!r}")
            chosen = [operator.index(i) for i in wanted]
        for i in chosen:
            if not -len(self) <= i < len(self):
                raise IndexError(f"expected an item in [0, {len(self)}), got {i}")
        chosen = [i % len(self) for i in chosen]
        lengths = self.lengths[chosen]
        longest = int(lengths.max()) if lengths.numel() else 0
        if chosen == list(range(len(self))) and longest == self.ids.shape[2]:
            return self
        extras = self._cut({name: extra[chosen] for name, extra in self.extras.items()}, lengths)
        return dataclasses.replace(
            self, ids=self.ids[chosen, :, :longest], lengths=lengths, extras=extras, meta=tuple(self.meta[i] for i in chosen)
        )

    def _cut(self, extras: Mapping[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        """Extras, those with a value for each token as long as the longest sequence, and 0 behind the end of each."""
        cut = dict(extras)
        for name in cut.keys() & set(self.spec.per_token):
            longest = int(lengths.max()) if lengths.numel() else 0
            padding = torch.arange(longest, device=lengths.device) >= lengths.amax(1)[:, None]
            value = cut[name][:, :longest]
            cut[name] = value.masked_fill(padding.view(*padding.shape, *(1,) * (value.dim() - 2)).to(value.device), 0)
        return cut

    def __iter__(self) -> Iterator["Tokens"]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        name = self.spec.name or self.spec.architecture
        kind = f"K={self.spec.num_codebooks}" if self.spec.num_codebooks else "continuous"
        try:
            lengths = self.lengths if self.spec.num_codebooks else self.counts
            spread = f"{int(lengths.min())}..{int(lengths.max())}" if lengths.numel() else "none"
        except TokensError:
            spread = "unknown"
        return f"Tokens({len(self)} items of {name}, {kind}, lengths {spread})"

    @staticmethod
    def cat(batches: Sequence["Tokens"]) -> "Tokens":
        """Joins batches of one checkpoint into one batch.

        Raises:
            TokensError: If there is no batch, or the batches come from different checkpoints.
        """
        if not batches:
            raise TokensError("expected at least one batch of tokens to join, got none")
        first = batches[0]
        if any(batch.spec != first.spec or batch.extras.keys() != first.extras.keys() for batch in batches):
            raise TokensError("expected tokens of one checkpoint and one kind, got several: join each kind by itself")
        names = first.extras.keys()
        return Tokens(
            pad_and_cat([batch.ids for batch in batches]),
            torch.cat([batch.lengths for batch in batches]),
            first.spec,
            {name: pad_and_cat([batch.extras[name] for batch in batches]) for name in names},
            tuple(meta for batch in batches for meta in batch.meta),
        )

    def equal(self, other: "Tokens") -> bool:
        """Whether both hold the same tokens of the same checkpoint; padding does not count."""
        if self.spec != other.spec or list(self.meta) != list(other.meta) or not torch.equal(self.lengths, other.lengths):
            return False
        if self.extras.keys() != other.extras.keys() or not all(
            torch.equal(v, other.extras[k]) for k, v in self.extras.items()
        ):
            return False
        return all(torch.equal(a, b) for a, b in zip(self.codes(), other.codes(), strict=True))

    def codes(self) -> list[Tensor]:
        """The unpadded ids: int64 `[length]` for every item and codebook, item by item."""
        return [self.ids[b, k, :n] for b, row in enumerate(self.lengths.tolist()) for k, n in enumerate(row)]

    def to(self, device: str | torch.device) -> "Tokens":
        """The same tokens on another device."""
        extras = {name: extra.to(device) for name, extra in self.extras.items()}
        return dataclasses.replace(self, ids=self.ids.to(device), lengths=self.lengths.to(device), extras=extras)

    def validate(self) -> None:
        """Checks every id and length.

        Raises:
            TokensError: If a length exceeds the ids, or an id is outside its codebook.
        """
        width = self.ids.shape[2]
        if self.lengths.numel() and (int(self.lengths.min()) < 0 or int(self.lengths.max()) > width):
            raise TokensError(f"expected lengths in [0, {width}], got {int(self.lengths.min())} to {int(self.lengths.max())}")
        if not self.ids.numel():
            return
        sizes = torch.tensor(self.spec.codebook_sizes, device=self.ids.device)[None, :, None]
        real = torch.arange(width, device=self.ids.device) < self.lengths[..., None]
        wrong = real & ((self.ids < 0) | (self.ids >= sizes))
        if bool(wrong.any()):
            b, k, at = wrong.nonzero()[0].tolist()
            size = self.spec.codebook_sizes[k]
            raise TokensError(
                f"expected ids of codebook {k} in [0, {size}), got {int(self.ids[b, k, at])} at item {b}, token {at}"
            )

    # -- length and size

    def truncate(self, n: int | Sequence[int]) -> "Tokens":
        """Keeps at most `n` tokens (or codebooks, where that is what the tokenizer varies) of each item.

        Args:
            n: One budget for all items, or one per item; at least 1.

        Raises:
            TokensError: If these tokens mean nothing without their tail, or a budget is not positive.
        """
        budget = torch.as_tensor(n, device=self.lengths.device)
        if budget.dim() > 1 or (budget.dim() == 1 and len(budget) != len(self)) or budget.is_floating_point():
            raise TokensError(f"expected one whole number, or one for each of {len(self)} items, got {n!r}")
        if budget.numel() and int(budget.min()) < 1:
            raise TokensError(f"expected at least 1 token to be kept, got {int(budget.min())}")
        if self.spec.variable == "prefix" and not self.spec.num_codebooks:
            name = self.spec.name or self.spec.architecture
            raise TokensError(f"tokens of {name} are continuous and cannot be truncated: encode with length= instead")
        budget = budget.expand(len(self))[:, None]
        if self.spec.variable == "prefix":
            return self._with_lengths(torch.minimum(self.lengths, budget))
        if self.spec.variable == "codebooks":
            kept = torch.arange(self.spec.num_codebooks, device=budget.device)[None] < budget
            return self._with_lengths(torch.where(kept, self.lengths, 0))
        raise TokensError(
            f"tokens of {self.spec.name or self.spec.architecture} have a fixed length and cannot be truncated: choose a "
            "variable-length tokenizer, such as one_d_piece_nano"
        )

    def _with_lengths(self, lengths: Tensor) -> "Tokens":
        longest = int(lengths.max()) if lengths.numel() else 0
        real = torch.arange(longest, device=lengths.device) < lengths[..., None]
        return dataclasses.replace(
            self, ids=self.ids[..., :longest] * real, lengths=lengths, extras=self._cut(self.extras, lengths)
        )

    @property
    def counts(self) -> Tensor:
        """Tokens of each item, those of all codebooks together: int64 `[B]`; of a continuous tokenizer, vectors that are kept.

        Raises:
            TokensError: If the tokens are continuous, and neither `extras["kept"]` nor `extras["vectors"]` says how many.
        """
        if self.spec.num_codebooks:
            return self.lengths.sum(1)
        if "kept" in self.extras:
            return self.extras["kept"].sum(1)
        return self.lengths.new_full((len(self),), self._vectors.shape[1])

    @property
    def budgets(self) -> Tensor:
        """The length of each item as `truncate` counts it: its codebooks, or the tokens of its longest one; int64 `[B]`.

        Raises:
            TokensError: As `counts`.
        """
        if self.spec.variable == "codebooks":
            return (self.lengths > 0).sum(1)
        return self.lengths.amax(1) if self.spec.num_codebooks else self.counts

    @property
    def _vectors(self) -> Tensor:
        """What a continuous tokenizer has instead of ids: `[B, N, C]`; no items need none."""
        vectors = self.extras.get("vectors", torch.zeros(0, 0, 0))
        if len(vectors) != len(self) or vectors.dim() != 3:
            name = self.spec.name or self.spec.architecture
            raise TokensError(f"expected extras['vectors'] [{len(self)}, N, C]: tokens of {name} are continuous")
        return vectors

    @property
    def bits(self) -> Tensor:
        """Information carried by each item's ids, in bits: sum of length * log2(codebook size), float64 `[B]`.

        The vectors of a continuous tokenizer count with all bits of their numbers.
        """
        if not self.spec.num_codebooks:
            return 8.0 * self.num_bytes.double()
        per_id = torch.tensor([math.log2(size) for size in self.spec.codebook_sizes], dtype=torch.float64)
        return (self.lengths.cpu() * per_id).sum(1)

    @property
    def num_bytes(self) -> Tensor:
        """Bytes that each item's ids, or vectors that are kept, take by themselves, header not counted: int64 `[B]`."""
        if not self.spec.num_codebooks:
            return self.counts.cpu() * self._vectors.shape[2] * self._vectors.element_size()
        per_id = torch.tensor(self.spec.bits_per_id, dtype=torch.long)
        return ((self.lengths.cpu() * per_id).sum(1) + 7) // 8

    # -- streams

    def flatten(self, layout: layouts.Layout) -> Tensor:
        """The ids as streams for a language model.

        Returns:
            `[B, N]` for `interleaved` and `coarse_to_fine` (codebooks offset so that they do not collide) or `[B, K, N]`
            for `parallel` and `delay`; `-1` marks positions without a token.
        """
        return layouts.flatten(self.ids, self.lengths, self.spec, layout)

    @classmethod
    def unflatten(
        cls,
        flat: Tensor,
        spec: TokenSpec,
        layout: layouts.Layout,
        *,
        extras: Mapping[str, Tensor] | None = None,
        meta: Sequence[Mapping[str, Any]] = (),
    ) -> "Tokens":
        """The exact inverse of `flatten`; raises `TokensError` where `flat` breaks the layout's rules."""
        ids, lengths = layouts.unflatten(flat, spec, layout)
        return cls(ids, lengths, spec, extras or {}, meta)

    # -- bytes and files

    def pack(self) -> bytes:
        """A self-describing container with ceil(log2 size) bits per id; see `tokenzoo.tokenizers.packing`."""
        self.validate()
        return packing.pack(self.ids, self.lengths, self.spec, self.extras, self.meta)

    @classmethod
    def unpack(cls, data: bytes) -> "Tokens":
        """The inverse of `pack`; raises `TokensError` for anything else than an undamaged container."""
        tokens = cls(*packing.unpack(data))
        tokens.validate()
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file, whole or not at all: packed for `.tok`, tensors for `.safetensors`."""
        path = Path(path)
        if path.suffix == ".tok":
            data = self.pack()
        elif path.suffix == ".safetensors":
            header = json.dumps({"spec": self.spec.to_dict(), "meta": list(self.meta)})
            tensors = {"ids": self.ids, "lengths": self.lengths, **{f"extras.{k}": v for k, v in self.extras.items()}}
            data = write_tensors({k: v.cpu().contiguous() for k, v in tensors.items()}, {_HEADER_KEY: header})
        else:
            raise TokensError(f"expected a .tok or .safetensors file name, got {path.name!r}")
        write_atomically(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokens":
        """Reads a file that `save` wrote, whatever its name.

        Raises:
            TokensError: If the file is missing, damaged, or holds something else.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TokensError(f"expected a token file at {path}: {error.strerror or error}") from error
        return cls.unpack(data) if data[:4] == packing.MAGIC else cls._from_safetensors(data, Path(path))

    @classmethod
    def _from_safetensors(cls, data: bytes, path: Path) -> "Tokens":
        try:
            tensors = read_tensors(data)
            header_length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + header_length])["__metadata__"][_HEADER_KEY])
            extras = {k.removeprefix("extras."): v for k, v in tensors.items() if k.startswith("extras.")}
            tokens = cls(tensors["ids"], tensors["lengths"], TokenSpec.from_dict(header["spec"]), extras, header["meta"])
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise TokensError(f"{path} holds no tokens: expected a .tok or .safetensors file that tokenzoo wrote") from error
        tokens.validate()
        return tokens


def pad_and_cat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates along the first dimension, padding all others with zeros to the largest; a single one is not copied."""
    if len(tensors) == 1:
        return tensors[0]
    sizes = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [(0, size - have) for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(tensor, [n for pair in reversed(missing) for n in pair]))
    return torch.cat(padded)
