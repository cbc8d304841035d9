"""How the tables of a One-D-Piece nano's `SpectralCode` are estimated from data.

Token by token, in the order in which they will be decoded: each takes the coefficients with most energy left in its class,
predicts their scale from the codes before it (ridge regression), quantizes them for every crop, and hands on the residual.

Shapes: M crops, K coefficients, D code width, P classes, N tokens.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenzoo.kernels import nearest

if TYPE_CHECKING:
    from tokenzoo.tokenizers.image.one_d_piece_nano import SpectralCode

_PRIOR_CROPS = 20.0
_RIDGE = 30.0
# Energy per coefficient below which detail is not told apart: a squared error of 2.2 grey levels.
_NOISE = 5e-4
_CLASS_BITS = 800.0
_MEANS_STEPS = 12
_MEANS_DIM = 4
_MAX_CROPS = 24576


def fit_spectral_code(code: "SpectralCode", x_MK: Tensor, generator: torch.Generator) -> None:
    """Fills every table of `code` from coefficients.

    Raises:
        ValueError: If there are fewer crops than codebook entries.
    """
    if len(x_MK) < len(code.codebook):
        raise ValueError(f"expected at least {len(code.codebook)} crops, one per codebook entry, got {len(x_MK)}")
    code.mean.copy_(x_MK.mean(0))
    residual = x_MK - code.mean
    chosen = _fit_classes(code, residual, generator)
    energy_PK = class_spectra(code, residual, chosen)
    residual = _fit_first_token(code, residual, chosen, energy_PK, generator)
    energy_PK = class_spectra(code, residual, chosen)
    _fit_codebook(code, residual, chosen, energy_PK, generator)
    _fit_tokens(code, residual[:_MAX_CROPS].clone(), chosen[:_MAX_CROPS], energy_PK)


def _fit_classes(code: "SpectralCode", x_MK: Tensor, generator: torch.Generator) -> Tensor:
    """Fits the classes: clusters of like log spectra, then whichever class describes a crop in fewest bits; returns that."""
    counts = torch.bincount(code.bands).float()
    energies = torch.zeros(len(x_MK), len(counts)).index_add(1, code.bands, x_MK.square()) / counts
    # The root weighs a band by how many coefficients speak for it, without letting the largest decide alone.
    features = torch.log(energies + _NOISE) * counts.sqrt()
    _, labels = k_means(features, len(code.class_costs), generator)
    variances = class_spectra(code, x_MK, labels)
    variances = variances + water_level(variances, _CLASS_BITS)
    code.precisions.copy_(1 / variances)
    code.class_costs.copy_(variances.log().sum(1))
    return code.class_lengths(x_MK).argmin(1)


def water_level(variances_PK: Tensor, bits: float) -> Tensor:
    """Distortion per coefficient `[P, 1]` of Gaussians coded at `bits` (reverse water-filling), by bisection."""
    low, high = torch.full((len(variances_PK), 1), 1e-9), variances_PK.amax(1, keepdim=True)
    for _ in range(50):
        level = (low * high).sqrt()
        rate = 0.5 * torch.log2((variances_PK / level).clamp(min=1)).sum(1, keepdim=True)
        low, high = torch.where(rate > bits, level, low), torch.where(rate > bits, high, level)
    return (low * high).sqrt()


def k_means(x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres `[count, D]` and labels `[M]` of vectors `[M, D]`; an empty cluster starts again at a random vector."""
    centres = x[torch.randperm(len(x), generator=generator)[:count]].clone()
    if len(centres) < count:
        centres = torch.cat([centres, centres[:1].expand(count - len(centres), -1)])
    for _ in range(_MEANS_STEPS):
        labels = nearest(x, centres)
        sizes = torch.bincount(labels, minlength=count)
        restarts = x[torch.randint(len(x), (count,), generator=generator)]
        means = torch.zeros_like(centres).index_add(0, labels, x) / sizes.clamp(min=1)[:, None]
        centres = torch.where((sizes > 0)[:, None], means, restarts)
    return centres, nearest(x, centres)


