import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tokenzoo
from tokenzoo import survey
from tokenzoo.cli import app
from tokenzoo.survey import Measured, Survey
from tokenzoo.survey_page import bins, page, summary
from tokenzoo.tokenizers import MediaError, TokensError
from tokenzoo.tokenizers.image.karl import KARL, KARLConfig


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.fixture
def tok(tiny):
    """A tokenizer that reconstructs the mean, darkened in proportion to the tokens that were cut off."""

    class Darkening(tiny.Tiny):
        def _encode(self, batch, *, length, seed):
            return super()._encode(batch, length=length, seed=seed)._replace(extras={"mean": batch.mean((1, 2, 3))})

        def _decode(self, ids, lengths, extras):
            return (extras["mean"] * lengths[:, 0] / 16)[:, None, None, None].expand(-1, 3, 8, 8)

    return Darkening(tiny.TinyConfig()).eval()


def grey(level, size=8):
    return torch.full((3, size, size), level)


@pytest.fixture
def model(tmp_path, tiny, monkeypatch, tok):
    """A folder that loads as that tokenizer."""
    folder = tiny.make().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tiny, "Tiny", type(tok))
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, level in (("dark & <low>.png", 40), ("middle.png", 128), ("more/bright.png", 250)):
        Image.fromarray(np.full((30, 40, 3), level, np.uint8)).save(folder / name)
    return folder


# -- the helper


def test_the_length_of_each_item_in_order(tok):
    levels = [1.0, 0.1, 0.5]
    assert tokenzoo.complexity([grey(v) for v in levels], tokenizer=tok, target={"l1": 0.1}) == [15, 1, 13]
    assert tokenzoo.complexity(grey(1.0), tokenizer=tok, target={"l1": 0.0}) == [16]
    assert tokenzoo.complexity([], tokenizer=tok) == []


def test_it_is_a_function_whatever_was_imported():
    import tokenzoo.survey_page

    assert callable(tokenzoo.complexity)
    assert tokenzoo.survey_page.Survey is Survey


def test_the_bundled_tokenizer_finds_noise_more_complex_than_a_plain_colour():
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, noisy = tokenzoo.complexity([grey(0.4, 64), noise])
    assert plain < 5
    assert noisy == 128


def test_a_tokenizer_of_fixed_length_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny.Tiny, "_describe", lambda self: {"codebook_sizes": (16,), "max_tokens": 16})
    with pytest.raises(TokensError, match="fixed length"):
        tokenzoo.complexity(grey(0.5), tokenizer=tiny.make())
    with pytest.raises(TokensError, match="whose length varies"):
        survey.limit_of(tiny.make())
    with pytest.raises(TokensError, match="expected a target"):
        tokenzoo.complexity(grey(0.5), target={"beauty": 1.0})


def test_where_the_network_promises_a_quality_it_is_measured(tok, photos, monkeypatch):
    """KARL leaves no note of what it reached."""
    encode = tok.encode

    def promising(*args, target, **options):
        return encode(*args, length=4, **options)

    monkeypatch.setattr(tok, "encode", promising)
    files = [photos / "dark & <low>.png", photos / "more/bright.png"]
    assert [p.met for p in survey.measure(tok, files, {"l1": 0.2})] == [True, False]


# -- the report


def make_survey(lengths, missed=(), limit=128, **changes):
    pictures = [
        Measured(f"{i:03}.png", n, i not in missed, None)  # the page shows names and numbers
        for i, n in enumerate(lengths)
    ]
    values = {"model": "m", "target": {"l1": 0.05}, "limit": limit, "unit": "tokens", "asked": len(lengths)}
    return Survey(**{**values, "pictures": pictures, **changes})


class Name(str):
    name = property(str)


def as_page(result, show=4):
    result.pictures = [Measured(Name(p.file), p.length, p.met, None) for p in result.pictures]
    return page(result, lambda picture: (b"a", b"b"), show=show)


@pytest.mark.parametrize(("limit", "count", "first", "last"), [(1, 1, (1, 1), (1, 1)), (16, 16, (1, 1), (16, 16))])
def test_few_counts_get_a_bar_each(limit, count, first, last):
    assert len(bins(limit)) == count
    assert (bins(limit)[0], bins(limit)[-1]) == (first, last)


