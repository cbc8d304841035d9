"""FlexTok: an image as 1 to 256 ordered ids, of which any prefix is decoded by a rectified flow.

Paper: https://arxiv.org/abs/2502.13967
Reference implementation: apple/ml-flextok@87d00cc, Apple and EPFL Sample Code License 1.1 (non-commercial); weights under the
Apple Machine Learning Research Model licence.

An autoencoder turns the image into latents on a grid. Registers read them in a transformer where every register sees the
grid and the registers before it, and are quantized to 64,000 codes each (FSQ). The decoder is a flow: from noise on the grid it
goes to latents in as many steps as `sampling` says, looking at the registers, or at a mask token where there are none.

    tok.sampling = Sampling(steps=25, guidance=7.5)
    images = tok.decode(tok.with_seed(tokens, [3, 4]))

Here, unlike there:

* encoding takes the mean of the autoencoder's posterior, so that an image has one sequence of ids, unless the config says
  `sample_posterior`;
* every item has a seed of its own, so that an item decodes alike in any batch;
* both passes of guidance go through each layer together;
* positions that hold the same vector (a prefix's missing registers, and all registers of the pass without tokens) go through
  the network as one, which counts in attention as often as it stands for positions. That is the same function.

Shapes: B batch, N registers, P patches of the grid, L tokens of a sequence, D width, C channels of the latents, h w grid.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.adaln_transformer import Block, Condition, Reach, TimeEmbedding, modulate, normalise
from tokenzoo.encoders.autoencoder_kl import DIFFUSERS_KEYS, AutoencoderKL
from tokenzoo.kernels import fsq_codes, fsq_quantize
from tokenzoo.tokenizers import Codes, ConfigError, Output, Tokenizer, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.image._common import alignment_features, check_frozen, draw_once, projector
from tokenzoo.tokenizers.image._flextok_config import config_from_published
from tokenzoo.tokenizers.image._flow import Sampling, as_seed, integrate, noise_of, widened
from tokenzoo.tokenizers.images import Images
from tokenzoo.tokenizers.spec import Modality


@strict
@dataclass(kw_only=True)
class FlexTokConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are FlexTok d12-d12.

    Attributes:
        image_size: Height and width in pixels.
        vae_channels: Channels of each level of the autoencoder, finest first; empty for a flow of the pixels themselves.
        vae_blocks: Residual blocks per level of the autoencoder.
        vae_groups: Groups of its norms.
        latent_channels: Channels of the latents.
        scaling_factor: What the latents are multiplied with.
        sample_posterior: Encode to samples, drawn with the seed of `encode`, instead of means.
        patch_size: Height and width of a patch of the latents.
        num_tokens: Registers.
        levels: Levels of each dimension of the quantizer; the codebook is their product.
        encoder_dim: Width of the encoder.
        encoder_layers: Blocks of the encoder.
        decoder_dim: Width of the decoder.
        decoder_layers: Blocks of the decoder.
        head_dim: Width of an attention head.
        mlp_ratio: Width of an MLP over that of its transformer, before the gate takes a third.
        encoder_positions: Kind of the encoder's table of positions.
        encoder_table: Rows and columns of that table, at least those of the grid.
        decoder_positions: Kind of the decoder's table of positions.
        decoder_table: Rows and columns of that table.
        register_table: Length of the decoder's table of register positions.
        time_frequencies: Width of the time embedding's sinusoids.
        max_time: Largest time, by which their frequencies are scaled.
        prefix_sampling: Prefix lengths in training: powers of two, all alike, or all rounded up to a power of two.
        time_sampling: Times in training: uniform, bent by `mode_scale` (https://arxiv.org/abs/2403.03206), or logit-normal.
        mode_scale: How much the uniform times are bent.
        null_probability: How often training hides all tokens from the decoder, for guidance.
        alignment_network: timm network whose patch features the decoder is aligned with in training (REPA,
            https://arxiv.org/abs/2410.06940); empty for none.
        alignment_dim: Width of those features.
        alignment_layer: Block of the decoder that is aligned, from 0.
        alignment_weight: Weight of that loss.
        steps: Steps that `sampling` starts with.
        guidance: Guidance that `sampling` starts with.
        guidance_method: Kind of guidance that `sampling` starts with.
    """

    image_size: int = 256
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_blocks: int = 2
    vae_groups: int = 32
    latent_channels: int = 16
    scaling_factor: float = 1.0
    sample_posterior: bool = False
    patch_size: int = 2
    num_tokens: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    encoder_dim: int = 768
    encoder_layers: int = 12
    decoder_dim: int = 768
    decoder_layers: int = 12
    head_dim: int = 64
    mlp_ratio: float = 4.0
    encoder_positions: Literal["sincos", "learnable_sum", "learnable_prod"] = "sincos"
    encoder_table: tuple[int, ...] = (16, 16)
    decoder_positions: Literal["sincos", "learnable_sum", "learnable_prod"] = "sincos"
    decoder_table: tuple[int, ...] = (16, 16)
    register_table: int = 256
    time_frequencies: int = 256
    max_time: float = 1000.0
    prefix_sampling: Literal["pow2", "uniform", "uniform_pow2"] = "pow2"
    time_sampling: Literal["mode", "logit_normal"] = "mode"
    mode_scale: float = 0.25
    null_probability: float = 0.2
    alignment_network: str = ""
    alignment_dim: int = 1024
    alignment_layer: int = 1
    alignment_weight: float = 1.0
    steps: int = 20
    guidance: float = 7.5
    guidance_method: Literal["apg", "cfg"] = "apg"

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.image_size // 2 ** max(len(self.vae_channels) - 1, 0)

    @property
    def grid(self) -> int:
        """Patches along one side of the latents."""
        return self.latent_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.latent_channels * self.patch_size**2

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("patch_size", "num_tokens", "encoder_layers", "decoder_layers", "latent_channels", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.grid * self.patch_size * self.image_size != self.latent_size * self.image_size or self.grid < 1:
            raise ValueError(f"expected a patch_size that divides the {self.latent_size} latents, got {self.patch_size}")
        if self.latent_size * 2 ** max(len(self.vae_channels) - 1, 0) != self.image_size:
            raise ValueError(f"expected an image_size that {len(self.vae_channels) - 1} halvings divide, got {self.image_size}")
        if not self.vae_channels and self.latent_channels != 3:
            raise ValueError(f"expected latent_channels=3, the pixels, where vae_channels is empty, got {self.latent_channels}")
        for side in ("encoder", "decoder"):
            if getattr(self, f"{side}_dim") % self.head_dim or getattr(self, f"{side}_dim") < 1:
                raise ValueError(f"expected {side}_dim to be a multiple of {self.head_dim = }")

    def validate_tables(self) -> None:
        """Checks that every position is in its table, and that tables and quantizer can be built."""
        for side in ("encoder", "decoder"):
            table, kind = getattr(self, f"{side}_table"), getattr(self, f"{side}_positions")
            if len(table) != 2 or min(table) < self.grid:
                raise ValueError(f"expected {side}_table of 2 sizes, at least {self.grid = }, got {table}")
            if kind != "sincos" and table[0] != table[1]:
                raise ValueError(f"expected {side}_table to be square where positions are learned, got {table}")
            if kind == "sincos" and getattr(self, f"{side}_dim") % 4:
                raise ValueError(f"expected {side}_dim to be a multiple of 4 for sines and cosines")
        if self.register_table < self.num_tokens:
            raise ValueError(f"expected a register_table of at least {self.num_tokens = }, got {self.register_table}")
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) > 2**31:
            raise ValueError(f"expected at least two levels in every dimension, 2^31 codes at most, got {self.levels}")

    def validate_training(self) -> None:
        """Checks what the objective needs."""
        if self.prefix_sampling == "pow2" and self.num_tokens & (self.num_tokens - 1):
            raise ValueError(f"expected num_tokens to be a power of two for prefix_sampling='pow2', got {self.num_tokens}")
        if not 0 <= self.null_probability < 1:
            raise ValueError(f"expected null_probability in [0, 1), got {self.null_probability}")
        if self.alignment_network and not 0 <= self.alignment_layer < self.decoder_layers:
            raise ValueError(f"expected alignment_layer in [0, {self.decoder_layers}), got {self.alignment_layer}")


