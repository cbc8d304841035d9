import gzip
import json

import numpy as np
import pytest

from tokenzoo.tokenizers.errors import ConfigError, MediaError
from tokenzoo.training.recipe import Recipe, TextsRecipe
from tokenzoo.training.sources import prepare_texts
from tokenzoo.training.texts import (
    TextStore,
    WindowSampler,
    copied_share,
    document,
    find_texts,
    first_lines,
    language,
    plain_text,
    shingles,
)

PAGE = r""".\" a comment
.TH LS 1 "May 2026"
.SH NAME
ls \- list \fBdirectory\fP contents
.PP
.BR ls (1)
shows \(lqfiles\(rq
.IP \(bu 2
one\&.two
.nf
"""


def manuals(folder, count=40):
    """Pages in two languages, under names of which some are held out."""
    for index in range(count):
        for lang, word in (("", "page"), ("de/", "Seite")):
            path = folder / "man" / f"{lang}man1" / f"tool{index}.1.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{word} {index} line{n} says {index * n} of{index} and{n} more{n * index}" for n in range(30)]
            path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return folder


def test_man_pages_lose_their_markup():
    assert plain_text("man/man1/ls.1", PAGE.encode()) == (
        "NAME\nls - list directory contents\n\nls(1)\nshows \u201cfiles\u201d\n\n\u2022\none.two\n"
    )
    assert plain_text("x.1.gz", gzip.compress(b"a\nb\n")) == "a\nb\n"
    assert plain_text("x.1", b"\xff\xfe") == ""


def test_html_loses_its_markup():
    page = b"<head><title>x</title></head><body><p>a  b &amp; <b>c</b></p><pre>d\n\te</pre><script>f()</script></body>"
    assert plain_text("index.de.html", page) == "a b & c\n\nd\n\te\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("usr/share/man/man1/ls.1.gz", "en"),
        ("usr/share/man/pt_BR/man1/ls.1.gz", "pt"),
        ("usr/share/debian-reference/ch01.zh-cn.html", "zh"),
        ("usr/share/doc/debian-handbook/html/ar-MA/apt.html", "ar"),
    ],
)
def test_paths_name_languages(name, expected):
    assert language(name) == expected
    assert document(name) == name.rpartition("/")[2].split(".")[0]


def test_translations_are_held_out_together(tmp_path):
    root = manuals(tmp_path / "in")
    names = find_texts(root, ["*"])
    assert len(names) == 80
    store = TextStore.build(root, names, tmp_path / "store", held_out=0.3)
    sides = [{document(text.name) for text in store.texts if text.held_out == held} for held in (False, True)]
    assert sides[1]
    assert not sides[0] & sides[1]
    streams = store.streams(held_out=True)
    assert set(streams) == {"de", "en"}
    assert b"Seite" in streams["de"].tobytes()
    assert b"Seite" not in streams["en"].tobytes()
    assert TextStore.build(root, names, tmp_path / "store", held_out=0.3).key == store.key


def test_copies_are_left_out(tmp_path):
    root = manuals(tmp_path / "in")
    pages = sorted((root / "man" / "man1").iterdir())
    held = {
        text.name
        for text in TextStore.build(root, find_texts(root, ["*"]), tmp_path / "a", held_out=0.3).texts
        if text.held_out
    }
    copied = next(page for page in pages if page.relative_to(root).as_posix() in held)
    source = next(page for page in pages if page.relative_to(root).as_posix() not in held)
    copied.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()) + b"and a line\n"))
    store = TextStore.build(root, find_texts(root, ["*"]), tmp_path / "b", held_out=0.3)
    assert store.copied == 1
    assert copied.relative_to(root).as_posix() not in {text.name for text in store.texts}


def test_shares_of_copies():
    text = b"a b c d e f g h i j"
    known = set(shingles(text))
    assert len(known) == 3
    assert copied_share(text, known) == 1
    assert copied_share(b"1 2 3 4 5 6 7 8 9", known) == 0


def test_windows_begin_behind_line_breaks_and_depend_on_the_step_alone():
    streams = {"en": np.frombuffer(b"word word\n" * 500, np.uint8), "de": np.frombuffer(b"Wort Wort\n" * 100, np.uint8)}
    sampler = WindowSampler(streams, window=100, seed=1)
    batch = sampler.batch(3, 8)
    assert batch.shape == (8, 100)
    assert all(row.numpy().tobytes()[:4] in (b"word", b"Wort") for row in batch)
    assert (batch == sampler.batch(3, 8)).all()
    assert (batch != sampler.batch(4, 8)).any()
    with pytest.raises(ValueError, match=r"lower data\.window"):
        WindowSampler(streams, window=4000, seed=1)


def test_first_lines_are_whole():
    stream = np.frombuffer(b"ab\ncd\nef\n", np.uint8)
    assert first_lines(stream, 7) == b"ab\ncd\n"
    assert first_lines(stream, 100) == b"ab\ncd\nef\n"


def test_recipes_of_texts_read_and_write():
    values = {"architecture": "word_pool", "data": {"media": "texts", "window": 64}}
    recipe = Recipe.from_dict(values)
    assert recipe.data == TextsRecipe(window=64)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_missing_manuals_are_named(tmp_path):
    with pytest.raises(ConfigError, match="pass --data"):
        prepare_texts(TextsRecipe(), tmp_path / "cache")
    with pytest.raises(ConfigError, match="found no manuals"):
        prepare_texts(TextsRecipe(folder=str(tmp_path)), tmp_path / "cache")
    (tmp_path / "a.1.gz").write_bytes(gzip.compress(b"too short"))
    with pytest.raises(MediaError, match="on both sides of the split"):
        prepare_texts(TextsRecipe(folder=str(tmp_path)), tmp_path / "cache")


def test_a_word_pool_trains_and_resumes(tmp_path):
    from tokenzoo.training import train

    root = manuals(tmp_path / "in")
    values = {
        "architecture": "word_pool",
        "config": {
            "num_vectors": 2, "stages": 1, "codebook_size": 300, "starts": 20, "vector_dim": 8, "byte_dim": 8, "byte_layers": 1,
            "byte_heads": 2, "queries": 2, "hidden_dim": 16, "blocks": 1, "said_dim": 4, "past_dim": 4, "position_dim": 16,
            "position_blocks": 1, "model_layers": 0, "continuous": 0.0,
        },
        "data": {"media": "texts", "folder": str(root), "window": 256, "eval_bytes": 200, "held_out": 0.3},
        "output": str(tmp_path / "run"), "batch_size": 2, "initialise_items": 8, "log_every": 1,
        "save_every": 2, "eval_every": 2, "steps": 2,
    }  # fmt: skip
    train(Recipe.from_dict(values))
    train(Recipe.from_dict({**values, "steps": 4}), resume=True)
    train(Recipe.from_dict({**values, "steps": 4, "output": str(tmp_path / "whole")}))
    first, second = (tmp_path / name / "averaged" / "model.safetensors" for name in ("run", "whole"))
    assert first.read_bytes() == second.read_bytes()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("held_out_bits_per_byte" in line and "held_out_words_de" in line for line in log)