@pytest.mark.parametrize("limit", [33, 128, 250, 256])
def test_bars_cover_every_count_once(limit):
    ranges = bins(limit)
    assert len(ranges) <= 32
    assert [n for first, last in ranges for n in range(first, last + 1)] == list(range(1, limit + 1))


def test_every_picture_is_in_one_bar():
    lengths = [1, 4, 5, 5, 64, 127, 128, 128]
    html = as_page(make_survey(lengths, missed={7}))
    assert sum(int(n) for n in re.findall(r"tokens: (\d+) pictures", html)) == len(lengths)
    assert "125 to 128 tokens: 3 pictures, 1 miss the target" in html
    assert html.count('class="short"') == 1


def test_no_picture_is_shown_at_both_ends():
    for count in (1, 2, 3, 7, 20):
        html = as_page(make_survey(range(1, count + 1)), show=4)
        shown = re.findall(r"</b> tokens?(?:<span[^>]*>[^<]*</span>)?<span>(\d+\.png)", html)
        assert len(shown) == len(set(shown)) == min(count, 8)
        assert shown[0] == "000.png"
        if count > 1:
            assert f"{count - 1:03}.png" in shown


def test_the_order_is_by_length_then_by_whether_the_target_was_met():
    result = make_survey([16, 3, 16, 1], missed={0})
    assert [p.file for p in result.ordered] == ["003.png", "001.png", "002.png", "000.png"]
    assert summary(result) == {
        "pictures": 4,
        "median": 9.5,
        "mean": 9.0,
        "shortest": 1,
        "longest": 16,
        "target missed": 1,
        "unreadable": 0,
    }


def test_the_page_needs_nothing_else_and_escapes_names():
    result = make_survey([3], failed=["<b>.png: damaged"], asked=9)
    result.pictures = [Measured(Name("<script>x</script>.png"), 3, True, None)]
    html = as_page(result)
    assert not re.search(r"<script|https?://|@import|url\(", html)
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;.png: damaged" in html
    assert "Interrupted after 2 of 9 files" in html


# -- the command


def test_a_folder_becomes_a_report(photos, model, tmp_path):
    report = tmp_path / "out" / "report.html"
    answer = json.loads(run("complexity", photos, "-o", report, "-m", model, "-t", "l1=0.1", "--json").stdout)
    assert {row["file"].split("/")[-1]: row["length"] for row in answer["pictures"]} == {
        "dark & <low>.png": 6,
        "middle.png": 13,
        "bright.png": 15,
    }
    assert answer["summary"]["pictures"] == 3
    html = report.read_text()
    assert html.count("data:image/jpeg;base64,") == 6
    assert "dark &amp; &lt;low&gt;.png" in html
    assert "report:" in run("complexity", photos, "-o", report, "-m", model).stdout


def test_unreadable_files_are_listed_and_not_fatal(photos, model, tmp_path):
    (photos / "broken.png").write_bytes((photos / "middle.png").read_bytes()[:60])
    (photos / "text.jpg").write_text("hello")
    result = run("complexity", photos, "-o", tmp_path / "r.html", "-m", model, code=1)
    assert result.stderr.count("failed:") == 2
    html = (tmp_path / "r.html").read_text()
    assert "Could not be read" in html
    assert "broken.png" in html


@pytest.mark.parametrize("content", [None, "hello"])
def test_folders_without_pictures_are_refused(tmp_path, model, content):
    folder = tmp_path / "empty"
    folder.mkdir()
    if content:
        (folder / "a.png").write_text(content)
    reason = run("complexity", folder, "-o", tmp_path / "r.html", "-m", model, code=2).stderr.replace("\n", " ")
    assert ("none of 1 files could be read" if content else "no image files in") in reason
    assert not (tmp_path / "r.html").exists()


def test_interrupted_it_reports_what_is_done(photos, model, tmp_path, monkeypatch):
    measure, calls = survey.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(survey, "measure", interrupted)
    run("complexity", photos, "-o", tmp_path / "r.html", "-m", model, code=130)
    assert "Interrupted after 1 of 3 files" in (tmp_path / "r.html").read_text()


