"""One-D-Piece nano: a small variable-length 1D image tokenizer whose every prefix decodes, trained here from photos.

From One-D-Piece (https://arxiv.org/abs/2501.10064) it takes that an image is a sequence of ids, coarse to fine, of which any
prefix decodes; the network is our own. The sequence is a progressive residual code of the image's DCT coefficients:

- the first token names one of `num_classes` spectra (which frequencies carry energy, in which direction, in which
  colours) and a coarse mean;
- each further token quantizes the `code_dim` coefficients that, in this class and after the tokens before, have most energy
  left. They are scaled to unit energy, so that one codebook serves all tokens; the scale follows the energies of the
  codes so far, which costs no bits;
- a refiner turns the linear reconstruction of a prefix into the expected image.

The code is estimated from crops by `initialise`; the refiner starts as the identity and is trained by `objective`.

Shapes: B batch, N tokens, K kept coefficients, D code width, P classes, H W pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.refiner import Refiner
from tokenzoo.kernels import PackCache, nearest
from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig
from tokenzoo.tokenizers.image._spectral_fit import fit_spectral_code
from tokenzoo.tokenizers.images import Images
from tokenzoo.tokenizers.quality import psnr
from tokenzoo.tokenizers.spec import Modality

# Rows: an orthonormal luma and two colour differences, close to the principal axes of photos.
_COLOUR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 2.0, -1.0))
_ENERGY_FLOOR = 1e-2


@strict
@dataclass(kw_only=True)
class OneDPieceNanoConfig(TokenizerConfig):
    """Size of the tokenizer.

    Attributes:
        image_size: Height and width, in pixels.
        num_tokens: N, the longest code.
        codebook_size: Entries shared by all tokens.
        code_dim: D, coefficients per token.
        num_classes: P, spectra that the first token chooses from; divides `codebook_size`.
        luma_radius: Luma coefficients (u, v) with u^2 + v^2 below its square are kept.
        chroma_radius: The same of the two colour differences.
        width: Channels of the refiner at half resolution.
        blocks: Blocks of the refiner per resolution and side.
        heads: Attention heads of the refiner.
        condition_dim: Width of what the refiner knows of the class and the number of tokens.
        classes_tried: Likeliest classes that `encode` tries in full; it costs time and no bits. Training tries one.
    """

    image_size: int = 64
    num_tokens: int = 128
    codebook_size: int = 4096
    code_dim: int = 16
    num_classes: int = 256
    luma_radius: int = 36
    chroma_radius: int = 14
    width: int = 64
    blocks: int = 2
    heads: int = 8
    condition_dim: int = 128
    classes_tried: int = 4

    def validate_sizes(self) -> None:
        """Checks what the graph needs of the sizes."""
        if self.codebook_size % self.num_classes:
            raise ValueError(f"expected codebook_size to be a multiple of {self.num_classes = }, got {self.codebook_size}")
        if not 1 <= self.classes_tried <= self.num_classes:
            raise ValueError(f"expected classes_tried from 1 to {self.num_classes}, got {self.classes_tried}")
        if self.image_size % 8 or not 0 < max(self.luma_radius, self.chroma_radius) <= self.image_size:
            raise ValueError(f"expected a multiple of 8 no smaller than the radii, got {self.image_size = }")


class SpectralCode(nn.Module):
    """The code: DCT coefficients `[B, K]` to ids `[B, N]` and, for any prefix, back.

    All tables are in the state dict, filled by `fit_spectral_code`; ids are found one after another, each for the
    residual that the ids before it leave.
    """

    bands: Tensor
    columns: Tensor

    def __init__(self, config: OneDPieceNanoConfig, bands: Tensor) -> None:
        super().__init__()
        classes, tokens, dim = config.num_classes, config.num_tokens, config.code_dim
        self.variants = config.codebook_size // classes
        self.register_buffer("bands", bands, persistent=False)
        self.mean = nn.Parameter(torch.zeros(len(bands)))
        self.precisions = nn.Parameter(torch.ones(classes, len(bands)))
        self.class_costs = nn.Parameter(torch.zeros(classes))
        self.first_codebook = nn.Parameter(0.1 * torch.randn(classes, self.variants, dim))
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, dim))
        self.scales = nn.Parameter(torch.full((classes, tokens, dim), 0.1))
        self.energy_weights = nn.Parameter(torch.zeros(tokens, tokens))
        self.energy_bias = nn.Parameter(torch.zeros(tokens))
        self._cache = PackCache()
        columns = torch.arange(tokens * dim).view(1, tokens, dim) % len(bands)
        self.register_buffer("columns", columns.repeat(classes, 1, 1).to(torch.int16))

    def encode(self, x_BK: Tensor, length: int, *, tries: int = 1) -> Tensor:
        """Ids int64 `[B, length]` of coefficients: greedy, in the best of the `tries` likeliest classes.

        Best is the one with the smallest error at half of all tokens, whatever `length` is, so that the ids of a
        shorter code are a prefix of those of a longer one.
        """
        half = len(self.energy_bias) // 2
        return self.encode_with_errors(x_BK, length if tries == 1 else max(length, half), tries=tries)[0][:, :length]

    def encode_with_errors(self, x_BK: Tensor, steps: int, *, tries: int = 1) -> tuple[Tensor, Tensor]:
        """Ids `[B, steps]` as `encode` finds them, and the squared error `[B, steps]` that each of them leaves.

        More than one class is tried with at least half of all tokens, which is where they are compared.
        """
        centred = x_BK.float() - self.mean.float()
        classes = self.class_lengths(centred).topk(tries, dim=1, largest=False).indices
        ids, errors = self.encode_in(centred.repeat_interleave(tries, 0), classes.flatten(), steps)
        compared = errors[:, min(steps, len(self.energy_bias) // 2) - 1]
        best = compared.view(-1, tries).argmin(1) + tries * torch.arange(len(x_BK), device=x_BK.device)
        return ids[best], errors[best]

    def encode_in(self, centred_BK: Tensor, chosen: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Ids `[B, steps]` of centred coefficients in given classes, and the squared error `[B, steps]` after each."""
        columns = self.columns[chosen, 0].long()
        first = self.first_codebook[chosen].float()
        variant = torch.cdist(centred_BK.gather(1, columns)[:, None], first)[:, 0].argmin(1)
        ids = [chosen * self.variants + variant]
        residual = centred_BK.scatter_add(1, columns, -self.first_codebook[chosen, variant].float())
        energies = residual.new_zeros(len(residual), len(self.energy_bias))
        errors = [residual.square().sum(1)]
        for t in range(1, steps):
            columns = self.columns[chosen, t].long()
            scales = self.scales[chosen, t].float() * self.gain(energies, t)[:, None]
            ids.append(nearest(residual.gather(1, columns) / scales, self.codebook, cache=self._cache))
            entries = self.codebook[ids[-1]].float()
            residual = residual.scatter_add(1, columns, -entries * scales)
            energies[:, t] = self.log_energy(entries)
            errors.append(residual.square().sum(1))
        return torch.stack(ids, 1), torch.stack(errors, 1)

    def decode(self, ids_BN: Tensor, lengths: Tensor) -> Tensor:
        """Coefficients `[B, K]` of the first `lengths` `[B]` ids; differentiable with respect to the tables."""
        chosen, variant = ids_BN[:, 0] // self.variants, ids_BN[:, 0] % self.variants
        entries_BND = self.codebook[ids_BN[:, 1:]].float()
        energies = F.pad(self.log_energy(entries_BND), (1, len(self.energy_bias) - ids_BN.shape[1]))
        gains = (energies @ self.energy_weights.float().tril(-1).T + self.energy_bias.float()).exp()
        gains = gains[:, 1 : ids_BN.shape[1], None]
        kept = torch.arange(1, ids_BN.shape[1], device=ids_BN.device) < lengths[:, None]
        rest = entries_BND * self.scales[chosen, 1 : ids_BN.shape[1]].float() * gains * kept[..., None]
        values = torch.cat([self.first_codebook[chosen, variant].float(), rest.flatten(1)], 1)
        columns = self.columns[chosen, : ids_BN.shape[1]].long().flatten(1)
        return self.mean.float().expand(len(ids_BN), -1).scatter_add(1, columns, values)

    def class_lengths(self, x_BK: Tensor) -> Tensor:
        """How long each class's Gaussian describes centred coefficients, `[B, P]`, up to scale and constants."""
        return torch.addmm(self.class_costs.float(), x_BK.square(), self.precisions.float().T)

    def gain(self, energies: Tensor, t: int) -> Tensor:
        """Factor `[B]` on the scales of token `t`, from the log energies `[B, N]` of the tokens before it."""
        return ((energies[:, :t] * self.energy_weights[t, :t].float()).sum(1) + self.energy_bias[t].float()).exp()

    @staticmethod
    def log_energy(entries: Tensor) -> Tensor:
        """Half the log of the mean square of code vectors `(..., D)`: how far from the typical energy they are."""
        return 0.5 * torch.log(entries.square().mean(-1) + _ENERGY_FLOOR)


