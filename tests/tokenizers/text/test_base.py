import random
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from tokenzoo.tokenizers import MediaError, TokenizerConfig, Tokens, TokensError, WrongTokenizerError
from tokenzoo.tokenizers.text.base import Embedding, TextTokenizer, ragged
from tokenzoo.tokenizers.text.splitters import splitter


@strict
@dataclass(kw_only=True)
class ShiftConfig(TokenizerConfig):
    shift: int = 3


class Shifted(TextTokenizer):
    """Bytes plus a number, as ByT5 has them, and the bytes' means as vectors of words."""

    architecture = "shifted"
    config_class = ShiftConfig

    def __init__(self, config=None):
        super().__init__(config or ShiftConfig())
        self.weight = nn.Parameter(torch.ones(1))
        self.batches = []

    def _describe(self):
        return {"codebook_sizes": (256 + self.config.shift,)}

    def _encode_texts(self, texts, *, seed):
        self.batches.append(len(texts))
        return ragged([torch.tensor(list(text), dtype=torch.long) + self.config.shift for text in texts])

    def _decode_texts(self, tokens):
        return [bytes((row - self.config.shift).tolist()) for row in tokens.codes()]

    def _embed_texts(self, texts):
        found = []
        for text in texts:
            ends = torch.from_numpy(splitter("space").split(text))
            lengths = ends.diff(prepend=torch.zeros(1, dtype=torch.long))
            mean = torch.segment_reduce(torch.tensor(list(text), dtype=torch.float), "mean", lengths=lengths)
            found.append(Embedding(mean[:, None, None], torch.cat([torch.zeros(1, dtype=torch.long), ends])))
        return found


@pytest.fixture
def tok():
    return Shifted().eval()


def items(count):
    rng = random.Random(0)
    texts = ["".join(chr(rng.choice([65, 10, 0, 0xE9, 0x4F60, 0xD83D, 0x1F600])) for _ in range(rng.randrange(9)))]
    for i in range(count):
        texts.append(rng.randbytes(rng.randrange(9)) if i % 2 else texts[0][: i % 5] + chr(rng.randrange(0x110000)))
    return ["", b"", *texts]


def test_any_text_comes_back(tok):
    texts = items(2_000)
    assert tok.decode(tok.encode(texts)) == texts


def test_native_answers_with_bytes(tok):
    texts = ["é", b"\xff", "\ud800"]
    assert tok.decode(tok.encode(texts), native=True) == [b"\xc3\xa9", b"\xff", b"\xed\xa0\x80"]


def test_each_item_has_the_tokens_that_it_has_alone(tok):
    texts = ["abc", "", b"\xff\xfe", "a longer text"]
    together = tok.encode(texts)
    assert all(one.equal(tok.encode(text)) for one, text in zip(together, texts, strict=True))
    assert together.lengths[:, 0].tolist() == [3, 0, 2, 13]


def test_batches_are_ragged_on_an_accelerator(tok, monkeypatch):
    texts = items(37)
    alone = tok.encode(texts)
    tok.batches.clear()
    monkeypatch.setattr(Shifted, "_batch_size", 16)
    assert tok.encode(texts).equal(alone)
    assert tok.batches == [16, 16, 8]
    assert tok.decode(alone) == texts


def test_tokens_survive_packing(tok):
    tokens = tok.encode(["", "héllo\ud800", b"\x00\xff"])
    assert Tokens.unpack(tokens.pack()).equal(tokens)
    assert tok.decode(Tokens.unpack(tokens.pack())) == ["", "héllo\ud800", b"\x00\xff"]


def test_tokens_of_a_language_model_are_a_str(tok):
    made = tok.encode("né").ids
    assert tok.decode(Tokens(made, torch.tensor([[3]]), tok.info)) == ["né"]
    with pytest.raises(TokensError, match=r"offset 1 of 2 \(unexpected end of data\).*native=True"):
        tok.decode(Tokens(made[..., :2], torch.tensor([[2]]), tok.info))
    assert tok.decode(Tokens(made[..., :2], torch.tensor([[2]]), tok.info), native=True) == [b"n\xc3"]


def test_the_broken_item_of_a_batch_is_named(tok):
    broken = Tokens(torch.tensor([[[68, 69]], [[3 + 0xFF, 68]]]), torch.tensor([[2], [2]]), tok.info)
    with pytest.raises(TokensError, match=r"item 1: .*offset 0 of 2"):
        tok.decode(broken)


def test_what_cannot_be_meant_is_refused(tok):
    with pytest.raises(TokensError, match=r"\[0, 259\), got 259"):
        tok.decode(Tokens(torch.tensor([[[259]]]), torch.tensor([[1]]), tok.info))
    with pytest.raises(TokensError, match="follow the media"):
        tok.encode("a", length=3)
    with pytest.raises(TokensError, match="fixed length"):
        tok.encode("a", target={"psnr": 3})
    with pytest.raises(MediaError, match="item 1: expected a text"):
        tok.encode(["a", 5])
    other = Shifted(ShiftConfig(shift=4)).eval()
    with torch.no_grad():
        other.weight.zero_()
    with pytest.raises(WrongTokenizerError):
        tok.decode(other.encode("a"))


def test_vectors_with_their_places(tok):
    first, second = tok.embed(["ab cd", b"\x00"])
    assert first.vectors.shape == (2, 1, 1)
    assert first.offsets.tolist() == [0, 3, 5]
    assert second.vectors.tolist() == [[[0.0]]]


def test_a_tokenizer_without_vectors_says_so(tok, monkeypatch):
    monkeypatch.delattr(Shifted, "_embed_texts")
    with pytest.raises(TokensError, match="no vectors"):
        tok.embed("a")


def test_hooks_of_tensors_go_by_those_of_texts(tok):
    batch = torch.tensor([[65, 66], [0, 255]], dtype=torch.uint8)
    codes = tok._encode(batch, length=None, seed=0)
    assert codes.ids.tolist() == [[[68, 69]], [[3, 258]]]
    assert torch.equal(tok._decode(codes.ids, codes.lengths, {}), batch)
