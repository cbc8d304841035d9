import dataclasses
import random

import numpy as np
import pytest
import torch

from tokenzoo.tokenizers import ConfigError, Tokens, TokensError
from tokenzoo.tokenizers.text._word_network import read
from tokenzoo.tokenizers.text._words import RAW, Words, check_order, choice, joined, raw_bytes, raw_frames
from tokenzoo.tokenizers.text.word_pool import WordPool, WordPoolConfig

WORDS = [f"{a}{b}".encode() for a in "abcdefgh" for b in ("", "x", "yy", "zzz")] + ["é".encode(), "日本".encode(), b"\n"]
TEXT = "a bx cyy d日本e\n\nezzz fx\tgyy h é"
TINY = {
    "num_vectors": 2,
    "stages": 2,
    "codebook_size": RAW + 63,
    "starts": 40,
    "vector_dim": 16,
    "byte_dim": 16,
    "byte_layers": 1,
    "byte_heads": 2,
    "queries": 4,
    "hidden_dim": 64,
    "blocks": 1,
    "past_dim": 8,
    "position_dim": 64,
    "position_blocks": 1,
    "model_dim": 32,
    "model_layers": 1,
    "model_heads": 2,
    "context": 8,
}


def build(**values):
    torch.manual_seed(0)
    return WordPool(WordPoolConfig(**{**TINY, **values})).eval()


@pytest.fixture(scope="module")
def untrained():
    return build()


@pytest.fixture(scope="module")
def trained():
    """A network that knows a few words."""
    tokenizer = build().train()
    batch = torch.tensor([list(b"|".join([*WORDS, b"|"]))], dtype=torch.uint8)
    tokenizer.initialise(batch, torch.Generator())
    tokenizer.next_word.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=1e-2)
    for step in range(80):
        loss = tokenizer(batch, progress=step / 80).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tokenizer.requires_grad_(False).eval()


def random_texts(count):
    """Strings of all planes, surrogates and control characters among them, and bytes; most are short, some empty."""
    source = random.Random(1)
    texts = []
    for index in range(count):
        length = source.choice([0, 1, 2, 3, 5, 8, 40])
        if index % 2:
            texts.append(source.randbytes(length))
            continue
        ranges = [(0, 0x20), (0x20, 0x7F), (0x80, 0x250), (0x3040, 0x9FFF), (0xD800, 0xE000), (0x10000, 0x110000)]
        texts.append("".join(chr(source.randrange(*source.choice(ranges))) for _ in range(length)))
    return texts


# -- words and frames


def test_characters_of_scripts_without_spaces_are_joined_in_pairs():
    data = "日本語の text です。".encode()
    ends = np.array([3, 6, 9, 12, 17, 18, 21, 27])
    assert [data[a:b].decode() for a, b in zip([0, *joined(data, ends, 2)], joined(data, ends, 2), strict=False)] == [
        "日本",
        "語の",
        " text",
        " ",
        "で",
        "す。",
    ]
    assert joined(data, ends, 1).tolist() == ends.tolist()
    assert joined(data, ends, 3).tolist() == [9, 12, 17, 18, 21, 27]


def test_words_of_a_text_stay_when_it_goes_on(untrained):
    data = "日本語の text です。 And so onwards, to très long wordsthatarecut 漢字漢字漢é".encode()
    whole = untrained.split(data).tolist()
    for length in range(1, len(data)):
        ends = untrained.split(data[:length]).tolist()
        assert whole[: len(ends) - 1] == ends[:-1]


def test_words_become_rows_and_groups():
    words = Words.of([b"a", b"abc", b"abcdefghi"], torch.device("cpu"))
    assert words.lengths.tolist() == [1, 3, 9]
    assert [(chosen.tolist(), group.rows.shape) for chosen, group in words.groups()] == [
        ([0], (64, 2)),
        ([1], (64, 4)),
        ([2], (64, 12)),
    ]
    assert words.targets(256)[1].tolist() == [97, 98, 99, 256] + [-1] * 6


def test_raw_frames_come_back():
    for length in range(1, 10):
        word = bytes(range(length))
        raw, parts = raw_bytes(raw_frames(word, 4, 100).astype(np.int64), 100)
        assert raw.all()
        assert b"".join(parts) == word


@pytest.mark.parametrize("frame", [[100, 1, 2, 3], [356, 356, 356, 356], [101, 356, 102, 356], [99, 99, 99, 100]], ids=str)
def test_damaged_frames_are_refused(frame):
    with pytest.raises(TokensError, match="frame 1"):
        raw_bytes(np.array([[0, 1, 2, 3], frame]), 100)


