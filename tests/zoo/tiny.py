"""A tokenizer of a few hundred weights, as another distribution would ship it."""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig
from tokenzoo.tokenizers.adapter import Adapter
from tokenzoo.tokenizers.images import Images


@strict
@dataclass(kw_only=True)
class TinyConfig(TokenizerConfig):
    codes: int = 16
    dim: int = 4


class Tiny(Tokenizer):
    architecture = "tiny"
    modality = "image"
    config_class = TinyConfig
    adapters = {  # noqa: RUF012
        "published": Adapter(
            rules=(("encoder.conv.", "down."), ("decoder.conv.", "up."), ("quantize.embedding", "codebook")),
            dropped={"loss.*": "training only"},
            inside=("model",),
        )
    }

    def __init__(self, config):
        super().__init__(config, Images(8))
        self.down = nn.Conv2d(3, config.dim, 2, 2)
        self.codebook = nn.Parameter(torch.randn(config.codes, config.dim))
        self.up = nn.ConvTranspose2d(config.dim, 3, 2, 2)
        self.register_buffer("steps", torch.arange(4), persistent=False)

    def _describe(self):
        return {"codebook_sizes": (self.config.codes,), "variable": "prefix", "max_tokens": 16}

    def _encode(self, batch, *, length, seed):
        vectors = self.down(batch).flatten(2).mT.float()
        return Codes(torch.cdist(vectors, self.codebook.float()[None]).argmin(-1)[:, None])

    def _decode(self, ids, lengths, extras):
        vectors = torch.zeros(len(ids), 16, self.config.dim)
        vectors[:, : ids.shape[2]] = self.codebook[ids[:, 0]]
        return self.up(vectors.mT.reshape(-1, self.config.dim, 4, 4).to(self.dtype))

    def objective(self, batch, *, progress=1.0, generator=None):
        reconstruction = self.up(self.down(batch))
        return Output(reconstruction, {"l2": (reconstruction - batch).square().mean()})


def make(seed=0, **config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(TinyConfig(**config)).eval()


def published(tokenizer):
    """The state dict as its authors would have published it, with what training left in it."""
    return {**Tiny.adapters["published"].to_published(tokenizer.state_dict()), "loss.weight": torch.ones(3)}


def __getattr__(name):
    if name == "not_a_tokenizer":
        return object
    raise AttributeError(name)
