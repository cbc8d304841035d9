"""LARP: a clip as an ordered sequence of holistic tokens, which learned queries gather from all of its patches.

Paper: https://arxiv.org/abs/2410.21264
Reference implementation: hywang66/LARP@8aaed63, MIT.

The encoder attends over patches and queries together, and the queries are kept; each becomes one of 8,192 codes by cosine.
The decoder attends over the codes and one query per patch, and the patches are kept. Nothing is causal and no token belongs
to a place, so longer clips are cut into windows of 16 frames, each of which is coded by itself.

Here, unlike there: codes are the most similar ones, while the published pipeline draws them at random (temperature 0.03)
unless told otherwise, in evaluation too; here only training does. The last transformer block computes only what is read. The
autoregressive prior, a second network that the published recipe trains beside this one, is left out.

Shapes: B batch, T frames, P patches of a window, N tokens of a window, D width, C width of a code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.vit import TIMM_BLOCK_KEYS, Block
from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.clips import Video
from tokenzoo.tokenizers.quantizers import FactorizedQuantizer, Quantized, carry_gradient
from tokenzoo.tokenizers.spec import Modality
from tokenzoo.tokenizers.video._common import Loss, repeat_last, trained

_ROWS_AT_ONCE = 4096


@strict
@dataclass(kw_only=True)
class LARPConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are LARP-L-long.

    Attributes:
        image_size: Height and width of a frame in pixels.
        num_frames: Frames of a window.
        patch_size: Height and width of a patch in pixels.
        frame_stride: Frames per patch.
        num_tokens: Tokens per window.
        dim: Width.
        layers: Blocks of the encoder, and of the decoder.
        heads: Attention heads.
        codebook_size: Codes.
        token_dim: Width of a code.
        commitment: Weight of the commitment loss within the quantizer's.
        temperature: Of the cosines by which training draws codes; 0 for the most similar ones, as in encoding.
        quantizer_weight: Of the quantizer's loss.
        fit: Frames of another size are stretched to the network's, or their centre is cropped.
    """

    image_size: int = 128
    num_frames: int = 16
    patch_size: int = 8
    frame_stride: int = 4
    num_tokens: int = 1024
    dim: int = 768
    layers: int = 12
    heads: int = 12
    codebook_size: int = 8192
    token_dim: int = 16
    commitment: float = 0.25
    temperature: float = 0.03
    quantizer_weight: float = 0.1
    fit: Literal["stretch", "crop"] = "stretch"

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches of a window in time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.frame_stride, side, side

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("patch_size", "frame_stride", "num_tokens", "layers", "heads", "token_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"expected an image size that patch_size={self.patch_size} divides, got {self.image_size}")
        if self.num_frames < 1 or self.num_frames % self.frame_stride:
            raise ValueError(f"expected a number of frames that {self.frame_stride} divides, got num_frames={self.num_frames}")
        if self.dim < 4 or self.dim % 4 or self.dim % self.heads:
            raise ValueError(f"expected a width that 4 and heads={self.heads} divide, got dim={self.dim}")
        if self.temperature < 0:
            raise ValueError(f"expected no negative temperature, got {self.temperature}")


class DrawingQuantizer(FactorizedQuantizer):
    """Codes by cosine, which training draws with the softmax of the cosines over `temperature` as probabilities."""

    def __init__(self, size: int, dim: int, input_dim: int, *, commitment: float, temperature: float) -> None:
        super().__init__(size, dim, input_dim, commitment=commitment, unit_entries=True)
        self.temperature = temperature

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Quantizes `(..., D)` for training, as `FactorizedQuantizer` does but for how codes are chosen."""
        if not self.training or not self.temperature:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(self.in_proj(x.float()), dim=-1)
            ids = self._draw(x.detach().flatten(0, -2), generator).view(x.shape[:-1])
            entries = F.normalize(F.embedding(ids, self.codebook), dim=-1)
            loss = F.mse_loss(entries, x.detach()) + self.commitment * F.mse_loss(x, entries.detach())
            return Quantized(self.out_proj(carry_gradient(x, entries, self.gradient)), ids, loss)

    @torch.no_grad()
    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Ids of unit vectors `(N, C)`, some rows at a time: what is between them and the codes would fill the memory."""
        device = generator.device if generator else x.device
        codes, ids = F.normalize(self.codebook, dim=-1), []
        for rows in x.split(_ROWS_AT_ONCE):
            reached = (rows @ codes.T / self.temperature).softmax(-1).cumsum(-1)
            at = torch.rand(len(rows), 1, generator=generator, device=device).to(x.device) * reached[:, -1:]
            ids.append(torch.searchsorted(reached, at, right=True)[:, 0].clamp_max(len(codes) - 1))
        return torch.cat(ids)


class Blocks(nn.Module):
    """Transformer blocks over a context and queries, of which the queries are kept; no LayerNorm before or after."""

    def __init__(self, config: LARPConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, qkv_bias=False) for _ in range(config.layers))

    def forward(self, context: Tensor, queries: Tensor) -> Tensor:
        """`[B, L, D]` and `[B, L', D]` to `[B, L', D]`."""
        x = torch.cat([context, queries], 1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return last(x, slice(context.shape[1], None))


class Encoder(nn.Module):
    """Windows of a clip to one vector per token."""

    positions: Tensor

    def __init__(self, config: LARPConfig) -> None:
        super().__init__()
        patch = (config.frame_stride, config.patch_size, config.patch_size)
        self.patch_embed = nn.Conv3d(3, config.dim, patch, stride=patch)
        self.register_buffer("positions", _patch_waves(config)[None])
        self.queries = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.dim))
        self.transformer = Blocks(config)

    def forward(self, clip: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` in [0, 1] to `[B, N, D]`."""
        patches = self.patch_embed(clip.transpose(1, 2)).flatten(2).mT + self.positions
        return self.transformer(patches, self.queries.expand(len(clip), -1, -1))


class Decoder(nn.Module):
    """One vector per token to windows of a clip."""

    positions: Tensor
    queries: Tensor

    def __init__(self, config: LARPConfig) -> None:
        super().__init__()
        self.grid, self.patch = config.grid, (config.frame_stride, config.patch_size, config.patch_size)
        self.register_buffer("positions", waves(torch.arange(config.num_tokens), config.dim)[None])
        self.register_buffer("queries", _patch_waves(config)[None])
        self.query_type = nn.Parameter(0.02 * torch.randn(1, 1, config.dim))
        self.transformer = Blocks(config)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.out = nn.Linear(config.dim, 3 * config.frame_stride * config.patch_size**2)

    def forward(self, vectors_BND: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, T, 3, H, W]`, not clamped; within a patch, channels vary fastest, frames slowest."""
        batch = len(vectors_BND)
        queries = (self.queries + self.query_type).expand(batch, -1, -1)
        x = self.out(self.norm(self.transformer(vectors_BND + self.positions, queries)))
        (t, h, w), (frames, height, width) = self.grid, self.patch
        pixels = x.view(batch, t, h, w, frames, height, width, 3).permute(0, 1, 4, 7, 2, 5, 3, 6)
        return pixels.reshape(batch, t * frames, 3, h * height, w * width)


def waves(places: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of `places` `(N,)` at `dim / 2` wavelengths from 2 pi to 10,000 times that: `(N, dim)`."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = torch.outer(places.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def _patch_waves(config: LARPConfig) -> Tensor:
    """Of the patches of a window, `[P, D]`: columns in the first half of the width, rows in the second, times over both."""
    time, height, width = config.grid
    times = waves(torch.arange(time), config.dim)[:, None, None]
    rows = waves(torch.arange(height), config.dim // 2)[:, None].expand(-1, width, -1)
    columns = waves(torch.arange(width), config.dim // 2).expand(height, -1, -1)
    return (times + torch.cat([columns, rows], -1)).flatten(0, 2)


PUBLISHED = Adapter(
    rules=(
        ("x_embedder.proj.", "encoder.patch_embed."),
        ("encoder_patch_pe", "encoder.positions"),
        ("encoder_latent_query_embed", "encoder.queries"),
        ("decoder_latent_pe", "decoder.positions"),
        ("decoder_patch_query_embed", "decoder.queries"),
        ("decoder_patch_query_token_type_embed", "decoder.query_type"),
        ("bottleneck.in_linear.", "quantizer.in_proj."),
        ("bottleneck.out_linear.", "quantizer.out_proj."),
        ("bottleneck.regularizer.embedding.weight", "quantizer.codebook"),
        ("final_layer.norm_final.", "decoder.norm."),
        ("final_layer.linear.", "decoder.out."),
        *(
            (f"{side}.blocks.{{}}.{published}", f"{side}.transformer.blocks.{{}}.{ours}")
            for side in ("encoder", "decoder")
            for published, ours in TIMM_BLOCK_KEYS
        ),
    ),
    dropped={"prior_model.*": "the autoregressive prior, which only training needs"},
)


class LARP(Tokenizer):
    """The tokenizer: `num_tokens` ids per window of `num_frames` frames; the last window is filled up with its last frame.

    Attributes:
        extra_losses: Further terms of `objective`, of `(reconstruction, original)`, clips `[B, T, 3, H, W]` in [0, 1] both,
            such as a perceptual network of yours.
    """

    architecture: ClassVar[str] = "larp"
    modality: ClassVar[Modality] = "video"
    config_class: ClassVar[type[TokenizerConfig]] = LARPConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config: LARPConfig

    def __init__(self, config: LARPConfig) -> None:
        super().__init__(config, Video(config.image_size, config.fit))
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        for side in (self.encoder, self.decoder):
            side.apply(_initialize)
        self.quantizer = DrawingQuantizer(
            config.codebook_size,
            config.token_dim,
            config.dim,
            commitment=config.commitment,
            temperature=config.temperature,
        )
        self.extra_losses: dict[str, Loss] = {}

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.codebook_size,)}

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length, seed
        windows = batch.split(self.config.num_frames, 1)
        return Codes(torch.cat([self.quantizer.ids(self.encoder(self._fill(window))) for window in windows], 1)[:, None])

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del lengths, extras
        number = self.config.num_tokens
        if ids.shape[2] % number:
            raise TokensError(f"expected all {number} tokens of every window, got {ids.shape[2]} tokens")
        windows = ids[:, 0].split(number, 1)
        return torch.cat([self.decoder(self.quantizer.lookup(window).to(self.dtype)) for window in windows], 1).clamp(0, 1)

    def _fill(self, window: Tensor) -> Tensor:
        return repeat_last(window, self.config.num_frames - window.shape[1])

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Absolute error of the pixels, the quantizer's loss, and `extra_losses`, on clips `[B, T, 3, H, W]` in [0, 1].

        Clips have no more frames than a window. The published recipe adds a perceptual loss, an adversarial one (here the
        training loop's: `adversary` in the recipe), and the cross-entropy of an autoregressive prior.
        """
        del progress
        found = self.quantizer(self.encoder(self._fill(batch)), generator)
        reconstruction = self.decoder(found.vectors.to(batch.dtype))[:, : batch.shape[1]]
        pixels = F.l1_loss(reconstruction.float(), batch.float())
        losses = {"pixels": pixels, "quantizer": self.config.quantizer_weight * found.loss}
        return trained(batch, reconstruction, losses, self.extra_losses, found.ids, self.config.codebook_size)


def _initialize(module: nn.Module) -> None:
    """The published start: uniform by fan-in and fan-out, without biases."""
    if isinstance(module, (nn.Linear, nn.Conv3d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
