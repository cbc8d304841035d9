"""Training windows from a folder of manuals: man pages and HTML as plain text, split by document.

Files are stripped of their markup once and stored as one flat file per side of the split beside an index. A window is a run
of bytes of one language, starting behind a line break. Batches are a pure function of (seed, step), as those of photos.

Translations of one page share its name (`ls.1`), so names are held out, not files: no translation of a held-out page is
trained on. Held-out documents that are mostly copies of something trained on, under whatever name, are left out.

Shapes: B batch, N bytes.
"""

import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenzoo.tokenizers.errors import MediaError
from tokenzoo.tokenizers.files import write_atomically
from tokenzoo.training.data import is_held_out

STORE_VERSION = 1
SHORTEST = 400  # bytes; what is shorter is a redirection or an index
COPIED = 0.5
_SHINGLE = 8
_SUFFIXES = (".html", ".htm", ".gz")
_LANGUAGES = frozenset(
    [
        "ar",
        "ca",
        "cs",
        "da",
        "de",
        "el",
        "en",
        "es",
        "fa",
        "fi",
        "fr",
        "hr",
        "hu",
        "id",
        "it",
        "ja",
        "ko",
        "mk",
        "nb",
        "nl",
        "pl",
        "pt",
        "ro",
        "ru",
        "sr",
        "sv",
        "tr",
        "uk",
        "vi",
        "zh",
    ]
)
_LINE_MACROS = frozenset(["B", "BI", "BR", "I", "IB", "IR", "IP", "RB", "RI", "SB", "SH", "SM", "SS", "TP", "HP"])
_BREAKS = frozenset(
    ["PP", "LP", "P", "TP", "IP", "HP", "SH", "SS", "RS", "RE", "br", "sp", "nf", "fi", "EX", "EE", "Pp", "It", "Sh", "Ss"]
)
_JOINED = frozenset(["BI", "BR", "IB", "IR", "RB", "RI"])
_MDOC = frozenset(
    [
        "Nm",
        "Fl",
        "Ar",
        "Pa",
        "Xr",
        "Sh",
        "Ss",
        "Dq",
        "Em",
        "Ic",
        "Cm",
        "Op",
        "It",
        "Sy",
        "Li",
        "Va",
        "Dv",
        "Ev",
        "Fn",
        "Nd",
        "Ql",
        "Sq",
        "Bq",
    ]
)
_SPECIAL = {
    "aq": "'",
    "bu": "\u2022",
    "co": "\u00a9",
    "cq": "\u2019",
    "dq": '"',
    "em": "\u2014",
    "en": "\u2013",
    "ga": "`",
    "ha": "^",
    "hy": "-",
    "lq": "\u201c",
    "oq": "\u2018",
    "rq": "\u201d",
    "rs": "\\",
    "ti": "~",
    "tm": "\u2122",
    "->": "\u2192",
    "+-": "\u00b1",
    "mu": "\u00d7",
    "mi": "-",
}
_ESCAPE = re.compile(r"\\(?:\".*|f(?:\[[^\]]*\]|\(..|.)|s[+-]?\d|\*?\((?P<two>..)|\*?\[(?P<long>[^\]]*)\]|\*.|(?P<one>.)|$)")
_PLAIN = {"-": "-", "e": "\\", " ": " ", "~": " ", "0": " ", "t": "\t", "'": "\u00b4", "`": "`"}


