import pytest
import torch

from tdhook_train.ops.cuts import cut, shared_out


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 9), (4, [4, 4, 1]), (9, [9]), (100, [9])])
def test_parts_are_shared_out_in_order_each_pass_full_but_the_last(most, sizes):
    whole, units = cut("layer", (2, 8), (0, 1)), cut("unit", (2, 8), (0, 1))
    passes = list(shared_out([(whole, torch.arange(1)), (units, torch.arange(8))], most))
    assert [sum(len(index) for _, index in some) for some in passes] == sizes
    flat = [(one is whole, int(i)) for some in passes for one, index in some for i in index]
    assert flat == [(True, 0), *((False, i) for i in range(8))]


def test_a_cut_without_parts_takes_no_pass():
    none = cut("position", (2, 8), (0, 1))
    assert list(shared_out([(none, torch.arange(none.count))], 4)) == []
