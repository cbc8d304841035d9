"""Errors that a user of tokenzoo can act on.

Every error derives from `TokenizerError` and from the builtin that describes it, so `except LookupError` and
`except tokenzoo.TokenizerError` both work. Messages say what was given, what was expected and what to do.
"""


class TokenizerError(Exception):
    """Anything tokenzoo refuses to do."""


class UnknownTokenizerError(TokenizerError, LookupError):
    """No tokenizer, architecture or adapter has this name."""


class ConfigError(TokenizerError, ValueError):
    """A config, card or recipe that does not describe a tokenizer."""


class WeightsError(TokenizerError, ValueError):
    """Weights that do not fit the architecture, are damaged, or would execute code when read."""


class DownloadError(TokenizerError, OSError):
    """A file that could not be had from the Hub or from the local cache."""


class MediaError(TokenizerError, ValueError):
    """A file, array or tensor that is not the media this tokenizer encodes."""


class TokensError(TokenizerError, ValueError):
    """Tokens that are malformed, out of range, or damaged."""


class WrongTokenizerError(TokensError):
    """Tokens made by another checkpoint than the one asked to decode them."""
