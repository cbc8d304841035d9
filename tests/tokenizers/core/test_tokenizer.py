import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tokenzoo.tokenizers import ConfigError, MediaError, Quality, Tokens, TokensError, WrongTokenizerError
from tokenzoo.tokenizers.quality import psnr


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, (count, 2))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def quality_of(tok, picture, tokens):
    return float(psnr(tok.decode(tokens, native=True)[0][None], tok.media.read(picture)[0][None]))


def test_a_list_gives_each_item_what_it_gets_alone(tok):
    items = pictures(5)
    together = tok.encode(items)
    assert together.equal(Tokens.cat([tok.encode(item) for item in items]))
    for alone, item in zip(tok.decode(together), items, strict=True):
        side = min(item.size)
        assert alone.shape == (3, side, side)
        assert alone.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_order_survives_batches_by_size(blocks_module, batch_size):
    class Mixed(blocks_module.Blocks):
        _batch_size = batch_size

    tok = Mixed().eval()
    tok.media = dataclasses.replace(tok.media)
    read = type(tok.media).read

    class BySize(type(tok.media)):
        def read(self, item):
            tensor, meta = read(self, item)
            return (tensor[:, ::2, ::2], meta) if item.width % 2 else (tensor, meta)

    tok.media = BySize(16)
    items = pictures(10)
    together = tok.encode(items)
    for one, item in zip(together, items, strict=True):
        assert one.equal(tok.encode(item))
    lengths = [1 + i for i in range(10)]
    decoded = tok.decode(together.truncate(lengths))
    for i, item in enumerate(items):
        assert torch.equal(decoded[i], tok.decode(tok.encode(item, length=lengths[i]))[0])


def test_nothing_in_nothing_out(tok):
    tokens = tok.encode([])
    assert len(tokens) == 0
    assert tok.decode(tokens) == []
    assert Tokens.unpack(tokens.pack()).equal(tokens)


def test_length_is_a_budget_for_all_or_for_each(tok):
    items = pictures(3)
    assert tok.encode(items, length=5).lengths[:, 0].tolist() == [5, 5, 5]
    assert tok.encode(items, length=[1, 16, 7]).lengths[:, 0].tolist() == [1, 16, 7]
    assert tok.encode(items, length=5).equal(tok.encode(items).truncate(5))


@pytest.mark.parametrize("length", [0, 17, -1, 1.5, "4", [1, 2], True])
def test_lengths_out_of_reach_are_refused(tok, length):
    with pytest.raises((TokensError, TypeError)):
        tok.encode(pictures(3), length=length)


def test_a_fixed_length_takes_only_its_own(blocks_module):
    tok = blocks_module.Blocks(blocks_module.BlocksConfig(variable="none"))
    assert tok.encode(pictures(1), length=16).ids.shape == (1, 1, 16)
    with pytest.raises(TokensError, match="16, its fixed length"):
        tok.encode(pictures(1), length=4)
    with pytest.raises(TokensError, match="fixed length"):
        tok.encode(pictures(1), target={"psnr": 20})


def test_target_finds_the_shortest_prefix(tok):
    """Black, grey and white blocks: every further token can only bring a block nearer, so quality is monotone."""
    levels = np.random.default_rng(1).choice(np.array([0, 128, 255], np.uint8), (6, 4, 4))
    items = [Image.fromarray(blocks).resize((16, 16), 0) for blocks in levels]
    wanted = 8.0
    tokens = tok.encode(items, target={"psnr": wanted})
    for one, item in zip(tokens, items, strict=True):
        qualities = [quality_of(tok, item, tok.encode(item, length=n)) for n in range(1, 17)]
        assert int(one.lengths) == 1 + next(n for n, value in enumerate(qualities) if value >= wanted)
        assert one.meta[0]["target"]["met"]
        assert one.meta[0]["target"]["psnr"] == pytest.approx(quality_of(tok, item, one), abs=1e-3)
    assert len(set(tokens.lengths[:, 0].tolist())) > 1


def test_targets_combine_and_unreachable_ones_keep_everything(tok):
    item = pictures(1)[0]
    far = tok.encode(item, target={"psnr": 90})
    assert int(far.lengths) == 16
    assert not far.meta[0]["target"]["met"]
    easy = tok.encode(item, target={"psnr": 1, "l1": 0.9})
    assert int(easy.lengths) == 1
    assert set(easy.meta[0]["target"]) == {"met", "psnr", "l1"}


