"""TA-TiTok: a TiTok whose decoder also reads a caption.

Paper: https://arxiv.org/abs/2501.07730
Reference implementation: bytedance/1d-tokenizer@942a96f, Apache-2.0.

Encoding needs the image alone. Decoding needs the caption too: per token, the output of the last LayerNorm of the text
tower of OpenAI's CLIP ViT-L/14 at 336 pixels, `[77, 768]` (`last_hidden_state` of transformers'
`CLIPTextModel.from_pretrained("openai/clip-vit-large-patch14-336")` with captions padded to 77 tokens). That network is not
part of this library; give its output with `with_text`:

    tokens = tok.with_text(tok.encode(image), features)
    image = tok.decode(tokens)

Shapes: B batch, T tokens of a caption, D width.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from tokenzoo.tokenizers import Output, TokenizerConfig, Tokens, TokensError
from tokenzoo.tokenizers.image.titok import TiTok, TiTokConfig


@strict
@dataclass(kw_only=True)
class TATiTokConfig(TiTokConfig):
    """The architecture of one checkpoint; the defaults are TA-TiTok-BL-128 VQ. Attributes as in `TiTokConfig`, and:

    Attributes:
        text_length: Tokens of a caption, padding included.
        text_dim: Width of the caption's features.
    """

    num_tokens: int = 128
    encoder_dim: int = 768
    encoder_layers: int = 12
    encoder_heads: int = 12
    token_dim: int = 64
    codebook_size: int = 8192
    metric: Literal["cosine", "l2"] = "l2"
    legacy: bool = False
    text_length: int = 77
    text_dim: int = 768

    def validate_text(self) -> None:
        """Checks that the decoder writes pixels, as all published models do."""
        if self.legacy:
            raise ValueError("expected legacy=False, got True")


class TATiTok(TiTok):
    """The tokenizer: decodes tokens together with the features of a caption."""

    architecture: ClassVar[str] = "tatitok"
    config_class: ClassVar[type[TokenizerConfig]] = TATiTokConfig
    config: TATiTokConfig

    def __init__(self, config: TATiTokConfig) -> None:
        super().__init__(config)
        dim = config.decoder_dim
        self.text_proj = nn.Linear(config.text_dim, dim)
        self.text_positional_embedding = nn.Parameter(dim**-0.5 * torch.randn(config.text_length, dim))

    def with_text(self, tokens: Tokens, features: Tensor) -> Tokens:
        """Tokens that carry the captions they are decoded with.

        Args:
            tokens: B items.
            features: `[T, D]` for all of them, or `[B, T, D]`; see the module's docstring.

        Raises:
            TokensError: If the features have another shape.
        """
        expected = (self.config.text_length, self.config.text_dim)
        if features.shape not in (expected, (len(tokens), *expected)):
            raise TokensError(f"expected text features {expected}, or one of these per item, got {tuple(features.shape)}")
        text = features.float().expand(len(tokens), -1, -1)
        return dataclasses.replace(tokens, extras={**tokens.extras, "text": text})

    def _decode(self, ids: Tensor, lengths: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        if "text" not in extras:
            raise TokensError("expected tokens with a caption, got none: add its features, tok.with_text(tokens, features)")
        return self.decoder(self._vectors(ids, lengths, extras), self._context(extras["text"])).clamp(0, 1)

    def _context(self, text_BTD: Tensor) -> Tensor:
        return self.text_proj(text_BTD.to(self.dtype)) + self.text_positional_embedding

    def objective(
        self,
        batch: Tensor,
        *,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
        text: Tensor | None = None,
    ) -> Output:
        """As TiTok's, with the captions' features `[B, T, D]` as `text`.

        Raises:
            TokensError: If there is no `text`.
        """
        del progress
        if text is None:
            raise TokensError("training TA-TiTok needs captions: objective(batch, text=features [B, T, D])")
        vectors_BNC, losses, metrics = self._bottleneck(self.encoder(batch), generator)
        reconstruction = self.decoder(vectors_BNC.to(batch.dtype), self._context(text))
        return self._output(batch, reconstruction, losses, metrics)
