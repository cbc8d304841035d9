"""Quantizer modules: what turns vectors into ids, with the gradients and losses that training needs.

All of them work in float32 whatever the precision around them, since a rounded codebook has other ids.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.kernels import (
    PackCache,
    Projections,
    fsq_codes,
    fsq_quantize,
    lfq_codes,
    lfq_quantize,
    lookup,
    nearest,
    projected_residual_quantize,
    residual_quantize,
)
from tokenzoo.tokenizers.learning import CodebookLearner, Learning

Metric = Literal["l2", "cosine"]
Gradient = Literal["straight_through", "rotation"]


class Quantized(NamedTuple):
    """Vectors `(..., D)` that carry gradients to the input, ids `(...)`, and the weighted loss (a scalar)."""

    vectors: Tensor
    ids: Tensor
    loss: Tensor


class Quantizer(nn.Module):
    """What all quantizers share: they move with the module around them, but stay in float32 when it is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: tensor.detach() for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        super()._apply(fn, recurse)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.dtype != exact[name].dtype:
                tensor.data = exact[name].to(tensor.device)
        return self


class VectorQuantizer(Quantizer):
    """A codebook of `size` entries of width `dim` (VQ-VAE, https://arxiv.org/abs/1711.00937).

    Args:
        size: Number of entries K.
        dim: Width of vectors and entries D.
        metric: `"l2"`, or `"cosine"`: vectors and entries are l2-normalised before they are compared.
        commitment: Weight of the loss that pulls vectors to their entries; that which pulls entries has weight 1.
        gradient: How the gradient of the quantized vectors reaches the input: unchanged (`"straight_through"`), or turned
            and scaled as the vector is on its way to its entry (`"rotation"`, https://arxiv.org/abs/2410.06424).
        unit_entries: With `metric="cosine"`, whether normalised entries are what is returned and what the loss sees
            (https://arxiv.org/abs/2110.04627), or the entries as they are (DAC, https://arxiv.org/abs/2306.06546).
        learning: Moving averages, restarts and k-means of the codebook in training.

    State dict: `codebook`, float32 `(K, D)`; with `learning`, also the buffers under `learner.` that it needs.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        metric: Metric = "l2",
        commitment: float = 0.25,
        gradient: Gradient = "straight_through",
        unit_entries: bool = True,
        learning: Learning | None = None,
    ) -> None:
        super().__init__()
        if metric not in ("l2", "cosine") or gradient not in ("straight_through", "rotation"):
            raise ValueError(
                f"expected a metric l2 or cosine, a gradient straight_through or rotation, got {metric=}, {gradient=}"
            )
        self.metric = metric
        self.commitment = commitment
        self.gradient = gradient
        self.unit = metric == "cosine" and unit_entries
        averaged = learning is not None and learning.decay is not None
        self.codebook = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size), requires_grad=not averaged)
        self.learner = CodebookLearner(learning, self.codebook, spherical=self.unit) if learning else None
        self._cache = PackCache()

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; the packed codebook is kept in eval mode only."""
        self._cache.clear()
        return super().train(mode)

    def ids(self, x: Tensor) -> Tensor:
        """Ids int64 `(...)` of vectors `(..., D)`."""
        return nearest(x, self.codebook, metric=self.metric, cache=None if self.training else self._cache)

    def lookup(self, ids: Tensor) -> Tensor:
        """Entries float32 `(..., D)` of ids `(...)`; differentiable with respect to the codebook."""
        entries = lookup(ids, self.codebook)
        return F.normalize(entries, dim=-1) if self.unit else entries

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `(..., D)` for training: codebook loss plus `commitment` times the commitment loss.

        Where entries are moving averages there is no codebook loss.
        """
        with torch.autocast(x.device.type, enabled=False):
            x, ids, entries, errors = self.assign(x.float())
            return Quantized(carry_gradient(x, entries, self.gradient), ids, mean(errors))

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step of training, for quantizers of several stages.

        Args:
            x: Vectors float32 `(..., D)`.

        Returns:
            The vectors as they are compared `(..., D)`, ids `(...)`, entries `(..., D)`, and the weighted loss of each
            vector `(...)`. Entries carry the codebook's gradient, and are those from before this step's averaging.
        """
        if self.unit:
            x = F.normalize(x, dim=-1)
        learner = self.learner if self.training else None
        if learner is not None and learner.learning.decay is None and not self.codebook.requires_grad:
            learner = None  # the codebook is frozen; one of averages never has a gradient
        if learner is not None:
            learner.start(self.codebook, x.detach())
        ids = VectorQuantizer.ids(self, x)
        entries = VectorQuantizer.lookup(self, ids)
        errors = self.commitment * (x - entries.detach()).square().mean(-1)
        if self.codebook.requires_grad:
            errors = errors + (entries - x.detach()).square().mean(-1)
        if learner is not None:
            learner.update(self.codebook, x.detach(), ids)
        return x, ids, entries, errors


