"""OmniTokenizer: pictures and clips as one grid of codes, by a transformer in space followed by one in time.

Paper: https://arxiv.org/abs/2406.09399
Reference implementation: FoundationVision/OmniTokenizer@701b619, MIT; weights MIT.

The first frame makes a latent frame by itself, every four frames after it make one more; a picture is a clip of one frame.
Clips longer than the network was trained on are cut into windows of its frames, each of which is coded by itself.

The layers in time look at their neighbours through a convolution that reads a sequence `[B h w, t, D]` as if it were a grid
`[B, t, h, w, D]`. That scrambles places and times; the published weights were trained so, and so it is done here. Because of
it the causal masks do not make the network causal: every latent frame depends on the whole window.

Here, unlike there: the grid need not be square; attention among one key is the identity on its value.

Shapes: B batch, T frames, t latent frames, h w cells of a latent frame, N sequences of L vectors, D width, C width of a code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig, TokensError
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.clips import Video
from tokenzoo.tokenizers.learning import Learning
from tokenzoo.tokenizers.quantizers import VectorQuantizer
from tokenzoo.tokenizers.spec import Modality
from tokenzoo.tokenizers.video._common import Loss, repeat_last, trained

Grid = tuple[int, int, int, int]

_SHARPNESS = 8.0  # of the attention between unit vectors
_SLOPE = 0.1


@strict
@dataclass(kw_only=True)
class OmniTokenizerConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are those trained on pictures and clips.

    Attributes:
        image_size: Height and width of a frame in pixels.
        num_frames: Frames that the network sees at once, `1 + k * frame_stride`; 1 for the networks trained on pictures.
        patch_size: Height and width of a patch in pixels.
        frame_stride: Frames per patch, after the first frame.
        dim: Width.
        heads: Attention heads.
        encoder_blocks: The encoder's layers in space: `t` attends to the whole frame, `w` to windows of it.
        decoder_blocks: As `encoder_blocks`, of the decoder.
        temporal_layers: Layers in time of either.
        window: Height and width of a window in patches.
        positions: How attention to the whole frame knows places: by rotation, by a learned bias, or not at all.
        codebook_size: Codes.
        token_dim: Width of a code.
        commitment: Weight of the commitment loss.
        kmeans_iterations: Rounds of k-means by which the first training batch sets the codebook; 0 for a random start.
        restart_after: Training steps after which a code that nothing chose is set to a vector of the batch; 0 for never.
        reconstruction_weight: Of the absolute error.
        fit: Frames of another size are stretched to the network's, or their centre is cropped.
    """

    image_size: int = 256
    num_frames: int = 17
    patch_size: int = 8
    frame_stride: int = 4
    dim: int = 512
    heads: int = 8
    encoder_blocks: str = "ttww"
    decoder_blocks: str = "tttt"
    temporal_layers: int = 4
    window: int = 8
    positions: Literal["rotary", "bias", "none"] = "rotary"
    codebook_size: int = 8192
    token_dim: int = 8
    commitment: float = 0.25
    kmeans_iterations: int = 0
    restart_after: int = 0
    reconstruction_weight: float = 4.0
    fit: Literal["stretch", "crop"] = "stretch"

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def latent_frames(self) -> int:
        """Latent frames of a whole window."""
        return 1 + (self.num_frames - 1) // self.frame_stride

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and divide as they must."""
        for name in ("patch_size", "frame_stride", "num_frames", "window", "token_dim", "codebook_size", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"expected an image size that patch_size={self.patch_size} divides, got {self.image_size}")
        if (self.num_frames - 1) % self.frame_stride:
            raise ValueError(f"expected 1 + k * {self.frame_stride} frames at once, got num_frames={self.num_frames}")
        if self.dim % self.heads or self.dim // self.heads % 4:
            raise ValueError(f"expected heads of a width that 4 divides, got dim={self.dim} for heads={self.heads}")

    def validate_blocks(self) -> None:
        """Checks that layers are of a known kind, and that windows fill the grid."""
        blocks = self.encoder_blocks + self.decoder_blocks
        if set(blocks) - {"t", "w"}:
            raise ValueError(f"expected blocks out of t and w, got {self.encoder_blocks!r} and {self.decoder_blocks!r}")
        if "w" in blocks and self.grid % self.window:
            raise ValueError(f"expected windows that fill a grid of {self.grid} patches a side, got window={self.window}")


class CosineAttention(nn.Module):
    """Attention between unit vectors. Queries are taken of the normalised input, keys and values of the input itself."""

    def __init__(self, dim: int, heads: int, *, causal: bool, biased: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(dim, bias=False)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim // heads))
        self.k_scale = nn.Parameter(torch.ones(dim // heads))
        self.out = nn.Linear(dim, dim, bias=False)
        self.position = PositionBias(dim, heads) if biased else None

    def forward(self, x_NLD: Tensor, cells: tuple[int, int], turns: Tensor | None) -> Tensor:
        """`[N, L, D]` to the same shape; `cells` are those of a frame, `turns` its rotations `[L, D / heads / 2]`."""
        q, (k, v) = self.q(self.norm(x_NLD)), self.kv(x_NLD).chunk(2, -1)
        if x_NLD.shape[1] == 1 and not self.training:
            return self.out(v)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        if turns is not None:
            q, k = _turned(q, turns), _turned(k, turns)
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        bias = None if self.position is None else self.position(*cells).to(q.dtype)
        x_NHLD = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, is_causal=self.causal, scale=_SHARPNESS
        )
        return self.out(x_NHLD.transpose(1, 2).flatten(2))


class PositionBias(nn.Module):
    """What attention adds for the way from one place to another (https://arxiv.org/abs/2111.09883)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.inside, self.hidden, self.outside = nn.Linear(2, dim), nn.Linear(dim, dim), nn.Linear(dim, heads)

    def forward(self, height: int, width: int) -> Tensor:
        """Of a frame of `height * width = L` cells, `[heads, L, L]`."""
        ways = torch.stack(torch.meshgrid(_ways(height), _ways(width), indexing="ij"), -1).to(self.inside.weight)
        x = F.leaky_relu(self.inside(ways.sign() * ways.abs().log1p()), _SLOPE)
        table = self.outside(F.leaky_relu(self.hidden(x), _SLOPE)).flatten(0, 1)
        return table[_way_between(height, width).to(x.device)].permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Attention within windows of a frame, with a bias for the way from one place to another."""

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(dim, bias=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.bias_table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("index", _way_between(window, window), persistent=False)

    def forward(self, x_NLD: Tensor, cells: tuple[int, int]) -> Tensor:
        """Frames of `cells`, `[N, h * w, D]`, to the same shape."""
        size = self.window
        rows, columns = (n // size for n in cells)
        split = self.norm(x_NLD).view(len(x_NLD), rows, size, columns, size, -1).transpose(2, 3)
        q, k, v = self.qkv(split).reshape(-1, size * size, 3, self.heads, split.shape[-1] // self.heads).unbind(2)
        bias = self.bias_table[self.index].permute(2, 0, 1)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias)
        x = self.proj(x.transpose(1, 2).reshape(split.shape))
        return x.transpose(2, 3).reshape(x_NLD.shape)


class GatedMLP(nn.Module):
    """LayerNorm, and a hidden layer of which one half gates the other (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(4 * (2 / 3) * dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        x, gate = self.up(self.norm(x)).chunk(2, -1)
        return self.down(F.gelu(gate) * x)


class Layer(nn.Module):
    """Residual neighbourhood (of kind `t`), attention and MLP."""

    def __init__(self, config: OmniTokenizerConfig, kind: str, *, causal: bool = False) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.conv = nn.Conv3d(dim, dim, 3, groups=dim) if kind == "t" else None
        biased = config.positions == "bias" and not causal
        self.attention: CosineAttention | WindowAttention = (
            CosineAttention(dim, heads, causal=causal, biased=biased)
            if kind == "t"
            else WindowAttention(dim, heads, config.window)
        )
        self.mlp = GatedMLP(dim)

    def forward(self, x_NLD: Tensor, grid: Grid, turns: Tensor | None) -> Tensor:
        """`[N, L, D]` to `[N, L, D]`, of a grid `(B, t, h, w)`."""
        if self.conv is not None:
            # Of a layer in time, N L is B h w t, not B t h w: the scrambling that the weights were trained with.
            x_NLD = x_NLD + self._neighbours(x_NLD.reshape(*grid, -1)).reshape(x_NLD.shape)
        if isinstance(self.attention, CosineAttention):
            x_NLD = x_NLD + self.attention(x_NLD, grid[2:], turns)
        else:
            x_NLD = x_NLD + self.attention(x_NLD, grid[2:])
        return x_NLD + self.mlp(x_NLD)

    def _neighbours(self, x_BthwD: Tensor) -> Tensor:
        """A convolution over the cells around, of this latent frame and the two before it."""
        assert self.conv is not None
        weight, bias, groups = self.conv.weight, self.conv.bias, self.conv.groups
        if x_BthwD.shape[1] == 1:
            x = F.conv2d(x_BthwD[:, 0].movedim(-1, 1), weight[:, :, -1], bias, padding=1, groups=groups)[:, :, None]
        else:
            x = F.conv3d(F.pad(x_BthwD.movedim(-1, 1), (1, 1, 1, 1, 2, 0)), weight, bias, groups=groups)
        return x.movedim(1, -1)


class Layers(nn.Module):
    """Layers of one transformer, and a last LayerNorm."""

    def __init__(self, config: OmniTokenizerConfig, blocks: str, *, causal: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, kind, causal=causal) for kind in blocks)
        self.norm = nn.LayerNorm(config.dim, bias=False)

    def forward(self, x_NLD: Tensor, grid: Grid, turns: Tensor | None = None) -> Tensor:
        """As `Layer.forward`."""
        for layer in self.layers:
            x_NLD = layer(x_NLD, grid, turns)
        return self.norm(x_NLD)


class PatchEmbed(nn.Module):
    """Patches of `frames` frames as vectors, normalised before and after."""

    def __init__(self, config: OmniTokenizerConfig, frames: int) -> None:
        super().__init__()
        self.frames, self.size = frames, config.patch_size
        inside = 3 * frames * config.patch_size**2
        self.norm_in = nn.LayerNorm(inside)
        self.proj = nn.Linear(inside, config.dim)
        self.norm_out = nn.LayerNorm(config.dim)

    def forward(self, clip: Tensor) -> Tensor:
        """`[B, t * frames, 3, H, W]` to `[B, t, h, w, D]`; within a patch, columns vary fastest, channels slowest."""
        size = self.size
        batch, _, channels, height, width = clip.shape
        split = clip.view(batch, -1, self.frames, channels, height // size, size, width // size, size)
        return self.norm_out(self.proj(self.norm_in(split.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4))))


class PatchHead(nn.Linear):
    """The inverse of `PatchEmbed`, from vectors to pixels."""

    def __init__(self, config: OmniTokenizerConfig, frames: int) -> None:
        super().__init__(config.dim, 3 * frames * config.patch_size**2)
        self.frames, self.size = frames, config.patch_size

    def forward(self, x_BthwD: Tensor) -> Tensor:
        """`[B, t, h, w, D]` to `[B, t * frames, 3, H, W]`."""
        batch, time, height, width, _ = x_BthwD.shape
        pixels = super().forward(x_BthwD).view(batch, time, height, width, 3, self.frames, self.size, self.size)
        pixels = pixels.permute(0, 1, 5, 4, 2, 6, 3, 7)
        return pixels.reshape(batch, time * self.frames, 3, height * self.size, width * self.size)


class Encoder(nn.Module):
    """Clips to unit vectors: patches, space, time."""

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.head_dim, self.rotary = config.dim // config.heads, config.positions == "rotary"
        self.first, self.rest = PatchEmbed(config, 1), PatchEmbed(config, config.frame_stride)
        self.spatial = Layers(config, config.encoder_blocks)
        self.temporal = Layers(config, "t" * config.temporal_layers, causal=True)
        self.out = nn.Linear(config.dim, config.token_dim)

    def forward(self, clip: Tensor) -> Tensor:
        """`[B, 1 + k * frame_stride, 3, H, W]` in [0, 1] to `[B, t, h, w, C]`."""
        clip = clip - 0.5
        x = self.first(clip[:, :1])
        if clip.shape[1] > 1:
            x = torch.cat([x, self.rest(clip[:, 1:])], 1)
        batch, time, height, width, _ = grid = x.shape
        turns = rotations(height, width, self.head_dim, x.device) if self.rotary else None
        x_NLD = self.spatial(x.flatten(2, 3).flatten(0, 1), grid[:4], turns)
        x_NLD = x_NLD.unflatten(0, (batch, time)).transpose(1, 2).flatten(0, 1)
        vectors = self.out(self.temporal(x_NLD, grid[:4]))
        return F.normalize(vectors.view(batch, height, width, time, -1).permute(0, 3, 1, 2, 4), dim=-1)


class Decoder(nn.Module):
    """Codes to clips: time, space, patches."""

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.head_dim, self.rotary = config.dim // config.heads, config.positions == "rotary"
        self.embed = nn.Linear(config.token_dim, config.dim)
        self.temporal = Layers(config, "t" * config.temporal_layers, causal=True)
        self.spatial = Layers(config, config.decoder_blocks)
        self.first, self.rest = PatchHead(config, 1), PatchHead(config, config.frame_stride)

    def forward(self, vectors_BthwC: Tensor) -> Tensor:
        """`[B, t, h, w, C]` to `[B, 1 + k * frame_stride, 3, H, W]`, not clamped."""
        batch, time, height, width, _ = grid = vectors_BthwC.shape
        x_NLD = self.embed(vectors_BthwC.flatten(2, 3).transpose(1, 2).flatten(0, 1))
        x_NLD = self.temporal(x_NLD, grid[:4])
        x_NLD = x_NLD.unflatten(0, (batch, height * width)).transpose(1, 2).flatten(0, 1)
        turns = rotations(height, width, self.head_dim, x_NLD.device) if self.rotary else None
        x = self.spatial(x_NLD, grid[:4], turns).view(batch, time, height, width, -1)
        clip = self.first(x[:, :1])
        return (clip if time == 1 else torch.cat([clip, self.rest(x[:, 1:])], 1)) + 0.5


def rotations(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Rotary positions of the cells of a frame, column by column and row by row in turn: complex `[h * w, dim / 2]`."""
    frequencies = 1.0 / (10000 ** (torch.arange(0, dim, 4, device=device).float() / dim))
    place = torch.arange(height * width, device=device)
    angles = torch.stack([torch.outer(place % width, frequencies), torch.outer(place // width, frequencies)], -1).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def _turned(x_NLHD: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_NLHD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x_NLHD.dtype)


def _ways(size: int) -> Tensor:
    """Distances, with their sign, between any two of `size` places."""
    return torch.arange(1 - size, size)


def _way_between(height: int, width: int) -> Tensor:
    """For cells i and j of a frame, where the way from j to i is in a table of all `(2 h - 1) * (2 w - 1)`: `[L, L]`."""
    row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
    return (row[:, None] - row + height - 1) * (2 * width - 1) + column[:, None] - column + width - 1


def _transformer_rules(side: str, kind: str) -> tuple[tuple[str, str], ...]:
    published, ours = f"{side}oder.{side}_{kind}_transformer.", f"{side}oder.{kind}."
    parts = (
        ("0.dsconv.", "conv."),
        ("1.norm.gamma", "attention.norm.weight"),
        ("1.to_q.", "attention.q."),
        ("1.to_kv.", "attention.kv."),
        ("1.to_out.", "attention.out."),
        ("1.relative_position_bias_table", "attention.bias_table"),
        ("1.spatial_rel_pos_bias.net.0.0.", "attention.position.inside."),
        ("1.spatial_rel_pos_bias.net.1.0.", "attention.position.hidden."),
        ("1.spatial_rel_pos_bias.net.2.", "attention.position.outside."),
        ("1.", "attention."),
        ("3.0.", "mlp.norm."),
        ("3.1.", "mlp.up."),
        ("3.4.", "mlp.down."),
    )
    layers = ((f"{published}layers.{{}}.{theirs}", f"{ours}layers.{{}}.{name}") for theirs, name in parts)
    return (*layers, (f"{published}norm_out.gamma", f"{ours}norm.weight"))


_RULES = (
    *(
        (f"encoder.to_patch_emb{suffix}.{i}.", f"encoder.{name}.{part}.")
        for suffix, name in (("_first_frame", "first"), ("", "rest"))
        for i, part in ((1, "norm_in"), (2, "proj"), (3, "norm_out"))
    ),
    *(rule for side in ("enc", "dec") for kind in ("spatial", "temporal") for rule in _transformer_rules(side, kind)),
    ("pre_vq_conv.1.", "encoder.out."),
    ("post_vq_conv.1.", "decoder.embed."),
    ("decoder.to_pixels_first_frame.0.", "decoder.first."),
    ("decoder.to_pixels.0.", "decoder.rest."),
    ("codebook.embeddings", "quantizer.codebook"),
    ("codebook.N", "quantizer.learner.cluster_size"),
    ("codebook.z_avg", "quantizer.learner.cluster_sums"),
)
_DROPPED = {
    "*.beta": "zeros that nothing ever changes",
    "*.context_norm.*": "norms of a context that these networks are not given",
    "*.relative_position_index": "follows from the window's size",
    "codebook.codebook_usage": "a statistic for the log",
    **{f"{name}.*": "needed in training only" for name in ("image_discriminator", "video_discriminator", "perceptual_model")},
}
_UNUSED = "a bias that the fused attention of the published pipeline leaves out"


class OmniTokenizer(Tokenizer):
    """The tokenizer: `h * w` ids per latent frame, in the order of time, rows and columns.

    Attributes:
        extra_losses: Further terms of `objective`, of `(reconstruction, original)`, clips `[B, T, 3, H, W]` in [0, 1] both,
            such as a perceptual network of yours.
    """

    architecture: ClassVar[str] = "omnitokenizer"
    modality: ClassVar[Modality] = "video"
    config_class: ClassVar[type[TokenizerConfig]] = OmniTokenizerConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "published": Adapter(_RULES, _DROPPED | {"*.spatial_rel_pos_bias.*": _UNUSED}, inside=("state_dict",)),
        "published_with_bias": Adapter(
            _RULES, _DROPPED | {"*_temporal_transformer.*.spatial_rel_pos_bias.*": _UNUSED}, inside=("state_dict",)
        ),
    }
    config: OmniTokenizerConfig

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__(config, Video(config.image_size, config.fit))
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        learning = Learning(
            decay=0.99,
            smoothing=1e-7,
            kmeans_iterations=config.kmeans_iterations,
            restart_after=config.restart_after or None,
        )
        self.quantizer = VectorQuantizer(
            config.codebook_size, config.token_dim, commitment=config.commitment, learning=learning
        )
        learner = self.quantizer.learner
        assert learner is not None
        self.quantizer.codebook.data.copy_(F.normalize(torch.randn(config.codebook_size, config.token_dim), dim=-1))
        learner.cluster_sums.copy_(self.quantizer.codebook)
        self.extra_losses: dict[str, Loss] = {}

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.codebook_size,), "grid": (self.config.grid, self.config.grid)}

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length, seed
        windows = batch.split(self.config.num_frames, 1)
        return Codes(torch.cat([self.quantizer.ids(self.encoder(self._fill(w))).flatten(1) for w in windows], 1)[:, None])

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        del lengths, extras
        grid = self.config.grid
        if ids.shape[2] % grid**2:
            raise TokensError(
                f"expected whole latent frames of {grid} x {grid} tokens, got {ids.shape[2]} tokens: encode again"
            )
        latent = ids[:, 0].view(len(ids), -1, grid, grid)
        windows = latent.split(self.config.latent_frames, 1)
        return torch.cat([self.decoder(self.quantizer.lookup(w).to(self.dtype)) for w in windows], 1).clamp(0, 1)

    def _fill(self, window: Tensor) -> Tensor:
        """The window with its last frame repeated until its frames are patches."""
        return repeat_last(window, -(window.shape[1] - 1) % self.config.frame_stride)

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Absolute error of the pixels, the commitment loss, and `extra_losses`, on clips `[B, T, 3, H, W]` in [0, 1].

        Codes are moving averages of what chose them. An adversarial loss is the training loop's: `adversary` in the recipe.
        Clips should have no more frames than the network sees at once.
        """
        del progress, generator
        found = self.quantizer(self.encoder(self._fill(batch)))
        reconstruction = self.decoder(found.vectors.to(batch.dtype))[:, : batch.shape[1]]
        pixels = self.config.reconstruction_weight * F.l1_loss(reconstruction.float(), batch.float())
        losses = {"pixels": pixels, "quantizer": found.loss}
        return trained(batch, reconstruction, losses, self.extra_losses, found.ids, self.config.codebook_size)
