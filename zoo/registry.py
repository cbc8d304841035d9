"""Which class an architecture is, and which cards there are: our own, and those of other installed packages.

Another distribution adds a tokenizer by the entry-point group `tokenzoo.tokenizers` (the name is the architecture's key, the
object a `Tokenizer` subclass), and cards by the group `tokenzoo.cards` (a package that holds `<name>.md` files).
"""

import difflib
import functools
import logging
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING

from tokenzoo.card import Card, read_cards
from tokenzoo.tokenizers.errors import ConfigError, TokenizerError, UnknownTokenizerError

if TYPE_CHECKING:
    from tokenzoo.tokenizers import Tokenizer

TOKENIZERS_GROUP = "tokenzoo.tokenizers"
CARDS_GROUP = "tokenzoo.cards"

_BUILTIN = {
    "autoencoder_kl": "tokenzoo.tokenizers.image.autoencoder_kl:GridVAE",
    "blt": "tokenzoo.tokenizers.text.blt:BLT",
    "cosmos": "tokenzoo.tokenizers.video.cosmos:Cosmos",
    "cosmos_image": "tokenzoo.tokenizers.image.cosmos_image:CosmosImage",
    "dac": "tokenzoo.tokenizers.audio.dac:Dac",
    "encodec": "tokenzoo.tokenizers.audio.encodec:Encodec",
    "equal_info": "tokenzoo.tokenizers.text.equal_info:EqualInfo",
    "flextok": "tokenzoo.tokenizers.image.flextok:FlexTok",
    "hat": "tokenzoo.tokenizers.text.hat:HAT",
    "karl": "tokenzoo.tokenizers.image.karl:KARL",
    "karl_nano": "tokenzoo.tokenizers.image.karl_nano:KARLNano",
    "larp": "tokenzoo.tokenizers.video.larp:LARP",
    "maskgit_vqgan": "tokenzoo.tokenizers.image.maskgit_vqgan:VQGAN",
    "mimi": "tokenzoo.tokenizers.audio.mimi:Mimi",
    "mrt5": "tokenzoo.tokenizers.text.mrt5:MrT5",
    "omnitokenizer": "tokenzoo.tokenizers.video.omnitokenizer:OmniTokenizer",
    "one_d_piece": "tokenzoo.tokenizers.image.one_d_piece:OneDPiece",
    "one_d_piece_nano": "tokenzoo.tokenizers.image.one_d_piece_nano:OneDPieceNano",
    "retok": "tokenzoo.tokenizers.image.retok:ReToK",
    "snac": "tokenzoo.tokenizers.audio.snac:Snac",
    "tatitok": "tokenzoo.tokenizers.image.tatitok:TATiTok",
    "titok": "tokenzoo.tokenizers.image.titok:TiTok",
    "vidtok": "tokenzoo.tokenizers.video.vidtok:VidTok",
    "vidtok_nano": "tokenzoo.tokenizers.video.vidtok_nano:VidTokNano",
    "vqtoken": "tokenzoo.tokenizers.video.vqtoken:VQToken",
    "wavtokenizer": "tokenzoo.tokenizers.audio.wavtokenizer:WavTokenizer",
    "wavtokenizer_nano": "tokenzoo.tokenizers.audio.wavtokenizer_nano:WavTokenizerNano",
    "word_pool": "tokenzoo.tokenizers.text.word_pool:WordPool",
}

_log = logging.getLogger(__name__)


def architectures() -> list[str]:
    """Keys of all architectures, sorted."""
    return sorted({*_BUILTIN, *_third_party()})


def tokenizer_class(architecture: str) -> "type[Tokenizer]":
    """The class of an architecture; its module is imported by this call.

    Raises:
        UnknownTokenizerError: If no architecture has this key.
        ConfigError: If another package registered something that is not a tokenizer under this key.
    """
    if architecture in _BUILTIN:
        module, _, name = _BUILTIN[architecture].partition(":")
        cls: type[Tokenizer] = getattr(import_module(module), name)
        return cls
    if architecture in _third_party():
        return _load_third_party(_third_party()[architecture])
    raise UnknownTokenizerError(f"no architecture {architecture!r}{closest(architecture, architectures())}")


def cards() -> Mapping[str, Card]:
    """All cards by name, sorted. Read once; see `refresh`."""
    return _cards()


def find_card(name: str) -> Card:
    """The card of a name, whose tag may be left out where the variant has one card or a default.

    Raises:
        UnknownTokenizerError: If no card, or more than one, answers to this name; the closest names are given.
    """
    if name in cards():
        return cards()[name]
    variant = [card for card in cards().values() if card.variant == name]
    candidates = [card for card in variant if card.default] if len(variant) > 1 else variant
    if len(candidates) == 1:
        return candidates[0]
    if variant:
        names = ", ".join(card.name for card in candidates or variant)
        raise UnknownTokenizerError(f"{name!r} has several checkpoints: choose one of {names}")
    known = {*cards(), *(card.variant for card in cards().values())}
    raise UnknownTokenizerError(f"no tokenizer is called {name!r}{closest(name, known)}")


def refresh() -> None:
    """Forgets what was found, so that packages installed since are seen."""
    _cards.cache_clear()
    _third_party.cache_clear()


def closest(name: str, known: "list[str] | set[str]") -> str:
    """The end of a message about an unknown name: what may have been meant, or where to look."""
    close = difflib.get_close_matches(name, sorted(known), 3, 0.5)
    return f": did you mean {' or '.join(map(repr, close))}?" if close else f": known are {', '.join(sorted(known)) or 'none'}"


@functools.cache
def _cards() -> Mapping[str, Card]:
    found: dict[str, Card] = {card.name: card for card in read_cards("tokenzoo.cards")}
    for point in entry_points(group=CARDS_GROUP):
        for card in _third_party_cards(point):
            if card.name in found:
                _log.warning("%s: its card %r is left out, there is one of this name already", _origin(point), card.name)
            else:
                found[card.name] = card
    return MappingProxyType(dict(sorted(found.items())))


def _third_party_cards(point: EntryPoint) -> Iterator[Card]:
    """Another package's cards; one that is broken must not take the others down."""
    try:
        yield from read_cards(point.value)
    except (TokenizerError, ImportError, OSError, ValueError, TypeError) as error:
        _log.warning("%s: its cards are left out: %s", _origin(point), error)


@functools.cache
def _third_party() -> Mapping[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=TOKENIZERS_GROUP):
        if point.name in _BUILTIN or point.name in found:
            _log.warning("%s: its architecture %r is left out, there is one of this name already", _origin(point), point.name)
        else:
            found[point.name] = point
    return found


def _load_third_party(point: EntryPoint) -> "type[Tokenizer]":
    from tokenzoo.tokenizers import Tokenizer

    cls = point.load()
    if not (isinstance(cls, type) and issubclass(cls, Tokenizer)):
        raise ConfigError(f"{_origin(point)}: expected {point.value} to be a subclass of tokenzoo.Tokenizer, got {cls!r}")
    if getattr(cls, "architecture", None) != point.name:
        raise ConfigError(
            f"{_origin(point)}: expected {cls.__name__}.architecture to be {point.name!r}, the entry point's name, got "
            f"{getattr(cls, 'architecture', None)!r}"
        )
    return cls


def _origin(point: EntryPoint) -> str:
    return f"distribution {point.dist.name}" if point.dist else f"entry point {point.name}"
