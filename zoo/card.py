"""`Card`: a model card whose YAML front matter is the registration of one checkpoint.

A card is a markdown file `<architecture variant>.<tag>.md`. Its front matter has the Hub's own keys (`license`, `tags`,
...) and one key of ours:

    license: apache-2.0             # of the weights; there is no default
    tokenzoo:
      architecture: titok           # a key of the registry, never an import path
      modality: image
      config: {...}                 # values of the architecture's config
      source: {repo: org/name, revision: <40 hex digits>, file: model.safetensors, sha256: <64 hex digits>, adapter: published}

and optionally `default`, `commercial`, `code_license`, `size_mb`, `params` and `metrics`. Weights that are not on the Hub have
`url` (an address that a program can download from), `page` (where a person gets the file, or reads about it) or both instead
of `repo`:

      source: {url: https://..., page: https://..., file: model.pth, adapter: published}

A source with none of the three is a file bundled with the package of the card.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, get_args

import yaml

from tokenzoo.tokenizers.errors import ConfigError
from tokenzoo.tokenizers.spec import Modality

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\.[a-z0-9][a-z0-9_-]*")
_ARCHITECTURE = re.compile(r"[a-z0-9_]+")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(r"https://[^/\s]+/\S*")
_COMMERCIAL = re.compile(
    r"apache-2\.0|mit(-0)?|0bsd|bsd(-.*)?|isc|zlib|unlicense|cc0-1\.0|cc-by-[\d.]+|cc-by-sa-[\d.]+|mpl-2\.0|bsl-1\.0|afl-3\.0"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where weights are.

    Attributes:
        file: Path inside the repository or, for bundled weights, inside the package; the name under which a file from
            elsewhere is kept.
        repo: Hub repository.
        url: Address of the file, for weights that are not on the Hub.
        page: Where a person finds the file, for weights that are not on the Hub; without `url` it is downloaded by hand.
        revision: Commit of the repository, 40 hexadecimal digits; `None` for its main branch.
        sha256: Of the file, where known.
        adapter: Published layout, a key of the architecture's `adapters`; `None` for our own layout.
        config: Path of the published config in the repository, whose values go before those of the card's config; only the
            architecture's own reader sees it, and nothing that it names is imported.
        tensors: Patterns (`fnmatch`) of the tensors to read, where a checkpoint holds much more than the tokenizer; `file` is
            then its `.safetensors.index.json`.
    """

    file: str
    repo: str | None = None
    url: str | None = None
    page: str | None = None
    revision: str | None = None
    sha256: str | None = None
    adapter: str | None = None
    config: str | None = None
    tensors: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.file)
        for what, name in (("file", self.file), ("config", self.config or "config.json")):
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or "\\" in name or not parts.name:
                raise ConfigError(f"expected source.{what} to be a relative path, got {name!r}")
        if self.config is not None and self.repo is None:
            raise ConfigError("expected source.repo beside source.config: only a repository has a published config")
        _match(_REPOSITORY, "source.repo", self.repo, "org/name")
        _match(_REVISION, "source.revision", self.revision, "a commit, 40 hexadecimal digits")
        _match(_SHA256, "source.sha256", self.sha256, "64 hexadecimal digits")
        _match(_ADDRESS, "source.url", self.url, "an https address")
        _match(_ADDRESS, "source.page", self.page, "an https address")
        if self.repo is not None and self.outside:
            raise ConfigError("expected source.repo, or source.url and source.page: a file of the Hub needs no other address")
        if self.repo is None and self.revision is not None:
            raise ConfigError("expected source.repo beside source.revision: weights that are not on the Hub have no revisions")
        if self.tensors is not None:
            if self.repo is None or self.sha256 is not None or not self.file.endswith(".safetensors.index.json"):
                raise ConfigError("expected source.tensors beside a repository's .safetensors.index.json, without sha256")
            if not self.tensors or not all(isinstance(pattern, str) for pattern in self.tensors):
                raise ConfigError(f"expected source.tensors to be names or patterns of names, got {list(self.tensors)}")
        if self.bundled and path.suffix != ".safetensors":
            raise ConfigError(f"expected bundled weights to be safetensors, got source.file = {self.file!r}")

    @property
    def outside(self) -> bool:
        """Whether the file is published elsewhere than on the Hub."""
        return self.url is not None or self.page is not None

    @property
    def bundled(self) -> bool:
        """Whether the file came with the package of the card."""
        return self.repo is None and not self.outside


