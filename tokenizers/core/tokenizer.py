"""`Tokenizer`: the one public `encode` and `decode`, over the tensor-level hooks that a system implements.

A system is an `nn.Module` that subclasses `Tokenizer` once and implements `_describe`, `_encode`, `_decode` and
`objective`; reading media and putting reconstructions back into their original size is the work of its `media` adapter.
"""

import dataclasses
import hashlib
import math
import operator
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.config import TokenizerConfig
from tokenzoo.tokenizers.errors import MediaError, TokensError, WrongTokenizerError
from tokenzoo.tokenizers.quality import QUALITIES, Quality
from tokenzoo.tokenizers.spec import Modality, TokenSpec
from tokenzoo.tokenizers.tokens import Tokens, pad_and_cat

ACCELERATOR_BATCH = 16
_DIGEST_BLOCK = 1 << 20  # values at a time: weights that lie in another order are copied to be read


class Codes(NamedTuple):
    """What `_encode` returns for a batch: ids int64 `[B, K, L]`, lengths `[B, K]` (`None`: all L), extras `[B, ...]`."""

    ids: Tensor
    lengths: Tensor | None = None
    extras: Mapping[str, Tensor] = {}


@dataclass
class Output:
    """What `forward` returns: the training path.

    Attributes:
        reconstruction: `[B, ...]`, differentiable; `None` for objectives that reconstruct nothing.
        losses: Weighted scalars; their sum is what is minimised.
        metrics: Detached scalars to log.
    """

    reconstruction: Tensor | None
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The sum of the losses."""
        return torch.stack(list(self.losses.values())).sum()


class Media(Protocol):
    """Reads one modality into tensors of the network's size, and restores the original size."""

    def items(self, media: Any) -> Sequence[Any]:
        """The items of what the user passed: one or many."""

    def read(self, item: Any) -> tuple[Tensor, dict[str, Any]]:
        """One item as a tensor without batch dimension, and what restores it. Raises `MediaError`."""

    def restore(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> Any:
        """A reconstruction in the original's size."""


class Tokenizer(nn.Module):
    """Base of every tokenizer.

    Attributes:
        architecture: Key of the registry.
        modality: What is encoded.
        config_class: Type of `config`.
        adapters: The published layouts of this system's weights, by name; a card says which one its file has.
        may_be_empty: Whether an item may have no tokens, as the empty text has.
        config: What the network was built from.
        media: Reads and restores this tokenizer's media.
        name: Card name; empty for a tokenizer that was never named.
        revision: Commit of the Hub repository that the weights came from, where known.
        card_text: The model card, for `save_pretrained`; empty where there is none.
        qualities: Measures that `encode(target=...)` knows; add your own, such as LPIPS with a network of yours:
            `tok.qualities["lpips"] = Quality(network, higher_is_better=False)`.
    """

    architecture: ClassVar[str]
    modality: ClassVar[Modality]
    config_class: ClassVar[type[TokenizerConfig]]
    adapters: ClassVar[Mapping[str, Adapter]] = {}
    may_be_empty: ClassVar[bool] = False

    def __init__(self, config: TokenizerConfig, media: Media) -> None:
        super().__init__()
        self.config = config
        self.media = media
        self.name = ""
        self.revision: str | None = None
        self.card_text = ""
        self.qualities: dict[str, Quality] = dict(QUALITIES)
        self._digest: str | None = None
        self.register_load_state_dict_post_hook(_forget_digest)

    # -- hooks

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """The fields of `TokenSpec` that the config decides: `codebook_sizes`, `variable`, `max_tokens`, ..."""

    @abstractmethod
    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        """Codes of items of one size, `[B, ...]`.

        `length` is the largest budget asked of them, if any; codes may be longer, since the caller truncates them.
        """

    @abstractmethod
    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """Reconstructions `[B, ...]` of items with equal `lengths`."""

    @abstractmethod
    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Losses on a batch of media tensors; `progress` in [0, 1] is how much of the training is done."""

    # -- what this tokenizer is

    @property
    def info(self) -> TokenSpec:
        """What this tokenizer's tokens mean."""
        return TokenSpec(
            name=self.name,
            architecture=self.architecture,
            modality=self.modality,
            digest=self.digest,
            revision=self.revision,
            **self._describe(),
        )

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and values of the weights (16 hexadecimal digits); kept until they are trained."""
        if self._digest is None:
            self._digest = weights_digest(self.state_dict())
        return self._digest

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; weights that may change lose their digest."""
        if mode:
            self._digest = None
        return super().train(mode)

    # -- encode

    @torch.no_grad()
    def encode(
        self,
        media: Any,
        *,
        length: int | Sequence[int] | None = None,
        target: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Tokens:
        """Encodes media into tokens.

        Args:
            media: One item or a list of items: a path, bytes, a PIL image, an array or a tensor, `(waveform, sample
                rate)`, text; whatever this modality reads. With an empty list, only the length and target are checked.
            length: Budget per item: tokens, or codebooks, whatever this tokenizer varies (`info.variable`). One for
                all, or one per item.
            target: A quality to reach, such as `{"psnr": 28}`, `{"ssim": 0.9}` or `{"l1": 0.05}`; the shortest prefix
                that reaches it is found by bisection, which takes quality to rise with length. Where even the full
                length falls short it is kept, and `meta["target"]` says what was reached.
            seed: For encoders that sample.

        Returns:
            Tokens of all items, in order; each item has the ids it would get alone. (On a CPU exactly so; an accelerator's
            batched arithmetic rounds otherwise, and can decide a near-tie between two codes the other way.)

        Raises:
            MediaError: If an item cannot be read as this modality.
            TokensError: If the length or target is not one that this tokenizer can meet.
        """
        if length is not None and target is not None:
            raise TokensError("expected length= or target=, got both: a budget and a quality exclude each other")
        items = self.media.items(media)
        budgets = self._check_length(length, len(items))
        self._check_target(target)
        parts: list[Tokens] = []
        order: list[int] = []
        for indices, batch, meta in self._batches(items):
            chosen = None if budgets is None else [budgets[i] for i in indices]
            parts.append(self._encode_batch(batch, meta, chosen, target, seed))
            order += indices
        if not parts:
            spec = self.info
            return Tokens(torch.zeros(0, spec.num_codebooks, 0).long(), torch.zeros(0, spec.num_codebooks).long(), spec)
        tokens = Tokens.cat(parts)
        return tokens if order == sorted(order) else tokens[sorted(range(len(order)), key=order.__getitem__)]

    def _batches(self, items: Sequence[Any]) -> Iterator[tuple[list[int], Tensor, list[dict[str, Any]]]]:
        """Reads items and groups them by exact size, holding no more than one batch of each size."""
        waiting: dict[torch.Size, list[tuple[int, Tensor, dict[str, Any]]]] = {}
        for index, item in enumerate(items):
            try:
                tensor, meta = self.media.read(item)
            except MediaError as error:
                raise MediaError(f"item {index}: {error}" if len(items) > 1 else str(error)) from error
            group = waiting.setdefault(tensor.shape, [])
            group.append((index, tensor, meta))
            if len(group) == self._batch_size:
                yield _stack(waiting.pop(tensor.shape))
        for group in waiting.values():
            yield _stack(group)

    @property
    def _batch_size(self) -> int:
        """One item at a time on a CPU: hardly slower than a batch there, and an item's rounding never depends on the others."""
        return 1 if self.device.type == "cpu" else ACCELERATOR_BATCH

    def _encode_batch(
        self,
        batch: Tensor,
        meta: list[dict[str, Any]],
        budgets: list[int] | None,
        target: Mapping[str, float] | None,
        seed: int,
    ) -> Tokens:
        batch = batch.to(self.device)
        codes = self._encode(batch.to(self.dtype), length=max(budgets) if budgets else None, seed=seed)
        batch_size, num_codebooks, width = codes.ids.shape
        lengths = codes.ids.new_full((batch_size, num_codebooks), width) if codes.lengths is None else codes.lengths
        tokens = Tokens(codes.ids, lengths, self.info, codes.extras, meta)
        if target is not None:
            tokens = self._shorten(tokens, batch, target)
        elif budgets is not None and self.info.variable != "none":
            tokens = tokens.truncate(budgets)
        return tokens.to("cpu")

    def _check_length(self, length: int | Sequence[int] | None, count: int) -> list[int] | None:
        if length is None:
            return None
        many = isinstance(length, Sequence)
        wanted = list(length) if isinstance(length, Sequence) else [length]
        budgets = [operator.index(n) for n in wanted if hasattr(n, "__index__") and not isinstance(n, bool)]
        if len(budgets) < len(wanted) or len(wanted) != (count if many else 1):
            raise TokensError(f"expected length= a whole number, or one for each of {count} items, got {length!r}")
        lowest, limit = self._length_range()
        for n in budgets:
            if n < lowest or (limit is not None and n > limit):
                allowed = f"{lowest} to {limit}" if lowest != limit else f"{limit}, its fixed length"
                raise TokensError(f"{self.name or self.architecture} encodes to {allowed} tokens, got length={n}")
        return budgets if many else budgets * count

    def _length_range(self) -> tuple[int, int | None]:
        """The shortest and the longest that `length` may ask for; the latter `None` if there is no limit."""
        info = self._describe()
        if info.get("variable", "none") == "none" and info.get("max_tokens") is None:
            raise TokensError(
                f"{self.name or self.architecture} has a fixed rate, its tokens follow the media: leave out length="
            )
        limit = len(info["codebook_sizes"]) if info.get("variable") == "codebooks" else info.get("max_tokens")
        return (limit or 1) if info.get("variable", "none") == "none" else 1, limit

    def _check_target(self, target: Mapping[str, float] | None) -> None:
        if target is None:
            return
        if self._describe().get("variable", "none") == "none":
            raise TokensError(f"{self.name or self.architecture} has a fixed length: target= needs one that varies")
        if not target:
            raise TokensError("expected a quality to reach, such as target={'psnr': 28}, got an empty target")
        for name, wanted in target.items():
            if name not in self.qualities:
                raise TokensError(
                    f"expected a target out of {', '.join(self.qualities)}, got {name!r}: add a measure of your own with "
                    f"tok.qualities[{name!r}] = Quality(function, higher_is_better=...)"
                )
            if not _is_finite(wanted):
                raise TokensError(f"expected a finite number as the target {name!r}, got {wanted!r}")

    def _shorten(self, tokens: Tokens, original: Tensor, target: Mapping[str, float]) -> Tokens:
        """Batched bisection for the shortest prefix that meets every target; `high` always meets it or is all there is."""
        low, high = torch.ones(len(tokens), dtype=torch.long), tokens.budgets.cpu()
        while bool((low < high).any()):
            open_ = (low < high).nonzero()[:, 0]
            middle = ((low + high) // 2)[open_]
            met = self._met(self._measure(tokens[open_.tolist()].truncate(middle.tolist()), original[open_], target), target)
            high[open_] = torch.where(met, middle, high[open_])
            low[open_] = torch.where(met, low[open_], middle + 1)
        shortest = tokens.truncate(low.tolist())
        reached = self._measure(shortest, original, target)
        met = self._met(reached, target)
        notes = [
            {"met": bool(met[i]), **{name: float(value[i]) for name, value in reached.items()}} for i in range(len(tokens))
        ]
        return dataclasses.replace(
            shortest, meta=[{**meta, "target": note} for meta, note in zip(tokens.meta, notes, strict=True)]
        )

    def _measure(self, tokens: Tokens, original: Tensor, target: Mapping[str, float]) -> dict[str, Tensor]:
        reconstruction = self._decode_tokens(tokens)
        return {name: self.qualities[name].measure(reconstruction, original).cpu() for name in target}

    def _met(self, reached: Mapping[str, Tensor], target: Mapping[str, float]) -> Tensor:
        return torch.stack([self.qualities[name].meets(reached[name], wanted) for name, wanted in target.items()]).all(0)

    # -- decode

    @torch.no_grad()
    def decode(self, tokens: Tokens, *, native: bool = False) -> list[Any]:
        """Decodes tokens into media, one item each.

        Args:
            tokens: Tokens that these weights made, or that were built with this tokenizer's `info`.
            native: Return the network's own resolution or sample rate instead of the original's.

        Returns:
            Per item an image float32 `[3, H, W]` in [0, 1], audio float32 `[C, S]` in [-1, 1], video float32
            `[T, 3, H, W]` in [0, 1], or a `str`, in the original's size.

        Raises:
            WrongTokenizerError: If another checkpoint made the tokens.
            TokensError: If an id or length is out of range.
        """
        self._check_tokens(tokens)
        results: list[Any] = [None] * len(tokens)
        for indices in self._decode_groups(tokens):
            part = tokens[indices]
            for i, reconstruction in zip(indices, self._decode_tokens(part), strict=True):
                reconstruction = reconstruction.cpu()
                results[i] = reconstruction if native else self.media.restore(reconstruction, tokens.meta[i])
        return results

    def _decode_tokens(self, tokens: Tokens) -> Tensor:
        """Reconstructions of a batch as float32, grouped by length."""
        groups = []
        order: list[int] = []
        for indices in self._decode_groups(tokens):
            part = tokens[indices].to(self.device)
            groups.append(self._decode(part.ids, part.lengths, part.extras).float())
            order += indices
        if len(groups) == 1:
            return groups[0]
        together = torch.cat(groups)
        return together[torch.argsort(torch.tensor(order)).to(together.device)]

    def _decode_groups(self, tokens: Tokens) -> Iterable[list[int]]:
        """Items with equal lengths, at most a batch at a time."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, lengths in enumerate(tokens.lengths.tolist()):
            groups.setdefault(tuple(lengths), []).append(index)
        return [group[at : at + self._batch_size] for group in groups.values() for at in range(0, len(group), self._batch_size)]

    def _check_tokens(self, tokens: Tokens) -> None:
        if not isinstance(tokens, Tokens):
            raise TokensError(f"expected Tokens, got {type(tokens).__name__}: build them with Tokens(ids, lengths, tok.info)")
        made, mine = tokens.spec, self.info
        if made.digest != mine.digest or made.architecture != mine.architecture:
            raise WrongTokenizerError(
                f"these tokens were made by {made.name or made.architecture} (weights {made.digest or 'unknown'}), this is "
                f"{mine.name or mine.architecture} (weights {mine.digest}): load the tokenizer that made them"
            )
        tokens.validate()
        if not self.may_be_empty and tokens.lengths.numel() and int(tokens.lengths.max(1).values.min()) < 1:
            raise TokensError("expected at least one token per item, got an item of length 0")
        if mine.max_tokens is not None and tokens.lengths.numel() and int(tokens.lengths.max()) > mine.max_tokens:
            raise TokensError(f"expected at most {mine.max_tokens} tokens per item, got {int(tokens.lengths.max())}")

    def stream(self) -> Any:
        """An encoder and a decoder of media that are still coming in, where the network allows it: causal audio and video.

        Raises:
            TokensError: If this network has to see an item as a whole.
        """
        raise TokensError(f"{self.name or self.architecture} has to see an item as a whole and cannot be streamed: use encode")

    # -- training

    def forward(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """The training path: reconstruction and losses of a batch of media tensors."""
        return self.objective(batch, progress=progress, generator=generator)

    # -- saving

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `config.json`, `model.safetensors` and the card to a folder that `tokenzoo.load` reads."""
        from tokenzoo.tokenizers import pretrained

        return pretrained.save(self, folder)

    def push_to_hub(self, repo: str, *, token: str | None = None, private: bool = False, message: str = "Add tokenizer") -> str:
        """Uploads what `save_pretrained` writes to a Hub repository, made if missing.

        Returns:
            The commit's URL.

        Raises:
            DownloadError: If the Hub refuses or cannot be reached.
        """
        from tokenzoo.tokenizers import pretrained

        return pretrained.push(self, repo, token=token, private=private, message=message)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or a Hub repository; options as `tokenzoo.load`.

        Raises:
            ConfigError: If the config is of another architecture, or has unknown keys.
            DownloadError: If a file cannot be had.
            WeightsError: If the weights do not fit.
        """
        from tokenzoo.tokenizers import pretrained

        return pretrained.load(cls, source, **options)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _forget_digest(module: nn.Module, incompatible_keys: Any) -> None:
    del incompatible_keys
    module._digest = None  # type: ignore[assignment]


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names, shapes, dtypes and values, its first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        rows = torch.atleast_1d(tensor)
        for part in rows.split(max(1, _DIGEST_BLOCK * len(rows) // max(1, rows.numel()))):
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _stack(group: list[tuple[int, Tensor, dict[str, Any]]]) -> tuple[list[int], Tensor, list[dict[str, Any]]]:
    indices, tensors, meta = zip(*group, strict=True)
    return list(indices), pad_and_cat([t[None] for t in tensors]), list(meta)
