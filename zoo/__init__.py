"""tokenzoo: images, video, audio and text to tokens and back, behind one `load(name).encode/decode`.

    >>> import tokenzoo
    >>> tok = tokenzoo.load("one_d_piece_nano")
    >>> tokens = tok.encode("photo.jpg", length=32)
    >>> image, = tok.decode(tokens)

Importing this package loads neither torch nor model code: names are resolved when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenzoo.card import Card
    from tokenzoo.convert import convert
    from tokenzoo.loading import info, list_models, load
    from tokenzoo.survey import complexity
    from tokenzoo.tokenizers import Tokenizer, TokenizerError, Tokens, TokenSpec

__version__ = "0.1.0"

_WHERE = {
    "Card": "tokenzoo.card",
    "Tokenizer": "tokenzoo.tokenizers",
    "TokenizerError": "tokenzoo.tokenizers",
    "TokenSpec": "tokenzoo.tokenizers",
    "Tokens": "tokenzoo.tokenizers",
    "complexity": "tokenzoo.survey",
    "convert": "tokenzoo.convert",
    "info": "tokenzoo.loading",
    "list_models": "tokenzoo.loading",
    "load": "tokenzoo.loading",
}

__all__ = ["Card", "TokenSpec", "Tokenizer", "TokenizerError", "Tokens", "complexity", "convert", "info", "list_models", "load"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tokenzoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