class FactorizedQuantizer(VectorQuantizer):
    """A codebook in a narrow space, with linear maps in and out (a stage of DAC, https://arxiv.org/abs/2306.06546).

    Args:
        size: Number of entries K.
        dim: Width of the entries d.
        input_dim: Width of the vectors D.
        metric: As in `VectorQuantizer`.
        commitment: As in `VectorQuantizer`; the loss compares in the narrow space.
        gradient: As in `VectorQuantizer`.
        unit_entries: As in `VectorQuantizer`.
        learning: As in `VectorQuantizer`.

    State dict: `codebook` `(K, d)`, `in_proj.weight` `(d, D)`, `in_proj.bias`, `out_proj.weight` `(D, d)`, `out_proj.bias`.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        input_dim: int,
        *,
        metric: Metric = "cosine",
        commitment: float = 0.25,
        gradient: Gradient = "straight_through",
        unit_entries: bool = False,
        learning: Learning | None = None,
    ) -> None:
        super().__init__(
            size, dim, metric=metric, commitment=commitment, gradient=gradient, unit_entries=unit_entries, learning=learning
        )
        self.in_proj = nn.Linear(input_dim, dim)
        self.out_proj = nn.Linear(dim, input_dim)

    def ids(self, x: Tensor) -> Tensor:
        """Ids int64 `(...)` of vectors `(..., D)`."""
        with torch.autocast(x.device.type, enabled=False):
            return super().ids(self.in_proj(x.float()))

    def lookup(self, ids: Tensor) -> Tensor:
        """Entries of ids `(...)`, mapped back: float32 `(..., D)`."""
        with torch.autocast(ids.device.type, enabled=False):
            return self.out_proj(super().lookup(ids))

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `VectorQuantizer.assign`; vectors are mapped in, and both sides stay in the narrow space, `(..., d)`."""
        return super().assign(self.in_proj(x))

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `(..., D)` for training, as `VectorQuantizer` does."""
        found = super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return found._replace(vectors=self.out_proj(found.vectors))


def carry_gradient(x: Tensor, entries: Tensor, gradient: Gradient) -> Tensor:
    """The values of `entries`, with the gradient going to `x`, `(..., D)` both.

    `"rotation"` passes it through the rotation that takes the direction of a vector to that of its entry, and the ratio of
    their norms, both held constant: with unit vectors e and q and r their normalised sum, `R = I - 2 r r' + 2 q e'`.
    A vector of zeros has no direction; its gradient passes unchanged.
    """
    entries = entries.detach()
    if gradient == "straight_through":
        return x + (entries - x).detach()
    with torch.no_grad():
        norm = x.norm(dim=-1, keepdim=True)
        scale = torch.where(norm > 0, entries.norm(dim=-1, keepdim=True) / norm, 1)
        e, q = F.normalize(x, dim=-1), F.normalize(entries, dim=-1)
        r = torch.where(norm > 0, F.normalize(e + q, dim=-1), 0)
    turned = x - 2 * r * (r * x).sum(-1, keepdim=True) + 2 * q * (e * x).sum(-1, keepdim=True)
    turned = scale * turned
    return turned + (entries - turned).detach()


def mean(errors: Tensor) -> Tensor:
    """The mean, and zero of nothing."""
    return errors.sum() / max(1, errors.numel())


class ResidualQuantizer(Quantizer):
    """Stages that each quantize what those before them left over (SoundStream, https://arxiv.org/abs/2107.03312).

    In training one gradient goes from the sum of the entries to the input, and every stage has its own loss; they are added up.

    Args:
        size: Number of entries of each stage K.
        dim: Width of the entries D.
        num_stages: Number of stages Q.
        input_dim: Width of the vectors where it differs: linear maps without bias lead into and out of all stages (Mimi).
        metric: As in `VectorQuantizer`; entries are returned as they are.
        commitment: As in `VectorQuantizer`.
        gradient: As in `VectorQuantizer`.
        dropout: Probability that in training an item (along the first dimension) uses only its first stages, 1 to Q at random.
        learning: As in `VectorQuantizer`, for every stage.

    State dict: `stages.{q}.codebook` `(K, D)`; with `input_dim`, `in_proj.weight` and `out_proj.weight`.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        num_stages: int,
        *,
        input_dim: int | None = None,
        metric: Metric = "l2",
        commitment: float = 0.25,
        gradient: Gradient = "straight_through",
        dropout: float = 0.0,
        learning: Learning | None = None,
    ) -> None:
        super().__init__()
        _check_stages(num_stages, dropout)
        self.metric = metric
        self.gradient = gradient
        self.dropout = dropout
        self.stages = nn.ModuleList(
            VectorQuantizer(
                size, dim, metric=metric, commitment=commitment, unit_entries=False, learning=_for_stage(learning, q)
            )
            for q in range(num_stages)
        )
        self.in_proj: nn.Module = nn.Identity()
        self.out_proj: nn.Module = nn.Identity()
        if input_dim is not None and input_dim != dim:
            self.in_proj, self.out_proj = nn.Linear(input_dim, dim, bias=False), nn.Linear(dim, input_dim, bias=False)
        _check_choices(metric, gradient)

    @torch.no_grad()
    def ids(self, x: Tensor, num_stages: int | None = None, *, keep: bool = True) -> Tensor:
        """Ids int64 `(..., Q')` of vectors `(..., D)` from the first Q' = `num_stages` stages (all by default).

        In eval mode packed codebooks, up to twice their size, are kept for the next call; without `keep`, under `metric="l2"`,
        there is only one at a time, which takes hardly longer for a thousand vectors and more.
        """
        stages = _prefix(self.stages, num_stages)
        with torch.autocast(x.device.type, enabled=False):
            residual = self.in_proj(x.float())
            if self.metric == "l2":
                caches = None if self.training or not keep else [stage._cache for stage in stages]
                return residual_quantize(residual, [stage.codebook for stage in stages], caches=caches).ids
            ids = []
            for stage in stages:
                ids.append(stage.ids(residual))
                residual = residual - stage.lookup(ids[-1])
            return torch.stack(ids, -1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Sum float32 `(..., D)` of the entries of ids `(..., Q')` of the first Q' stages."""
        stages = _prefix(self.stages, ids.shape[-1])
        with torch.autocast(ids.device.type, enabled=False):
            return self.out_proj(sum(stage.lookup(chosen) for stage, chosen in zip(stages, ids.unbind(-1), strict=True)))

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `(..., D)` for training. Ids `(..., Q)` are -1 for stages that an item did not use."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.in_proj(x.float())
            kept = _kept_stages(x, len(self.stages), self.dropout if self.training else 0)
            residual, total, loss, ids = x, torch.zeros_like(x), x.new_zeros(()), []
            for q, stage in enumerate(_prefix(self.stages)):
                _, chosen, entries, errors = stage.assign(residual)
                used = q < kept
                total = total + torch.where(used[..., None], entries, 0)
                loss = loss + mean(torch.where(used, errors, 0))
                ids.append(torch.where(used, chosen, -1))
                residual = residual - entries.detach()
            return Quantized(self.out_proj(carry_gradient(x, total, self.gradient)), torch.stack(ids, -1), loss)


class ProjectedResidualQuantizer(Quantizer):
    """Residual stages that each search in a narrow space of their own (DAC, https://arxiv.org/abs/2306.06546).

    In training the gradient passes through every stage in turn, as published; the stages' losses are added up.

    Args:
        size: Number of entries of each stage K.
        dim: Width of the entries d.
        input_dim: Width of the vectors D.
        num_stages: Number of stages Q.
        metric: As in `VectorQuantizer`; entries are returned as they are.
        commitment: As in `VectorQuantizer`.
        gradient: As in `VectorQuantizer`.
        dropout: As in `ResidualQuantizer`.
        learning: As in `VectorQuantizer`, for every stage.

    State dict: `stages.{q}.` before the names of `FactorizedQuantizer`.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        input_dim: int,
        num_stages: int,
        *,
        metric: Metric = "cosine",
        commitment: float = 0.25,
        gradient: Gradient = "straight_through",
        dropout: float = 0.0,
        learning: Learning | None = None,
    ) -> None:
        super().__init__()
        _check_stages(num_stages, dropout)
        self.metric = metric
        self.dropout = dropout
        self.stages = nn.ModuleList(
            FactorizedQuantizer(
                size,
                dim,
                input_dim,
                metric=metric,
                commitment=commitment,
                gradient=gradient,
                learning=_for_stage(learning, q),
            )
            for q in range(num_stages)
        )
        self._stacks = _Stacks()

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; the stacked codebooks are kept in eval mode only."""
        self._stacks.clear()
        return super().train(mode)

    @torch.no_grad()
    def ids(self, x: Tensor, num_stages: int | None = None, *, keep: bool = True) -> Tensor:
        """Ids int64 `(..., Q')` of vectors `(..., D)` from the first Q' = `num_stages` stages (all by default).

        In eval mode copies of the parameters are kept for the next call, unless without `keep`.
        """
        stages, count = _prefix(self.stages), len(_prefix(self.stages, num_stages))
        sources = [
            [stage.codebook for stage in stages],
            [stage.in_proj.weight for stage in stages],
            [stage.in_proj.bias for stage in stages],
            [stage.out_proj.weight for stage in stages],
            [stage.out_proj.bias for stage in stages],
        ]
        codebooks, *maps = (stack[:count] for stack in self._stacks.get(keep and not self.training, sources))
        return projected_residual_quantize(x, codebooks, Projections(*maps), metric=self.metric).ids

    def lookup(self, ids: Tensor) -> Tensor:
        """Sum float32 `(..., D)` of the entries, mapped back, of ids `(..., Q')` of the first Q' stages."""
        stages = _prefix(self.stages, ids.shape[-1])
        return sum(stage.lookup(chosen) for stage, chosen in zip(stages, ids.unbind(-1), strict=True))

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `(..., D)` for training. Ids `(..., Q)` are -1 for stages that an item did not use."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            kept = _kept_stages(x, len(self.stages), self.dropout if self.training else 0)
            residual, total, loss, ids = x, torch.zeros_like(x), x.new_zeros(()), []
            for q, stage in enumerate(_prefix(self.stages)):
                narrow, chosen, entries, errors = stage.assign(residual)
                vectors = stage.out_proj(carry_gradient(narrow, entries, stage.gradient))
                used = q < kept
                total = total + torch.where(used[..., None], vectors, 0)
                loss = loss + mean(torch.where(used, errors, 0))
                ids.append(torch.where(used, chosen, -1))
                residual = residual - vectors
            return Quantized(total, torch.stack(ids, -1), loss)


class FiniteScalarQuantizer(nn.Module):
    """Every dimension is rounded to a few levels (https://arxiv.org/abs/2309.15505); nothing is learnt and no loss needed.

    Args:
        levels: Levels of each dimension; their product is the size of the codebook.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.size = math.prod(self.levels)
        fsq_codes(torch.zeros(1, dtype=torch.long), self.levels)  # refuses what cannot be

    def ids(self, x: Tensor) -> Tensor:
        """Ids int64 `(...)` of vectors `(..., D)`."""
        return fsq_quantize(x.detach(), self.levels).ids

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes float32 `(..., D)` in [-1, 1] of ids `(...)`."""
        return fsq_codes(ids, self.levels)

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `(..., D)`; gradients pass straight through the rounding, and the loss is zero."""
        codes, ids = fsq_quantize(x, self.levels)
        return Quantized(codes, ids, codes.new_zeros(()))


class LookupFreeQuantizer(nn.Module):
    """One bit a dimension (https://arxiv.org/abs/2310.05737), or binary spherical (https://arxiv.org/abs/2406.07548).

    The loss is `commitment` times the squared distance to the codes, plus `entropy` times (the mean entropy of a vector's
    code, less `diversity` times the entropy of the codes of all vectors). The bits of a vector's code are independent given
    the vector, so its entropy is exactly the sum over its bits. That of all vectors together is taken bit by bit too, an
    upper bound, so that no matrix of vectors by codes is needed.

    Args:
        dim: Width of the vectors, and bits of an id.
        spherical: Vectors are l2-normalised, and codes are `+-1 / sqrt(dim)`; otherwise codes are `+-1`.
        commitment: Weight of the commitment loss.
        entropy: Weight of the entropy loss.
        diversity: Weight, within the entropy loss, of the entropy of all codes.
        temperature: Of the softmax over squared distances that the entropies are of.
    """

    def __init__(
        self,
        dim: int,
        *,
        spherical: bool = False,
        commitment: float = 0.25,
        entropy: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.size = 1 << dim
        self.spherical = spherical
        self.scale = dim**-0.5 if spherical else 1.0
        self.commitment = commitment
        self.entropy = entropy
        self.diversity = diversity
        self.temperature = temperature
        lfq_codes(torch.zeros(1, dtype=torch.long), dim)  # refuses what cannot be

    def ids(self, x: Tensor) -> Tensor:
        """Ids int64 `(...)` of vectors `(..., D)`; the first dimension is their highest bit."""
        return lfq_quantize(x.detach()).ids

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes float32 `(..., D)` of ids `(...)`."""
        return lfq_codes(ids, self.dim, scale=self.scale)

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes `(..., D)` for training; gradients pass straight through the sign."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=-1) if self.spherical else x.float()
            codes, ids = lfq_quantize(x, scale=self.scale)
            loss = self.commitment * mean((x - codes.detach()).square())
            if self.entropy and x.numel():
                logits = x.reshape(-1, self.dim) * (4 * self.scale / self.temperature)
                each = _bit_entropy(logits.sigmoid(), (-logits).sigmoid()).sum(-1).mean()
                high = logits.sigmoid().mean(0)
                together = _bit_entropy(high, 1 - high).sum()
                loss = loss + self.entropy * (each - self.diversity * together)
            return Quantized(codes, ids, loss)


def _bit_entropy(high: Tensor, low: Tensor) -> Tensor:
    """Entropy in nats of bits that are one with probability `high` and zero with probability `low`."""
    return -sum(torch.special.xlogy(p, p.clamp_min(torch.finfo(p.dtype).tiny)) for p in (high, low))


class _Stacks:
    """Parameters of all stages stacked for the kernels, kept until one of them changes."""

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Stacks, ()  # copies and pickles are empty

    def clear(self) -> None:
        self._held: tuple[Any, list[Tensor], list[Tensor]] | None = None

    def get(self, keep: bool, sources: list[list[Tensor]]) -> list[Tensor]:
        """Each list of tensors as one, float32."""
        flat = [tensor for group in sources for tensor in group]
        if not keep or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in flat):
            return [torch.stack([tensor.detach().float() for tensor in group]) for group in sources]
        if self._held is None or self._held[0] != _state_of(flat):
            with torch.inference_mode(False), torch.no_grad():
                stacked = [torch.stack([tensor.detach().float() for tensor in group]) for group in sources]
            # The sources are kept alive, so that an address cannot become another tensor's.
            self._held = (_state_of(flat), stacked, [tensor.detach() for tensor in flat])
        return self._held[1]


def _state_of(tensors: list[Tensor]) -> list[tuple[int, int, torch.device]]:
    """What changes when a tensor is written to, moved or exchanged."""
    return [(tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors]


def _kept_stages(x: Tensor, num_stages: int, dropout: float) -> Tensor:
    """How many stages each vector uses, int64, of the shape `x.shape[:-1]` but with ones after the first dimension."""
    items = x.shape[:1] if x.dim() > 1 else ()
    kept = torch.full(items, num_stages, device=x.device)
    if dropout:
        chosen = torch.randint(1, num_stages + 1, items, device=x.device)
        kept = torch.where(torch.rand(items, device=x.device) < dropout, chosen, kept)
    return kept.reshape(*items, *[1] * (x.dim() - 1 - len(items)))


def _prefix(stages: Iterable[Any], count: int | None = None) -> list[Any]:
    stages = list(stages)
    if count is not None and not 1 <= count <= len(stages):
        raise ValueError(f"expected 1 to {len(stages)} stages, got {count}")
    return stages[:count]


def _for_stage(learning: Learning | None, stage: int) -> Learning | None:
    return replace(learning, seed=learning.seed + stage) if learning else None


def _check_stages(num_stages: int, dropout: float) -> None:
    if num_stages < 1 or not 0 <= dropout <= 1:
        raise ValueError(f"expected at least one stage and a dropout in [0, 1], got {num_stages = } and {dropout = }")


def _check_choices(metric: str, gradient: str) -> None:
    if metric not in get_args(Metric) or gradient not in get_args(Gradient):
        expected = f"a metric of {get_args(Metric)} and a gradient of {get_args(Gradient)}"
        raise ValueError(f"expected {expected}, got {metric = } and {gradient = }")