# -- round trips


ORDER = {"starts": 10, "codes": 20, "most": 3}


def test_words_begin_with_a_first_vector():
    check_order(np.array([[0, 9], [9, 9], [10, 19], [19, 10], [30, 276], [3, 3]]), **ORDER)
    check_order(np.zeros((0, 2), np.int64), **ORDER)


@pytest.mark.parametrize(
    "frames",
    [[[10, 10]], [[30, 30], [10, 10]], [[1, 1], [11, 11], [12, 12], [13, 13]], [[1, 11]]],
    ids=["first", "raw", "long", "mixed"],
)
def test_vectors_out_of_order_are_refused(frames):
    with pytest.raises(TokensError, match=rf"in frame {len(frames) - 1}: was something cut off"):
        check_order(np.array(frames), **ORDER)


def test_random_texts_come_back(untrained, trained):
    texts = random_texts(10_000)
    for tokenizer in (untrained, trained):
        part = texts if tokenizer is trained else texts[:200]
        assert tokenizer.decode(tokenizer.encode(part)) == part


@pytest.mark.parametrize(
    "text", ["", b"", "x" * 1_000_000, b"\xff" * 100_000, "\ud800a\udfff", "a\0b\r\n"], ids=lambda t: repr(t)[:12]
)
def test_odd_texts_come_back(trained, text):
    assert trained.decode(trained.encode(text)) == [text]


def test_known_words_take_a_frame_for_each_share_and_others_their_bytes(trained):
    tokens = trained.encode("a")
    assert tokens.ids.shape == (1, 2, 1)
    assert int(tokens.ids.max()) < trained.config.starts
    tokens = trained.encode("QWERTY")
    assert tokens.ids.shape == (1, 2, 3)
    assert int(tokens.ids.min()) >= trained.codes
    assert trained.reconstructed(["a", "a\nQWERTY\n", ""]) == [1, 0.75, 1]
    assert trained.reconstructed("".join(map(bytes.decode, WORDS)))[0] > 0


def test_words_that_were_not_met_come_back_from_their_shares(trained):
    starts, pieces = trained.config.starts, trained.pieces
    words = [first + later for first in pieces.first for later in pieces.later if len(later) > 1]
    words = [word for word in words if word.isascii() and word not in WORDS and len(trained.shares([word])[0]) == 2]
    known = [word for word, right in zip(words, trained.comes_back(words), strict=True) if right]
    assert known
    frames = np.frombuffer(trained._frames(known)[known[0]], np.int32).reshape(2, 2)
    assert bool((frames[0] < starts).all())
    assert bool(((frames[1] >= starts) & (frames[1] < trained.codes)).all())
    assert trained.spell(torch.from_numpy(frames.astype(np.int64))) == trained.shares(known[:1])[0]


def test_tokens_survive_packing_and_layouts(trained):
    tokens = trained.encode([TEXT, "", "QWERTY"])
    assert trained.decode(Tokens.unpack(tokens.pack())) == [TEXT, "", "QWERTY"]
    for layout in ("interleaved", "coarse_to_fine", "parallel", "delay"):
        flat = tokens.flatten(layout)
        back = Tokens.unflatten(flat, tokens.spec, layout, meta=tokens.meta)
        assert trained.decode(back) == [TEXT, "", "QWERTY"]
    assert tokens.bits.tolist()[1] == 0


# -- the same ids and words, whatever is beside them


def test_ids_do_not_depend_on_the_texts_around(trained):
    texts = [TEXT, "a", "zz a bx QWERTY", "", TEXT[::-1]]
    trained.forget()
    together = trained.encode(texts)
    for index, text in enumerate(texts):
        trained.forget()
        alone = trained.encode(text)
        assert torch.equal(alone.ids[0], together[index].ids[0])


def keys(*shares):
    return [(False, share) for share in shares]


