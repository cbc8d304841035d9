import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokenzoo import load
from tokenzoo.evaluation.next_word import WORDS, TokenModel, WordModel, release, train_bpe
from tokenzoo.evaluation.words import PIECE, Measured, measure, spread
from tokenzoo.registry import find_card
from tokenzoo.tokenizers.text.word_pool import WordPool

TEXT = [b"the", b" cat", b" sat", b" on", b" the", b" mat."]


def test_spread_text_is_whole_lines_of_all_places():
    lines = b"".join(b"line %06d\n" % n for n in range(5000))
    text = spread(np.frombuffer(lines, np.uint8), 3 * PIECE)
    found = text.splitlines()
    assert set(found) <= set(lines.splitlines())
    assert len(text) <= 3 * PIECE
    assert int(found[0].split()[1]) < 100 < 3000 < int(found[-1].split()[1])
    assert spread(np.frombuffer(lines, np.uint8), len(lines)) == lines


def test_words_are_counted():
    pytest.importorskip("tokenizers.models", reason="HF tokenizers, of the extra bench")
    tokenizer = load("word_pool_nano", local_files_only=True)
    found = measure(tokenizer, b"the file the \xff", train_bpe([b"the"] * 10, 300))
    assert (found.num_bytes, found.words, found.distinct) == (14, 5, 5)
    assert found.right < found.words
    assert found.ids == found.words
    assert found.bpe_ids == 10
    row = Measured(1000, 200, 150, 100, 50, 250, 400).row("en", 11.0)
    assert row == "| en | 1 | 75.00% | 50.00% | 5.00 | 1.25 | 4.00 | 2.50 | 2.75 |"


@pytest.fixture(scope="module")
def byte_model():
    """A byte model that knows one sentence."""
    torch.manual_seed(0)
    model = TokenModel(WordPool(WORDS), None, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        model.loss([TEXT]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_word_is_right_where_its_bytes_are_and_it_ends(byte_model):
    assert all(byte_model.judge([TEXT]).right[1:])
    # What follows "the" is foreseen as " cat": "the" in "then" is named right only where the word ends there.
    judged = byte_model.judge([[b"the", b" cab"]]).right
    assert judged[0]
    assert not judged[1]


def test_nats_are_those_of_the_text(byte_model):
    judged = byte_model.judge([TEXT])
    assert judged.nats == pytest.approx(float(byte_model.loss([TEXT]).detach()) * sum(map(len, TEXT)), rel=1e-4)


def test_words_foresee_words():
    torch.manual_seed(0)
    model = WordModel(WordPool(WORDS))
    assert len(model.judge([TEXT, TEXT[:3]]).right) == 9
    model.loss([TEXT]).backward()
    assert model.words.encoder.bytes.weight.grad is not None


def test_bpe_stays_within_words():
    pytest.importorskip("tokenizers.models", reason="HF tokenizers, of the extra bench")
    bpe = train_bpe(TEXT * 10, 300)
    model = TokenModel(WordPool(WORDS), bpe, 1)
    ids = model.tokens([b" cat", b"\xff "])
    assert [b"".join(model.pieces[i] for i in row) for row in ids] == [b" cat", b"\xff "]
    assert len(ids[0]) == 1
    assert len(model.judge([TEXT]).right) == len(TEXT)


def test_the_word_model_is_bundled_with_its_figures(tmp_path):
    torch.manual_seed(0)
    model = WordModel(WordPool(WORDS))
    measured = {"params": 1, "next_word_accuracy": 0.25, "rare_word_accuracy": 0.5, "bits_per_byte": 2.0}
    result = dict.fromkeys(("word", "bpe", "byte"), measured)
    counts = {"steps": 3, "training_bytes": 10, "training_text": 20, "window": 5, "held_out_words": 9, "rare_words": 2}
    card = tmp_path / "word_pool_nano_lm.manuals.md"
    card.write_text(find_card("word_pool_nano_lm").text)
    (tmp_path / "nano").mkdir()
    release(model, {**result, **counts}, card, b"the cat sat")
    assert "| bytes | 0.00 M | 25.0% | 50.00% | 2.00 |" in card.read_text()
    state = load_file(tmp_path / "nano" / "word_pool_nano_lm.manuals.safetensors")
    assert torch.equal(state["next_word.start"], model.words.next_word.start.detach().half())
    assert not any(name.startswith("words.") for name in state)


def test_the_bundled_word_model_scores_texts():
    tokenizer = load("word_pool_nano_lm", local_files_only=True)
    english, noise = tokenizer.score(["The file is not found, and the command exits with status 1.\n" * 3, "qx zv kj " * 20])
    assert english.bits_per_byte < 4 < noise.bits_per_byte
    assert english.next_word_accuracy > noise.next_word_accuracy
    assert tokenizer.decode(tokenizer.encode("a word")) == ["a word"]