def test_a_measure_of_the_users_own(tok):
    item = pictures(1)[0]
    with pytest.raises(TokensError, match="lpips"):
        tok.encode(item, target={"lpips": 0.1})
    tok.qualities["lpips"] = Quality(lambda a, b: (a - b).abs().flatten(1).mean(1), higher_is_better=False)
    assert tok.encode(item, target={"lpips": 0.3}).equal(tok.encode(item, target={"lpips": 0.3}))
    with pytest.raises(TokensError, match="empty target"):
        tok.encode(item, target={})
    with pytest.raises(TokensError, match="got both"):
        tok.encode(item, target={"l1": 0.1}, length=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "28", None])
def test_a_target_is_a_finite_number(tok, value):
    with pytest.raises(TokensError, match="expected a finite number as the target 'l1'"):
        tok.encode(pictures(1), target={"l1": value})


def test_no_items_are_encoded_to_none_but_length_and_target_are_checked(tok):
    assert len(tok.encode([], length=3)) == len(tok.encode([], target={"l1": 0.1})) == len(tok.encode([], length=[])) == 0
    for options in ({"length": 100}, {"length": "3"}, {"length": [3]}, {"target": {"lpips": 0.1}}):
        with pytest.raises(TokensError):
            tok.encode([], **options)


def test_a_bad_item_is_named(tok):
    with pytest.raises(MediaError, match=r"item 1: .*NoneType"):
        tok.encode([pictures(1)[0], None])
    with pytest.raises(MediaError, match=r"^expected a picture"):
        tok.encode([None])


def test_tokens_of_other_weights_are_refused(tok, blocks_module):
    tokens = tok.encode(pictures(1))
    other = blocks_module.Blocks().eval()
    assert other.decode(tokens)
    with torch.no_grad():
        other.gain.mul_(2)
    other.train().eval()
    with pytest.raises(WrongTokenizerError, match="load the tokenizer that made them"):
        other.decode(tokens)
    with pytest.raises(TokensError, match="got list"):
        tok.decode([1, 2])


@pytest.mark.parametrize(
    ("ids", "reason"), [([0, 256], "got 256"), ([-1], "got -1"), ([], "at least one token"), ([0] * 17, "at most 16")]
)
def test_ids_that_cannot_be_decoded_are_refused(tok, ids, reason):
    tokens = Tokens(torch.tensor([[ids]]).long(), torch.tensor([[len(ids)]]), tok.info)
    with pytest.raises(TokensError, match=reason):
        tok.decode(tokens)


def test_ids_of_a_language_model_decode_at_the_networks_size(tok):
    tokens = Tokens.unflatten(torch.tensor([[1, 2, 3]]), tok.info, "interleaved")
    assert tok.decode(tokens)[0].shape == (3, 16, 16)


def test_the_digest_follows_the_weights_but_not_their_precision(tok):
    before = tok.digest
    assert tok.to(torch.bfloat16).digest == before
    assert tok.train().eval().digest != before


def test_forward_is_the_objective(tok):
    output = tok(torch.rand(2, 3, 16, 16))
    assert float(output.loss.detach()) == pytest.approx(1.0)
    output.loss.backward()
    assert float(tok.gain.grad) == pytest.approx(2.0)


def test_configs_refuse_what_they_do_not_know(blocks_module):
    config = blocks_module.BlocksConfig
    assert config.from_dict(config(side=8).to_dict()) == config(side=8)
    with pytest.raises(ConfigError, match="did you mean 'levels'"):
        config.from_dict({"level": 3})
    with pytest.raises(ConfigError, match="side must divide 16"):
        config.from_dict({"side": 5})
    with pytest.raises(ConfigError, match="int"):
        config.from_dict({"side": "4"})


def test_loading_other_weights_changes_the_digest(tok):
    tokens, state = tok.encode(pictures(1)), {name: 2 * value for name, value in tok.state_dict().items()}
    tok.load_state_dict(state)
    with pytest.raises(WrongTokenizerError):
        tok.decode(tokens)


def test_lengths_of_any_integer_type(tok):
    assert tok.encode(pictures(2), length=np.int64(3)).equal(tok.encode(pictures(2), length=[np.int32(3), 3]))
    with pytest.raises(TokensError, match=r"8\.0"):
        tok.encode(pictures(2), length=8.0)
