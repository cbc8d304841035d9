import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tokenzoo import Tokens, load
from tokenzoo.cli import app
from tokenzoo.demo.sheet import bundled_photos

NANO = "one_d_piece_nano"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.fixture
def photos(tmp_path):
    """A folder of photos with sub-folders, one name under two extensions, and files that are no photos."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for i, photo in enumerate(bundled_photos()[:3]):
        photo.resize((90 + i, 70)).save(folder / ["a.jpg", "a.png", "deep/er/b.webp"][i])
    photo.save(folder / ".hidden" / "no.png")
    (folder / "notes.txt").write_text("not a photo")
    return folder


def test_a_folder_in_a_folder_out(photos, tmp_path):
    report = json.loads(run("encode", photos, "-o", tmp_path / "tokens", "-n", 16, "--json").stdout)
    assert [row["tokens"] for row in report["done"]] == [16, 16, 16]
    names = sorted(str(p.relative_to(tmp_path / "tokens")) for p in (tmp_path / "tokens").rglob("*.*"))
    assert names == ["a.jpg.tok", "a.png.tok", "deep/er/b.webp.tok"]
    run("decode", tmp_path / "tokens", "-o", tmp_path / "back")
    with Image.open(tmp_path / "back/deep/er/b.webp.tok.png") as back:
        assert back.size == (92, 70)
    tok = load(NANO)
    assert Tokens.load(tmp_path / "tokens/a.jpg.tok").equal(tok.encode(photos / "a.jpg", length=16))


def test_one_bad_file_is_reported_and_does_not_stop_the_rest(photos, tmp_path):
    data = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2])
    (photos / "text.png").write_text("hello")
    result = run("encode", photos, "-o", tmp_path / "tokens", "--json", code=1)
    report = json.loads(result.stdout)
    assert len(report["done"]) == 3
    assert [row["file"].split("/")[-1] for row in report["failed"]] == ["cut.jpg", "text.png"]
    assert "cut.jpg: truncated or damaged" in result.stderr
    assert "text.png: not a picture" in result.stderr
    assert not list((tmp_path / "tokens").glob(".*"))


def test_a_file_name_that_is_not_utf8(photos, monkeypatch):
    monkeypatch.chdir(photos)
    Path("a.jpg").rename("\udcff.jpg")
    assert r"\udcff.jpg" in run("encode", "\udcff.jpg", "-o", "tokens", "-n", 2).stdout
    assert Path("tokens/\udcff.jpg.tok").is_file()


def test_one_file_to_one_file(photos, tmp_path):
    run("encode", photos / "a.jpg", "-o", tmp_path / "a.safetensors", "--target", "psnr=14")
    tokens = Tokens.load(tmp_path / "a.safetensors")
    assert tokens.meta[0]["target"]["met"]
    run("decode", tmp_path / "a.safetensors", "-o", tmp_path / "a.png", "--native")
    size = load(NANO).config.image_size
    with Image.open(tmp_path / "a.png") as back:
        assert back.size == (size, size)


def test_several_items_in_one_token_file(photos, tmp_path):
    load(NANO).encode([photos / "a.jpg", photos / "a.png"], length=4).save(tmp_path / "two.tok")
    run("decode", tmp_path / "two.tok", "-o", tmp_path / "back")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["two.tok.0.png", "two.tok.1.png"]


def test_roundtrip_measures(photos, tmp_path):
    report = json.loads(run("roundtrip", photos, "-n", 32, "--json", "-o", tmp_path / "out").stdout)
    for row in report["done"]:
        assert row["tokens"] == 32
        assert row["bytes"] == 48
        assert 5 < row["psnr"] < 60
        assert 0 < row["ssim"] <= 1
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    assert "psnr" in run("roundtrip", photos / "a.jpg").stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["encode", "{photos}/missing.jpg", "-o", "{out}"], "missing.jpg does not exist"),
        (["encode", "{out}", "-o", "{out}"], "no image files in"),
        (["encode", "{photos}", "-o", "{out}", "-m", "one_d_peice_nano"], "one_d_piece_nano"),
        (["encode", "{photos}", "-o", "{out}", "-n", "100000"], "got length=100000"),
        (["encode", "{photos}", "-o", "{out}", "-t", "psnr"], "NAME=NUMBER"),
        (["encode", "{photos}", "-o", "{out}", "-t", "l1=nan"], "NAME=NUMBER"),
        (["encode", "{photos}", "-o", "{out}", "-t", "beauty=3"], "error: expected a target"),
        (["encode", "{photos}", "-o", "{out}", "-n", "129"], "error: one_d_piece_nano.photos encodes to 1 to 128 tokens"),
        (["encode", "{photos}", "-o", "{photos}/a.jpg/tokens"], "error: cannot make the folder"),
        (["encode", "{photos}/a.jpg", "-o", "{photos}/folder.tok"], "error: expected the name of a file to write"),
        (["roundtrip", "{photos}", "-t", "beauty=3"], "error: expected a target"),
        (["roundtrip", "{photos}", "-o", "{photos}/a.jpg"], "error: cannot make the folder"),
        (["encode", "{photos}", "-o", "{out}", "--format", "zip"], "tok or safetensors"),
        (["encode", "{photos}/a.jpg", "-o", "{out}/a.bin"], "ends in .tok or .safetensors"),
        (["encode", "{photos}/notes.txt", "-o", "{out}"], "not a picture"),
        (["decode", "{photos}/notes.txt", "-o", "{out}"], "notes.txt holds no tokens"),
        (["info", "nothing_like_it"], "nothing_like_it"),
        (["train", "no_such_recipe.toml"], "no_such_recipe"),
    ],
)
def test_errors_a_user_can_act_on(photos, tmp_path, arguments, reason):
    (tmp_path / "out").mkdir()
    (photos / "folder.tok").mkdir()
    result = run(*(a.format(photos=photos, out=tmp_path / "out") for a in arguments), code=2)
    assert reason in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_tokens_of_other_weights_are_refused(photos, tmp_path):
    tok = load(NANO)
    next(tok.parameters()).data.add_(0.5)
    tok.train().eval()
    tok.encode(photos / "a.jpg", length=4).save(tmp_path / "other.tok")
    result = run("decode", tmp_path / "other.tok", "-o", tmp_path / "back", code=2)
    assert "load the tokenizer that made them" in result.stderr.replace("\n", " ")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert "too large" in run("encode", tmp_path, "-o", tmp_path / "out", code=2).stderr


def test_list_and_info():
    cards = json.loads(run("list", "--json").stdout)
    assert any(card["name"] == "one_d_piece_nano.photos" for card in cards)
    assert {"name", "modality", "license"} <= cards[0].keys()
    assert "one_d_piece_s" in run("list", "one_d_piece*").stdout
    assert "license: apache-2.0" in run("info", "titok_l32").stdout
    assert json.loads(run("info", NANO, "--json").stdout)["name"] == "one_d_piece_nano.photos"
    assert "torch" in json.loads(run("info", "--system", "--json").stdout)


def test_demo_writes_the_sheet(tmp_path):
    report = json.loads(run("demo", "-o", tmp_path, "--json").stdout)
    assert [row["tokens"] for row in report["rows"]] == [8, 32, 128]
    assert [row["bytes"] for row in report["rows"]] == [12, 48, 192]
    qualities = [row["PSNR (dB)"] for row in report["rows"]]
    assert qualities == sorted(qualities)
    with Image.open(tmp_path / "demo.png") as sheet:
        assert np.asarray(sheet).std() > 10


def test_the_installed_command(tmp_path):
    command = shutil.which("tokenzoo") or [sys.executable, "-m", "tokenzoo"]
    command = [command] if isinstance(command, str) else command
    assert subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout.count("roundtrip")
    assert subprocess.run([*command, "encode"], capture_output=True, check=False).returncode == 2