class GridPositions(nn.Module):
    """Positions of a grid: fixed sines and cosines of rows and columns, or learned rows and columns, combined."""

    def __init__(self, kind: str, dim: int, sizes: Sequence[int], grid: int) -> None:
        super().__init__()
        self.kind, self.grid = kind, grid
        if kind == "sincos":
            self.register_buffer("table", sines_and_cosines(dim, *sizes))
        else:
            self.table = nn.Parameter(0.02 * torch.randn(2, 1, dim, sizes[0]))

    def forward(self) -> Tensor:
        """`[h * w, D]`, rows first."""
        n, table = self.grid, self.table
        if self.kind == "sincos":
            cells = table[0, :, :n, :n]
        else:
            rows, columns = table[0, 0, :, :n, None], table[1, 0, :, None, :n]
            cells = rows * columns if self.kind == "learnable_prod" else rows + columns
        return cells.flatten(1).T


class RegisterEncoder(nn.Module):
    """Latents on a grid to one vector per register: patches see patches, a register sees them and the registers up to it."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        dim, self.patch_size = config.encoder_dim, config.patch_size
        self.patch_embed = nn.Linear(config.patch_dim, dim)
        self.positions = GridPositions(config.encoder_positions, dim, config.encoder_table, config.grid)
        self.registers = nn.Parameter(0.02 * torch.randn(config.num_tokens, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.head_dim, mlp_ratio=config.mlp_ratio) for _ in range(config.encoder_layers)
        )
        self.out = nn.Linear(dim, len(config.levels))

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, N, number of levels]`."""
        patches = self.patch_embed(patchify(latents, self.patch_size)) + self.positions()
        num_patches, num_registers = patches.shape[1], len(self.registers)
        x_BLD = torch.cat([patches, self.registers.expand(len(patches), -1, -1)], 1)
        length = num_patches + num_registers
        seen = torch.ones(num_registers, length, dtype=torch.bool, device=latents.device).tril(num_patches)
        grid = Reach(slice(0, num_patches), slice(0, num_patches))
        *blocks, last = self.blocks
        for block in blocks:
            x_BLD = block(x_BLD, [grid, Reach(slice(num_patches, None), slice(0, length), seen)])
        x_BLD = last(x_BLD, [Reach(slice(None), slice(0, length), seen)], keep=slice(num_patches, None))
        return self.out(normalise(x_BLD))