def test_codes_do_not_depend_on_the_shares_around_nor_on_threads(trained):
    shares = keys(*(word for word in WORDS if len(word) < 4))
    codes, margins = trained.codes_of(shares)
    others = [(bool(i % 2), bytes([65 + i % 26, 65 + i // 26])) for i in range(200)]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        again, other_margins = trained.codes_of(shares[::-1] + others)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(codes, again[: len(shares)].flip(0))
    assert (margins - other_margins[: len(shares)].flip(0)).abs().max() < trained.config.margin / 100


def test_decoding_survives_other_rounding(trained):
    tokens = trained.encode(TEXT)
    frames = tokens.ids[0].mT.numpy()
    assert (frames < trained.codes).all(1).any()
    other = build()
    other.load_state_dict(
        {k: v * (1 + 1e-6 * torch.randn_like(v)) if v.is_floating_point() else v for k, v in trained.state_dict().items()}
    )
    assert b"".join(other._bytes_of(frames)) == TEXT.encode()


def test_shares_spell_alike_in_any_batch(trained):
    codes, margins = trained.codes_of(keys(*WORDS))
    known = (margins >= trained.config.margin).nonzero()[:, 0]
    assert len(known) >= 8
    words = [WORDS[i] for i in known.tolist()]
    assert trained.spell(codes[known]) == words
    assert [trained.spell(row[None])[0] for row in codes[known]] == words


def test_half_precision_changes_no_id(trained):
    half = build()
    half.load_state_dict(trained.state_dict())
    half.half()
    assert torch.equal(half.encode(TEXT).ids, trained.encode(TEXT).ids)


def test_vectors_do_not_depend_on_padding(trained):
    word = torch.tensor([[97, 98, 0, 0]])
    narrow = trained.encoder(word[:, :2], torch.tensor([2]))
    wide = trained.encoder(torch.tensor([[97, 98, 77, 78]]), torch.tensor([2]))
    assert torch.allclose(narrow, wide, atol=1e-6)


# -- damage


def test_codes_that_spell_no_word_are_refused(untrained):
    ids = torch.randint(0, untrained.codes, (64, 2))
    with pytest.raises(TokensError, match="spell none of 1 to 16 bytes"):
        untrained.spell(ids)


def test_damaged_tokens_are_refused(trained):
    tokens = trained.encode(TEXT)
    with pytest.raises(TokensError, match="as many ids of each codebook"):
        trained.decode(dataclasses.replace(tokens, lengths=tokens.lengths - torch.tensor([[0, 1]])))
    for value, message in ((trained.config.codebook_size, "codebook 1"), (trained.codes + 5, "frame 0")):
        damaged = tokens.ids.clone()
        damaged[0, 1, 0] = value
        with pytest.raises(TokensError, match=message):
            trained.decode(dataclasses.replace(tokens, ids=damaged))


@pytest.mark.parametrize(
    "values",
    [
        {"codebook_size": RAW},
        {"longest": 3},
        {"byte_dim": 15},
        {"margin": 0.0},
        {"splitter": "words"},
        {"starts": 63},
        {"stages": 0},
    ],
    ids=lambda v: next(iter(v)),
)
def test_impossible_configs_are_refused(values):
    with pytest.raises(ConfigError):
        WordPool(WordPoolConfig.from_dict({**TINY, **values}))


# -- vectors and the word-level model


def test_embeddings_are_those_of_the_ids(trained):
    (found,) = trained.embed("a bx日本語")
    assert found.vectors.shape == (len(found.offsets) - 1, 2, 16)
    assert found.offsets[-1] == len("a bx日本語".encode())
    ids = trained.encode("a").ids[0].mT
    assert torch.equal(trained.vectors_of(ids), found.vectors[0, :1])
    assert not bool(found.vectors[0, 1].any())
    assert trained.embed("")[0].vectors.shape == (0, 2, 16)


def test_without_stages_ids_are_bytes_and_vectors_stay_continuous():
    tokenizer = build(stages=0, codebook_size=RAW)
    tokens = tokenizer.encode([TEXT, ""])
    assert tokens[0].ids[0, 0].tolist() == list(TEXT.encode())
    assert tokenizer.decode(tokens) == [TEXT, ""]
    whole, part = tokenizer.embed([TEXT, TEXT[:4]])
    assert torch.equal(whole.vectors[:2], part.vectors)
    assert bool(whole.vectors.any())
    assert tokenizer.embed("")[0].vectors.shape == (0, 2, 16)
    assert tokenizer.score(TEXT)[0].bits_per_byte > 0
    tokenizer.initialise(torch.zeros(1, 8, dtype=torch.uint8), torch.Generator())
    assert tokenizer.pieces is None
    with pytest.raises(TokensError, match="stages is 0"):
        tokenizer.codes_of(keys(b"a"))


def test_scores_in_pieces_are_those_of_the_whole(trained):
    text = TEXT * 40
    score = trained.score(text)[0]
    words = [text.encode()[a:b] for a, b in zip([0, *trained.split(text.encode())], trained.split(text.encode()), strict=False)]
    assert score.words == len(words) > 256
    with torch.no_grad():
        nats, margins = trained.foresee([words])
    assert score.bits_per_byte == pytest.approx(float(nats.sum()) / np.log(2) / len(text.encode()), rel=1e-4)
    assert score.next_word_accuracy == pytest.approx(float((margins > 0).float().mean()), abs=0.01)


def test_the_future_is_not_seen(trained):
    words = [b"a", b"bx", b"cyy", b"dzzz"]
    first, _ = trained.foresee([words])
    second, _ = trained.foresee([[*words[:3], b"h"]])
    assert torch.allclose(first[:3], second[:3], atol=1e-5)


def test_scores_need_a_model_and_a_text(trained):
    with pytest.raises(TokensError, match="score with word_pool_nano_lm"):
        build(model_layers=0).score("a")
    with pytest.raises(TokensError, match="at least one byte"):
        trained.score("")


# -- training


def test_both_objectives_reach_their_parameters():
    tokenizer = build().train()
    batch = torch.tensor([list(TEXT.encode())], dtype=torch.uint8)
    output = tokenizer(batch, progress=0.5)
    assert output.losses.keys() == {"shares", "codes", "next_word"}
    output.loss.backward()
    missing = [name for name, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert tokenizer(batch, progress=0.0).losses.keys() == {"shares", "next_word"}


def test_frozen_parts_have_no_loss():
    tokenizer = build().train()
    tokenizer.next_word.requires_grad_(False)
    batch = torch.tensor([list(TEXT.encode())], dtype=torch.uint8)
    assert tokenizer(batch).losses.keys() == {"shares", "codes"}
    tokenizer.requires_grad_(False)
    tokenizer.next_word.requires_grad_(True)
    assert tokenizer(batch).losses.keys() == {"next_word"}


def test_codes_start_as_the_vectors_of_pieces():
    tokenizer = build(stages=1).train()
    batch = torch.tensor([list(b"|".join([*WORDS, b"|"]))], dtype=torch.uint8)
    tokenizer.initialise(batch, torch.Generator())
    tokenizer._start_codes()
    tokenizer.eval()
    pieces = tokenizer.pieces
    codes, _ = tokenizer.codes_of([(False, piece) for piece in pieces.first] + [(True, piece) for piece in pieces.later])
    later = range(tokenizer.config.starts, tokenizer.config.starts + len(pieces.later))
    assert codes[:, 0].tolist() == [*range(len(pieces.first)), *later]
    codebook = tokenizer.quantizers[0].stages[0].codebook
    before = codebook.clone()
    tokenizer._start_codes()
    assert torch.equal(codebook, before)


def test_pieces_are_kept_with_the_weights(trained):
    other = build()
    assert other.pieces is None
    other.load_state_dict(trained.state_dict())
    assert (other.pieces.first, other.pieces.later) == (trained.pieces.first, trained.pieces.later)


def test_a_batch_takes_some_words_and_pieces_at_random(trained):
    tokenizer = build(batch_words=3, batch_pieces=4)
    words = [b"a", b"b", b"c", b"d", b"e", b"a"]
    chosen = [tokenizer._some(words, torch.Generator().manual_seed(seed)) for seed in range(5)]
    assert all(len(set(some)) == 3 and set(some) <= set(words) for some in chosen)
    assert len({tuple(some) for some in chosen}) > 1
    assert tokenizer._some(words[:2], None) == words[:2]
    assert tokenizer._some_pieces(None) == []
    tokenizer.load_state_dict(trained.state_dict())
    pieces = tokenizer.pieces
    known = {(False, piece) for piece in pieces.first} | {(True, piece) for piece in pieces.later}
    some = [set(tokenizer._some_pieces(torch.Generator().manual_seed(seed))) for seed in range(20)]
    assert all(len(one) == 4 and one <= known for one in some)
    assert {later for one in some for later, _ in one} == {False, True}
    assert choice(3, 5, None) == [0, 1, 2]


def test_a_share_is_right_where_every_byte_wins(trained):
    words = Words.of(WORDS, torch.device("cpu"))
    codes, margins = trained.codes_of(keys(*WORDS))
    nats, again = read(trained.decoder, trained.decoder.condition(trained.vectors_of(codes)), words)
    assert torch.allclose(margins, again, atol=1e-4)
    assert bool((nats[margins < 0] > 0.6).all())
