import copy
import json
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenzoo.tokenizers import Tokens, TokensError, TokenSpec

LAYOUTS = ["interleaved", "coarse_to_fine", "parallel", "delay"]


@st.composite
def batches(draw, *, aligned=False):
    """Batches of any number of items, codebooks, sizes and lengths; `aligned` lengths are what an encoder makes."""
    num_codebooks = draw(st.integers(1, 5))
    sizes = tuple(draw(st.lists(st.integers(1, 70000), min_size=num_codebooks, max_size=num_codebooks)))
    strides = tuple(sorted((2 ** draw(st.integers(0, 3)) for _ in range(num_codebooks)), reverse=True))
    spec = TokenSpec(
        name="test.tag", architecture="test", modality="audio", codebook_sizes=sizes, strides=strides, digest="d", rate=12.5
    )
    num_items = draw(st.integers(0, 3))
    lengths = []
    for _ in range(num_items):
        steps = draw(st.integers(0, 20))
        own = [-(-steps // s) for s in strides]
        lengths.append(own if aligned else [draw(st.integers(0, n)) for n in own])
    lengths = torch.tensor(lengths, dtype=torch.long).reshape(num_items, num_codebooks)
    longest = int(lengths.max()) if lengths.numel() else 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    high = torch.tensor(sizes)[None, :, None]
    ids = (torch.rand(num_items, num_codebooks, longest, generator=generator, dtype=torch.float64) * high).long()
    ids *= torch.arange(longest) < lengths[..., None]
    meta = [{"samples": i, "name": "ä"} for i in range(num_items)]
    extras = {"scales": torch.randn(num_items, 2, generator=generator)} if draw(st.booleans()) else {}
    return Tokens(ids, lengths, spec, extras, meta)


@given(batches())
@settings(max_examples=150)
def test_every_layout_has_an_exact_inverse(tokens):
    for layout in LAYOUTS:
        flat = tokens.flatten(layout)
        again = Tokens.unflatten(flat, tokens.spec, layout, extras=tokens.extras, meta=tokens.meta)
        assert again.equal(tokens)


@given(batches())
@settings(max_examples=150)
def test_packing_has_an_exact_inverse_and_the_exact_size(tokens):
    data = tokens.pack()
    assert Tokens.unpack(data).equal(tokens)
    bare = copy.copy(tokens)
    object.__setattr__(bare, "extras", {})
    packed = bare.pack()
    header = int.from_bytes(packed[8:12], "little")
    bits = int((tokens.lengths * torch.tensor(tokens.spec.bits_per_id)).sum())
    assert len(packed) == 12 + header + -(-bits // 8)


@given(batches())
@settings(max_examples=50)
def test_files_round_trip(tmp_path_factory, tokens):
    folder = tmp_path_factory.mktemp("tokens")
    for name in ("a.tok", "a.safetensors"):
        tokens.save(folder / name)
        assert Tokens.load(folder / name).equal(tokens)
    assert sorted(p.name for p in folder.iterdir()) == ["a.safetensors", "a.tok"]


def test_interleaved_is_frame_after_frame_and_snac_depth_first():
    spec = TokenSpec(name="", architecture="a", modality="audio", codebook_sizes=(10, 10), rate=1.0)
    tokens = Tokens(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), torch.tensor([[3, 3]]), spec)
    assert tokens.flatten("interleaved").tolist() == [[1, 14, 2, 15, 3, 16]]
    assert tokens.flatten("coarse_to_fine").tolist() == [[1, 2, 3, 14, 15, 16]]
    assert tokens.flatten("delay").tolist() == [[[1, 2, 3, -1], [-1, 4, 5, 6]]]
    snac = TokenSpec(name="", architecture="a", modality="audio", codebook_sizes=(10, 10, 10), strides=(4, 2, 1))
    ids = torch.tensor([[[0, 0, 0, 0], [1, 2, 0, 0], [3, 4, 5, 6]]])
    tree = Tokens(ids, torch.tensor([[1, 2, 4]]), snac)
    assert tree.flatten("interleaved").tolist() == [[0, 11, 23, 24, 12, 25, 26]]
    assert tree.flatten("parallel").tolist() == [[[0, -1, -1, -1], [1, -1, 2, -1], [3, 4, 5, 6]]]


@pytest.mark.parametrize(
    ("layout", "flat", "reason"),
    [
        ("interleaved", [[1, 2, 13]], "position 1"),
        ("interleaved", [[1, -1, 13]], "between tokens"),
        ("interleaved", [[1, 20]], r"\[0, 20\)"),
        ("delay", [[[1, 2, -1], [3, 4, -1]]], "gaps"),
        ("parallel", [[[1, 2], [3, 10]]], r"\[0, 10\)"),
        ("parallel", [[1, 2]], r"\[B, 2, N\]"),
        ("zigzag", [[1]], "expected a layout"),
    ],
)
def test_streams_that_break_the_rules_are_refused(layout, flat, reason):
    spec = TokenSpec(name="", architecture="a", modality="audio", codebook_sizes=(10, 10))
    with pytest.raises(TokensError, match=reason):
        Tokens.unflatten(torch.tensor(flat), spec, layout)


def example(**changes):
    spec = TokenSpec(**{
        "name": "x.y", "architecture": "x", "modality": "image", "codebook_sizes": (4096,), "variable": "prefix",
        "max_tokens": 8, "digest": "abc", **changes,
    })  # fmt: skip
    ids = torch.arange(24).reshape(3, 1, 8)
    return Tokens(ids, torch.full((3, 1), 8), spec, {"mask": torch.ones(3, 4)}, [{"i": i} for i in range(3)])


def test_truncate_by_prefix_per_item_and_for_all():
    tokens = example().truncate([2, 5, 100])
    assert tokens.lengths[:, 0].tolist() == [2, 5, 8]
    assert tokens.ids[0, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert tokens.truncate(3).ids.shape == (3, 1, 3)
    assert tokens.truncate(3).lengths[:, 0].tolist() == [2, 3, 3]


def test_truncate_by_codebooks_keeps_the_first_ones():
    spec = TokenSpec(name="", architecture="a", modality="audio", codebook_sizes=(9, 9), variable="codebooks")
    tokens = Tokens(torch.ones(1, 2, 5).long(), torch.full((1, 2), 5), spec)
    assert tokens.truncate(1).lengths.tolist() == [[5, 0]]
    assert tokens.truncate(1).ids.tolist() == [[[1] * 5, [0] * 5]]


@pytest.mark.parametrize("n", [0, -1, 1.5, [1, 2], [[1, 2, 3]]])
def test_truncate_refuses_budgets_that_are_none(n):
    with pytest.raises(TokensError):
        example().truncate(n)


def test_truncate_refuses_fixed_length_tokens():
    with pytest.raises(TokensError, match="fixed length"):
        example(variable="none").truncate(2)


def test_items_slices_and_joining():
    tokens = example()
    assert len(tokens) == 3
    assert tokens[-1].ids.tolist() == tokens[2].ids.tolist() == [[list(range(16, 24))]]
    assert tokens[0:2].meta == ({"i": 0}, {"i": 1})
    assert Tokens.cat([tokens[0].truncate(2), tokens[1]]).lengths.tolist() == [[2], [8]]
    assert Tokens.cat(list(tokens)).equal(tokens)
    with pytest.raises(IndexError):
        tokens[3]
    with pytest.raises(TokensError, match="one checkpoint"):
        Tokens.cat([tokens, example(digest="other")])
    with pytest.raises(TokensError, match="none"):
        Tokens.cat([])


def test_extras_with_a_value_per_token_are_cut_as_ids_are():
    tokens = example(per_token=("weights", "kept"))
    extras = {"weights": torch.ones(3, 8, 2), "kept": torch.ones(3, 8, dtype=torch.bool), "seed": torch.ones(3, 8)}
    tokens = Tokens(tokens.ids, tokens.lengths, tokens.spec, extras, tokens.meta).truncate([2, 5, 3])
    assert tokens.extras["weights"].shape == (3, 5, 2)
    assert tokens.extras["weights"].sum((1, 2)).tolist() == [4, 10, 6]
    assert tokens[0].extras["weights"].shape == (1, 2, 2)
    assert tokens[[0, 2]].extras["kept"].tolist() == [[True, True, False], [True, True, True]]
    assert tokens[0].extras["seed"].shape == (1, 8)
    assert tokens[0].truncate(1).extras["kept"].tolist() == [[True]]
    assert Tokens.cat(list(tokens)).equal(tokens)
    assert Tokens.unpack(tokens.pack())[0].equal(tokens[0])
    assert tokens[[]].extras["weights"].shape == (0, 0, 2)


def test_sizes():
    tokens = example(codebook_sizes=(64000,)).truncate([1, 2, 8])
    assert tokens.num_bytes.tolist() == [2, 4, 16]
    assert tokens.bits.tolist() == pytest.approx([15.966, 31.932, 127.726], abs=1e-3)
    assert TokenSpec(
        name="", architecture="a", modality="audio", codebook_sizes=(1024, 1024), strides=(2, 1), rate=10.0
    ).bits_per_second == pytest.approx(150)


def continuous(**extras):
    spec = TokenSpec(name="x.y", architecture="x", modality="image", codebook_sizes=(), variable="prefix", max_tokens=8)
    return Tokens(torch.zeros(2, 0, 0).long(), torch.zeros(2, 0).long(), spec, extras)


def test_how_many_tokens_there_are():
    tokens = example().truncate([1, 2, 8])
    assert tokens.counts.tolist() == tokens.budgets.tolist() == [1, 2, 8]
    spec = TokenSpec(name="", architecture="a", modality="audio", codebook_sizes=(9, 9), strides=(2, 1), variable="codebooks")
    two = Tokens(torch.zeros(2, 2, 4).long(), torch.tensor([[2, 4], [2, 0]]), spec)
    assert (two.counts.tolist(), two.budgets.tolist()) == ([6, 2], [2, 1])
    vectors, kept = torch.zeros(2, 8, 3), torch.arange(8) < torch.tensor([[5], [8]])
    for tokens, counts in ((continuous(vectors=vectors, kept=kept), [5, 8]), (continuous(vectors=vectors), [8, 8])):
        assert tokens.counts.tolist() == tokens.budgets.tolist() == counts
        assert tokens.num_bytes.tolist() == [12 * n for n in counts]
        assert tokens.bits.tolist() == [96 * n for n in counts]
        assert f"continuous, lengths {counts[0]}..{counts[1]})" in repr(tokens)
    for empty in (vectors[:0], None):
        none = Tokens(
            torch.zeros(0, 0, 0).long(), torch.zeros(0, 0).long(), tokens.spec, {} if empty is None else {"vectors": empty}
        )
        assert none.counts.tolist() == none.budgets.tolist() == none.num_bytes.tolist() == []
        assert "lengths none" in repr(none)


def test_continuous_tokens_without_vectors_do_not_tell_how_many_they_are():
    tokens = continuous()
    for name in ("counts", "budgets", "num_bytes", "bits"):
        with pytest.raises(TokensError, match=r"tokens of x\.y are continuous"):
            getattr(tokens, name)
    assert "lengths unknown" in repr(tokens)


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        (torch.zeros(1, 8).long(), torch.ones(1, 1).long()),
        (torch.zeros(1, 2, 8).long(), torch.ones(1, 1).long()),
        (torch.zeros(1, 1, 8), torch.ones(1, 1).long()),
        (torch.zeros(1, 1, 8).long(), torch.ones(1).long()),
    ],
)
def test_malformed_tokens_are_refused(ids, lengths):
    with pytest.raises(TokensError, match="expected int64"):
        Tokens(ids, lengths, example().spec)


def test_validate_names_the_first_bad_id():
    tokens = example()
    tokens.ids[1, 0, 3] = 4096
    with pytest.raises(TokensError, match="got 4096 at item 1, token 3"):
        tokens.validate()
    with pytest.raises(TokensError, match="4096"):
        tokens.pack()


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:3], lambda d: b"", lambda d: d[:40] + b"\0" + d[41:]])
def test_damaged_containers_are_refused(damage):
    with pytest.raises(TokensError):
        Tokens.unpack(damage(example().pack()))


