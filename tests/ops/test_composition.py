"""Which heads read what others write."""

import pytest
import torch
from torch.testing import assert_close

from tdhook_train.ops.composition import composition

MODEL, HEAD = 8, 2


def head(reads, writes, generator):
    """``W_V W_O`` of a head that reads some axes of the stream and writes to others."""
    value, out = torch.zeros(MODEL, HEAD).double(), torch.zeros(HEAD, MODEL).double()
    value[reads] = torch.randn(len(reads), HEAD, generator=generator).double()
    out[:, writes] = torch.randn(HEAD, len(writes), generator=generator).double()
    return value @ out


def test_heads_that_do_not_meet_score_nothing_and_those_that_do_score_in_their_direction_alone():
    generator = torch.Generator().manual_seed(0)
    first = head([0, 1], [2, 3], generator)
    second = head([2, 3], [4, 5], generator)  # reads what the first writes; the first reads nothing of its own
    aside = head([6, 7], [6, 7], generator)
    scores = composition(torch.stack([first, second, aside]), torch.stack([first, second, aside]))
    assert scores[0, 1] > 0.3
    assert scores[1, 0] == 0  # the transposed product would give this one the score
    assert_close(scores[2], torch.tensor([0.0, 0.0, float(scores[2, 2])]).double())
    assert scores[0, 2] == scores[1, 2] == 0


def test_the_score_is_1_where_everything_written_is_read_at_full_strength():
    direction = torch.zeros(MODEL, 1).double()
    direction[3] = 2.0
    writer = torch.ones(MODEL, 1).double() @ direction.T
    assert_close(composition(writer[None], direction[None]), torch.ones(1, 1).double())


@pytest.mark.parametrize("width", [HEAD, MODEL])
def test_pair_by_pair_by_hand(width):
    generator = torch.Generator().manual_seed(1)
    writes = torch.randn(3, MODEL, MODEL, generator=generator).double()
    reads = torch.randn(4, MODEL, width, generator=generator).double()
    found = composition(writes, reads)
    for i, ov in enumerate(writes):
        for j, read in enumerate(reads):
            product = sum(ov[:, k, None] * read[None, k] for k in range(MODEL))
            norms = [float(m.square().sum()) ** 0.5 for m in (product, ov, read)]
            assert_close(float(found[i, j]), norms[0] / (norms[1] * norms[2]))