class Plan(NamedTuple):
    """How sequences of the decoder are laid out: registers, patches, and where guided the patches and the null token again.

    Attributes:
        masks: How many missing registers the mask token at the end of the registers stands for; 0 for none.
        guided: Whether the pass without tokens is part of the sequence.
        patches: Where the patches are, of both passes.
        kinds: 0 for patches and 1 for registers, int64 `[L]`.
        reaches: What attends to what.
        last: The same for the patches alone.
    """

    masks: int
    guided: bool
    patches: slice
    kinds: Tensor
    reaches: list[Reach]
    last: list[Reach]


class FlowDecoder(nn.Module):
    """The velocity of a flow of latents, given codes and a time."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        dim, self.patch_size, self.grid = config.decoder_dim, config.patch_size, config.grid
        self.num_tokens, self.num_patches = config.num_tokens, config.grid**2
        self.embed = nn.Linear(len(config.levels), dim)
        self.register_positions = nn.Parameter(0.02 * torch.randn(1, 1, dim, config.register_table))
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.null_token = nn.Parameter(0.02 * torch.randn(dim))
        self.patch_embed = nn.Linear(config.patch_dim, dim)
        self.positions = GridPositions(config.decoder_positions, dim, config.decoder_table, config.grid)
        self.time = TimeEmbedding(dim, num_frequencies=config.time_frequencies, max_time=config.max_time)
        self.blocks = nn.ModuleList(
            Block(dim, config.head_dim, mlp_ratio=config.mlp_ratio, num_kinds=2) for _ in range(config.decoder_layers)
        )
        self.modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, config.patch_dim)

    def registers(self, codes: Tensor) -> Tensor:
        """Codes `[B, length, number of levels]` of a prefix as registers `[B, length, D]`."""
        return self.embed(codes) + self.register_positions[0, 0, :, : codes.shape[1]].T

    def plan(self, length: int, *, guided: bool) -> Plan:
        """The layout of sequences with a prefix of `length` registers."""
        device, patches = self.mask_token.device, self.num_patches
        masks = self.num_tokens - length
        start = length + (masks > 0)
        end = start + patches
        with_tokens, without = slice(0, end), slice(end, None)
        here, there = self._weights(end, length, masks), self._weights(patches + 1, patches, self.num_tokens)
        reaches, last = [Reach(with_tokens, with_tokens, here)], [Reach(slice(0, patches), with_tokens, here)]
        if guided:
            reaches.append(Reach(without, without, there))
            last.append(Reach(slice(patches, None), without, there))
        kinds = torch.ones(end + guided * (patches + 1), dtype=torch.long, device=device)
        spread = slice(start, end + guided * patches)
        kinds[spread] = 0
        return Plan(masks, guided, spread, kinds, reaches, last)

    def _weights(self, length: int, position: int, count: int) -> Tensor | None:
        """Added to scores of attention, what makes the token at `position` count `count` times."""
        if count < 2:
            return None
        bias = torch.zeros(1, length, dtype=self.mask_token.dtype, device=self.mask_token.device)
        bias[0, position] = math.log(count)
        return bias

    def forward(
        self, latents: Tensor, time: Tensor, registers: Tensor, plan: Plan, *, tap: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Velocities, and the patches as they leave block `tap`.

        Args:
            latents: `[B, C, h, w]`, at `time`.
            time: float32 `[B]`, or `[1]` for all.
            registers: Of a prefix, `[B, length, D]`.
            plan: The layout for this length.
            tap: A block, counted from 0.

        Returns:
            `[B, C, h, w]`, where `plan.guided` with the velocities without tokens below: `[2 B, C, h, w]`; and `[B, P, D]`.
        """
        batch, ones = len(latents), (len(latents), 1, -1)
        patches = self.patch_embed(patchify(latents, self.patch_size)) + self.positions()
        parts = [registers, *([self.mask_token.expand(ones)] if plan.masks else []), patches]
        if plan.guided:
            parts += [patches, self.null_token.expand(ones)]
        x_BLD, features = torch.cat(parts, 1), None
        condition = Condition(F.silu(self.time(time)), plan.kinds)
        for i, block in enumerate(self.blocks):
            final = i == len(self.blocks) - 1
            reaches, keep = (plan.last, plan.patches) if final else (plan.reaches, None)
            x_BLD = block(x_BLD, reaches, keep=keep, condition=condition)
            if i == tap:
                features = (x_BLD if final else x_BLD[:, plan.patches])[:, : self.num_patches]
        shift, scale = self.modulation(condition.time)[:, None].chunk(2, -1)
        x_BLD = self.out(modulate(x_BLD, shift, scale))
        if plan.guided:
            x_BLD = x_BLD.unflatten(1, (2, -1)).transpose(0, 1).reshape(2 * batch, self.num_patches, -1)
        return unpatchify(x_BLD, self.grid, self.patch_size), features


