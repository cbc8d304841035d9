"""HAT's byte encoder and its pooling: bytes to a vector per word, as the backbone of a TFree-HAT language model reads them.

Papers: https://arxiv.org/abs/2501.10322 and https://arxiv.org/abs/2603.15953. Models: https://huggingface.co/Aleph-Alpha
(Open Aleph License: research and education that are not commercial). Written from a description of what the published
checkpoints compute (their implementation for vLLM, Aleph-Alpha/vllm@b76e756, Apache-2.0), and from none of their code.

Only the encoder and its connector are here, 119 of 7,192 million weights: bytes go through a causal transformer with a window,
then one learned query attends to the bytes of each word. Ids are the bytes, so `decode(ids)` is exact; no vector is turned back
into text, since the published decoder writes the next word and needs the backbone to know it.

What differs: the splitter is `unicode_word`, which takes any bytes (see `word_rule`); special tokens such as `<|eot_id|>` are
text like any other.

Shapes: N bytes, W words, D width of the byte encoder, E width of a word, H heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from tokenzoo.encoders.byte_transformer import ByteTransformer, Rotary
from tokenzoo.tokenizers import Codes, ConfigError, Output, TokenizerConfig, Tokens
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.strings import to_tensor
from tokenzoo.tokenizers.text.base import Embedding, TextTokenizer, ragged
from tokenzoo.tokenizers.text.splitters import Ends, RuleSplitter, splitter

POOLED_TOGETHER = 4096


@strict
@dataclass(kw_only=True)
class HATConfig(TokenizerConfig):
    """What the byte encoder and the pooling are made of; the cards read it from the published config.

    Attributes:
        dim: Width D of the byte encoder.
        num_layers: Blocks of the byte encoder.
        num_heads: Attention heads of the byte encoder.
        mlp_dim: Width between the linear layers of a block.
        word_dim: Width E of a word's vector.
        word_heads: Attention heads of the pooling.
        window: Bytes that a byte attends to.
        rope_theta: Base of the rotary wavelengths, for bytes and words alike.
        neighbours: Whether rotary positions turn neighbours together, and not the two halves of a head.
        norm_eps: Added to the mean square in the norms.
        max_word_bytes: Longer words are cut.
    """

    dim: int = 1024
    num_layers: int = 6
    num_heads: int = 8
    mlp_dim: int = 2816
    word_dim: int = 4096
    word_heads: int = 32
    window: int = 768
    rope_theta: float = 10000.0
    neighbours: bool = False
    norm_eps: float = 1e-5
    max_word_bytes: int = 100

    def __post_init__(self) -> None:
        for width, heads in ((self.dim, self.num_heads), (self.word_dim, self.word_heads)):
            if heads < 1 or width % heads or (width // heads) % 2:
                raise ValueError(f"expected heads of an even width that make up {width}, got {heads} of them")
        if self.window < 1 or self.max_word_bytes < 1:
            raise ValueError(f"expected a window and words of at least 1 byte, got {self.window}, {self.max_word_bytes}")


def config_from_published(published: Mapping[str, Any], related: object = None) -> dict[str, Any]:
    """Our config's values out of a TFree-HAT model's `config.json`.

    Raises:
        ConfigError: If it lacks a value, or describes an encoder that is built otherwise.
    """
    del related
    encoder = _part(published, "encoder_config")
    cross = _part(encoder, "cross_attention_config")
    heads, word_heads = _whole(encoder, "num_attention_heads"), _whole(cross, "num_attention_heads")
    dim, word_dim = _whole(encoder, "hidden_size"), _whole(cross, "hidden_size")
    expected = {
        "num_key_value_heads": (encoder, heads),
        "attention_num_kv_heads": (cross, word_heads),
        "hidden_size_q": (cross, word_dim),
        "hidden_size_kv": (cross, dim),
        "head_dim": (encoder, dim // heads),
        "vocab_size": (encoder, 256),
        "hidden_act": (encoder, "silu"),
    }
    for key, (part, value) in expected.items():
        if part.get(key) not in (None, value):
            raise ConfigError(f"expected {key} to be {value}, got {part[key]!r}: this HAT encoder is built otherwise")
    for key, value in [*encoder.items(), *cross.items()]:
        if value and any(word in key for word in ("bias", "qk_norm", "softcap", "soft_cap")):
            raise ConfigError(f"expected an encoder without {key}, got {value!r}: only the Llama 3.1 models are known here")
    scaling = encoder.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ConfigError(f"expected no rope_scaling in encoder_config, got {scaling}")
    return {
        "dim": dim,
        "num_layers": _whole(encoder, "num_hidden_layers"),
        "num_heads": heads,
        "mlp_dim": _whole(encoder, "intermediate_size"),
        "word_dim": word_dim,
        "word_heads": word_heads,
        "window": _whole(encoder, "sliding_window"),
        "rope_theta": float(encoder.get("rope_theta") or 10000.0),
        "neighbours": not encoder.get("is_neox_style", True),
        "norm_eps": float(encoder.get("rms_norm_eps") or 1e-6),
        "max_word_bytes": int(published.get("max_word_size") or 100),
    }


_LAYER = "encoder.layers.{}."
_PROJECTIONS = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))


class HAT(TextTokenizer):
    """Ids are bytes; `embed` gives a vector per word and one per byte."""

    architecture: ClassVar[str] = "hat"
    config_class: ClassVar[type[TokenizerConfig]] = HATConfig
    config_from_published = staticmethod(config_from_published)
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "published": Adapter(
            rules=(
                ("encoder.embedding_layer.", "embedding."),
                (_LAYER + "input_layernorm.", _LAYER + "norm1."),
                (_LAYER + "post_attention_layernorm.", _LAYER + "norm2."),
                *((_LAYER + f"self_attn.{p}_proj.", _LAYER + f"{ours}.") for p, ours in _PROJECTIONS),
                *((_LAYER + f"mlp.{name}_proj.", _LAYER + f"{name}.") for name in ("gate", "up", "down")),
                ("encoder_connector.latent_query", "pooling.latent"),
                *(
                    (f"encoder_connector.cross_attention_encoder_connector.{p}_proj.", f"pooling.{ours}.")
                    for p, ours in _PROJECTIONS
                ),
            ),
            dropped={
                "backbone.*": "the language model, which reads the vectors",
                "decoder.*": "writes the bytes of the next word, which takes the backbone",
                "decoder_connector.*": "as the decoder",
                "layer_norm.*": "as the decoder",
                "lm_head.*": "as the decoder",
            },
        )
    }
    config: HATConfig

    def __init__(self, config: HATConfig) -> None:
        super().__init__(config)
        rotary = Rotary(config.rope_theta, config.neighbours)
        self.embedding = nn.Embedding(256, config.dim)
        self.encoder = ByteTransformer(
            config.dim,
            config.num_layers,
            config.num_heads,
            config.mlp_dim,
            window=config.window,
            rotary=rotary,
            norm_eps=config.norm_eps,
        )
        self.pooling = WordPooling(config.dim, config.word_dim, config.word_heads, rotary)
        self.splitter: RuleSplitter = splitter("unicode_word", max_bytes=config.max_word_bytes)

    def _describe(self) -> dict[str, Any]:
        return {"codebook_sizes": (256,)}

    def _encode_texts(self, texts: Sequence[bytes], *, seed: int) -> Codes:
        del seed
        return ragged([to_tensor(text).long() for text in texts])

    def _decode_texts(self, tokens: Tokens) -> list[bytes]:
        return [ids.to(torch.uint8).cpu().numpy().tobytes() for ids in tokens.codes()]

    def _embed_texts(self, texts: Sequence[bytes]) -> list[Embedding]:
        return [self._embed(text) for text in texts]

    def _embed(self, text: bytes) -> Embedding:
        ends = self.splitter.split(text)
        ids = to_tensor(text).to(self.device).long()
        byte_vectors = self.encoder(self.embedding(ids)[None])[0]
        offsets = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), ends]))
        return Embedding(self.pooling(byte_vectors, ends)[:, None], offsets, byte_vectors)

    def objective(self, batch: Tensor, *, progress: float = 1.0, generator: torch.Generator | None = None) -> Output:
        """Refused.

        Raises:
            ConfigError: Always.
        """
        del batch, progress, generator
        raise ConfigError("hat is here as an encoder: its objective, the next byte, needs the backbone of the repository")


class WordPooling(nn.Module):
    """One learned query attends to the bytes of each word by itself.

    The query is turned by the number of the word and the keys by the number of the byte, both counted from the start of the
    text; there is no residual and no norm.

    Args:
        dim: Width D of the bytes' vectors.
        word_dim: Width E of the words' vectors.
        num_heads: Attention heads H.
        rotary: How positions turn the heads.
    """

    def __init__(self, dim: int, word_dim: int, num_heads: int, rotary: Rotary) -> None:
        super().__init__()
        self.num_heads, self.rotary = num_heads, rotary
        self.latent = nn.Parameter(torch.zeros(1, 1, word_dim))
        self.query, self.out = nn.Linear(word_dim, word_dim, bias=False), nn.Linear(word_dim, word_dim, bias=False)
        self.key, self.value = nn.Linear(dim, word_dim, bias=False), nn.Linear(dim, word_dim, bias=False)

    def forward(self, byte_vectors: Tensor, ends: Ends) -> Tensor:
        """Vectors `[W, E]` of the words of a text, from those of its bytes, `[N, D]`, and the words' ends."""
        pooled = [self._pool(byte_vectors, ends, first, last) for first, last in _groups(ends)]
        return self.out(torch.cat(pooled)) if pooled else byte_vectors.new_zeros(0, self.latent.shape[-1])

    def _pool(self, byte_vectors: Tensor, ends: Ends, first: int, last: int) -> Tensor:
        """The words from `first` up to `last`, before the last linear layer."""
        start, end = int(ends[first - 1]) if first else 0, int(ends[last - 1])
        lengths = torch.from_numpy(np.diff(ends[first:last], prepend=start))
        word = torch.repeat_interleave(torch.arange(last - first), lengths).to(byte_vectors.device)
        key, value = (layer(byte_vectors[start:end]).unflatten(-1, (self.num_heads, -1)) for layer in (self.key, self.value))
        query = self.query(self.latent[0]).unflatten(-1, (self.num_heads, -1)).expand(last - first, -1, -1)
        query = self.rotary.turn(query, self.rotary.angles(torch.arange(first, last, device=key.device), query.shape[-1]))
        key = self.rotary.turn(key, self.rotary.angles(torch.arange(start, end, device=key.device), key.shape[-1]))
        scores = (query[word] * key).sum(-1).float() * key.shape[-1] ** -0.5
        shape = (last - first, self.num_heads)
        highest = scores.new_zeros(shape).scatter_reduce(0, word[:, None].expand_as(scores), scores, "amax", include_self=False)
        weights = (scores - highest[word]).exp()
        total = scores.new_zeros(shape).index_add(0, word, weights)
        mixed = scores.new_zeros(*shape, value.shape[-1]).index_add(0, word, weights[..., None] * value.float())
        return (mixed / total[..., None]).flatten(1).to(value.dtype)


def _groups(ends: Ends) -> Iterator[tuple[int, int]]:
    """Words in groups of a few thousand bytes, so that a long text takes no more memory than a short one."""
    first = 0
    while first < len(ends):
        start = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, start + POOLED_TOGETHER, "right")))
        yield first, last
        first = last


def _part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = values.get(key)
    if not isinstance(part, Mapping):
        raise ConfigError(f"expected the config of a TFree-HAT model, which has {key}, got the keys {', '.join(values)}")
    return part


def _whole(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"expected {key} in the published config to be a whole number from 1 on, got {value!r}")
    return value
