import random
from importlib.resources import files

import pytest
import torch

from tokenzoo import load
from tokenzoo.registry import find_card
from tokenzoo.tokenizers.text.splitters import words_of

CARD = "word_pool_nano.manuals"
ENGLISH = (
    "The system call returns the number of bytes that were written to the file, or an error if the argument is not a valid "
    "file descriptor. See the manual page for more information about the options of this command.\n"
)
OTHERS = (
    "Diese Option gibt den Namen der Datei aus.\n",
    "Cette option affiche le nom du fichier.\n",
    "Этот параметр выводит имя файла.\n",
    "このオプションはファイルの名前を表示します。\n",
    "Esta opción muestra el nombre del archivo.\n",
)


@pytest.fixture(scope="module")
def nano():
    return load(CARD, local_files_only=True)


def test_weights_are_bundled_and_small():
    card = find_card("word_pool_nano")
    assert card.name == CARD
    assert card.bundled
    assert len((files("tokenzoo.cards") / card.source.file).read_bytes()) < 16_000_000


def test_plain_english_is_words_not_bytes(nano):
    tokens = nano.encode(ENGLISH)
    assert nano.decode(tokens) == [ENGLISH]
    assert nano.reconstructed(ENGLISH)[0] > 0.9
    assert tokens.ids.shape[2] < len(ENGLISH) / 4


def test_other_languages_are_words_too(nano):
    texts = list(OTHERS)
    assert nano.decode(nano.encode(texts)) == texts
    assert min(nano.reconstructed(texts)) > 0.5


def test_random_texts_come_back(nano):
    source = random.Random(2)
    words = [word.decode() for text in (ENGLISH, *OTHERS) for word in words_of(text.encode(), nano.split(text.encode()))]
    texts = ["", b"", "\ud800x", b"\xff\xfe\x00", "\0\x1b\r\n"]
    for index in range(10_000 - len(texts)):
        length = source.choice([0, 1, 2, 4, 12])
        if index % 2:
            texts.append(source.randbytes(length))
        elif index % 20:
            texts.append("".join(source.choices(words, k=length)))
        else:
            texts.append("".join(chr(source.randrange(0x110000)) for _ in range(length)))
    assert nano.decode(nano.encode(texts)) == texts


def test_a_long_word_comes_back(nano):
    text = "z" * 1_000_000  # by itself: a batch of tokens is as wide as its longest text
    assert nano.decode(nano.encode(text)) == [text]


def test_decoding_survives_other_rounding(nano):
    frames = nano.encode(ENGLISH).ids[0].mT.numpy()
    other = load(CARD, local_files_only=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
    assert b"".join(other._bytes_of(frames)) == ENGLISH.encode()
