import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokenzoo.encoders.adaln_transformer import Attention, Block, Condition, Reach, SwiGLU, TimeEmbedding


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


EVERYTHING = [Reach(slice(None), slice(None))]


def test_attention_is_that_of_a_plain_loop_over_heads():
    attention, x = Attention(24, 8), torch.randn(2, 7, 24)
    expected = []
    for h in range(3):
        rows = slice(8 * h, 8 * h + 8)
        q, k = (F.layer_norm(x @ part.weight[rows].T, (8,)) for part in (attention.q, attention.k))
        weights = (q @ k.transpose(1, 2) * 8 / 8).softmax(-1)
        expected.append(weights @ (x @ attention.v.weight[rows].T))
    torch.testing.assert_close(attention(x, EVERYTHING), torch.cat(expected, 2) @ attention.out.weight.T)


def test_a_mlp_has_the_weights_of_an_ungated_one():
    assert SwiGLU(1792).gate.weight.shape == (4778, 1792)
    mlp, x = SwiGLU(6, 2.0), torch.randn(3, 6)
    torch.testing.assert_close(mlp(x), mlp.down(F.silu(mlp.gate(x)) * mlp.up(x)))


def modulated(dim=16):
    block = Block(dim, 8, num_kinds=2)
    nn.init.normal_(block.modulation.weight, std=0.2)
    condition = Condition(torch.randn(2, dim), torch.tensor([1, 1, 0, 0, 0, 0, 1]))
    return block, condition


@pytest.mark.parametrize("keep", [slice(-3, None), slice(1, 5), slice(None)])
def test_keeping_positions_equals_slicing_the_whole_output(keep):
    block, condition = modulated()
    x = torch.randn(2, 7, 16)
    whole = block(x, EVERYTHING, condition=condition)
    torch.testing.assert_close(block(x, EVERYTHING, keep=keep, condition=condition), whole[:, keep])
    plain = Block(16, 8)
    torch.testing.assert_close(plain(x, EVERYTHING, keep=keep), plain(x, EVERYTHING)[:, keep])


def test_sequences_that_share_a_batch_stay_apart():
    block, condition = modulated()
    x = torch.randn(2, 7, 16)
    apart = [Reach(slice(0, 3), slice(0, 3)), Reach(slice(3, None), slice(3, None))]
    together = block(x, apart, condition=condition)
    for part in (slice(0, 3), slice(3, None)):
        alone = block(x[:, part], EVERYTHING, condition=condition._replace(kinds=condition.kinds[part]))
        torch.testing.assert_close(together[:, part], alone)


def test_kinds_are_modulated_by_their_own_amounts():
    block, condition = modulated()
    x = torch.randn(2, 7, 16)
    before = block(x, EVERYTHING, condition=condition)
    with torch.no_grad():
        block.modulation.bias[:96] += torch.randn(96)  # kind 0, only its gates and shifts and scales
        block.modulation.weight[96:] *= 1
    changed = (block(x, EVERYTHING, condition=condition) - before).abs().amax((0, 2)) > 1e-3
    assert changed[condition.kinds == 0].all()
    with torch.no_grad():
        for parameter in block.modulation.parameters():
            parameter.zero_()
    assert torch.equal(block(x, EVERYTHING, condition=condition), x)  # gates come with the amounts


def test_one_time_for_all_items():
    block, condition = modulated()
    x, one = torch.randn(2, 7, 16), condition._replace(time=condition.time[:1])
    both = condition._replace(time=condition.time[:1].expand(2, -1))
    torch.testing.assert_close(block(x, EVERYTHING, condition=one), block(x, EVERYTHING, condition=both))


def test_time_embedding():
    embedding = TimeEmbedding(8, num_frequencies=6, max_time=10.0)
    embedding.mlp = nn.Sequential(nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        embedding.mlp[0].weight.copy_(torch.eye(6))
    angles = [2 * 100 * 256 ** (-k / 3) for k in range(3)]
    expected = torch.tensor([[f(a) for f in (math.cos, math.sin) for a in angles]])
    torch.testing.assert_close(embedding(torch.tensor([2.0])), expected, rtol=0, atol=1e-4)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="head_dim = 5"):
        Attention(16, 5)
