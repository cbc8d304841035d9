import random

import pytest
import torch

from tokenzoo.tokenizers import MediaError, TokensError
from tokenzoo.tokenizers.strings import Strings, to_bytes, to_tensor

MEDIA = Strings()


def round_trip(item):
    return MEDIA.restore(*MEDIA.read(item))


def random_text(rng):
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xD800, 0xE000), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(12)))


def test_texts_and_bytes_come_back_as_what_they_were():
    rng = random.Random(0)
    for i in range(10_000):
        item = random_text(rng) if i % 2 else rng.randbytes(rng.randrange(20))
        back = round_trip(item)
        assert back == item
        assert type(back) is type(item)


@pytest.mark.parametrize("item", ["", b"", "\x00\r\n\ufeff", "a" * 1_000_000, "é" * 500_000, "\ud83d\ude00", "a\udfff\ud800z"])
def test_odd_texts_come_back(item):
    assert round_trip(item) == item


def test_surrogates_are_noted_where_there_are_some():
    assert MEDIA.read("é")[1] == {"bytes": 2, "type": "str"}
    assert MEDIA.read("\ud83d")[1] == {"bytes": 3, "type": "str", "surrogates": True}
    assert MEDIA.read(bytearray(b"\xff"))[1] == {"bytes": 1, "type": "bytes"}


def test_files_are_texts_where_they_are_utf8(tmp_path):
    text, binary = tmp_path / "a.txt", tmp_path / "b.bin"
    text.write_bytes("\ufeffzeile\r\nä".encode())
    binary.write_bytes(b"\xff\xfe\x00")
    assert round_trip(text) == "\ufeffzeile\r\nä"
    assert round_trip(binary) == b"\xff\xfe\x00"


def test_a_string_is_never_a_path(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("content")
    assert round_trip(str(file)) == str(file)


@pytest.mark.parametrize("item", [3, None, torch.zeros(3), {"a": 1}])
def test_what_is_no_text_is_refused(item):
    with pytest.raises(MediaError, match=r"expected a text.*pathlib\.Path"):
        MEDIA.read(item)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(MediaError, match="No such file"):
        MEDIA.read(tmp_path / "missing.txt")
    with pytest.raises(MediaError, match="is a folder"):
        MEDIA.read(tmp_path)
    with pytest.raises(MediaError, match="null byte"):
        MEDIA.read(tmp_path / "a\0b")


def test_bytes_that_are_no_text_are_refused_with_the_place():
    with pytest.raises(TokensError, match=r"offset 3 of 5 \(invalid continuation byte\): c3 28\. Pass native=True"):
        MEDIA.restore(to_tensor(b"abc\xc3("), {})
    with pytest.raises(TokensError, match="offset 1"):
        MEDIA.restore(to_tensor("a\ud800".encode("utf-8", "surrogatepass")), {})
    assert MEDIA.restore(to_tensor(b"abc\xc3("), {"type": "bytes"}) == b"abc\xc3("


def test_items_of_lists_and_of_one():
    assert MEDIA.items("ab") == ["ab"]
    assert MEDIA.items(b"ab") == [b"ab"]
    assert MEDIA.items(["a", b"b"]) == ["a", b"b"]


def test_tensors_of_bytes():
    tensor = to_tensor(b"\x00\xff")
    assert tensor.dtype == torch.uint8
    assert to_bytes(tensor) == b"\x00\xff"
    assert to_tensor(b"").shape == (0,)