def test_a_file_name_that_is_not_utf8_loses_nothing(photos, model, tmp_path):
    (photos / "middle.png").rename(photos / "\udcff.png")
    (photos / "\udcfe.png").write_text("hello")
    report = tmp_path / "\udcfd.html"
    assert r"\udcfd.html" in run("complexity", photos, "-o", report, "-m", model, code=1).stdout
    assert "?.png" in report.read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_picture_without_thumbnails_is_still_reported(photos, model, tmp_path, monkeypatch, error):
    """Interrupted, or gone since it was encoded."""
    thumbnails, calls = survey.thumbnails, []

    def failing(tokenizer, picture):
        calls.append(picture)
        if len(calls) == 2:
            raise error
        return thumbnails(tokenizer, picture)

    monkeypatch.setattr(survey, "thumbnails", failing)
    run("complexity", photos, "-o", tmp_path / "r.html", "-m", model, code=130 if error is KeyboardInterrupt else 0)
    html = (tmp_path / "r.html").read_text()
    assert html.count("<figure>") == 3
    assert html.count("data:image/jpeg") == (2 if error is KeyboardInterrupt else 4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-o", "{photos}"], "expected the name of a file to write"),
        (["-o", "{photos}/middle.png/r.html"], "cannot make the folder"),
        (["-t", "pnsr=28"], "expected a target"),
        (["-t", "l1=nan"], "NAME=NUMBER"),
        (["-t", "l1=inf"], "NAME=NUMBER"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(photos, model, tmp_path, monkeypatch, options, reason):
    monkeypatch.setattr(survey, "measure", lambda *args: pytest.fail("a picture was encoded"))
    monkeypatch.chdir(tmp_path)
    options = [option.format(photos=photos) for option in options]
    assert reason in run("complexity", photos, "-m", model, *options, code=2).stderr.replace("\n", " ")


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(photos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "measure", lambda *args: pytest.fail("a picture was encoded"))
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert "cannot write into" in run("complexity", photos, "-m", model, "-o", tmp_path / "r.html", code=2).stderr


@pytest.fixture
def karl():
    """Continuous: what is kept is told by a mask, not by lengths."""
    torch.manual_seed(0)
    width = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("dim", 8), ("layers", 1), ("heads", 2))}
    pixel = {"pixel_dim": 4, "pixel_codebook_size": 8, "pixel_channels": 32, "pixel_multipliers": (1, 1), "pixel_blocks": 1}
    own = {"num_tokens": 8, "num_slots": 8, "position_size": 8, "token_dim": 4, "halting_dim": 8, "quantizer": "none"}
    return KARL(KARLConfig(image_size=16, patch_size=2, **width, **pixel, **own)).eval()


def test_continuous_tokens_are_counted(karl, photos, tmp_path):
    files = [photos / "middle.png", photos / "more/bright.png"]
    kept = karl.encode(files, target={"l1": 0.05}).extras["kept"].sum(1).tolist()
    assert tokenzoo.complexity(files, tokenizer=karl) == kept
    folder = karl.save_pretrained(tmp_path / "karl")
    answer = json.loads(run("complexity", *files, "-m", folder, "-o", tmp_path / "r.html", "--json").stdout)
    assert [picture["length"] for picture in answer["pictures"]] == kept
    answer = json.loads(run("encode", *files, "-m", folder, "-o", tmp_path / "tokens", "-t", "l1=0.05", "--json").stdout)
    assert [(row["tokens"], row["bytes"]) for row in answer["done"]] == [(n, 16 * n) for n in kept]
    assert min(kept) > 0


def test_a_picture_may_miss_the_target_at_any_length():
    html = as_page(make_survey([3, 9], missed={0}))
    assert "1 miss the target" in html
    assert "full length and" not in html


def test_an_item_that_cannot_be_read_is_an_error_in_the_helper(tok, tmp_path):
    with pytest.raises(MediaError, match="does not exist"):
        tokenzoo.complexity(tmp_path / "missing.png", tokenizer=tok)