def test_a_container_with_a_valid_checksum_but_foreign_content_is_refused():
    rest = (5).to_bytes(4, "little") + zlib.compress(b"{}")
    with pytest.raises(TokensError, match="not written by tokenzoo"):
        Tokens.unpack(b"TKZ1" + zlib.crc32(rest).to_bytes(4, "little") + rest)


def test_loading_other_files_is_refused(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(safetensors.torch.save({"w": torch.zeros(2)}))
    for path in (weights, tmp_path / "missing.tok", tmp_path):
        with pytest.raises(TokensError):
            Tokens.load(path)
    with pytest.raises(TokensError, match=r"\.tok or \.safetensors"):
        example().save(tmp_path / "tokens.json")


def test_spec_round_trips_and_refuses_unknown_fields():
    spec = example(grid=(2, 4), rate=None).spec
    assert TokenSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(TokensError, match="colour"):
        TokenSpec.from_dict({**spec.to_dict(), "colour": 1})


def test_items_are_chosen_by_any_integers_but_not_by_masks():
    tokens = example()
    assert tokens[np.int64(1)].meta == tokens[torch.tensor(1)].meta == ({"i": 1},)
    assert tokens[[2, -3]].meta == ({"i": 2}, {"i": 0})
    with pytest.raises(TokensError, match="mask"):
        tokens[[True, True, True]]
    with pytest.raises(IndexError):
        tokens[[0, 3]]


@pytest.mark.parametrize(
    "header", [{"spec": []}, {"lengths": [[10**14]]}, {"lengths": [[-1]]}, {"batch": 2}, {"meta": [{}, {}]}]
)
def test_crafted_headers_are_refused(header):
    whole = {"spec": example(codebook_sizes=(1,)).spec.to_dict(), "lengths": [[3]], "batch": 1, "meta": [{}], "extras": False}
    text = zlib.compress(json.dumps({**whole, **header}).encode())
    rest = len(text).to_bytes(4, "little") + text
    with pytest.raises(TokensError):
        Tokens.unpack(b"TKZ1" + zlib.crc32(rest).to_bytes(4, "little") + rest)