PUBLISHED = Adapter(
    rules=(
        ("encoder.module_dict.enc_patch_emb.patch_proj.", "encoder.patch_embed."),
        ("encoder.module_dict.enc_posemb_module.posembs", "encoder.positions.table"),
        ("encoder.module_dict.enc_register_module.registers", "encoder.registers"),
        ("encoder.module_dict.enc_to_latents.proj.", "encoder.out."),
        ("decoder.module_dict.dec_from_latents.proj.", "decoder.embed."),
        ("decoder.module_dict.dec_registers_posemb_module.posembs", "decoder.register_positions"),
        ("decoder.module_dict.dec_nested_dropout.dropout_mask_token", "decoder.mask_token"),
        ("decoder.module_dict.dec_latent_dropout.nullcond", "decoder.null_token"),
        ("decoder.module_dict.dec_noise_patch_emb.patch_proj.", "decoder.patch_embed."),
        ("decoder.module_dict.dec_patches_posemb_module.posembs", "decoder.positions.table"),
        ("decoder.module_dict.dec_time_embedder.", "decoder.time."),
        ("decoder.module_dict.dec_to_patches.adaLN_modulation.1.", "decoder.modulation."),
        ("decoder.module_dict.dec_to_patches.proj.", "decoder.out."),
        *(
            (f"{side}.module_dict.{side[:3]}_transformer.blocks.{{}}.{wrapped}{published}.", f"{side}.blocks.{{}}.{ours}.")
            for wrapped in ("", "_checkpoint_wrapped_module.")  # where training recomputed activations
            for side in ("encoder", "decoder")
            for published, ours in (
                ("attn.wq", "attention.q"),
                ("attn.wk", "attention.k"),
                ("attn.wv", "attention.v"),
                ("attn.proj", "attention.out"),
                ("mlp.fc1", "mlp.gate"),
                ("mlp.fc2", "mlp.down"),
                ("mlp.fc3", "mlp.up"),
                ("adaLN_modulation.1", "modulation"),
            )
        ),
        *((f"vae.vae.{published}", f"vae.{ours}") for published, ours in DIFFUSERS_KEYS),
        ("vae.vae.", "vae."),
    ),
    dropped={
        "decoder.module_dict.dec_repa*": "the projection that training compared with features of another network",
        "vae.logvar": "weighted the autoencoder's loss in training",
        "vae.vae.*.to_qkv.*": "copies of queries, keys and values",
    },
)


