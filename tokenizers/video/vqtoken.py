"""VQToken: a clip as a handful of tokens, by clustering what a frozen vision network sees in all its frames.

Paper: https://arxiv.org/abs/2503.16980
Reference implementation: Hai-chao-Zhang/VQToken, BSD-3-Clause; the released method is that of its "runtime 2" of 2026.

Patches of all frames are described by a vision transformer and a projector, and grouped by spherical k-means over this one
clip. Its tokens are the ids of the patches (the index map, `[T, h, w]`, "token hash function"), the centroids (the codebook,
another one for each clip), and, per centroid, what one layer of attention makes of the index map and the codebook. Decoding
gives each patch its centroid: features, not pixels.

The codebook and the attention tokens travel in `Tokens.extras`, ids of two clips have nothing in common.

Shapes: B batch, T frames, h w grid of patches, K clusters, D width of the features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from tokenzoo.encoders.vision import vision_tower
from tokenzoo.kernels import kmeans
from tokenzoo.kernels.quantize import code_sums
from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig, TokensError
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
        image_size: Height and width of a frame in pixels.
        mean: Of each colour, subtracted.
        deviation: Of each colour, divided by.
        dim: Width of the projected features.
        frames: Frames of a clip that are looked at.
        clusters: K, or the largest K that is tried.
        fewest_clusters: The smallest K that is tried; 0 for always `clusters`.
        iterations: Rounds of k-means at most.
        tokens: What the tokens of a clip are: `"attention"` over index map and codebook, or the `"centroid"`s themselves.
        heads: Attention heads.
        feedforward: Width of the attention layer's MLP.
    """

    tower: str = "vit_so400m_patch14_siglip_384"
    tower_layers: int = 26
    image_size: int = 384
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    deviation: tuple[float, float, float] = (0.5, 0.5, 0.5)
    dim: int = 896
    frames: int = 32
    clusters: int = 32
    fewest_clusters: int = 0
    iterations: int = 50
    tokens: Literal["attention", "centroid"] = "attention"
    heads: int = 8
    feedforward: int = 2048

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
        self.tower = vision_tower(config.tower, size, config.tower_layers)
        self.grid: tuple[int, int] = self.tower.patch_embed.grid_size  # type: ignore[union-attr, assignment]
        width = int(self.tower.num_features)  # type: ignore[arg-type]
        self.projector = nn.Sequential(nn.Linear(width, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim))
        patches = self.grid[0] * self.grid[1]
        self.attention = (
            ClusterAttention(patches, config.dim, config.heads, config.feedforward) if config.tokens == "attention" else None
        )
        self.newline = nn.Parameter(torch.zeros(config.dim))
        self.tower.requires_grad_(False)
        self.qualities = {}

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (self.config.clusters,), "decodes_to": "features"}

    @property
    def patches(self) -> int:
        """Patches per frame."""
        return self.grid[0] * self.grid[1]

    def features(self, clip: Tensor) -> Tensor:
        """Features `[T, h * w, D]` of frames `[T, 3, H, W]` in [0, 1], one frame at a time."""
        mean, deviation = (clip.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.deviation))
        return torch.cat([self._look((frame[None] - mean) / deviation) for frame in clip])

    def _look(self, frame: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.tower.forward_features(frame)[:, self.tower.num_prefix_tokens :]  # type: ignore[operator]
        return self.projector(seen)

    def _encode(self, batch: Tensor, *, length: int | None, seed: int) -> Codes:
        del length
        parts = [self.group(self.features(clip), seed=seed) for clip in batch]
        most = self.config.clusters
        pad = [(0, 0, 0, most - len(codebook)) for _, codebook in parts]
        tokens = [self.tokens_of(ids, codebook) for ids, codebook in parts]
        extras = {
            "codebook": torch.stack([F.pad(codebook, p) for (_, codebook), p in zip(parts, pad, strict=True)]),
            "tokens": torch.stack([F.pad(t, p) for t, p in zip(tokens, pad, strict=True)]),
            "clusters": torch.tensor([len(codebook) for _, codebook in parts], device=batch.device),
        }
        return Codes(torch.stack([ids.reshape(1, -1) for ids, _ in parts]), None, extras)

    def group(self, features: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Ids int64 `[T, h * w]` and codebook `[K, D]` of features `[T, h * w, D]`, K as the config says."""
        config = self.config
        rows = F.normalize(features.detach().flatten(0, 1).float(), dim=-1)
        fits = []
        for size in range(config.fewest_clusters or config.clusters, config.clusters + 1):
            generator = torch.Generator().manual_seed(seed)
            fits.append(
                kmeans(
                    rows,
                    size,
                    iterations=config.iterations,
                    spherical=True,
                    generator=generator,
                    tolerance=1e-4,
                    keep_empty=True,
                )
            )
        distortions = torch.stack([(1 - (rows * fit.centroids[fit.ids]).sum(1)).double().sum() for fit in fits])
        centroids, ids = fits[elbow(distortions)]
        counts, sums = code_sums(rows, ids, len(centroids))
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
                f"expected at most as many frames as clusters, got {len(ids)} frames and {len(codebook)} clusters"
            )
        tokens: Tensor = self.attention(ids, codebook)
        return tokens

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
        """Trains projector and attention on the frozen tower: every patch is to be read out of its clip's K tokens.

        A patch's feature attends to the tokens; the loss is the cosine distance between what it reads and itself. (The
        authors train with a language model's cross-entropy behind the tokens; put yours behind `tokens_of` for that.)
        """
        del progress
        seed = int(torch.randint(1 << 31, (), generator=generator))
        losses = []
        for clip in batch:
            features = self.features(clip)
            ids, codebook = self.group(features, seed=seed)
            tokens = self.tokens_of(ids, codebook)
            wanted = F.normalize(features.flatten(0, 1).detach(), dim=-1)
            read = (wanted @ tokens.mT * tokens.shape[1] ** -0.5).softmax(-1) @ tokens
            losses.append(1 - F.cosine_similarity(read, wanted).mean())
        return Output(None, {"readout": torch.stack(losses).mean()})


def elbow(distortions: Tensor) -> int:
    """Where a falling curve bends: the point farthest from the line between its ends, the first of several."""
    curve = distortions - distortions.amin()
    curve = curve / curve.amax().clamp_min(1e-30)
    steps = torch.linspace(0, 1, len(curve), dtype=curve.dtype, device=curve.device)
    return int((curve[0] + (curve[-1] - curve[0]) * steps - curve).abs().argmax())


def tokdense(accuracy: float, tokens: float) -> float:
    """TokDense, accuracy per token that a clip takes (section 4 of the paper): 57.72 points over 13.08 tokens are 4.41."""
    return accuracy / tokens
