"""Writes `_word_classes.py`: what the rule `unicode_word` knows of each character.

    pip install regex==2024.11.6   # the last release with Unicode 16.0
    python -m tokenzoo.tokenizers.text.make_word_classes

The table is kept in the repository, not derived from Python's `unicodedata`: a text has to have the same words everywhere,
and `unicodedata` follows the version of Python and knows neither word boundaries nor pictographs.
"""

import base64
import zlib
from pathlib import Path

import numpy as np

UNICODE = "16.0"
PROPERTIES = (
    *(f"WB={name}" for name in ("CR", "LF", "Newline", "Extend", "Format", "ZWJ", "Katakana", "Hebrew_Letter", "ALetter")),
    *(f"WB={name}" for name in ("Single_Quote", "Double_Quote", "MidNumLet", "MidLetter", "MidNum", "Numeric")),
    *(f"WB={name}" for name in ("ExtendNumLet", "WSegSpace", "Regional_Indicator")),
    *("Extended_Pictographic", "P", "Ll", "Lu", "White_Space"),
)
SPACE = "U+0020"
_WIDTH = 120
_HEADER = f'''"""Classes of characters of Unicode {UNICODE} for the rule `unicode_word`: written by `make_word_classes`.

`CLASSES` has the properties of each class; `TABLE` is base85 of zlib of the class of each code point, one byte each.
From the Unicode Character Database, https://www.unicode.org/license.txt.
"""

'''


def classes() -> tuple[list[frozenset[str]], np.ndarray]:
    """The sets of properties that occur, and for each code point the index of its set, uint8 `[0x110000]`."""
    import regex

    if not regex.match(r"\p{Lu}", "\u1c89") or regex.match(r"\p{L}", "\U00011db0"):
        raise SystemExit(f"expected a regex with Unicode {UNICODE}, got {regex.__version__}: pip install regex==2024.11.6")
    surrogate = range(0xD800, 0xE000)
    characters = "".join("\ufffe" if point in surrogate else chr(point) for point in range(0x110000))
    bits = np.zeros(0x110000, np.int64)
    for bit, name in enumerate(PROPERTIES):
        for run in regex.finditer(rf"\p{{{name}}}+", characters):
            bits[run.start() : run.end()] |= 1 << bit
    bits[0x20] |= 1 << len(PROPERTIES)
    found, table = np.unique(bits, return_inverse=True)
    named = [frozenset(name for bit, name in enumerate([*PROPERTIES, SPACE]) if value >> bit & 1) for value in found.tolist()]
    return named, table.astype(np.uint8)


def main() -> None:
    """Writes the module beside this one."""
    named, table = classes()
    rows = "".join(f"    {' '.join(sorted(names))!r},\n".replace("'", '"') for names in named)
    packed = base64.b85encode(zlib.compress(table.tobytes(), 9)).decode()
    lines = "".join(f'    "{packed[at : at + _WIDTH]}"\n' for at in range(0, len(packed), _WIDTH))
    text = f"{_HEADER}CLASSES = (\n{rows})\nTABLE = (\n{lines})\n"
    Path(__file__).with_name("_word_classes.py").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
