"""The contracts every tokenizer fulfils: `Tokenizer`, `Tokens`, `TokenSpec`, configs, errors and quantizers.

Names are resolved when they are first used, so that the error classes can be had without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_WHERE = {
    "Codes": "tokenizer",
    "ConfigError": "errors",
    "DownloadError": "errors",
    "Media": "tokenizer",
    "MediaError": "errors",
    "Output": "tokenizer",
    "Quality": "quality",
    "TokenSpec": "spec",
    "Tokenizer": "tokenizer",
    "TokenizerConfig": "config",
    "TokenizerError": "errors",
    "Tokens": "tokens",
    "TokensError": "errors",
    "UnknownTokenizerError": "errors",
    "WeightsError": "errors",
    "WrongTokenizerError": "errors",
}

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


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tokenzoo.tokenizers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tokenzoo.tokenizers.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