class OneDPieceNano(Tokenizer):
    """The tokenizer: up to `num_tokens` ids per image, of which any prefix decodes."""

    architecture: ClassVar[str] = "one_d_piece_nano"
    modality: ClassVar[Modality] = "image"
    config_class: ClassVar[type[TokenizerConfig]] = OneDPieceNanoConfig
    config: OneDPieceNanoConfig
    kept: Tensor

    def __init__(self, config: OneDPieceNanoConfig) -> None:
        super().__init__(config, Images(config.image_size, "stretch"))
        kept, bands = spectrum_layout(config)
        self.register_buffer("kept", kept, persistent=False)
        self.code = SpectralCode(config, bands)
        self.refiner = Refiner(
            config.image_size, width=config.width, blocks=config.blocks, heads=config.heads, condition_dim=config.condition_dim
        )
        self.class_embedding = nn.Parameter(0.02 * torch.randn(config.num_classes, config.condition_dim))
        self.length_embedding = nn.Sequential(
            nn.Linear(16, config.condition_dim), nn.SiLU(), nn.Linear(config.condition_dim, config.condition_dim)
        )

    def _describe(self) -> dict[str, Any]:
        return {
            "codebook_sizes": (self.config.codebook_size,),
            "variable": "prefix",
            "max_tokens": self.config.num_tokens,
        }

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del seed
        with torch.autocast(batch.device.type, enabled=False):
            ids = self.code.encode(self.analyse(batch), length or self.config.num_tokens, tries=self.config.classes_tried)
        return Codes(ids[:, None])

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del extras
        return self.reconstruct(ids[:, 0], lengths[:, 0]).clamp(0, 1)

    def analyse(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] to kept coefficients, float32 `[B, K]`."""
        return self.spectrum(images)[:, self.kept]

    def spectrum(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] to all coefficients, float32 `[B, 3 * H * W]`, which have the pixels' energy."""
        cosines, colours = self._bases(images.device)
        return torch.einsum("uh,kc,bchw,vw->bkuv", cosines, colours, images.float() - 0.5, cosines).flatten(1)

    def synthesise(self, x_BK: Tensor) -> Tensor:
        """The inverse of `analyse`, with zeros for the coefficients that are not kept."""
        cosines, colours = self._bases(x_BK.device)
        side = self.config.image_size
        spectrum = x_BK.new_zeros(len(x_BK), 3 * side**2).index_copy(1, self.kept, x_BK)
        return torch.einsum("uh,kc,bkuv,vw->bchw", cosines, colours, spectrum.view(-1, 3, side, side), cosines) + 0.5

    def reconstruct(self, ids_BN: Tensor, lengths: Tensor) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped, of the first `lengths` `[B]` ids."""
        with torch.autocast(ids_BN.device.type, enabled=False):
            coarse = self.synthesise(self.code.decode(ids_BN, lengths))
        condition = self.length_embedding(length_features(lengths, self.config.num_tokens).to(self.dtype))
        condition = condition + self.class_embedding[ids_BN[:, 0] // self.code.variants]
        return self.refiner(coarse.to(self.dtype), F.silu(condition))

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Mean log squared error, which is PSNR, of prefixes of random length (tail token drop)."""
        del progress
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
            ids = self.code.encode(self.analyse(batch), self.config.num_tokens)
        lengths = self._training_lengths(len(batch), generator).to(batch.device)
        if not self.training:
            lengths = torch.full_like(lengths, self.config.num_tokens)
        reconstruction = self.reconstruct(ids, lengths).float()
        errors = (reconstruction - batch.float()).square().flatten(1).mean(1)
        used = torch.bincount(ids.flatten(), minlength=self.config.codebook_size).count_nonzero()
        quality = psnr(reconstruction.detach().clamp(0, 1), batch).mean()
        return Output(reconstruction, {"log_error": torch.log(errors + 1e-5).mean()}, {"psnr": quality, "codes_used": used})

    def _training_lengths(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Prefix lengths: a third all, a third half, a third log-uniform."""
        device = generator.device if generator is not None else "cpu"
        longest = self.config.num_tokens
        kind, place = torch.rand(2, count, generator=generator, device=device)
        free = (longest + 1.0) ** place
        lengths = torch.where(kind < 1 / 3, float(longest), torch.where(kind < 2 / 3, longest / 2, free))
        return lengths.long().clamp(1, longest)

    @torch.no_grad()
    def initialise(self, crops: Tensor, generator: torch.Generator) -> None:
        """Estimates the code from uint8 crops `[M, 3, H, W]`, some hundred per class."""
        x_BK = torch.cat([self.analyse(part.float() / 255) for part in crops.split(256)])
        fit_spectral_code(self.code, x_BK, generator)

    def _bases(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """DCT and colour matrices, computed rather than stored so that no cast to half precision blunts them."""
        colours = F.normalize(torch.tensor(_COLOUR_AXES, device=device), dim=1)
        return cosine_matrix(self.config.image_size).to(device), colours


@cache
def cosine_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II, float32 `[size, size]`; rows are frequencies."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) * frequency / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def spectrum_layout(config: OneDPieceNanoConfig) -> tuple[Tensor, Tensor]:
    """Indices `[K]` of kept coefficients in a flat `(channel, u, v)` spectrum, and the band `[K]` of each.

    A band is half an octave of one channel and, for luma, one of three directions.
    """
    frequencies = torch.arange(config.image_size, dtype=torch.float64)
    u, v = torch.meshgrid(frequencies, frequencies, indexing="ij")
    distance = (u.square() + v.square()).sqrt()
    radii = (config.luma_radius, config.chroma_radius, config.chroma_radius)
    kept = torch.stack([distance < radius for radius in radii]).flatten().nonzero()[:, 0]
    octave = (2 * torch.log2(distance.clamp(min=0.7))).round().long() + 1
    direction = (torch.atan2(u, v) / (math.pi / 2) * 2.999).long()
    labels = torch.stack([10 * octave + direction, 1000 + 10 * octave, 2000 + 10 * octave]).flatten()[kept]
    return kept, labels.unique(return_inverse=True)[1]


def length_features(lengths: Tensor, longest: int) -> Tensor:
    """Cosines `[B, 16]` of the log of the number of tokens."""
    place = torch.log(lengths.float()) / math.log(longest + 1)
    return torch.cos(math.pi * place[:, None] * torch.arange(16, device=lengths.device))
