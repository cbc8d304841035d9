"""The convolutional autoencoder of latent diffusion as a tokenizer of its own: an image as a grid of Gaussian vectors.

Paper: https://arxiv.org/abs/2112.10752
Reference implementation: `AutoencoderKL` of huggingface/diffusers, Apache-2.0.

There are no codes: the vectors, one per cell of 8 x 8 pixels, are in `Tokens.extras["vectors"]`, row by row.

Here, unlike there: the posterior's mean is what an image is encoded to, so that encoding is deterministic, unless the config
says `sample_posterior`; vectors are not multiplied with the `scaling_factor` that models trained on them apply.

Shapes: B batch, N cells, C channels of the latents, h w grid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.encoders.autoencoder_kl import DIFFUSERS_KEYS, AutoencoderKL, arguments_from_diffusers
from tokenzoo.tokenizers import Codes, ConfigError, Output, Tokenizer, TokenizerConfig
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.image._common import draw_once, vectors_of
from tokenzoo.tokenizers.images import Images
from tokenzoo.tokenizers.quality import psnr
from tokenzoo.tokenizers.spec import Modality


@strict
@dataclass(kw_only=True)
class GridVAEConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are FlexTok's 16-channel autoencoder.

    Attributes:
        image_size: Height and width in pixels.
        latent_channels: Width of a vector.
        channels: Channels of each level, finest first; all but the last halve the resolution.
        num_blocks: Residual blocks per level of the encoder.
        groups: Of every GroupNorm.
        scaling_factor: What models trained on the vectors multiply them with.
        sample_posterior: Encode to samples, drawn with the seed of `encode`, instead of means.
        kl_weight: Weight of the KL divergence to the standard normal in training.
    """

    image_size: int = 256
    latent_channels: int = 16
    channels: tuple[int, ...] = (128, 256, 512, 512)
    num_blocks: int = 2
    groups: int = 32
    scaling_factor: float = 0.18215
    sample_posterior: bool = False
    kl_weight: float = 1e-6

    @property
    def grid(self) -> int:
        """Cells along one side of the image."""
        return self.image_size // 2 ** (len(self.channels) - 1)

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        if not self.channels or min(*self.channels, self.groups, self.num_blocks, self.latent_channels) < 1:
            raise ValueError("expected channels, num_blocks, groups and latent_channels of at least 1")
        if any(width % self.groups for width in self.channels):
            raise ValueError(f"expected channels that {self.groups = } divides, got {self.channels}")
        if self.grid < 1 or self.grid * 2 ** (len(self.channels) - 1) != self.image_size:
            raise ValueError(f"expected an image_size that {len(self.channels) - 1} halvings divide, got {self.image_size}")


def config_from_published(
    published: Mapping[str, Any], related: Callable[[str], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The values of our config that a diffusers `config.json` stands for.

    Args:
        published: The flat form that diffusers writes.
        related: Without effect: these configs refer to no others.

    Raises:
        ConfigError: If it is another network's, or has a key or value that this one does not know.
    """
    del related
    try:
        return arguments_from_diffusers(published)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"published config of an AutoencoderKL: {error}") from error


class GridVAE(Tokenizer):
    """The tokenizer: one vector per cell of the grid."""

    architecture: ClassVar[str] = "autoencoder_kl"
    modality: ClassVar[Modality] = "image"
    config_class: ClassVar[type[TokenizerConfig]] = GridVAEConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "diffusers": Adapter(
            rules=(*((theirs, f"vae.{ours}") for theirs, ours in DIFFUSERS_KEYS), ("", "vae.")),
        )
    }
    config_from_published = staticmethod(config_from_published)
    config: GridVAEConfig

    def __init__(self, config: GridVAEConfig) -> None:
        super().__init__(config, Images(config.image_size))
        self.vae = AutoencoderKL(config.latent_channels, config.channels, num_blocks=config.num_blocks, groups=config.groups)

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (), "max_tokens": self.config.grid**2, "grid": (self.config.grid, self.config.grid)}

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length
        mean, log_variance = self.vae.encode(2 * batch - 1)
        if self.config.sample_posterior:
            mean = mean + (0.5 * log_variance).exp() * draw_once(mean.shape[1:], seed, mean.device)
        vectors = mean.flatten(2).transpose(1, 2).contiguous()
        ids = torch.zeros(len(mean), 0, vectors.shape[1], dtype=torch.long, device=mean.device)
        return Codes(ids, extras={"vectors": vectors})

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del ids
        grid = self.config.grid
        vectors = vectors_of(extras, (len(lengths), grid**2, self.config.latent_channels))
        latents = vectors.to(self.dtype).transpose(1, 2).unflatten(2, (grid, grid))
        return ((self.vae.decode(latents) + 1) / 2).clamp(0, 1)

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Squared error of the pixels from a sample of the posterior, plus the weighted KL divergence."""
        del progress
        mean, log_variance = self.vae.encode(2 * batch - 1)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device if generator else mean.device)
        sample = mean + (0.5 * log_variance).exp() * noise.to(mean.device)
        reconstruction = (self.vae.decode(sample.to(batch.dtype)) + 1) / 2
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        losses = {"reconstruction": F.mse_loss(reconstruction.float(), batch.float()), "kl": self.config.kl_weight * kl}
        quality = psnr(reconstruction.detach().clamp(0, 1), batch).mean()
        return Output(reconstruction, losses, {"psnr": quality, "kl": kl.detach()})