def find_texts(root: Path, include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Man pages and HTML files under `root` by `fnmatch` globs, as sorted relative POSIX paths; links are skipped."""
    found = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix not in _SUFFIXES or path.is_symlink() or not path.is_file():
            continue
        if any(fnmatch(name, glob) for glob in include) and not any(fnmatch(name, glob) for glob in exclude):
            found.append(name)
    return found


def language(name: str) -> str:
    """Language of a file by its path (`man/pt_BR/man1/ls.1.gz`, `ch01.de.html`); English where it names none."""
    for part in reversed(re.split(r"[/.]", name)):
        if re.fullmatch(r"[a-z]{2}(?:[-_][A-Za-z]{2})?", part) and part[:2] in _LANGUAGES:
            return part[:2]
    return "en"


def document(name: str) -> str:
    """What all translations of a document have in common: its file name up to the first dot."""
    return name.rpartition("/")[2].partition(".")[0].lower()


def plain_text(name: str, data: bytes) -> str:
    """Text of a man page (roff, possibly gzipped) or an HTML file, without markup; empty where it is not UTF-8."""
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ""
    text = _without_tags(text) if ".htm" in name else _without_roff(text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def _without_roff(text: str) -> str:
    lines = []
    for line in text.replace("\\\n", "").splitlines():
        if line[:1] not in (".", "'"):
            lines.append(_unescaped(line))
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        if macro in _BREAKS and lines and lines[-1]:
            lines.append("")
        if rest and (macro in _LINE_MACROS or macro in _MDOC):
            words = [a or b for a, b in re.findall(r'"([^"]*)"|((?:\\ |\S)+)', rest)]
            shown = words[:1] if macro in ("IP", "TP", "HP") else words
            lines.append(_unescaped(("" if macro in _JOINED else " ").join(shown)))
    return "\n".join(lines)


def _unescaped(line: str) -> str:
    def plain(match: re.Match[str]) -> str:
        name = match["two"] or match["long"]
        if name is None:
            return _PLAIN.get(match["one"] or "", "")
        if re.fullmatch(r"u[0-9A-F]{4,6}", name):
            return chr(int(name[1:], 16))
        return _SPECIAL.get(name, "")

    return _ESCAPE.sub(plain, line)


class _Text(HTMLParser):
    """Collects the text of a page; white space is kept in `pre` alone."""

    hidden = frozenset(("script", "style", "head"))
    blocks = frozenset(("p", "div", "br", "li", "dt", "dd", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "table", "ul", "dl"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag in self.hidden or tag == "pre":
            self.inside.append(tag)
        if tag in self.blocks:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            del self.inside[self.inside.index(tag) :]
        if tag in self.blocks:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden.intersection(self.inside):
            self.parts.append(data if "pre" in self.inside else re.sub(r"\s+", " ", data))


def _without_tags(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    return re.sub(r"\n ", "\n", html.unescape("".join(parser.parts)))


@dataclass(frozen=True)
class Text:
    """One document in a store: `offset` and `length` in bytes of the file of its side."""

    name: str
    language: str
    held_out: bool
    offset: int
    length: int


class TextStore:
    """Plain text of a folder of manuals, memory-mapped.

    Args:
        folder: A folder written by `TextStore.build`.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.key: str = index["key"]
        self.copied: int = index["copied"]
        self.texts = [Text(*row) for row in index["texts"]]
        self._bytes = [np.memmap(folder / name, dtype=np.uint8, mode="r") for name in ("training.u8", "held_out.u8")]

    @classmethod
    def build(cls, root: Path, names: Sequence[str], folder: Path, *, held_out: float) -> "TextStore":
        """Reads `names` under `root` into `folder`, or opens what an earlier call left there.

        Files with the same text count once; `copied` says how many held-out documents were left out as copies.

        Raises:
            MediaError: If no file has enough text on both sides of the split.
        """
        facts = [(name, (root / name).stat().st_size) for name in names]
        key = hashlib.sha256(json.dumps([STORE_VERSION, facts, held_out]).encode()).hexdigest()
        if (folder / "index.json").exists() and (store := cls(folder)).key == key:
            return store
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        sides: tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]] = ([], [])
        seen = set()
        for name in names:
            data = plain_text(name, (root / name).read_bytes()).encode()
            if len(data) >= SHORTEST and (digest := hashlib.sha256(data).digest()) not in seen:
                seen.add(digest)
                sides[is_held_out(document(name), held_out)].append((name, data))
        known = {shingle for _, data in sides[0] for shingle in shingles(data)}
        fresh = [(name, data) for name, data in sides[1] if copied_share(data, known) <= COPIED]
        if not sides[0] or not fresh:
            raise MediaError(
                f"expected manuals on both sides of the split, got {len(sides[0])} to train on, {len(fresh)} held out"
            )
        rows = []
        for held, documents in enumerate((sides[0], fresh)):
            offset, documents = 0, sorted(documents, key=lambda item: (language(item[0]), item[0]))
            for name, data in documents:
                rows.append((name, language(name), bool(held), offset, len(data)))
                offset += len(data)
            write_atomically(folder / ("held_out.u8" if held else "training.u8"), b"".join(data for _, data in documents))
        index = {"key": key, "copied": len(sides[1]) - len(fresh), "texts": rows}
        write_atomically(folder / "index.json", json.dumps(index).encode())
        return cls(folder)

    def streams(self, *, held_out: bool) -> dict[str, np.ndarray]:
        """All bytes of one side by language, uint8 `(N,)`."""
        found: dict[str, np.ndarray] = {}
        for name in sorted({text.language for text in self.texts if text.held_out == held_out}):
            mine = [text for text in self.texts if text.held_out == held_out and text.language == name]
            found[name] = self._bytes[held_out][mine[0].offset : mine[-1].offset + mine[-1].length]
        return found


def shingles(data: bytes) -> Iterator[int]:
    """Hashes of all runs of eight words."""
    words = data.split()
    for at in range(len(words) - _SHINGLE + 1):
        yield hash(tuple(words[at : at + _SHINGLE]))


def copied_share(data: bytes, known: set[int]) -> float:
    """Share of a document's runs of eight words that are among `known`."""
    mine = list(shingles(data))
    return sum(shingle in known for shingle in mine) / max(1, len(mine))


def first_lines(stream: np.ndarray, most: int) -> bytes:
    """The first bytes of a stream, at most `most` where it is longer, up to the last whole line of them."""
    data = stream[:most].tobytes()
    return data if len(stream) <= most else data[: data.rfind(b"\n") + 1]


class WindowSampler:
    """Random windows: a language with probability proportional to its bytes to the power `flatten`, then a place.

    Args:
        streams: Bytes by language, uint8 `(N,)`; languages shorter than twice a window are left out.
        window: Bytes N of a window.
        seed: With the step, the whole state of the sampler.
        flatten: 1 takes languages as they are, 0 all alike.
    """

    def __init__(self, streams: dict[str, np.ndarray], *, window: int, seed: int, flatten: float = 0.5) -> None:
        self.streams = [stream for stream in streams.values() if len(stream) >= 2 * window]
        if not self.streams:
            raise ValueError(f"no language has two windows of {window} bytes: lower data.window")
        shares = np.array([len(stream) for stream in self.streams], dtype=float) ** flatten
        self.shares, self.window, self.seed = shares / shares.sum(), window, seed

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The windows of a step, uint8 `(batch_size, window)`."""
        random = np.random.default_rng((self.seed, step))
        chosen = random.choice(len(self.streams), batch_size, p=self.shares)
        return torch.from_numpy(np.stack([self._window(self.streams[i], random) for i in chosen]))

    def _window(self, stream: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """From behind a line break where one is near, so that no window starts inside a word."""
        start = int(random.integers(len(stream) - 2 * self.window + 1))
        breaks = np.flatnonzero(stream[start : start + self.window] == 10)
        start += int(breaks[0]) + 1 if len(breaks) else 0
        return stream[start : start + self.window]
