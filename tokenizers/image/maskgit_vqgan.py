"""MaskGIT's VQGAN as a tokenizer: a grid of codes per image, and the teacher of TiTok's first training stage.

Paper: https://arxiv.org/abs/2202.04200
Reference implementation: bytedance/1d-tokenizer@942a96f, Apache-2.0, which follows huggingface/open-muse.

The network is `tokenzoo.encoders.maskgit_vqgan`. Its 256 ids per picture are a grid, rows first; nothing can be cut off.

Shapes: B batch, D width of the codes, h w height and width of the grid, H W height and width of the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.nn import functional as F

from tokenzoo.encoders.maskgit_vqgan import PixelDecoder, PixelEncoder
from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.images import Images
from tokenzoo.tokenizers.learning import keep_in_use
from tokenzoo.tokenizers.quality import psnr
from tokenzoo.tokenizers.quantizers import VectorQuantizer
from tokenzoo.tokenizers.spec import Modality


@strict
@dataclass(kw_only=True)
class VQGANConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are the published one.

    Attributes:
        image_size: Height and width in pixels.
        codebook_size: Codes.
        dim: D.
        channels: Channels at full resolution.
        multipliers: Channels of each level over those of the finest, finest first; each level but the last halves the grid.
        blocks: Residual blocks per level.
        commitment: Weight of the commitment loss.
        kmeans_iterations: Rounds of k-means by which the first training batch sets the codebook; 0 for a random start.
        restart_after: Training steps after which a code that nothing chose is set to a vector of the batch; 0 for never.
    """

    image_size: int = 256
    codebook_size: int = 1024
    dim: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    commitment: float = 0.25
    kmeans_iterations: int = 0
    restart_after: int = 0

    @property
    def grid(self) -> int:
        """Codes along one side of the image."""
        return int(self.image_size // 2 ** (len(self.multipliers) - 1))

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("image_size", "codebook_size", "dim", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not self.multipliers or self.channels < 1 or any(m < 1 or self.channels * m % 32 for m in self.multipliers):
            raise ValueError(f"expected channels that times {self.multipliers} are multiples of 32, got {self.channels}")
        if self.grid < 1 or self.image_size % self.grid:
            raise ValueError(f"expected an image that {len(self.multipliers) - 1} halvings divide, got {self.image_size}")


class VQGAN(Tokenizer):
    """The tokenizer: `grid * grid` ids per image, rows first, always all of them."""

    architecture: ClassVar[str] = "maskgit_vqgan"
    modality: ClassVar[Modality] = "image"
    config_class: ClassVar[type[TokenizerConfig]] = VQGANConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "published": Adapter(rules=(("quantize.embedding.weight", "quantizer.codebook"),))
    }
    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config, Images(config.image_size))
        shape = (config.dim, config.channels, config.multipliers, config.blocks)
        self.encoder = PixelEncoder(*shape)
        self.quantizer = VectorQuantizer(
            config.codebook_size,
            config.dim,
            commitment=config.commitment,
            learning=keep_in_use(kmeans_iterations=config.kmeans_iterations, restart_after=config.restart_after),
        )
        self.decoder = PixelDecoder(*shape)

    def _describe(self) -> dict[str, Any]:
        grid = self.config.grid
        return {"codebook_sizes": (self.config.codebook_size,), "max_tokens": grid**2, "grid": (grid, grid)}

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length, seed
        return Codes(self.codes(batch)[:, None])

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Ids int64 `[B, h * w]`, rows first, of images `[B, 3, H, W]` in [0, 1]."""
        return self.quantizer.ids(self.encoder(images).flatten(2).transpose(1, 2))

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del lengths, extras
        if ids.shape[2] != self.config.grid**2:
            raise TokensError(f"expected all {self.config.grid**2} tokens of an image, got {ids.shape[2]}: encode it again")
        return self._paint(self.quantizer.lookup(ids[:, 0]).to(self.dtype)).clamp(0, 1)

    def _paint(self, vectors_BLD: Tensor) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped, of vectors `[B, h * w, D]`."""
        return self.decoder(vectors_BLD.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid)))

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Squared error of the pixels plus the quantizer's loss: the published recipe without its second networks."""
        del progress, generator
        vectors, ids, commitment = self.quantizer(self.encoder(batch).flatten(2).transpose(1, 2))
        reconstruction = self._paint(vectors.to(batch.dtype))
        used = torch.bincount(ids.flatten(), minlength=self.config.codebook_size).count_nonzero()
        metrics = {"psnr": psnr(reconstruction.detach().clamp(0, 1), batch).mean(), "codes_used": used}
        error = F.mse_loss(reconstruction.float(), batch.float())
        return Output(reconstruction, {"reconstruction": error, "quantizer": commitment}, metrics)
