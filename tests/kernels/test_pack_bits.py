import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenzoo.kernels import pack_bits, unpack_bits


@given(st.integers(1, 62).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=50))))
def test_ids_come_back(case):
    bits, values = case
    ids = torch.tensor(values, dtype=torch.long)
    stream = pack_bits(ids, bits)
    assert len(stream) == bits * len(values)
    assert unpack_bits(stream, bits).tolist() == values


def test_the_most_significant_bit_comes_first():
    assert pack_bits(torch.tensor([6, 1]), 3).tolist() == [1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(("ids", "bits"), [([4], 2), ([-1], 2), ([1], 0), ([1], 63)])
def test_ids_that_do_not_fit_are_refused(ids, bits):
    with pytest.raises(ValueError, match="expected"):
        pack_bits(torch.tensor(ids), bits)


def test_a_ragged_stream_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 3)
