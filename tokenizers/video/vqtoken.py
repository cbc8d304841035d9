"""VQToken: a clip as a handful of tokens, by clustering what a frozen vision network sees in all its frames.

Paper: https://arxiv.org/abs/2503.16980
Reference implementation: Hai-chao-Zhang/VQToken, BSD-3-Clause; the released method is that of its "runtime 2" of 2026.

Patches of all frames are described by a vision transformer and a projector, and grouped by spherical k-means over this one
clip. Its tokens are the ids of the patches (the index map, `[T, h, w]`, "token hash function"), the centroids (the codebook,
another one for each clip), and, per centroid, what one layer of attention makes of the index map and the codebook. Decoding
gives each patch its centroid: features, not pixels.

The codebook and the attention tokens travel in `Tokens.extras`, ids of two clips have nothing in common. The codebook is also
what the paper's "centroid" ablation takes as a clip's tokens.

Here, unlike there: the attention is computed in float64. Ids go into it as numbers from 0 to 31, of 729 patches at once, so
that its softmax is nearly a maximum, and float32 would leave the tokens with errors in the fourth decimal.

Shapes: B batch, T frames, h w grid of patches, K clusters, D width of the features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.masked_autoencoder import MaskedAutoencoder
from tokenzoo.encoders.vision import vision_tower
from tokenzoo.kernels import kmeans
from tokenzoo.kernels.quantize import code_sums
from tokenzoo.tokenizers import Codes, ConfigError, DownloadError, Output, Tokenizer, TokenizerConfig, TokensError
from tokenzoo.tokenizers.adapter import Adapter, State
from tokenzoo.tokenizers.clips import Video
from tokenzoo.tokenizers.spec import Modality
from tokenzoo.tokenizers.video_files import Sampling


@strict
@dataclass(kw_only=True)
class VQTokenConfig(TokenizerConfig):
    """The architecture of one checkpoint; the defaults are the published 0.5B model's.

    Attributes:
        tower: Vision transformer, by timm's name.
        tower_layers: Its blocks that are kept, without the norm after the last; 0 for all of them and the norm.
        tower_activation: Of its MLPs, by timm's name; empty for what timm gives this network.
        image_size: Height and width of a frame in pixels.
        mean: Of each colour, subtracted.
        deviation: Of each colour, divided by.
        projector: What stands between tower and clusters: an `"mlp"` of two layers, a `"whitening"`, fitted to the tower's
            features of some media when training begins, or `"none"`.
        dim: Width of the projected features.
        frames: Frames of a clip that are looked at.
        clusters: K, or the largest K that is tried.
        fewest_clusters: The smallest K that is tried; 0 for always `clusters`.
        iterations: Rounds of k-means at most.
        tokens: What the tokens of a clip are: `"attention"` over index map and codebook, or the `"centroid"`s themselves.
        heads: Attention heads.
        feedforward: Width of the attention layer's MLP.
        hidden: Share of the patches that the tower does not see while it is trained by masked autoencoding; with 0 the tower
            is frozen, and the attention is what is trained.
    """

    tower: str = "vit_so400m_patch14_siglip_384"
    tower_layers: int = 26
    tower_activation: str = "gelu_tanh"
    image_size: int = 384
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    deviation: tuple[float, float, float] = (0.5, 0.5, 0.5)
    projector: Literal["mlp", "whitening", "none"] = "mlp"
    dim: int = 896
    frames: int = 32
    clusters: int = 32
    fewest_clusters: int = 0
    iterations: int = 50
    tokens: Literal["attention", "centroid"] = "attention"
    heads: int = 8
    feedforward: int = 2048
    hidden: float = 0.0

    def validate_sizes(self) -> None:
        """Checks that sizes are positive and fit each other."""
        for name in ("image_size", "dim", "frames", "clusters", "iterations", "heads", "feedforward"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"expected dim to be a multiple of heads, got {self.dim} and {self.heads}")
        if not 0 <= self.fewest_clusters <= self.clusters:
            raise ValueError(f"expected fewest_clusters in [0, {self.clusters}], got {self.fewest_clusters}")
        if self.tokens == "attention" and self.frames > (self.fewest_clusters or self.clusters):
            raise ValueError(
                f"expected at most as many frames as clusters where tokens='attention', got {self.frames} and "
                f"{self.fewest_clusters or self.clusters}: a query is made of each frame"
            )
        if not 0 <= self.hidden < 1:
            raise ValueError(f"expected hidden, a share of the patches, in [0, 1), got {self.hidden}")


@dataclass(frozen=True)
class FewFrames(Video):
    """Clips of a file or an array, of which a few frames, evenly spread, are looked at; what is decoded is not pixels.

    Attributes:
        most: Frames that are looked at.
    """

    most: int = 32

    def read(self, item: Any) -> tuple[Tensor, dict[str, Any]]:
        """As `Video.read`; of a clip with more frames than `most`, so many by `linspace`."""
        clip, meta = super().read(item)
        if len(clip) > self.most:
            clip = clip[torch.from_numpy(Sampling("uniform", self.most).indices(torch.arange(len(clip)).numpy()))]
        return clip, {**meta, "frames": len(clip)}

    def restore(self, reconstruction: Tensor, meta: Mapping[str, Any]) -> Tensor:
        """Features stay as they are."""
        del meta
        return reconstruction


class ClusterAttention(nn.Module):
    """Queries made of the index map, one per frame, attend to the codebook: one token per cluster."""

    def __init__(self, patches: int, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.to_q_proj = nn.Linear(patches, dim)
        self.layer = nn.TransformerDecoderLayer(dim, heads, feedforward, dropout=0.1, batch_first=True)

    def forward(self, index_map: Tensor, codebook: Tensor) -> Tensor:
        """Tokens `[K, D]` of ids `[T, h * w]` with T <= K, and centroids `[K, D]`."""
        rows = torch.arange(len(codebook), device=index_map.device) % len(index_map)
        queries = self.to_q_proj(index_map[rows].to(codebook.dtype))
        return self.layer(queries[None], codebook[None])[0]


class Whitening(nn.Linear):
    """The principal components of features, with mean 0 and variance 1 each over what it was fitted to.

    Spherical clusters are those of directions, and a transformer's features share most of theirs until their mean is gone.
    """

    @torch.no_grad()
    def fit(self, parts: Iterable[Tensor]) -> None:
        """Takes the components from features `[..., width]`, in several parts."""
        count, total, products = (
            0,
            torch.zeros(self.in_features).double(),
            torch.zeros(self.in_features, self.in_features).double(),
        )
        for part in parts:
            rows = part.flatten(0, -2).double().cpu()
            count, total, products = count + len(rows), total + rows.sum(0), products + rows.mT @ rows
        mean = total / count
        variances, directions = torch.linalg.eigh(products / count - mean[:, None] * mean)
        scale = variances[-self.out_features :].flip(0).clamp_min(1e-12).rsqrt()
        weight = directions[:, -self.out_features :].flip(1).mT * scale[:, None]
        self.weight.copy_(weight)
        self.bias.copy_(-self.weight.double().cpu() @ mean)


def _projector(kind: str, width: int, dim: int) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))
    if dim > width or (kind == "none" and dim != width):
        raise ConfigError(f"expected dim {'of' if kind == 'none' else 'of at most'} {width}, the tower's width, got {dim}")
    return Whitening(width, dim) if kind == "whitening" else nn.Identity()


class _SiglipAdapter(Adapter):
    """Joins the projections to queries, keys and values, which transformers holds apart and timm in one matrix."""

    def to_ours(self, published: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_ours`."""
        joined = dict(published)
        for key in [key for key in published if ".self_attn.q_proj." in key and ".layers." in key and "tower" in key]:
            names = [key.replace("q_proj", f"{part}_proj") for part in "qkv"]
            joined[key.replace("q_proj", "qkv")] = torch.cat([joined.pop(name) for name in names])
        ours = super().to_ours(joined)
        position = ours.get("tower.pos_embed")
        return ours if position is None else {**ours, "tower.pos_embed": position.reshape(1, -1, position.shape[-1])}

    def to_published(self, ours: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_published`."""
        apart: State = {}
        for key, tensor in super().to_published(ours).items():
            if ".self_attn.qkv." in key:
                apart |= {key.replace("qkv", f"{p}_proj"): part for p, part in zip("qkv", tensor.chunk(3), strict=True)}
            else:
                apart[key] = tensor[0] if key.endswith("position_embedding.weight") else tensor
        return apart


_TOWER = "model.vision_tower.vision_tower.vision_model."
PUBLISHED = _SiglipAdapter(
    rules=(
        (f"{_TOWER}embeddings.patch_embedding.", "tower.patch_embed.proj."),
        (f"{_TOWER}embeddings.position_embedding.weight", "tower.pos_embed"),
        (f"{_TOWER}encoder.layers.{{}}.layer_norm1.", "tower.blocks.{}.norm1."),
        (f"{_TOWER}encoder.layers.{{}}.layer_norm2.", "tower.blocks.{}.norm2."),
        (f"{_TOWER}encoder.layers.{{}}.self_attn.qkv.", "tower.blocks.{}.attn.qkv."),
        (f"{_TOWER}encoder.layers.{{}}.self_attn.out_proj.", "tower.blocks.{}.attn.proj."),
        (f"{_TOWER}encoder.layers.{{}}.mlp.", "tower.blocks.{}.mlp."),
        ("model.mm_projector.", "projector."),
        ("model.cross_attention.to_q_proj.", "attention.to_q_proj."),
        ("model.cross_attention.transformer_decoder.layers.0.", "attention.layer."),
        ("model.image_newline", "newline"),
    ),
    dropped={
        "model.layers.*": "the language model",
        "model.embed_tokens.*": "the language model",
        "model.norm.*": "the language model",
        "lm_head.*": "the language model",
        f"{_TOWER}post_layernorm.*": "features are read before it",
        f"{_TOWER}head.*": "pooling, which is not used",
    },
)


class VQToken(Tokenizer):
    """The tokenizer: one id per patch of each frame; `extras` has the codebook and the clip's K tokens.

    `encode(length=k)` asks for K = k; without, K is what the config says, or what the clip wants.

    Attributes:
        newline: Vector `(D,)` that a language model gets after the tokens.
    """

    architecture: ClassVar[str] = "vqtoken"
    modality: ClassVar[Modality] = "video"
    config_class: ClassVar[type[TokenizerConfig]] = VQTokenConfig
    adapters: ClassVar[Mapping[str, Adapter]] = {"published": PUBLISHED}
    config: VQTokenConfig

    def __init__(self, config: VQTokenConfig) -> None:
        size = config.image_size
        media = FewFrames(size, "stretch", sampling=Sampling("uniform", config.frames), most=config.frames)
        super().__init__(config, media)
        try:
            self.tower = vision_tower(
                config.tower, size, config.tower_layers, activation=config.tower_activation or None
            ).requires_grad_(config.hidden > 0)
            self.autoencoder = MaskedAutoencoder(self.tower, config.hidden) if config.hidden else None
        except ValueError as error:
            raise ConfigError(f"tower: {error}") from error
        self.grid: tuple[int, int] = self.tower.patch_embed.grid_size  # type: ignore[union-attr, assignment]
        width = int(self.tower.num_features)  # type: ignore[arg-type]
        self.projector = _projector(config.projector, width, config.dim)
        self.attention = (
            ClusterAttention(self.patches, config.dim, config.heads, config.feedforward)
            if config.tokens == "attention"
            else None
        )
        self.newline = nn.Parameter(torch.zeros(config.dim))
        self.qualities = {}

    @classmethod
    def over(cls, tower: str, *, pretrained: bool = True, **config: Any) -> "VQToken":
        """Clusters of any vision transformer's own features: `VQToken.over("vit_small_patch14_dinov2.lvd142m")`.

        Args:
            tower: timm's name.
            pretrained: Get timm's weights from the Hub; otherwise they are random.
            config: Values of the config. Size, mean and deviation of the pictures are by default those of the weights, and the
                tokens of a clip are its centroids.

        Raises:
            ConfigError: If timm has no vision transformer of this name, or a value is refused.
            DownloadError: If its weights could not be had from the Hub or from the local cache.
        """
        import timm

        known = timm.get_pretrained_cfg(tower) if timm.is_model(tower) else None
        values: dict[str, Any] = {"tower": tower, "tower_layers": 0, "tower_activation": "", "projector": "none"}
        if known is not None:
            values |= {"image_size": known.input_size[-1], "mean": known.mean, "deviation": known.std}
        values |= {"tokens": "centroid", **config}
        try:
            seen = vision_tower(tower, values.get("image_size", 224), values["tower_layers"], pretrained=pretrained)
        except ValueError as error:
            raise ConfigError(f"tower: {error}") from error
        except OSError as error:
            raise DownloadError(str(error)) from error
        if values["projector"] == "none":
            values["dim"] = int(seen.num_features)  # type: ignore[arg-type]
        tokenizer = cls(cls.config_class.from_dict(values)).eval()  # type: ignore[arg-type]
        tokenizer.tower.load_state_dict(seen.state_dict())
        return tokenizer

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.clusters,), "decodes_to": "features"}

    def _length_range(self) -> tuple[int, int]:
        return 1, self.config.clusters

    @property
    def _batch_size(self) -> int:
        """One clip at a time: each is clustered by itself, into as many clusters as are asked of it."""
        return 1

    @property
    def patches(self) -> int:
        """Patches per frame."""
        return self.grid[0] * self.grid[1]

    def features(self, clip: Tensor) -> Tensor:
        """Features `[T, h * w, D]` of frames `[T, 3, H, W]` in [0, 1], one frame at a time."""
        return torch.cat([self.projector(self._look(frame[None])) for frame in clip])

    def _look(self, frames: Tensor) -> Tensor:
        """What the tower sees `[B, h * w, width]` in frames `[B, 3, H, W]` in [0, 1]."""
        with torch.no_grad():
            seen: Tensor = self.tower.forward_features(self._normalized(frames))  # type: ignore[operator]
        return seen[:, self.tower.num_prefix_tokens :]

    def _normalized(self, frames: Tensor) -> Tensor:
        mean, deviation = (frames.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.deviation))
        return (frames - mean) / deviation

    @torch.no_grad()
    def initialise(self, items: Tensor, generator: torch.Generator) -> None:
        """Fits the whitening, where the projector is one, to pictures `[B, 3, H, W]` or clips `[B, T, 3, H, W]`.

        Args:
            items: uint8, or floating point in [0, 1].
            generator: Not used; nothing is drawn.
        """
        del generator
        if isinstance(self.projector, Whitening):
            frames = items.flatten(0, 1) if items.dim() == 5 else items
            scale = 255 if frames.dtype == torch.uint8 else 1
            self.projector.fit(self._look(self.sized(frame[None].float() / scale)) for frame in frames)

    def sized(self, frames: Tensor) -> Tensor:
        """Frames `[..., 3, H, W]` in [0, 1] at the tower's size."""
        size = (self.config.image_size,) * 2
        if frames.shape[-2:] == size:
            return frames
        pictures = F.interpolate(frames.flatten(0, -4), size, mode="bicubic", antialias=True)
        return pictures.clamp(0, 1).unflatten(0, frames.shape[:-3])

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        parts = [self.group(self.features(clip), clusters=length, seed=seed) for clip in batch]
        most = self.config.clusters
        pad = [(0, 0, 0, most - len(codebook)) for _, codebook in parts]
        tokens = [self.tokens_of(ids, codebook) for ids, codebook in parts]
        extras = {
            "codebook": torch.stack([F.pad(codebook, p) for (_, codebook), p in zip(parts, pad, strict=True)]),
            "tokens": torch.stack([F.pad(t, p) for t, p in zip(tokens, pad, strict=True)]),
            "clusters": torch.tensor([len(codebook) for _, codebook in parts], device=batch.device),
        }
        return Codes(torch.stack([ids.reshape(1, -1) for ids, _ in parts]), None, extras)

    def group(self, features: Tensor, *, clusters: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Ids int64 `[T, h * w]` and codebook `[K, D]` of features `[T, h * w, D]`.

        Args:
            features: Of one clip.
            clusters: K; by default what the config says, which may leave it to the clip (`elbow`).
            seed: Of the first centroids.

        Returns:
            The ids, and the mean of every cluster's directions, differentiable where the features are.
        """
        config = self.config
        rows = F.normalize(features.flatten(0, 1).float(), dim=-1)
        sizes = range(config.fewest_clusters or config.clusters, config.clusters + 1)
        fits = [
            kmeans(
                rows.detach(),
                size,
                iterations=config.iterations,
                spherical=True,
                generator=torch.Generator().manual_seed(seed),
                tolerance=1e-4,
                keep_empty=True,
            )
            for size in (sizes if clusters is None else [clusters])
        ]
        distortions = torch.stack([(1 - (rows.detach() * fit.centroids[fit.ids]).sum(1)).double().sum() for fit in fits])
        centroids, ids = fits[elbow(distortions)]
        counts, sums = code_sums(rows.detach(), ids, len(centroids))
        if rows.requires_grad:
            sums = torch.zeros_like(sums).index_add(0, ids, rows)
        codebook = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centroids)
        return ids.reshape(features.shape[:2]), codebook.to(features.dtype)

    def tokens_of(self, ids: Tensor, codebook: Tensor) -> Tensor:
        """The K tokens `[K, D]` of ids `[T, h * w]` and a codebook `[K, D]`.

        Raises:
            TokensError: If there are more frames than clusters, of each of which the attention makes a query.
        """
        if self.attention is None:
            return codebook
        if len(ids) > len(codebook):
            raise TokensError(
                f"expected at most as many frames as clusters, got {len(ids)} frames and {len(codebook)} clusters: a query is "
                "made of each frame; show fewer of them, or take extras['codebook'] of a tokenizer with tokens='centroid'"
            )
        if self.training:
            tokens: Tensor = self.attention(ids, codebook)
            return tokens
        exact = {name: tensor.double() for name, tensor in self.attention.named_parameters()}
        tokens = torch.func.functional_call(self.attention, exact, (ids, codebook.double()))
        return tokens.to(codebook.dtype)

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """The feature grid `[B, T, h, w, D]`: directions, since clustering drops the magnitudes."""
        count = int(lengths[0, 0])
        if count % self.patches:
            raise TokensError(f"expected whole frames of {self.patches} ids, got {count}")
        if "codebook" not in extras:
            raise TokensError("expected extras['codebook'] [B, K, D]: a clip's ids mean nothing without its own codebook")
        grid = (-1, *self.grid)
        return torch.stack(
            [
                codebook[row[0, :count]].reshape(*grid, codebook.shape[1])
                for row, codebook in zip(ids, extras["codebook"], strict=True)
            ]
        )

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Trains the attention on frozen features; or, with `hidden` in the config, the tower.

        The attention learns to make K tokens out of which every patch of the clip can be read: a patch's feature attends to
        them, and the loss is the cosine distance between what it reads and itself. (The authors train with a language model's
        cross-entropy behind the tokens; put yours behind `tokens_of`, through which projector and attention get gradients.)

        The tower learns by masked autoencoding of single frames.

        Args:
            batch: Clips `[B, T, 3, H, W]`, or for the tower also pictures `[B, 3, H, W]`, in [0, 1]; of any size.
            progress: Not used.
            generator: Of the hidden patches, or of the first centroids and, where the config leaves it to the clip, of K.
        """
        del progress
        batch = self.sized(batch)
        if self.autoencoder is not None:
            frames = self._normalized(batch.flatten(0, 1) if batch.dim() == 5 else batch)
            return Output(None, {"hidden_patches": self.autoencoder(self.tower, frames, generator)})
        return Output(None, {"readout": torch.stack([self._readout(clip, generator) for clip in batch]).mean()})

    def _readout(self, clip: Tensor, generator: torch.Generator | None) -> Tensor:
        most, seed = self.config.clusters, int(torch.randint(1 << 31, (), generator=generator))
        fewest = min(most, max(self.config.fewest_clusters or most, len(clip)))
        clusters = int(torch.randint(fewest, most + 1, (), generator=generator))
        with torch.no_grad():
            features = self.features(clip)
            ids, codebook = self.group(features, clusters=clusters, seed=seed)
        return (
            1
            - F.cosine_similarity(
                read_out(features.flatten(0, 1), self.tokens_of(ids, codebook)), features.flatten(0, 1)
            ).mean()
        )


def read_out(features: Tensor, tokens: Tensor) -> Tensor:
    """What each feature `[N, D]` finds by attention in tokens `[K, D]`: `[N, D]`.

    Features are brought to the length that tokens have behind a LayerNorm, so that attention can be sharp.
    """
    return F.scaled_dot_product_attention(
        F.normalize(features, dim=-1)[None] * features.shape[1] ** 0.5, tokens[None], tokens[None]
    )[0]


def elbow(distortions: Tensor) -> int:
    """Where a falling curve bends: the point farthest from the line between its ends, the first of several."""
    curve = distortions - distortions.amin()
    curve = curve / curve.amax().clamp_min(1e-30)
    steps = torch.linspace(0, 1, len(curve), dtype=curve.dtype, device=curve.device)
    return int((curve[0] + (curve[-1] - curve[0]) * steps - curve).abs().argmax())


def tokdense(accuracy: float, tokens: float) -> float:
    """TokDense, accuracy per token that a clip takes (section 4 of the paper): 57.72 points over 13.08 tokens are 4.41."""
    return accuracy / tokens