class FlexTok(Tokenizer):
    """The tokenizer: up to `num_tokens` ids per image, of which any prefix decodes.

    Attributes:
        sampling: How `decode` follows the flow: steps, guidance, seed.
        features: Gives `[B, P, D]` of images `[B, 3, H, W]` in [0, 1], for training with an `alignment_network`; that network
            is loaded when it is first needed, unless you set this yourself.
    """

    architecture: ClassVar[str] = "flextok"
    modality: ClassVar[Modality] = "image"
    config_class: ClassVar[type[TokenizerConfig]] = FlexTokConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config_from_published = staticmethod(config_from_published)
    config: FlexTokConfig

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__(config, Images(config.image_size))
        self.vae = None
        if config.vae_channels:
            self.vae = AutoencoderKL(
                config.latent_channels, config.vae_channels, num_blocks=config.vae_blocks, groups=config.vae_groups
            )
        self.encoder = RegisterEncoder(config)
        self.decoder = FlowDecoder(config)
        self.alignment = None
        if config.alignment_network:
            self.alignment = projector(config.decoder_dim, 2 * config.decoder_dim, config.alignment_dim)
        _initialize(self)
        self.sampling = Sampling(config.steps, config.guidance, config.guidance_method)
        self.features: Callable[[Tensor], Tensor] | None = None

    def _describe(self) -> dict[str, Any]:
        config = self.config
        return {"codebook_sizes": (math.prod(config.levels),), "variable": "prefix", "max_tokens": config.num_tokens}

    def with_seed(self, tokens: Tokens, seeds: int | Sequence[int]) -> Tokens:
        """Tokens that carry the seed of the noise that they are decoded from, instead of `sampling.seed`.

        Args:
            tokens: B items.
            seeds: One for all of them, or one per item.

        Raises:
            TokensError: If there are more or fewer seeds than items, or one is no int64.
        """
        try:
            each = [as_seed(seed) for seed in seeds]  # type: ignore[union-attr]
        except TypeError:
            each = [as_seed(seeds)] * len(tokens)
        if len(each) != len(tokens) or None in each:
            raise TokensError(
                f"expected a whole number of 64 bits with a sign, or one for each of {len(tokens)} items, got {seeds!r}"
            )
        return dataclasses.replace(tokens, extras={**tokens.extras, "seed": torch.tensor(each, dtype=torch.long)})

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length  # the registers are computed together; the caller cuts them off
        noise = None
        if self.config.sample_posterior:
            noise = draw_once(self._latent_shape, seed, batch.device)
        vectors = self.encoder(self.latents(batch, noise))
        return Codes(fsq_quantize(vectors, self.config.levels).ids[:, None])

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del lengths
        seeds = extras.get("seed", torch.full((len(ids),), int(self.sampling.seed)))
        if seeds.shape != (len(ids),) or seeds.dtype != torch.long:
            got = f"{seeds.dtype} {tuple(seeds.shape)}"
            raise TokensError(f"expected extras['seed'], int64 {(len(ids),)}, got {got}: use with_seed")
        noise = noise_of(seeds.tolist(), self._latent_shape).to(ids.device)
        return self.pixels(self.denoise(fsq_codes(ids[:, 0], self.config.levels), noise)).clamp(0, 1)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return self.config.latent_channels, self.config.latent_size, self.config.latent_size

    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents `[B, C, h, w]` of images in [0, 1]: the posterior's mean, or a sample of it where there is noise."""
        images = 2 * images - 1
        if self.vae is None:
            return images * self.config.scaling_factor
        mean, log_variance = self.vae.encode(images)
        if noise is not None:
            mean = mean + (0.5 * log_variance).exp() * noise
        return (mean * self.config.scaling_factor).to(images.dtype)

    def pixels(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]`, about [0, 1] but not clamped, of scaled latents."""
        latents = latents.to(self.dtype) / self.config.scaling_factor
        return ((latents if self.vae is None else self.vae.decode(latents)) + 1) / 2

    def denoise(self, codes: Tensor, noise: Tensor) -> Tensor:
        """Follows the flow from noise, float32 `[B, C, h, w]`, to scaled latents, given codes `[B, length, levels]`."""
        registers = self.decoder.registers(codes.to(self.dtype))
        plan = self.decoder.plan(codes.shape[1], guided=self.sampling.guided)

        def velocity(latents: Tensor, time: float) -> Tensor:
            times = torch.full((1,), time, dtype=torch.float32, device=latents.device)
            return self.decoder(latents.to(self.dtype), times, registers, plan)[0]

        return integrate(velocity, noise, self.sampling)

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Squared error of the velocity at a random time, given a prefix of random length, and the alignment loss.

        The autoencoder is not trained: freeze `vae.*` in the recipe. In eval mode all tokens are kept.

        Raises:
            ConfigError: If the autoencoder is not frozen in training, or `features` have another shape than the config says.
        """
        del progress
        if self.training and self.vae is not None:
            check_frozen(self.vae, "vae")
        config, size = self.config, len(batch)
        draw = _Draws(generator, batch.device)
        with torch.no_grad():
            latents = self.latents(batch)
        codes, ids = fsq_quantize(self.encoder(latents), config.levels)
        registers = self.decoder.registers(codes.to(latents.dtype))
        if self.training:
            kept = prefix_lengths(config.prefix_sampling, config.num_tokens, draw.uniform(size))
            missing = torch.arange(config.num_tokens, device=batch.device) >= kept[:, None]
            registers = torch.where(missing[..., None], self.decoder.mask_token, registers)
            hidden = draw.uniform(size) < config.null_probability
            registers = torch.where(hidden[:, None, None], self.decoder.null_token, registers)
        time = flow_times(config.time_sampling, config.mode_scale, draw.uniform(size))
        noise, t = draw.normal(latents.shape), time[:, None, None, None]
        tap = config.alignment_layer if self.alignment is not None else None
        plan = self.decoder.plan(config.num_tokens, guided=False)
        noised = (t * noise + (1 - t) * latents.float()).to(latents.dtype)
        velocity, hidden_states = self.decoder(noised, time, registers, plan, tap=tap)
        losses = {"flow": F.mse_loss(velocity.float(), noise - latents.float())}
        if self.alignment is not None and hidden_states is not None:
            losses["alignment"] = config.alignment_weight * self._alignment_loss(hidden_states, batch)
        return Output(None, losses, {"codes_used": torch.tensor(len(ids.unique()))})

    def _alignment_loss(self, hidden_states: Tensor, images: Tensor) -> Tensor:
        """1 minus the mean cosine similarity between projected patches of the decoder and the features of the images."""
        if self.features is None:
            self.features = alignment_features(self.config.alignment_network, self.config.grid)
        wanted = self.features(images)
        expected = (*hidden_states.shape[:2], self.config.alignment_dim)
        if wanted.shape != expected:
            raise ConfigError(f"expected features {expected} of {self.config.alignment_network}, got {tuple(wanted.shape)}")
        assert self.alignment is not None
        return 1 - F.cosine_similarity(self.alignment(hidden_states).float(), wanted.float(), dim=-1).mean()


class _Draws:
    """Random numbers from one generator, on the device of the batch."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator, self.device = generator, device
        self.source = generator.device if generator is not None else device

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, device=self.source).to(self.device)

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.source).to(self.device)


def prefix_lengths(sampling: str, num_tokens: int, uniform: Tensor) -> Tensor:
    """Prefix lengths in [1, num_tokens], int64 `[B]`, from uniform numbers in [0, 1)."""
    if sampling == "pow2":
        return 2 ** (uniform * num_tokens.bit_length()).long()
    lengths = 1 + (uniform * num_tokens).long()
    if sampling == "uniform_pow2":
        lengths = 2 ** widened(lengths - 1).add(0.5).log2().ceil().clamp_min(0).long()
    return lengths.clamp(max=num_tokens)


def flow_times(sampling: str, mode_scale: float, uniform: Tensor) -> Tensor:
    """Times in [0, 1], float32 `[B]`, from uniform numbers: bent by a cosine, or through the normal distribution."""
    if sampling == "logit_normal":
        return torch.sigmoid(torch.special.ndtri(widened(uniform).clamp(1e-9, 1 - 1e-9))).float()
    return 1 - uniform - mode_scale * (torch.cos(math.pi / 2 * uniform).square() - 1 + uniform)


def patchify(x: Tensor, size: int) -> Tensor:
    """`[B, C, h, w]` to `[B, P, size * size * C]`: rows, columns, and within a patch channels last."""
    batch, channels, height, width = x.shape
    cells = x.view(batch, channels, height // size, size, width // size, size).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(batch, -1, size * size * channels)


def unpatchify(x: Tensor, grid: int, size: int) -> Tensor:
    """The inverse of `patchify` on a square grid."""
    cells = x.view(len(x), grid, grid, size, size, -1).permute(0, 5, 1, 3, 2, 4)
    return cells.reshape(len(x), -1, grid * size, grid * size)


def sines_and_cosines(dim: int, rows: int, columns: int) -> Tensor:
    """A table `[1, D, rows, columns]`: sines, then cosines of the row, then of the column (https://arxiv.org/abs/2104.02057)."""
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    row, column = (torch.arange(n, dtype=torch.float32) * frequencies[:, None] for n in (rows, columns))
    parts = [f(angles)[:, :, None].expand(-1, -1, columns) for angles in [row] for f in (torch.sin, torch.cos)]
    parts += [f(angles)[:, None, :].expand(-1, rows, -1) for angles in [column] for f in (torch.sin, torch.cos)]
    return torch.cat(parts)[None]


def _initialize(tokenizer: FlexTok) -> None:
    """Xavier-uniform matrices, and zeros wherever the decoder is modulated or read out.

    The published start has zeros in the encoder's last layer too. Then all codes are the middle one, and it takes long until
    the first vector leaves its cell; here the vectors start spread over the quantizer's range, and short of its ends.
    """
    zeros = {tokenizer.decoder.out, tokenizer.decoder.modulation}
    for part in (tokenizer.encoder, tokenizer.decoder):
        for module in part.modules():
            if isinstance(module, Block) and module.modulation is not None:
                zeros.add(module.modulation)
            if isinstance(module, nn.Linear):
                gain = 0.0 if module in zeros else 0.3 if module is tokenizer.encoder.out else 1.0
                bound = gain * math.sqrt(6 / sum(module.weight.shape))
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