@dataclass(frozen=True, kw_only=True)
class Card:
    """One checkpoint: what it is, what it may be used for, and where its weights are.

    Attributes:
        name: `variant.tag`, the stem of the card's file.
        architecture: Key of the registry.
        modality: What is encoded.
        license: Of the weights, as the Hub writes it.
        source: Where the weights are.
        config: Values of the architecture's config.
        commercial: Whether the licence allows commercial use; licences that we do not know count as not allowing it.
        default: Whether the tag may be left out although the variant has several.
        license_link: Text of the licence.
        code_license: Of the reference implementation.
        size_mb: Of the download, in 10^6 bytes.
        params: Number of parameters.
        metrics: What was measured, on what.
        tags: The Hub's tags.
        package: The package that the card, and bundled weights, are in.
        text: The whole card, front matter included.
    """

    name: str
    architecture: str
    modality: Modality
    license: str
    source: Source
    config: Mapping[str, Any] = field(default_factory=dict)
    commercial: bool = False
    default: bool = False
    license_link: str | None = None
    code_license: str | None = None
    size_mb: float | None = None
    params: int | None = None
    metrics: tuple[Mapping[str, Any], ...] = ()
    tags: tuple[str, ...] = ()
    package: str = "tokenzoo.cards"
    text: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        _match(_NAME, "the card's file name", self.name, "variant.tag in lower case")
        _match(_ARCHITECTURE, "architecture", self.architecture, "a key of the registry, never an import path")
        if self.modality not in get_args(Modality):
            raise ConfigError(f"expected modality to be one of {', '.join(get_args(Modality))}, got {self.modality!r}")

    @property
    def variant(self) -> str:
        """The name without its tag."""
        return self.name.split(".", 1)[0]

    @property
    def bundled(self) -> bool:
        """Whether the weights came with the package, so that loading needs no network."""
        return self.source.bundled

    @cached_property
    def body(self) -> str:
        """The card's prose, without the front matter."""
        return _FRONT_MATTER.sub("", self.text, count=1).lstrip()

    def summary(self) -> dict[str, Any]:
        """A JSON-able form of everything but the prose."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "modality": self.modality,
            "license": self.license,
            "license_link": self.license_link,
            "code_license": self.code_license,
            "commercial": self.commercial,
            "bundled": self.bundled,
            "size_mb": self.size_mb,
            "params": self.params,
            "source": {key: value for key, value in vars(self.source).items() if value is not None},
            "config": dict(self.config),
            "metrics": [dict(metric) for metric in self.metrics],
            "tags": list(self.tags),
        }


def read_cards(package: str) -> Iterator[Card]:
    """The cards among a package's markdown files, in the order of their names.

    Raises:
        ConfigError: If one of them is malformed.
    """
    for entry in sorted(files(package).iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".md") and entry.name != "README.md":
            yield parse_card(entry.name.removesuffix(".md"), entry.read_text(encoding="utf-8"), package=package)


def parse_card(name: str, text: str, *, package: str = "tokenzoo.cards") -> Card:
    """Reads a card.

    Args:
        name: Stem of its file name.
        text: Its markdown, with front matter.
        package: The package it is in.

    Raises:
        ConfigError: If the front matter is missing, is not YAML, lacks the licence, or has a key or value that is not
            one of ours. The message names the card.
    """
    try:
        return _card_from(name, text, package)
    except ConfigError as error:
        raise ConfigError(f"card {name!r}: {error}") from error


def allows_commercial_use(license_id: str) -> bool:
    """Whether a licence, by its identifier on the Hub, is known to allow commercial use."""
    return _COMMERCIAL.fullmatch(license_id.lower()) is not None


def _card_from(name: str, text: str, package: str) -> Card:
    front = _front_matter(text)
    outer = _Keys(front, "the front matter")
    license_id = outer.take("license", str)
    ours = _Keys(outer.take("tokenzoo", dict), "tokenzoo")
    source = _Keys(ours.take("source", dict), "tokenzoo.source")
    card = Card(
        name=name,
        text=text,
        package=package,
        license=license_id,
        license_link=outer.take("license_link", str, None),
        tags=tuple(outer.take("tags", list, [])),
        architecture=ours.take("architecture", str),
        modality=ours.take("modality", str),
        config=ours.take("config", dict, {}),
        commercial=ours.take("commercial", bool, allows_commercial_use(license_id)),
        default=ours.take("default", bool, False),
        code_license=ours.take("code_license", str, None),
        size_mb=ours.take("size_mb", (int, float), None),
        params=ours.take("params", int, None),
        metrics=tuple(ours.take("metrics", list, [])),
        source=Source(
            file=source.take("file", str),
            repo=source.take("repo", str, None),
            url=source.take("url", str, None),
            page=source.take("page", str, None),
            revision=source.take("revision", str, None),
            sha256=source.take("sha256", str, None),
            adapter=source.take("adapter", str, None),
            config=source.take("config", str, None),
            tensors=None if (tensors := source.take("tensors", list, None)) is None else tuple(tensors),
        ),
    )
    ours.refuse_the_rest()
    source.refuse_the_rest()
    return card


def _front_matter(text: str) -> dict[str, Any]:
    match = _FRONT_MATTER.match(text)
    if match is None:
        raise ConfigError("expected YAML front matter between two lines of '---' at the top")
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ConfigError(f"the front matter is not YAML: {error}") from error
    if not isinstance(front, dict):
        raise ConfigError(f"expected the front matter to be keys and values, got {type(front).__name__}")
    return front


_REQUIRED: Any = object()


class _Keys:
    """Takes typed values out of a mapping, and then knows what nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = dict(values)
        self.where = where

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        value = self.values.pop(key, None)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where} lacks {key!r}" + (", which has no default" if key == "license" else ""))
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(kind.__name__ for kind in kinds)
            hint = ": put it in quotes" if kind is str else ""
            raise ConfigError(f"expected {key!r} in {self.where} to be of type {expected}, got {value!r}{hint}")
        return value

    def refuse_the_rest(self) -> None:
        if self.values:
            raise ConfigError(f"{self.where} has unknown keys: {', '.join(sorted(map(str, self.values)))}")


def _match(pattern: re.Pattern[str], what: str, value: str | None, expected: str) -> None:
    if value is not None and not pattern.fullmatch(value):
        raise ConfigError(f"expected {what} to be {expected}, got {value!r}")
