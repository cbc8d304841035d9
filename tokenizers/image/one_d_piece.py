"""One-D-Piece: a TiTok whose every prefix decodes, from 1 to 256 tokens.

Paper: https://arxiv.org/abs/2501.10064
Reference implementation: turingmotors/One-D-Piece@473665d, Apache-2.0; weights Apache-2.0.

The network is a legacy TiTok with 256 latent tokens, and has its keys. What differs is training: "tail token drop" keeps a
random prefix of the tokens, one length per batch, so that the first tokens learn to carry most. A shorter prefix is a
shorter sequence for the decoder; nothing is padded or masked.

Here, unlike there: `encode(target=...)` finds the shortest prefix of a wanted quality, and items of one batch may differ in
length.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict

from tokenzoo.tokenizers import TokenizerConfig
from tokenzoo.tokenizers.image.titok import TiTok, TiTokConfig


@strict
@dataclass(kw_only=True)
class OneDPieceConfig(TiTokConfig):
    """The architecture of one checkpoint; the defaults are One-D-Piece-S-256. Attributes as in `TiTokConfig`."""

    num_tokens: int = 256
    encoder_dim: int = 512
    encoder_layers: int = 8
    encoder_heads: int = 8
    decoder_dim: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 8

    def validate_quantizer(self) -> None:
        """Checks that there are ids to cut off."""
        if self.quantizer != "vq":
            raise ValueError(f"expected quantizer='vq', got {self.quantizer!r}")


class OneDPiece(TiTok):
    """The tokenizer: up to `num_tokens` ids per image, of which any prefix decodes."""

    architecture: ClassVar[str] = "one_d_piece"
    config_class: ClassVar[type[TokenizerConfig]] = OneDPieceConfig

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "variable": "prefix"}

    def _training_length(self, generator: torch.Generator | None) -> int:
        """Tail token drop: uniform from 1 to all."""
        device = generator.device if generator is not None else "cpu"
        return int(torch.randint(1, self.config.num_tokens + 1, (), generator=generator, device=device))
