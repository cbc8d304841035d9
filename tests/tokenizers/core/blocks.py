"""A tokenizer small enough to be checked by hand: token n is the brightness of block n of a 16 x 16 picture."""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict

from tokenzoo.tokenizers import Codes, Output, Tokenizer, TokenizerConfig
from tokenzoo.tokenizers.images import Images


@strict
@dataclass(kw_only=True)
class BlocksConfig(TokenizerConfig):
    side: int = 4
    levels: int = 256
    variable: str = "prefix"

    def validate_side(self):
        if 16 % self.side:
            raise ValueError(f"side must divide 16, got {self.side}")


class Blocks(Tokenizer):
    architecture = "blocks"
    modality = "image"
    config_class = BlocksConfig

    def __init__(self, config=None):
        config = config or BlocksConfig()
        super().__init__(config, Images(16))
        self.gain = torch.nn.Parameter(torch.ones(()))

    def _describe(self):
        count = self.config.side**2
        return {"codebook_sizes": (self.config.levels,), "variable": self.config.variable, "max_tokens": count}

    def _encode(self, batch, *, length, seed):
        means = torch.nn.functional.adaptive_avg_pool2d(batch.mean(1, keepdim=True), self.config.side)
        return Codes((means * self.gain * (self.config.levels - 1)).round().long().flatten(2))

    def _decode(self, ids, lengths, extras):
        count = self.config.side**2
        values = torch.full((len(ids), 1, count), 0.5)
        values[..., : ids.shape[2]] = ids / (self.config.levels - 1) / self.gain
        blocks = values.reshape(-1, 1, self.config.side, self.config.side)
        return torch.nn.functional.interpolate(blocks, size=(16, 16)).expand(-1, 3, -1, -1)

    def objective(self, batch, *, progress=1.0, generator=None):
        reconstruction = batch * self.gain
        return Output(reconstruction, {"l2": (reconstruction - batch).square().mean(), "pull": self.gain.square()})