def class_spectra(code: "SpectralCode", x_MK: Tensor, chosen: Tensor) -> Tensor:
    """Energy `[P, K]` of each coefficient in each class, shrunk to the class's energy per band in the shape of all crops'."""
    classes, bands = len(code.class_costs), code.bands
    sizes = torch.bincount(chosen, minlength=classes)[:, None]
    overall = x_MK.square().mean(0, keepdim=True)
    sums = torch.zeros(classes, x_MK.shape[1]).index_add(0, chosen, x_MK.square())

    def per_band(values: Tensor) -> Tensor:
        totals = torch.zeros(len(values), int(bands.max()) + 1).index_add(1, bands, values)
        return (totals / torch.bincount(bands))[:, bands]

    prior = (overall / per_band(overall).clamp(min=1e-9)) * per_band((sums + overall) / (sizes + 1))
    return (sums + _PRIOR_CROPS * prior) / (sizes + _PRIOR_CROPS)


def _fit_first_token(
    code: "SpectralCode", residual: Tensor, chosen: Tensor, energy_PK: Tensor, generator: torch.Generator
) -> Tensor:
    """Fits the coarse means; returns what they leave.

    Classes share them, up to the scale of their strongest coefficients: a class alone has too few crops for its own.
    """
    top = energy_PK.topk(code.codebook.shape[1], 1).indices
    scales = energy_PK.gather(1, top).sqrt()
    unit = residual.gather(1, top[chosen]) / scales[chosen]
    unit[:, _MEANS_DIM:] = 0
    centres, labels = k_means(unit, code.variants, generator)
    code.columns[:, 0], code.first_codebook[:] = top.to(torch.int16), centres * scales[:, None]
    return residual.scatter_add(1, top[chosen], -centres[labels] * scales[chosen])


def _fit_codebook(
    code: "SpectralCode", residual: Tensor, chosen: Tensor, energy_PK: Tensor, generator: torch.Generator
) -> None:
    """Codebook entries: coefficients of random crops, of one of the first eight groups by energy, at unit energy."""
    size, dim = code.codebook.shape
    picked = torch.randperm(len(residual), generator=generator)[:size]
    groups = energy_PK.argsort(1, descending=True)[:, : 8 * dim].unflatten(1, (8, dim))
    columns = groups[chosen[picked], torch.randint(8, (size,), generator=generator)]
    energy = energy_PK[chosen[picked]].gather(1, columns)
    code.codebook.copy_(0.8 * residual[picked].gather(1, columns) / energy.sqrt())


def _fit_tokens(code: "SpectralCode", residual: Tensor, chosen: Tensor, energy_PK: Tensor) -> None:
    """Fits coefficients, scales and gain prediction of every token after the first."""
    (classes, tokens, dim), count = code.scales.shape, torch.bincount(chosen, minlength=len(code.class_costs))[:, None]
    energies = torch.zeros(len(residual), tokens)
    for t in range(1, tokens):
        top = energy_PK.topk(dim, 1).indices
        scales = energy_PK.gather(1, top).sqrt()
        columns = top[chosen]
        unscaled = residual.gather(1, columns) / scales[chosen]
        _fit_gain(code, t, energies, unscaled)
        vectors = unscaled / code.gain(energies, t)[:, None]
        trial = code.codebook[nearest(vectors[:4096], code.codebook)]
        shrink = ((vectors[:4096] * trial).sum() / trial.square().sum()).clamp(0.3, 1.5)
        entries = code.codebook[nearest(vectors / shrink, code.codebook)]
        left = vectors - shrink * entries
        code.columns[:, t], code.scales[:, t] = top.to(torch.int16), shrink * scales
        residual.scatter_add_(1, columns, (left - vectors) * code.gain(energies, t)[:, None] * scales[chosen])
        energies[:, t] = code.log_energy(entries)
        ratio = left.square().sum() / vectors.square().sum()
        sums = torch.zeros(classes, dim).index_add(0, chosen, residual.gather(1, columns).square())
        rest = (sums + _PRIOR_CROPS * ratio * scales.square()) / (count + _PRIOR_CROPS)
        energy_PK.scatter_(1, top, rest)


def _fit_gain(code: "SpectralCode", t: int, energies: Tensor, unscaled: Tensor) -> None:
    """Ridge regression of the log energy of token `t`'s vectors on those of the codes before it."""
    inputs = torch.cat([energies[:, 1:t], torch.ones(len(energies), 1)], 1).double()
    target = 0.5 * torch.log(unscaled.square().mean(1) + 1e-3).double()
    penalty = _RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ target).float()
    code.energy_weights[t, 1:t], code.energy_bias[t] = weights[:-1], weights[-1]
