import random

import pytest
import torch

import tokenzoo
from tokenzoo.tokenizers.text.blt import BLT, BLTConfig
from tokenzoo.tokenizers.text.hat import HAT, HATConfig
from tokenzoo.tokenizers.text.mrt5 import MrT5, MrT5Config

MEGABYTE = 1_000_000
ALPHABETS = (
    "\0\t\n\r\x1b\x7f\x85",
    "abcXYZ 019.,'",
    "éßñЖя中文字かな한국ไทย",
    "\ud800\udbff\udc00\udfff",
    "\U0001f469\u200d\U0001f680\U0001f3fd\u0301\U0010ffff",
)


def tiny_mrt5():
    torch.manual_seed(0)
    return MrT5(MrT5Config(dim=8, num_layers=2, num_heads=1, head_dim=8, hidden_dim=8, gate_layer=1, context=64)).eval()


def tiny_blt():
    torch.manual_seed(0)
    return BLT(BLTConfig(dim=8, num_layers=1, num_heads=1, hidden_dim=8, window=16, threshold=5.5)).eval()


def tiny_hat():
    torch.manual_seed(0)
    return HAT(HATConfig(dim=8, num_layers=1, num_heads=1, mlp_dim=8, word_dim=8, word_heads=1)).eval()


# How each is made, and how many texts it gets; word_pool has tests of its own.
TOKENIZERS = {
    "equal_info_nano": (lambda: tokenzoo.load("equal_info_nano"), 10_000),
    "equal_info_nano_b64": (lambda: tokenzoo.load("equal_info_nano_b64"), 10_000),
    "mrt5": (tiny_mrt5, 10_000),
    "blt": (tiny_blt, 10_000),
    "hat": (tiny_hat, 10_000),
}


def any_texts(count):
    """Strings of one alphabet or several, and bytes: mostly short, some of a few hundred."""
    rng = random.Random(20261122)
    for i in range(count):
        size = rng.randrange(300) if i % 100 == 0 else rng.randrange(12)
        if i % 2:
            yield rng.randbytes(size)
        else:
            letters = "".join(rng.sample(ALPHABETS, rng.randrange(1, 3)))
            yield "".join(rng.choice(letters) for _ in range(size))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_text_comes_back(name):
    make, count = TOKENIZERS[name]
    tok, texts = make(), ["", b"", *any_texts(count)]
    assert tok.decode(tok.encode(texts)) == texts


@pytest.mark.parametrize("name", ["equal_info_nano", "equal_info_nano_b64"])
def test_words_of_a_megabyte_come_back(name):
    tok = TOKENIZERS[name][0]()
    for word in ("a" * MEGABYTE, "字" * (MEGABYTE // 3), random.Random(0).randbytes(MEGABYTE), bytes(MEGABYTE)):
        assert tok.decode(tok.encode(word)) == [word]


@pytest.mark.parametrize("name", ["mrt5", "blt"])
def test_long_words_come_back_from_networks(name):
    tok, word = TOKENIZERS[name][0](), "a" * (MEGABYTE // 10)
    assert tok.decode(tok.encode(word)) == [word]
