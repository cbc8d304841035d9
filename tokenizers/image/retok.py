"""ReToK: an image as 1 to 256 ordered tokens, trained beside redundant ones so that the last ones carry their share.

Paper: https://arxiv.org/abs/2601.01535
Reference implementation: zfu006/ReTok@ffaa8a7, which builds on GigaTok and LlamaGen; no licence is stated.

A convolutional encoder makes a 16 x 16 map; queries that start as averages of it over ever smaller blocks read it and become
tokens. 224 further queries repeat the start of queries 32 to 255: their tokens pad the sequence while it is trained with
nested dropout, so that the real ones are dropped less often, and are thrown away afterwards. The decoder's spatial queries
all start as the first token, read a prefix of the tokens, and a convolutional decoder paints the result.

Here, unlike there: any prefix decodes without padding or hard-coded lengths; what only the padding's tokens would need of
the last layer is not computed; `encode(target=...)` finds the shortest prefix of a wanted quality. The training code of
ReToK was not published: `objective` follows the paper's text and says where it had to choose.

Shapes: B batch, N tokens, P padding tokens, C width of a code, D width of a transformer, F width of the map's features,
h w height and width of the map, H W height and width of the image.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.qformer import QueryTransformer, multi_level_queries
from tokenzoo.encoders.vqgan import ConvEncoder, StyledDecoder
from tokenzoo.tokenizers import Codes, ConfigError, Output, Tokenizer, TokenizerConfig
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.image._common import alignment_features, projector
from tokenzoo.tokenizers.images import Images
from tokenzoo.tokenizers.learning import keep_in_use
from tokenzoo.tokenizers.quality import psnr
from tokenzoo.tokenizers.quantizers import VectorQuantizer
from tokenzoo.tokenizers.spec import Modality


@strict
@dataclass(kw_only=True)
class ReToKConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are ReToK-S-S.

    Attributes:
        image_size: Height and width in pixels.
        num_tokens: N, a power of two.
        num_padding: P, redundant tokens, which repeat the start of the last P queries.
        encoder_dim: Width of the transformer that writes the tokens.
        encoder_layers: Its layers.
        encoder_heads: Its attention heads.
        decoder_dim: Width of the transformer that reads them.
        decoder_layers: Its layers.
        decoder_heads: Its attention heads.
        feature_dim: F, channels of the map between convolutions and transformers.
        channels: Channels of the convolutions at full resolution.
        multipliers: Channels of each level over those of the finest, finest first; each level but the last halves the map.
        blocks: Residual blocks per level.
        token_dim: C, width of a code.
        codebook_size: Codes.
        commitment: Weight of the commitment loss.
        kmeans_iterations: Rounds of k-means by which the first training batch sets the codebook; 0 for a random start.
        restart_after: Training steps after which a code that nothing chose is set to a vector of the batch; 0 for never.
        direct_until: Share of the training, from its start, in which the convolutions are also trained without tokens between
            them, and the features that come out of the tokens to point where those that went in do.
        alignment_network: timm network whose patch features training aligns the decoder with; empty for none.
        alignment_dim: Width of those features.
        alignment_layer: Layer of the decoder, from 1, that is aligned.
        alignment_weight: Weight of the alignment loss for the shortest prefix; it falls to 0 at the longest.
    """

    image_size: int = 256
    num_tokens: int = 256
    num_padding: int = 224
    encoder_dim: int = 512
    encoder_layers: int = 6
    encoder_heads: int = 8
    decoder_dim: int = 512
    decoder_layers: int = 6
    decoder_heads: int = 8
    feature_dim: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    token_dim: int = 8
    codebook_size: int = 16384
    commitment: float = 0.25
    kmeans_iterations: int = 0
    restart_after: int = 0
    direct_until: float = 0.01
    alignment_network: str = ""
    alignment_dim: int = 768
    alignment_layer: int = 3
    alignment_weight: float = 0.5

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a cell of the map."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def grid(self) -> int:
        """Cells along one side of the map."""
        return self.image_size // self.patch_size

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in (
            "encoder_layers",
            "decoder_layers",
            "feature_dim",
            "blocks",
            "token_dim",
            "codebook_size",
            "alignment_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for side in ("encoder", "decoder"):
            dim, heads = getattr(self, f"{side}_dim"), getattr(self, f"{side}_heads")
            if dim < 1 or heads < 1 or dim % heads:
                raise ValueError(f"expected {side}_dim to be a multiple of {side}_heads, got {dim} and {heads}")
        if not self.multipliers or self.channels < 1 or any(m < 1 or self.channels * m % 32 for m in self.multipliers):
            raise ValueError(
                f"expected channels times each of {self.multipliers = } to be a multiple of 32, got {self.channels}"
            )
        if self.grid < 2 or self.image_size % self.patch_size:
            raise ValueError(f"expected an image of several cells of {self.patch_size} pixels, got {self.image_size = }")
        if not 1 <= self.alignment_layer <= self.decoder_layers:
            raise ValueError(f"expected alignment_layer from 1 to {self.decoder_layers}, got {self.alignment_layer}")
        self._check_queries()

    def _check_queries(self) -> None:
        """The queries start as averages over equal blocks of the map."""
        doublings = self.num_tokens.bit_length() - 1
        if self.num_tokens < 1 or self.num_tokens != 2**doublings:
            raise ValueError(f"expected num_tokens to be a power of two, got {self.num_tokens}")
        if self.grid % 2 ** (doublings // 2):
            raise ValueError(f"expected {self.num_tokens = } to split {self.grid} x {self.grid} cells into equal blocks")
        if not 0 <= self.num_padding <= self.num_tokens:
            raise ValueError(f"expected num_padding from 0 to {self.num_tokens}, got {self.num_padding}")


class TokenEncoder(nn.Module):
    """A map of features to vectors, one per token: queries, coarse to fine, read the map."""

    def __init__(self, config: ReToKConfig) -> None:
        super().__init__()
        dim, self.num_tokens, self.num_padding = config.encoder_dim, config.num_tokens, config.num_padding
        self.norm_pre = nn.LayerNorm(config.feature_dim)
        self.embed = nn.Linear(config.feature_dim, dim)
        self.query = nn.Linear(dim, dim)
        self.positions = _positions(config.grid**2, dim)
        self.token_positions = _positions(config.num_tokens, dim)
        self.padding_positions = _positions(config.num_padding, dim)
        self.transformer = QueryTransformer(dim, config.encoder_layers, config.encoder_heads)
        self.out = nn.Linear(dim, config.feature_dim)
        self.quant = nn.Linear(config.feature_dim, config.token_dim)

    def forward(self, features: Tensor, *, padding: bool) -> Tensor:
        """Features `[B, F, h, w]` to `[B, N, C]`, or `[B, N + P, C]` with the padding's vectors."""
        memory_BMD = self.embed(self.norm_pre(features.flatten(2).transpose(1, 2)))
        grid_BDhw = memory_BMD.transpose(1, 2).unflatten(2, features.shape[2:])
        queries_BND = multi_level_queries(grid_BDhw, self.num_tokens)
        repeated = queries_BND[:, self.num_tokens - self.num_padding :]
        positions = torch.cat([self.token_positions, self.padding_positions]).transpose(0, 1)
        vectors, _ = self.transformer(
            self.query(torch.cat([queries_BND, repeated], 1)),
            positions,
            memory_BMD,
            self.positions.transpose(0, 1),
            keep=None if padding else self.num_tokens,
        )
        return self.quant(self.out(vectors))


class TokenDecoder(nn.Module):
    """Vectors of a prefix of the tokens to a map of features: spatial queries read them."""

    def __init__(self, config: ReToKConfig) -> None:
        super().__init__()
        dim, self.grid, self.tap = config.decoder_dim, config.grid, config.alignment_layer
        self.unquant = nn.Linear(config.token_dim, config.feature_dim)
        self.norm_pre = nn.LayerNorm(config.feature_dim)
        self.embed = nn.Linear(config.feature_dim, dim)
        self.positions = _positions(config.grid**2, dim)
        self.token_positions = _positions(config.num_tokens, dim)
        self.padding_positions = _positions(config.num_padding, dim)
        self.transformer = QueryTransformer(dim, config.decoder_layers, config.decoder_heads)
        self.conv_out = nn.Conv2d(dim, config.feature_dim, 3, padding=1)

    def forward(self, vectors_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """The first vectors `[B, N', C]` to features `[B, F, h, w]`, and the aligned layer's output `[B, h * w, D]`."""
        memory_BMD = self.embed(self.norm_pre(self.unquant(vectors_BNC)))
        token_positions = torch.cat([self.token_positions, self.padding_positions])[: memory_BMD.shape[1]]
        x_BLD, tapped = self.transformer(
            memory_BMD[:, :1].expand(-1, self.grid**2, -1),
            self.positions.transpose(0, 1),
            memory_BMD,
            token_positions.transpose(0, 1),
            tap=self.tap,
        )
        return self.conv_out(x_BLD.transpose(1, 2).unflatten(2, (self.grid, self.grid))), tapped


_TRANSFORMER = (
    ("transformer.{}.self_attn.in_proj_", "transformer.layers.{}.self_attention.qkv."),
    ("transformer.{}.self_attn.out_proj.", "transformer.layers.{}.self_attention.out."),
    ("transformer.{}.multihead_attn.in_proj_", "transformer.layers.{}.cross_attention.qkv."),
    ("transformer.{}.multihead_attn.out_proj.", "transformer.layers.{}.cross_attention.out."),
    ("transformer.{}.linear1.", "transformer.layers.{}.mlp.up."),
    ("transformer.{}.linear2.", "transformer.layers.{}.mlp.down."),
    ("transformer.{}.norm1.", "transformer.layers.{}.norm1."),
    ("transformer.{}.norm2.", "transformer.layers.{}.norm2."),
    ("transformer.{}.norm3.", "transformer.layers.{}.norm3."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "transformer.norm_post."),
    ("positional_embedding", "positions"),
    ("latent_token_positional_embedding_comp", "padding_positions"),
    ("latent_token_positional_embedding", "token_positions"),
)

PUBLISHED = Adapter(
    rules=(
        ("encoder.conv_blocks.{}.res.{}.nin_shortcut.", "conv_encoder.levels.{}.blocks.{}.shortcut."),
        ("decoder.conv_blocks.{}.res.{}.nin_shortcut.", "conv_decoder.levels.{}.blocks.{}.shortcut."),
        ("encoder.conv_blocks.{}.res.{}.", "conv_encoder.levels.{}.blocks.{}."),
        ("encoder.conv_blocks.{}.downsample.conv.", "conv_encoder.levels.{}.resample.conv."),
        ("encoder.", "conv_encoder."),
        ("decoder.conv_blocks.{}.res.{}.", "conv_decoder.levels.{}.blocks.{}."),
        ("decoder.conv_blocks.{}.upsample.conv1.", "conv_decoder.levels.{}.resample.conv."),
        ("decoder.adaptive.", "conv_decoder.styles."),
        ("decoder.", "conv_decoder."),
        ("s2to1encoder.encoder_embed.", "token_encoder.embed."),
        ("s2to1encoder.global_proj.", "token_encoder.query."),
        ("s2to1encoder.conv_out.", "token_encoder.out."),
        ("quant_conv.", "token_encoder.quant."),
        ("quantize.embedding.weight", "quantizer.codebook"),
        ("post_quant_conv.", "token_decoder.unquant."),
        ("s1to2decoder.decoder_embed.", "token_decoder.embed."),
        ("s1to2decoder.conv_out.", "token_decoder.conv_out."),
        ("s1to2decoder.distill_mlp.", "alignment."),
        *(("s2to1encoder." + published, "token_encoder." + ours) for published, ours in _TRANSFORMER),
        *(("s1to2decoder." + published, "token_decoder." + ours) for published, ours in _TRANSFORMER),
    ),
    dropped={
        "s1to2decoder.distill_mlp.*": "projects decoder features onto DINOv2's, for the regularization in training",
        "quantize.codebook_used": "the codes of the last training steps, kept to log how many are in use",
    },
    pointwise=("token_encoder.out.weight", "token_encoder.quant.weight", "token_decoder.unquant.weight"),
    inside=("ema", "model", "state_dict"),
)


class ReToK(Tokenizer):
    """The tokenizer: up to `num_tokens` ids per image, of which any prefix decodes.

    Attributes:
        features: Gives `[B, h * w, alignment_dim]` of images `[B, 3, H, W]` in [0, 1], for training with an
            `alignment_network`; that network if `None`. It is no part of the weights.
    """

    architecture: ClassVar[str] = "retok"
    modality: ClassVar[Modality] = "image"
    config_class: ClassVar[type[TokenizerConfig]] = ReToKConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config: ReToKConfig

    def __init__(self, config: ReToKConfig) -> None:
        super().__init__(config, Images(config.image_size, fit="adm"))
        shape = (config.feature_dim, config.channels, config.multipliers, config.blocks)
        self.conv_encoder = ConvEncoder(*shape)
        self.token_encoder = TokenEncoder(config)
        self.token_decoder = TokenDecoder(config)
        self.conv_decoder = StyledDecoder(*shape)
        self.alignment = None
        if config.alignment_network:
            self.alignment = projector(config.decoder_dim, 4 * config.decoder_dim, config.alignment_dim)
        self.quantizer = VectorQuantizer(
            config.codebook_size,
            config.token_dim,
            metric="cosine",
            commitment=config.commitment,
            gradient="rotation",
            learning=keep_in_use(kmeans_iterations=config.kmeans_iterations, restart_after=config.restart_after),
        )
        self.quantizer.codebook.data = F.normalize(self.quantizer.codebook.data, dim=-1)
        self.features: Callable[[Tensor], Tensor] | None = None

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.codebook_size,), "variable": "prefix", "max_tokens": self.config.num_tokens}

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length, seed  # the tokens are computed together; the caller cuts them off
        vectors_BNC = self.token_encoder(self.conv_encoder(2 * batch - 1), padding=False)
        return Codes(self.quantizer.ids(vectors_BNC)[:, None])

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del lengths, extras
        features, _ = self.token_decoder(self.quantizer.lookup(ids[:, 0]).to(self.dtype))
        return self._paint(features).clamp(0, 1)

    def _paint(self, features: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` about [0, 1] of features `[B, F, h, w]`."""
        return (self.conv_decoder(features) + 1) / 2

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Squared error of the pixels, the quantizer's loss, and alignment with an `alignment_network`.

        The prefix that is decoded is uniform from 1 to all N + P tokens, one length per batch, so that a real token is
        kept with at least the probability P / (N + P). The alignment loss is one minus the mean cosine similarity,
        times `alignment_weight` (GigaTok's 0.5) and a factor that falls linearly from 1 for the shortest prefix to 0 for the
        longest: the paper says that it falls, not how. Up to `direct_until` there are GigaTok's two losses that start the
        convolutions and the transformers separately. The published recipe adds perceptual and adversarial losses.
        """
        features = self.conv_encoder(2 * batch - 1)
        vectors, ids, commitment = self.quantizer(self.token_encoder(features, padding=self.training))
        kept = self._training_length(generator) if self.training else self.config.num_tokens
        decoded, tapped = self.token_decoder(vectors[:, :kept].to(batch.dtype))
        reconstruction = self._paint(decoded)
        losses = {"reconstruction": F.mse_loss(reconstruction.float(), batch.float()), "quantizer": commitment}
        used = torch.bincount(ids.flatten(), minlength=self.config.codebook_size).count_nonzero()
        metrics = {"psnr": psnr(reconstruction.detach().clamp(0, 1), batch).mean(), "codes_used": used}
        if self.training and progress < self.config.direct_until:
            losses["direct"] = F.mse_loss(self._paint(features).float(), batch.float())
            losses["features"] = 1 - F.cosine_similarity(decoded.float(), features.detach().float(), dim=1).mean()
        if self.alignment is not None:
            distance = self._alignment_distance(self.alignment(tapped), batch)
            total = self.config.num_tokens + self.config.num_padding
            losses["alignment"] = self.config.alignment_weight * (total - kept) / max(1, total - 1) * distance
            metrics["alignment_distance"] = distance.detach()
        return Output(reconstruction, losses, metrics)

    def _training_length(self, generator: torch.Generator | None) -> int:
        """Nested dropout over the padded sequence: uniform from 1 to all."""
        total = self.config.num_tokens + self.config.num_padding
        device = generator.device if generator is not None else "cpu"
        return int(torch.randint(1, total + 1, (), generator=generator, device=device))

    def _alignment_distance(self, projected: Tensor, images: Tensor) -> Tensor:
        """1 minus the mean cosine similarity between the projected layer and the features of the images."""
        if self.features is None:
            self.features = alignment_features(self.config.alignment_network, self.config.grid)
        with torch.no_grad():
            wanted = self.features(images)
        if wanted.shape != projected.shape:
            network = self.config.alignment_network
            raise ConfigError(f"expected features {tuple(projected.shape)} of {network}, got {tuple(wanted.shape)}")
        return 1 - F.cosine_similarity(projected.float(), wanted.float(), dim=-1).mean()


def _positions(length: int, dim: int) -> nn.Parameter:
    """Learned positions `[length, 1, dim]`, as published."""
    return nn.Parameter(torch.randn(length, 1, dim) / math.sqrt(dim))
