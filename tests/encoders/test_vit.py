import pytest
import torch
from torch import nn

from tokenzoo.encoders.vit import Attention, Block, Transformer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_attention_equals_torchs_multi_head_attention():
    ours, theirs = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.in_proj_bias.data.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("keep", [slice(-3, None), slice(1, 5), slice(0, 1), slice(None)])
def test_keeping_positions_equals_slicing_the_whole_output(keep):
    block, x = Block(16, 2), torch.randn(2, 9, 16)
    torch.testing.assert_close(block(x, keep), block(x)[:, keep])
    transformer = Transformer(16, 3, 2)
    torch.testing.assert_close(transformer(x, keep), transformer(x, slice(None))[:, keep])


def test_gradients_reach_what_is_not_kept():
    x = torch.randn(1, 6, 16, requires_grad=True)
    Transformer(16, 1, 2)(x, slice(-1, None))[..., 0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads = 3"):
        Attention(16, 3)


def test_masked_positions_are_as_if_they_were_not_there():
    transformer, x = Transformer(16, 3, 2), torch.randn(2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, [2, 5, 6]] = False
    masked = transformer(x, slice(None), mask)[mask].unflatten(0, (2, 6))
    torch.testing.assert_close(masked, transformer(x[mask].unflatten(0, (2, 6)), slice(None)))
