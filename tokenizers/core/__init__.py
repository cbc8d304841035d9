"""The contracts every tokenizer fulfils: `Tokenizer`, `Tokens`, `TokenSpec`, configs, errors and quantizers."""

from tokenzoo.tokenizers.config import TokenizerConfig
from tokenzoo.tokenizers.errors import (
    ConfigError,
    DownloadError,
    MediaError,
    TokenizerError,
    TokensError,
    UnknownTokenizerError,
    WeightsError,
    WrongTokenizerError,
)
from tokenzoo.tokenizers.quality import Quality
from tokenzoo.tokenizers.spec import TokenSpec
from tokenzoo.tokenizers.tokenizer import Codes, Media, Output, Tokenizer
from tokenzoo.tokenizers.tokens import Tokens

__all__ = [
    "Codes",
    "ConfigError",
    "DownloadError",
    "Media",
    "MediaError",
    "Output",
    "Quality",
    "TokenSpec",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerError",
    "Tokens",
    "TokensError",
    "UnknownTokenizerError",
    "WeightsError",
    "WrongTokenizerError",
]
