"""KARL: an image as as many 1D tokens as an asked error needs, decided in one pass of the encoder.

Paper: https://arxiv.org/abs/2507.07995
Reference implementation: ShivamDuggal4/karl@5c1a569, no licence stated, for code or weights.

The encoder sees the error that is asked for, the patches of the image beside the features of a convolutional autoencoder, and
latent tokens. Of each latent token it gives a code and the probability that the token is halted; the decoder sees only the
tokens that are not. Nothing is decoded to find the length. Four kinds share the two transformers: the autoencoder is MAGE's
VQGAN, whose 1,024 codes the decoder predicts, or MAR's KL-16, whose latents it predicts; the tokens are 4,096 codes of width
12 compared by cosine, or vectors of that width, in `Tokens.extras["vectors"]`.

The kept tokens are those that are not halted, in order; which of the `num_tokens` places they have is in
`Tokens.extras["kept"]`, bool `[B, N]`, and goes with the ids wherever they go: they are mostly, but not always, the first.

Here, unlike there: tokens come out of `encode` and `decode` takes them; halted tokens are left out instead of masked, which is
the same for an item alone and, unlike the reference's mask, right for batches; the mean of KL-16's posterior is encoded, so
that encoding is deterministic, unless the config says `sample_posterior`.

Shapes: B batch, N latent tokens, L tokens of a sequence, D width, C width of a code, G features of the autoencoder, H W height
and width in pixels, h w of the grid.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.kl16 import ATTENTION_WEIGHTS, KL16, LATENT_DIFFUSION_KEYS
from tokenzoo.encoders.maskgit_vqgan import MaskGITVQGAN
from tokenzoo.encoders.vit import CLIP_BLOCK_KEYS, Transformer
from tokenzoo.kernels import nearest
from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.image._common import check_frozen, draw_once, is_finite, vectors_of
from tokenzoo.tokenizers.images import Images
from tokenzoo.tokenizers.quality import l1, psnr
from tokenzoo.tokenizers.quantizers import VectorQuantizer
from tokenzoo.tokenizers.spec import Modality

_LEVELS = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.1),
    *(0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.28, 0.32, 0.38),
)
_LABEL_SMOOTHING = 0.1
_STRICT_LEVEL = 0.04


@strict
@dataclass(kw_only=True)
class KARLConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are `karl_small` with VQGAN and quantized latents.

    Attributes:
        image_size: Height and width in pixels.
        patch_size: Height and width of a patch in pixels.
        num_tokens: N, the largest budget.
        num_slots: Latent tokens that there are weights for; more than N, since training may ask for more.
        position_size: Height and width of the table of positions, from which the grid's are picked.
        encoder_dim: Width of the encoder.
        encoder_layers: Blocks of the encoder.
        encoder_heads: Attention heads of the encoder.
        decoder_dim: Width of the decoder.
        decoder_layers: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        quantizer: Codes (`"vq"`), or vectors as they are (`"none"`).
        token_dim: C.
        codebook_size: Codes.
        commitment: Weight of the commitment loss.
        halting_dim: Width of the hidden layer that decides about halting.
        halting_threshold: Tokens with a higher probability of being halted are left out.
        levels: Mean absolute errors that the encoder can be asked for, ascending; what is asked is rounded up to one.
        default_level: Error that is asked for where `encode` is given neither a target nor a length.
        pixel: The autoencoder: MAGE's VQGAN or MAR's KL-16.
        pixel_dim: G, width of its codes or channels of its latents.
        pixel_codebook_size: Its codes (`"vqgan"`).
        pixel_channels: Channels of its finest level.
        pixel_multipliers: Channels of each of its levels over those of the finest, finest first.
        pixel_blocks: Its residual blocks per level.
        latent_scale: Factor on KL-16's latents.
        sample_posterior: Encode to samples of KL-16's posterior, drawn with the seed of `encode`, instead of its mean.
        training: What `objective` compares: the autoencoder's latents (the first stage) or pixels (the second).
    """

    image_size: int = 256
    patch_size: int = 16
    num_tokens: int = 256
    num_slots: int = 512
    position_size: int = 64
    encoder_dim: int = 1024
    encoder_layers: int = 8
    encoder_heads: int = 8
    decoder_dim: int = 1024
    decoder_layers: int = 8
    decoder_heads: int = 8
    quantizer: Literal["vq", "none"] = "vq"
    token_dim: int = 12
    codebook_size: int = 4096
    commitment: float = 0.25
    halting_dim: int = 512
    halting_threshold: float = 0.75
    levels: tuple[float, ...] = _LEVELS
    default_level: float = 0.05
    pixel: Literal["vqgan", "kl16"] = "vqgan"
    pixel_dim: int = 256
    pixel_codebook_size: int = 1024
    pixel_channels: int = 128
    pixel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    pixel_blocks: int = 2
    latent_scale: float = 0.2325
    sample_posterior: bool = False
    training: Literal["latents", "pixels"] = "pixels"

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and fit together."""
        if self.image_size < 1 or self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"expected an image size that patch_size={self.patch_size} divides, got {self.image_size}")
        if 2 ** (len(self.pixel_multipliers) - 1) != self.patch_size:
            raise ValueError(
                f"expected pixel_multipliers for log2 of patch_size={self.patch_size} halvings and one level more, "
                f"got {self.pixel_multipliers}"
            )
        if not 1 <= self.num_tokens <= self.num_slots:
            raise ValueError(f"expected num_tokens from 1 to {self.num_slots = }, got {self.num_tokens}")
        if self.grid > self.position_size:
            raise ValueError(f"expected at most {self.position_size} patches along a side, got {self.grid}")
        if self.encoder_dim <= self.pixel_dim:
            raise ValueError(f"expected encoder_dim above {self.pixel_dim = }, since both share it, got {self.encoder_dim}")
        for side in ("encoder", "decoder"):
            if getattr(self, f"{side}_dim") % getattr(self, f"{side}_heads"):
                raise ValueError(f"expected {side}_dim to be a multiple of {side}_heads = {getattr(self, f'{side}_heads')}")

    def validate_levels(self) -> None:
        """Checks that errors are positive and ascend."""
        if not self.levels or list(self.levels) != sorted({*self.levels}) or self.levels[0] <= 0:
            raise ValueError(f"expected ascending positive levels, got {self.levels}")


class Latents(NamedTuple):
    """What the encoder says of every latent token: vectors `[B, N, C]`, and logits `[B, N]` that it is halted."""

    vectors: Tensor
    halting: Tensor


class LatentEncoder(nn.Module):
    """The transformer sees [asked error, patches and features, latents]; the latents are kept."""

    def __init__(self, config: KARLConfig) -> None:
        super().__init__()
        dim, self.grid, self.levels = config.encoder_dim, config.grid, config.levels
        self.patch_embed = nn.Conv2d(3, dim - config.pixel_dim, config.patch_size, stride=config.patch_size)
        self.level_embedding = nn.Parameter(torch.tensor(config.levels)[:, None].repeat(1, dim))
        self.positional_embedding = _embedding(dim, config.position_size, config.position_size, scale=dim)
        self.latent_tokens = _embedding(config.num_slots, dim, scale=dim)
        self.transformer = Transformer(dim, config.encoder_layers, config.encoder_heads)
        self.out = nn.Linear(dim, config.token_dim)
        self.halting_norm = nn.LayerNorm(dim)
        self.halting = nn.Sequential(nn.Linear(dim, config.halting_dim), nn.Tanh(), nn.Linear(config.halting_dim, 1))

    def level(self, error: Tensor) -> Tensor:
        """Index `[B]` of the smallest level that is no smaller than an error `[B]`; the largest where there is none."""
        levels = torch.tensor(self.levels, device=error.device)
        return torch.searchsorted(levels, error.float()).clamp(max=len(levels) - 1)

    def forward(self, images: Tensor, features: Tensor, level: Tensor, budget: int) -> Latents:
        """Images `[B, 3, H, W]` in [0, 1], their features `[B, G, h, w]` and an index of levels `[B]` to `budget` latents."""
        cells = torch.cat([self.patch_embed(images), features], 1)
        cells = (cells + _positions(self.positional_embedding, self.grid)).flatten(2).mT
        asked = self.level_embedding[level][:, None]
        x_BLD = torch.cat([asked, cells, self.latent_tokens[:budget].expand(len(images), -1, -1)], 1)
        x_BND = self.transformer.hidden(x_BLD, slice(-budget, None))
        halting = self.halting(self.halting_norm(x_BND))[..., 0]
        return Latents(self.out(self.transformer.norm_post(x_BND)), halting)


class LatentDecoder(nn.Module):
    """The transformer sees [mask tokens, latents]; the mask tokens become cells of the autoencoder."""

    def __init__(self, config: KARLConfig) -> None:
        super().__init__()
        dim, self.grid = config.decoder_dim, config.grid
        self.embed = nn.Linear(config.token_dim, dim)
        self.mask_token = _embedding(1, 1, dim, scale=dim)
        self.positional_embedding = _embedding(dim, config.position_size, config.position_size, scale=dim)
        self.latent_positional_embedding = _embedding(config.num_slots, dim, scale=dim)
        self.transformer = Transformer(dim, config.decoder_layers, config.decoder_heads)
        width = config.pixel_codebook_size if config.pixel == "vqgan" else config.pixel_dim
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, width))

    def forward(self, vectors_BNC: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
        """Latent vectors and the places `[B, N]` they have among all, where `mask` `[B, N]` is true, to `[B, h * w, ...]`."""
        batch, cells = len(vectors_BNC), self.grid**2
        masks = self.mask_token + _positions(self.positional_embedding, self.grid).flatten(2).mT
        latents = self.embed(vectors_BNC) + self.latent_positional_embedding[places]
        if mask is not None:
            mask = torch.cat([mask.new_ones(batch, cells), mask], 1)
        x_BLD = torch.cat([masks.expand(batch, -1, -1), latents], 1)
        return self.head(self.transformer(x_BLD, slice(cells), mask))


class VQGAN(MaskGITVQGAN):
    """MAGE's VQGAN behind the interface of the two autoencoders."""

    def features(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """What the latent encoder sees, `[B, G, h, w]`, and what the latent decoder learns: vectors before quantization."""
        del noise
        return self.encoder(images)

    def images(self, cells_BLD: Tensor, grid: int) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped, of the logits `[B, h * w, K]` of codes: expected codes are decoded."""
        return self.decoder((cells_BLD.softmax(-1) @ self.codebook).mT.unflatten(2, (grid, grid)))

    def distance(self, cells_BLD: Tensor, features: Tensor) -> Tensor:
        """How far logits are from the codes of features: cross entropy and the squared error of expected codes."""
        ids = nearest(features.flatten(2).mT, self.codebook.detach())
        entropy = F.cross_entropy(cells_BLD.float().mT, ids, label_smoothing=_LABEL_SMOOTHING)
        codebook = self.codebook.detach()
        return entropy + F.mse_loss((cells_BLD.softmax(-1) @ codebook).float(), codebook[ids].float())


class KL(KL16):
    """KL-16 behind the interface of the two autoencoders."""

    def __init__(self, scale: float, latent_channels: int, channels: Sequence[int], num_blocks: int) -> None:
        super().__init__(latent_channels, channels, num_blocks=num_blocks)
        self.scale = scale

    def features(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled latents `[B, G, h, w]`: the posterior's mean, or a sample made with standard normal `noise` of that shape."""
        mean, log_variance = self.encode(images)
        if noise is not None:
            mean = mean + (0.5 * log_variance).exp() * noise
        return (self.scale * mean).to(images.dtype)

    def images(self, cells_BLD: Tensor, grid: int) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped, of cells `[B, h * w, G]`; they are not scaled back, the decoder learned that."""
        return self.decode(cells_BLD.mT.unflatten(2, (grid, grid)))

    def distance(self, cells_BLD: Tensor, features: Tensor) -> Tensor:
        """Squared error of the latents."""
        return F.mse_loss(cells_BLD.float(), features.flatten(2).mT.float())


_TRANSFORMER_KEYS = (
    ("patch_embed.", "encoder.patch_embed."),
    ("rec_loss_embeddings", "encoder.level_embedding"),
    ("encoder_positional_embedding", "encoder.positional_embedding"),
    ("latent_tokens", "encoder.latent_tokens"),
    ("encoder_ln_pre.", "encoder.transformer.norm_pre."),
    ("encoder_ln_post_halt.", "encoder.halting_norm."),
    ("encoder_ln_post.", "encoder.transformer.norm_post."),
    ("pre_quantizer_mlp.", "encoder.out."),
    ("halting_mlp.", "encoder.halting."),
    ("quantize.embedding.weight", "quantizer.codebook"),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_mask_token", "decoder.mask_token"),
    ("decoder_positional_embedding", "decoder.positional_embedding"),
    ("decoder_latent_tokens_timestep_embed", "decoder.latent_positional_embedding"),
    ("decoder.ln_pre.", "decoder.transformer.norm_pre."),
    ("decoder.ln_post.", "decoder.transformer.norm_post."),
    ("decoder.ffn.", "decoder.head."),
    *(
        (f"{side}.transformer.{{}}.{published}", f"{side}.transformer.blocks.{{}}.{ours}")
        for side in ("encoder", "decoder")
        for published, ours in CLIP_BLOCK_KEYS
    ),
)
_VQGAN_KEYS = (
    ("quantize.embedding.weight", "codebook"),
    ("encoder.mid.block_1.", "encoder.mid.0."),
    ("encoder.mid.block_2.", "encoder.mid.1."),
    ("decoder.mid.block_1.", "decoder.mid.0."),
    ("decoder.mid.block_2.", "decoder.mid.1."),
    ("decoder.up.{}.upsample.conv.", "decoder.up.{}.upsample_conv."),
)


def _published(name: str, keys: Sequence[tuple[str, str]], pointwise: tuple[str, ...] = ()) -> Adapter:
    base = [(f"base_tokenizer.{name}.{theirs}", f"pixel.{ours}") for theirs, ours in (*keys, ("", ""))]
    return Adapter(
        rules=(*_TRANSFORMER_KEYS, *base),
        dropped={"gan_losses.*": "discriminators and perceptual networks, used in training only"},
        pointwise=tuple(f"pixel.{weight}" for weight in pointwise),
        inside=("ema", "model"),
    )


class KARL(Tokenizer):
    """The tokenizer: of `num_tokens` latent tokens, those that the asked error needs.

    `encode(image, target={"l1": 0.05})` asks for a mean absolute error, which is rounded up to one of `config.levels`;
    `encode(image, length=n)` gives the encoder only n latent tokens and the strictest level, so that at most n are kept.
    Attributes beyond those of `Tokenizer`:

    Attributes:
        extra_losses: Further terms of `objective`, of `(reconstruction, original)`, such as a perceptual network of yours.
    """

    architecture: ClassVar[str] = "karl"
    modality: ClassVar[Modality] = "image"
    config_class: ClassVar[type[TokenizerConfig]] = KARLConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "vqgan": _published("vqgan", _VQGAN_KEYS),
        "vae": _published("vae", LATENT_DIFFUSION_KEYS, ATTENTION_WEIGHTS),
    }
    config: KARLConfig

    def __init__(self, config: KARLConfig) -> None:
        super().__init__(config, Images(config.image_size))
        self.encoder = LatentEncoder(config)
        self.decoder = LatentDecoder(config)
        self.apply(_initialize)
        self.quantizer = None
        if config.quantizer == "vq":
            self.quantizer = VectorQuantizer(
                config.codebook_size, config.token_dim, metric="cosine", commitment=config.commitment
            )
        self.pixel: VQGAN | KL
        if config.pixel == "vqgan":
            self.pixel = VQGAN(
                codebook_size=config.pixel_codebook_size,
                dim=config.pixel_dim,
                channels=config.pixel_channels,
                multipliers=config.pixel_multipliers,
                num_blocks=config.pixel_blocks,
            )
        else:
            widths = [config.pixel_channels * m for m in config.pixel_multipliers]
            self.pixel = KL(config.latent_scale, config.pixel_dim, widths, config.pixel_blocks)
        self.extra_losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}

    def _describe(self) -> dict[str, Any]:
        sizes = (self.config.codebook_size,) if self.config.quantizer == "vq" else ()
        return {"codebook_sizes": sizes, "variable": "prefix", "max_tokens": self.config.num_tokens}

    # -- encode

    @torch.no_grad()
    def encode_at(self, images: Tensor, *, error: float, budget: int, seed: int = 0) -> Codes:
        """Codes of images `[B, 3, H, W]` in [0, 1]: one pass of the encoder, nothing is decoded.

        Args:
            images: Of the network's size.
            error: Mean absolute error to ask for.
            budget: Latent tokens that the encoder gets, 1 to `num_tokens`.
            seed: Of the noise, where the config says `sample_posterior`.

        Returns:
            Ids of the tokens that are kept, `extras["kept"]` bool `[B, N]`, and for continuous tokenizers `extras["vectors"]`
            `[B, N, C]`, zero where a token is not kept. An image of which every token is halted keeps the one that is
            halted least surely, since an item cannot be empty.
        """
        level = self.encoder.level(torch.full((len(images),), error, device=images.device))
        latents = self.encoder(images, self._features(images, seed), level, budget)
        kept = self._kept(latents.halting)
        counts = kept.sum(1)
        extras = {"kept": F.pad(kept, (0, self.config.num_tokens - budget))}
        if self.quantizer is None:
            vectors = latents.vectors.float() * kept[..., None]
            extras["vectors"] = F.pad(vectors, (0, 0, 0, self.config.num_tokens - budget))
            return Codes(torch.zeros(len(images), 0, 0, dtype=torch.long, device=images.device), None, extras)
        width = int(counts.max())
        real = torch.arange(width, device=images.device) < counts[:, None]
        ids = self.quantizer.ids(latents.vectors).gather(1, _first(kept, width)) * real
        return Codes(ids[:, None], counts[:, None], extras)

    def _kept(self, halting: Tensor) -> Tensor:
        """Bool `[B, N]` of logits `[B, N]`; the smallest of each row is always kept."""
        least = F.one_hot(halting.argmin(1), halting.shape[1]).bool()
        return (halting.float().sigmoid() <= self.config.halting_threshold) | least

    def _features(self, images: Tensor, seed: int) -> Tensor:
        noise = None
        if self.config.sample_posterior:
            noise = draw_once((self.config.pixel_dim, self.config.grid, self.config.grid), seed, images.device)
        return self.pixel.features(images, noise)

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        error = self.config.default_level if length is None else self.config.levels[0]
        return self.encode_at(batch, error=error, budget=length or self.config.num_tokens, seed=seed)

    def _encode_batch(
        self,
        batch: Tensor,
        meta: list[dict[str, Any]],
        budgets: list[int] | None,
        target: Mapping[str, float] | None,
        seed: int,
    ) -> Tokens:
        """Each budget by itself: it decides what the encoder sees, so that a longer code cannot be cut down to it."""
        batch = batch.to(self.device, self.dtype)
        if target is not None:
            asked = float(target["l1"])
            codes = self.encode_at(batch, error=asked, budget=self.config.num_tokens, seed=seed)
            level = self.config.levels[int(self.encoder.level(torch.tensor([asked], device=batch.device)))]
            meta = [{**facts, "target": {"asked": asked, "level": level}} for facts in meta]
            return self._tokens(codes, meta)
        parts, order = [], []
        for budget in sorted({*budgets}) if budgets else [None]:
            chosen = [i for i in range(len(batch)) if budgets is None or budgets[i] == budget]
            parts.append(self._tokens(self._encode(batch[chosen], length=budget, seed=seed), [meta[i] for i in chosen]))
            order += chosen
        return Tokens.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]

    def _tokens(self, codes: Codes, meta: list[dict[str, Any]]) -> Tokens:
        lengths = codes.ids.new_zeros(codes.ids.shape[:2]) if codes.lengths is None else codes.lengths
        return Tokens(codes.ids, lengths, self.info, codes.extras, meta).to("cpu")

    def _check_target(self, target: Mapping[str, float] | None) -> None:
        super()._check_target(target)
        if target is None:
            return
        if set(target) != {"l1"}:
            raise TokensError(f"KARL is asked for a mean absolute error, target={{'l1': ...}}, and nothing else, got {target}")
        if not (is_finite(target["l1"]) and target["l1"] > 0):
            raise TokensError(f"expected a positive mean absolute error, got target={target}")

    # -- decode

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        kept = self._places_kept(ids, lengths, extras)
        counts = kept.sum(1)
        width = int(counts.max())
        places = _first(kept, width)
        mask = torch.arange(width, device=kept.device) < counts[:, None]
        vectors = self._vectors(ids, extras, places)
        cells = self.decoder(vectors.to(self.dtype), places, None if bool(mask.all()) else mask)
        return self.pixel.images(cells, self.config.grid).clamp(0, 1)

    def _places_kept(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """Bool `[B, N]`: the places of the first `lengths` kept tokens; all places where all tokens are there."""
        batch, num_tokens = len(lengths), self.config.num_tokens
        kept = extras.get("kept")
        if kept is None and self.quantizer is not None and bool((lengths == num_tokens).all()):
            kept = torch.ones(batch, num_tokens, dtype=torch.bool, device=ids.device)
        if kept is None or kept.shape != (batch, num_tokens) or kept.dtype != torch.bool:
            got = "none" if kept is None else f"{kept.dtype} {tuple(kept.shape)}"
            raise TokensError(
                f"expected extras['kept'], bool {(batch, num_tokens)}, got {got}: tokens of KARL do not say which of "
                f"{num_tokens} places they have; hand the extras on with the ids, as in Tokens.unflatten(..., extras=...)"
            )
        if self.quantizer is not None:
            if bool((kept.sum(1) < lengths[:, 0]).any()):
                raise TokensError("expected extras['kept'] to have a place for every token, got more tokens than places")
            kept = kept & (kept.cumsum(1) <= lengths)
        if not bool(kept.any(1).all()):
            raise TokensError("expected at least one token per item, got extras['kept'] with none")
        return kept

    def _vectors(self, ids: Tensor, extras: Mapping[str, Tensor], places: Tensor) -> Tensor:
        """What the decoder reads, `[B, L, C]`."""
        if self.quantizer is not None:
            return self.quantizer.lookup(ids[:, 0])
        vectors = vectors_of(extras, (len(places), self.config.num_tokens, self.config.token_dim))
        return vectors.gather(1, places[..., None].expand(-1, -1, vectors.shape[2]))

    # -- training

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """The published recipe, two passes over a batch.

        First a random budget of n tokens, all of them to be used, and a strict level: the error that comes of it is what n
        tokens reach on this image. Then all tokens and that error asked for: the first n shall be active and the rest
        halted, and the image shall be made from what is not. Both passes are scored on latents or pixels (`config.training`)
        and on codes. What is published for pixels beyond that, a perceptual and an adversarial network, is left to
        `extra_losses`. On latents the autoencoder is not trained: freeze `pixel.*` in the recipe.

        The strict level of the first pass is drawn among those up to 0.04, ever more often the lowest: there by a running
        count of errors seen, here by `progress`, so that a resumed run needs no such state.

        Raises:
            ConfigError: If the autoencoder is not frozen in training on latents.
        """
        config, on_pixels = self.config, self.config.training == "pixels"
        if self.training and not on_pixels:
            check_frozen(self.pixel, "pixel")
        device = generator.device if generator is not None else torch.device("cpu")
        cells = (len(batch), config.pixel_dim, config.grid, config.grid)
        noise = torch.randn(cells, generator=generator, device=device).to(batch.device)
        with torch.set_grad_enabled(on_pixels and torch.is_grad_enabled()):
            features = self.pixel.features(batch, noise)
        step = max(1, config.num_tokens // 16)
        most = min(config.num_slots, config.num_tokens + config.num_tokens // 2 - step) // step
        budget = step * int(torch.randint(1, max(1, most) + 1, (), generator=generator, device=device))
        strict = (torch.tensor(config.levels, device=device) <= _STRICT_LEVEL).float() * (1 - progress)
        strict[0] = 1
        level = torch.multinomial(strict, len(batch), True, generator=generator).to(batch.device)
        latents = self.encoder(batch, features, level, budget)
        first, losses = self._pass(batch, features, latents, None)
        active = F.binary_cross_entropy_with_logits(latents.halting, torch.zeros_like(latents.halting))
        reached = l1(first.detach(), batch)

        latents = self.encoder(batch, features, self.encoder.level(reached), config.num_tokens)
        second, more = self._pass(batch, features, latents, self._kept(latents.halting.detach()))
        losses = {name: value + more[name] for name, value in losses.items()}
        losses["halting"] = active + _halting_loss(latents.halting, budget)
        count = self._kept(latents.halting).sum(1).float().mean()
        quality = psnr(second.detach().clamp(0, 1), batch).mean()
        return Output(second, losses, {"psnr": quality, "l1": l1(second.detach(), batch).mean(), "kept": count})

    def _pass(self, batch: Tensor, features: Tensor, latents: Latents, kept: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Images of latents where `kept`, and what they cost."""
        vectors, losses = latents.vectors, {}
        if self.quantizer is not None:
            quantized = self.quantizer(vectors)
            vectors, losses["quantizer"] = quantized.vectors.to(batch.dtype), quantized.loss
        places = torch.arange(vectors.shape[1], device=batch.device).expand(len(batch), -1)
        cells = self.decoder(vectors, places, kept)
        if self.config.training == "latents":
            losses["latents"] = self.pixel.distance(cells, features)
            with torch.no_grad():
                return self.pixel.images(cells, self.config.grid), losses
        images = self.pixel.images(cells, self.config.grid)
        losses["reconstruction"] = F.l1_loss(images.float(), batch.float())
        for name, function in self.extra_losses.items():
            losses[name] = function(images, batch).mean()
        return images, losses


def _halting_loss(logits: Tensor, active: int) -> Tensor:
    """Cross entropy of halting logits `[B, N]` with "the first `active` are active, the rest halted", each part averaged."""
    used, rest = logits[:, :active], logits[:, active:]
    loss = F.binary_cross_entropy_with_logits(used, torch.zeros_like(used))
    return loss + F.binary_cross_entropy_with_logits(rest, torch.ones_like(rest)) if rest.shape[1] else loss


def _first(kept: Tensor, width: int) -> Tensor:
    """Indices `[B, width]` of the first true entries of each row `[B, N]`, in order; rows with fewer go on with false ones."""
    return (~kept).long().argsort(dim=1, stable=True)[:, :width]


def _positions(table: Tensor, grid: int) -> Tensor:
    """A grid's positions `[1, D, h, w]` out of a table `[D, S, S]`, picked at even distances."""
    return F.interpolate(table[None], (grid, grid), mode="nearest")


def _embedding(*shape: int, scale: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(scale))


def _initialize(module: nn.Module) -> None:
    """The published start of the transformers."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
