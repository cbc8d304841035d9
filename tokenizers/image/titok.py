"""TiTok: an image as a short sequence of 1D tokens, read by latent queries and written by mask tokens.

Paper: https://arxiv.org/abs/2406.07550
Reference implementation: bytedance/1d-tokenizer@942a96f, Apache-2.0; weights Apache-2.0.

Three generations share the two transformers:

* legacy (L-32, B-64, S-128): 4,096 codes of width 12 compared by cosine; the decoder predicts the 1,024 codes of
  MaskGIT's VQGAN, whose expected embedding its convolutional decoder turns into pixels.
* VQ (BL-64, BL-128, SL-256): 8,192 codes of width 64 compared by Euclidean distance; the decoder writes patches of pixels.
* VAE (LL-32, BL-64, BL-128): no codes but Gaussian vectors of width 16, in `Tokens.extras["vectors"]`.

Here, unlike there: the posterior's mean is what the VAE variants encode to, so that encoding is deterministic, unless the
config says `sample_posterior`; the last transformer block computes only what is read.

Shapes: B batch, N latent tokens, L tokens of a sequence, D width, C width of a code, H W height and width, h w grid of patches.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.maskgit_vqgan import PixelDecoder
from tokenzoo.encoders.vit import CLIP_BLOCK_KEYS, Transformer
from tokenzoo.tokenizers import Codes, ConfigError, Output, Tokenizer, TokenizerConfig, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.image._common import draw_once, vectors_of
from tokenzoo.tokenizers.image.maskgit_vqgan import VQGAN
from tokenzoo.tokenizers.images import Images
from tokenzoo.tokenizers.learning import keep_in_use
from tokenzoo.tokenizers.quality import psnr
from tokenzoo.tokenizers.quantizers import VectorQuantizer
from tokenzoo.tokenizers.spec import Modality


@strict
@dataclass(kw_only=True)
class TiTokConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are TiTok-L-32.

    Attributes:
        image_size: Height and width in pixels.
        patch_size: Height and width of a patch in pixels.
        num_tokens: Latent tokens per image.
        encoder_dim: Width of the encoder.
        encoder_layers: Blocks of the encoder.
        encoder_heads: Attention heads of the encoder.
        decoder_dim: Width of the decoder.
        decoder_layers: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        quantizer: Codes (`"vq"`), or Gaussian vectors (`"vae"`).
        token_dim: Width of a code or vector.
        codebook_size: Codes.
        metric: How vectors are compared with codes.
        commitment: Weight of the commitment loss.
        kmeans_iterations: Rounds of k-means by which the first training batch sets the codebook; 0 for a random start.
        restart_after: Training steps after which a code that nothing chose is set to a vector of the batch; 0 for never.
        kl_weight: Weight of the KL divergence to the standard normal (`"vae"`).
        sample_posterior: Encode to samples, drawn with the seed of `encode`, instead of means (`"vae"`).
        legacy: Whether the encoder's output is reshaped as in the first release, and the decoder predicts codes of
            MaskGIT's VQGAN.
        pixel_codebook_size: Codes of that VQGAN.
        pixel_dim: Width of those codes.
        pixel_channels: Channels of the pixel decoder's finest level.
        pixel_multipliers: Channels of each level over those of the finest, finest first.
        pixel_blocks: Residual blocks per level.
    """

    image_size: int = 256
    patch_size: int = 16
    num_tokens: int = 32
    encoder_dim: int = 1024
    encoder_layers: int = 24
    encoder_heads: int = 16
    decoder_dim: int = 1024
    decoder_layers: int = 24
    decoder_heads: int = 16
    quantizer: Literal["vq", "vae"] = "vq"
    token_dim: int = 12
    codebook_size: int = 4096
    metric: Literal["cosine", "l2"] = "cosine"
    commitment: float = 0.25
    kmeans_iterations: int = 0
    restart_after: int = 0
    kl_weight: float = 1e-6
    sample_posterior: bool = False
    legacy: bool = True
    pixel_codebook_size: int = 1024
    pixel_dim: int = 256
    pixel_channels: int = 128
    pixel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    pixel_blocks: int = 2

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("patch_size", "num_tokens", "encoder_layers", "decoder_layers", "token_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"expected an image size that patch_size={self.patch_size} divides, got {self.image_size}")
        for side in ("encoder", "decoder"):
            dim, heads = getattr(self, f"{side}_dim"), getattr(self, f"{side}_heads")
            if dim < 1 or heads < 1 or dim % heads:
                raise ValueError(f"expected {side}_dim to be a multiple of {side}_heads, got {dim} and {heads}")

    def validate_legacy(self) -> None:
        """Checks that the pixel decoder of a legacy model brings the grid of patches back to the image's size."""
        if not self.legacy:
            return
        if self.quantizer != "vq":
            raise ValueError("expected quantizer='vq' where legacy=True, got 'vae'")
        if 2 ** (len(self.pixel_multipliers) - 1) != self.patch_size:
            raise ValueError(
                f"expected pixel_multipliers for log2 of patch_size={self.patch_size} doublings and one level more, "
                f"got {self.pixel_multipliers}"
            )


class LatentEncoder(nn.Module):
    """Images to one vector per latent token: the transformer sees [class, patches, latents], the latents are kept."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        dim, self.num_tokens, self.legacy = config.encoder_dim, config.num_tokens, config.legacy
        self.patch_embed = nn.Conv2d(3, dim, config.patch_size, stride=config.patch_size)
        self.class_embedding = _embedding(1, dim)
        self.positional_embedding = _embedding(config.grid**2 + 1, dim)
        self.latent_tokens = _embedding(config.num_tokens, dim)
        self.latent_positional_embedding = _embedding(config.num_tokens, dim)
        self.transformer = Transformer(dim, config.encoder_layers, config.encoder_heads)
        self.out = nn.Linear(dim, config.token_dim * (2 if config.quantizer == "vae" else 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] to `[B, N, C]`, or `[B, N, 2 C]` (mean, log variance) of a VAE."""
        batch = len(images)
        patches_BLD = self.patch_embed(images).flatten(2).transpose(1, 2) + self.positional_embedding[1:]
        first = self.class_embedding + self.positional_embedding[:1]
        latents = self.latent_tokens + self.latent_positional_embedding
        x_BLD = torch.cat([first.expand(batch, -1, -1), patches_BLD, latents.expand(batch, -1, -1)], 1)
        x_BND = self.transformer(x_BLD, keep=slice(-self.num_tokens, None))
        if self.legacy:
            # The first release meant to transpose and reshaped instead: every output token reads a strided slice of
            # all latents. Its weights were trained so.
            x_BND = x_BND.reshape(batch, -1, self.num_tokens).transpose(1, 2)
        return self.out(x_BND)


class ProxyHead(nn.Module):
    """Distributions over the codes of MaskGIT's VQGAN, and the image that their expected embeddings decode to."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        dim, self.grid = config.decoder_dim, config.grid
        self.layers = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, config.pixel_codebook_size))
        self.codebook = nn.Parameter(torch.empty(config.pixel_codebook_size, config.pixel_dim).normal_())
        self.pixel_decoder = PixelDecoder(
            config.pixel_dim, config.pixel_channels, config.pixel_multipliers, config.pixel_blocks
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """`[B, h * w, D]` to images `[B, 3, H, W]`."""
        expected = self.layers(x_BLD).softmax(-1) @ self.codebook
        return self.pixel_decoder(expected.transpose(1, 2).unflatten(2, (self.grid, self.grid)))


class PatchHead(nn.Module):
    """Pixels of each patch, and a 3x3 convolution over the seams."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.grid, self.patch_size = config.grid, config.patch_size
        self.layers = nn.Sequential(nn.Linear(config.decoder_dim, 3 * config.patch_size**2))
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """`[B, h * w, D]` to images `[B, 3, H, W]`; within a patch, channels vary fastest, then columns."""
        grid, patch = self.grid, self.patch_size
        pixels = self.layers(x_BLD).view(len(x_BLD), grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
        return self.conv_out(pixels.reshape(len(x_BLD), 3, grid * patch, grid * patch))


class LatentDecoder(nn.Module):
    """Vectors of latent tokens to images: the transformer sees [class, masks, latents, context], the masks are kept."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.embed = nn.Linear(config.token_dim, dim)
        self.class_embedding = _embedding(1, dim)
        self.mask_token = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim))
        self.positional_embedding = _embedding(config.grid**2 + 1, dim)
        self.latent_positional_embedding = _embedding(config.num_tokens, dim)
        self.transformer = Transformer(dim, config.decoder_layers, config.decoder_heads)
        self.head = ProxyHead(config) if config.legacy else PatchHead(config)

    def forward(self, vectors_BNC: Tensor, context_BLD: Tensor | None = None) -> Tensor:
        """The first N' latent vectors `[B, N', C]`, and further tokens, to images `[B, 3, H, W]`, not clamped."""
        return self.head(self.patches(vectors_BNC, context_BLD))

    def patches(self, vectors_BNC: Tensor, context_BLD: Tensor | None = None) -> Tensor:
        """What the head reads, `[B, h * w, D]`; arguments as `forward`."""
        batch, length, _ = vectors_BNC.shape
        masks = self.mask_token[0] + self.positional_embedding[1:]
        start = torch.cat([self.class_embedding + self.positional_embedding[:1], masks])
        latents = self.embed(vectors_BNC) + self.latent_positional_embedding[:length]
        parts = [start.expand(batch, -1, -1), latents]
        x_BLD = torch.cat(parts if context_BLD is None else [*parts, context_BLD], 1)
        return self.transformer(x_BLD, keep=slice(1, len(start)))


PUBLISHED = Adapter(
    rules=(
        ("latent_tokens", "encoder.latent_tokens"),
        ("encoder.latent_token_positional_embedding", "encoder.latent_positional_embedding"),
        ("encoder.conv_out.", "encoder.out."),
        ("quantize.embedding.weight", "quantizer.codebook"),
        ("decoder.decoder_embed.", "decoder.embed."),
        ("decoder.latent_token_positional_embedding", "decoder.latent_positional_embedding"),
        ("decoder.text_guidance_proj.", "text_proj."),
        ("decoder.text_guidance_positional_embedding", "text_positional_embedding"),
        ("decoder.ffn.", "decoder.head.layers."),
        ("decoder.conv_out.", "decoder.head.conv_out."),
        ("pixel_quantize.embedding.weight", "decoder.head.codebook"),
        ("pixel_decoder.", "decoder.head.pixel_decoder."),
        *(
            (f"{side}.{published}", f"{side}.transformer.{ours}")
            for side in ("encoder", "decoder")
            for published, ours in (
                ("ln_pre.", "norm_pre."),
                ("ln_post.", "norm_post."),
                *((f"transformer.{{}}.{published}", f"blocks.{{}}.{ours}") for published, ours in CLIP_BLOCK_KEYS),
            )
        ),
    ),
    dropped={"quantize.embed_prob": "how often codes were used, kept to revive dead ones in training"},
    pointwise=("encoder.out.weight", "decoder.head.layers.0.weight", "decoder.head.layers.2.weight"),
)


_SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
_PUBLISHED_KEYS = {
    *("codebook_size", "token_size", "use_l2_norm", "commitment_cost", "clustering_vq", "quantize_mode", "num_latent_tokens"),
    *("vit_enc_model_size", "vit_dec_model_size", "vit_enc_patch_size", "vit_dec_patch_size"),
    *("finetune_decoder", "is_legacy", "strict_length_assertion", "text_context_length", "text_embed_dim"),
}


def config_from_published(published: Mapping[str, Any], related: object = None) -> dict[str, Any]:
    """The values of our config that the `config.json` of a published repository stands for.

    Args:
        published: The nested form, `{"model": {"vq_model": {...}}, "dataset": {"preprocessing": {...}}}`. Keys that it
            leaves out have the values that the reference implementation gives them.
        related: Without effect: these configs refer to no others.

    Raises:
        ConfigError: If a part is missing, or a key or value is not one of this architecture's.
    """
    del related
    try:
        values: dict[str, Any] = dict(published["model"]["vq_model"])
        sizes = [_SIZES[values[f"vit_{side}_model_size"]] for side in ("enc", "dec")]
        patch_sizes = {values[f"vit_{side}_patch_size"] for side in ("enc", "dec")}
        config = {
            "image_size": published["dataset"]["preprocessing"]["crop_size"],
            "num_tokens": values["num_latent_tokens"],
            "token_dim": values["token_size"],
            "quantizer": values.get("quantize_mode", "vq"),
            "legacy": values.get("is_legacy", True),
        }
        if config["quantizer"] == "vq":
            config["codebook_size"] = values["codebook_size"]
            config["metric"] = "cosine" if values["use_l2_norm"] else "l2"
            config["commitment"] = values["commitment_cost"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"expected the published config of a TiTok tokenizer, nothing usable at {error}") from None
    if unknown := sorted(set(values) - _PUBLISHED_KEYS):
        raise ConfigError(f"published config: unknown keys of vq_model: {', '.join(unknown)}")
    if len(patch_sizes) != 1:
        raise ConfigError(f"published config: expected one patch size for encoder and decoder, got {sorted(patch_sizes)}")
    if values.get("finetune_decoder", True) != config["legacy"]:
        raise ConfigError(
            "published config: finetune_decoder and is_legacy differ, as in an unfinished first training stage: its "
            "decoder ends in proxy codes and has no pixels"
        )
    config["patch_size"] = patch_sizes.pop()
    for side, (dim, layers, heads) in zip(("encoder", "decoder"), sizes, strict=True):
        config |= {f"{side}_dim": dim, f"{side}_layers": layers, f"{side}_heads": heads}
    for theirs, ours in (("text_context_length", "text_length"), ("text_embed_dim", "text_dim")):
        if theirs in values:
            config[ours] = values[theirs]
    return config


class TiTok(Tokenizer):
    """The tokenizer: `num_tokens` ids (or vectors) per image, always all of them.

    Attributes:
        proxy_codes: Gives the ids int64 `[B, h * w]` that legacy models learn to predict in the first stage of their
            training, of images `[B, 3, H, W]` in [0, 1]; `None` in the second stage. See `learn_from`.
    """

    architecture: ClassVar[str] = "titok"
    modality: ClassVar[Modality] = "image"
    config_class: ClassVar[type[TokenizerConfig]] = TiTokConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config_from_published = staticmethod(config_from_published)
    config: TiTokConfig

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config, Images(config.image_size))
        self.encoder = LatentEncoder(config)
        self.decoder = LatentDecoder(config)
        self.encoder.apply(partial(_initialize, width=config.encoder_dim))
        self.decoder.apply(partial(_initialize, width=config.decoder_dim))
        self.proxy_codes: Callable[[Tensor], Tensor] | None = None
        self.quantizer = None
        if config.quantizer == "vq":
            self.quantizer = VectorQuantizer(
                config.codebook_size,
                config.token_dim,
                metric=config.metric,
                commitment=config.commitment,
                learning=keep_in_use(kmeans_iterations=config.kmeans_iterations, restart_after=config.restart_after),
            )

    def _describe(self) -> dict[str, Any]:
        sizes = (self.config.codebook_size,) if self.config.quantizer == "vq" else ()
        return {"codebook_sizes": sizes, "max_tokens": self.config.num_tokens}

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length  # the latents are computed together; the caller cuts them off where the length varies
        latents_BNC = self.encoder(batch)
        if self.quantizer is not None:
            return Codes(self.quantizer.ids(latents_BNC)[:, None])
        mean, log_variance = _posterior(latents_BNC)
        if self.config.sample_posterior:
            mean = mean + (0.5 * log_variance).exp() * draw_once(mean.shape[1:], seed, mean.device)
        return Codes(torch.zeros(len(mean), 0, mean.shape[1], dtype=torch.long, device=mean.device), extras={"vectors": mean})

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        return self.decoder(self._vectors(ids, lengths, extras)).clamp(0, 1)

    def _vectors(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """What the decoder reads, `[B, N', C]`."""
        config = self.config
        if self.quantizer is not None:
            if ids.shape[2] != config.num_tokens and self._describe().get("variable", "none") == "none":
                raise TokensError(f"expected all {config.num_tokens} tokens of an image, got {ids.shape[2]}: encode it again")
            return self.quantizer.lookup(ids[:, 0]).to(self.dtype)
        return vectors_of(extras, (len(lengths), config.num_tokens, config.token_dim)).to(self.dtype)

    def learn_from(self, teacher: Tokenizer) -> None:
        """Makes `objective` the first stage of the published recipe: predicting the codes of MaskGIT's VQGAN.

        The codebook and the pixel decoder become copies of the teacher's. Freeze them (`decoder.head.codebook`,
        `decoder.head.pixel_decoder.*`); for the second stage freeze `encoder.*` and `quantizer.*` instead, without a teacher.

        Args:
            teacher: A trained VQGAN whose grid, codebook and decoder are those that this config says. It is used as it is, not
                copied: it is frozen here, and moved to the device and dtype of the images that `objective` gets.

        Raises:
            ConfigError: If this is no legacy model, or the teacher is another network.
        """
        config = self.config
        mine = {
            "image_size": config.image_size,
            "grid": config.grid,
            "codebook_size": config.pixel_codebook_size,
            "dim": config.pixel_dim,
            "channels": config.pixel_channels,
            "multipliers": config.pixel_multipliers,
            "blocks": config.pixel_blocks,
        }
        if not isinstance(self.decoder.head, ProxyHead):
            raise ConfigError("expected a model with legacy=True: others are trained on pixels from the start, without teacher")
        if not isinstance(teacher, VQGAN):
            raise ConfigError(f"expected a maskgit_vqgan to learn from, got {teacher.name or teacher.architecture}")
        theirs = {name: getattr(teacher.config, name) for name in mine}
        if theirs != mine:
            wrong = ", ".join(f"{name} {theirs[name]} for {mine[name]}" for name in mine if theirs[name] != mine[name])
            raise ConfigError(f"expected a teacher of the sizes that the pixel decoder has, got {wrong}")
        with torch.no_grad():
            self.decoder.head.codebook.copy_(teacher.quantizer.codebook)
        self.decoder.head.pixel_decoder.load_state_dict(teacher.decoder.state_dict())
        self.proxy_codes = partial(_codes, teacher.eval().requires_grad_(False))

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """The quantizer's loss or the weighted KL divergence, and what the decoder gets wrong.

        That is the cross-entropy with the teacher's codes after `learn_from`, the squared error of the pixels otherwise.
        These are the parts of the published two-stage and single-stage recipes that need no further network: there is no
        perceptual and no adversarial loss.
        """
        del progress
        vectors_BNC, losses, metrics = self._bottleneck(self.encoder(batch), generator)
        if self.training:
            vectors_BNC = vectors_BNC[:, : self._training_length(generator)]
        vectors_BNC = vectors_BNC.to(batch.dtype)
        if self.proxy_codes is None:
            return self._output(batch, self.decoder(vectors_BNC), losses, metrics)
        logits = self.decoder.head.layers(self.decoder.patches(vectors_BNC)).float()
        wanted = self.proxy_codes(batch)
        correct = (logits.argmax(-1) == wanted).float().mean()
        return Output(None, {"proxy": F.cross_entropy(logits.mT, wanted), **losses}, {"proxy_accuracy": correct, **metrics})

    def _training_length(self, generator: torch.Generator | None) -> int:
        """How many of the first tokens the decoder sees in this step."""
        del generator
        return self.config.num_tokens

    def _bottleneck(
        self, latents_BNC: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Vectors as the decoder sees them in training, the losses they cost, and what to log of them."""
        if self.quantizer is not None:
            vectors, ids, loss = self.quantizer(latents_BNC)
            used = torch.bincount(ids.flatten(), minlength=self.config.codebook_size).count_nonzero()
            return vectors, {"quantizer": loss}, {"codes_used": used}
        mean, log_variance = _posterior(latents_BNC)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device if generator else mean.device)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(2).mean()
        sample = mean + (0.5 * log_variance).exp() * noise.to(mean.device)
        return sample, {"kl": self.config.kl_weight * kl}, {"kl": kl.detach()}

    def _output(self, batch: Tensor, reconstruction: Tensor, losses: dict[str, Tensor], metrics: dict[str, Tensor]) -> Output:
        error = F.mse_loss(reconstruction.float(), batch.float())
        quality = psnr(reconstruction.detach().clamp(0, 1), batch).mean()
        return Output(reconstruction, {"reconstruction": error, **losses}, {"psnr": quality, **metrics})


def _codes(teacher: VQGAN, images: Tensor) -> Tensor:
    return teacher.to(images.device, images.dtype).codes(images)


def _posterior(latents_BNC: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance, float32 `[B, N, C]`, of `[B, N, 2 C]`."""
    mean, log_variance = latents_BNC.float().chunk(2, -1)
    return mean, log_variance.clamp(-30, 20)


def _embedding(length: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(length, dim) / math.sqrt(dim))


def _initialize(module: nn.Module, *, width: int) -> None:
    """The published start: linear and patch layers near zero; the pixel decoder's convolutions keep PyTorch's.

    The published deviation, 0.02, is for transformers of width 512 and more; narrower ones need a larger one to see anything.
    """
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.stride != (1, 1)):
        nn.init.normal_(module.weight, std=0.02 * max(1.0, 512 / width))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
