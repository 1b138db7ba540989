"""Rows are split by trajectory, and shifted within trajectories only."""

import pytest
import torch

from tdhook_train.errors import GroupsError
from tdhook_train.ops.folds import circular_shifts, fold_of, in_blocks, starts_and_lengths


def trajectories(lengths, ids=None):
    ids = range(len(lengths)) if ids is None else ids
    return torch.cat([torch.full((n,), i) for i, n in zip(ids, lengths, strict=True)])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_no_fold_is_empty_no_group_is_split_and_groups_are_dealt_evenly(seed, folds):
    g = torch.Generator().manual_seed(seed)
    groups = torch.randint(-(2**62), 2**62, (int(torch.randint(folds, 40, (), generator=g)),), generator=g)
    rows = groups[torch.randint(len(groups), (300,), generator=g)]
    rows = torch.cat([groups, rows])  # every group at least once
    fold = fold_of(rows, folds)
    of_group = {}
    for group, own in zip(rows.tolist(), fold.tolist(), strict=True):
        assert of_group.setdefault(group, own) == own
    counts = torch.bincount(torch.tensor(list(of_group.values())), minlength=folds)
    assert len(counts) == folds
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1


def test_fewer_groups_than_folds_leave_one_out():
    fold = fold_of(trajectories([5, 3, 4], ids=[7, -1, 2**60]), 5)
    assert sorted(fold.unique().tolist()) == [0, 1, 2]
    assert sorted(torch.bincount(fold).tolist()) == [3, 4, 5]


def test_a_fold_belongs_to_the_trajectory_not_to_its_place_or_the_other_rows():
    groups = torch.arange(20).repeat_interleave(3)
    order = torch.randperm(60)
    assert torch.equal(fold_of(groups[order], 5), fold_of(groups, 5)[order])
    assert fold_of(groups, 5).unique_consecutive().tolist() != [i % 5 for i in range(20)]  # not dealt in order


@pytest.mark.parametrize("groups", [torch.zeros(5, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)])
def test_one_group_cannot_be_split(groups):
    with pytest.raises(GroupsError, match=r"needs rows of at least 2 groups, got [01]"):
        fold_of(groups, 5)


def test_blocks():
    assert in_blocks(trajectories([3, 1, 2]))
    assert in_blocks(trajectories([2, 2], ids=[9, 1]))
    assert not in_blocks(torch.tensor([0, 0, 1, 0]))
    start, length = starts_and_lengths(trajectories([3, 1, 2]))
    assert start.tolist() == [0, 0, 0, 3, 4, 4]
    assert length.tolist() == [3, 3, 3, 1, 2, 2]


def test_shifts_turn_each_trajectory_in_itself_never_by_nothing():
    lengths = [1, 2, 3, 7, 50, 2]
    groups = trajectories(lengths)
    shifts = circular_shifts(groups, 200, torch.Generator().manual_seed(0))
    assert shifts.shape == (200, len(groups))
    turns = {n: set() for n in lengths}
    for order in shifts:
        start = 0
        for n in lengths:
            own = (order[start : start + n] - start).tolist()
            assert sorted(own) == list(range(n))  # a permutation of the same trajectory
            turn = own[0]
            assert own == [(i + turn) % n for i in range(n)]  # the order of time is kept, cyclically
            assert (turn == 0) == (n == 1)
            turns[n].add(turn)
            start += n
    assert turns[7] == set(range(1, 7))
    assert len(turns[50]) > 40


def test_trajectories_turn_apart_from_one_another_and_by_the_generator_alone():
    groups = trajectories([40, 40])
    before = torch.get_rng_state()
    one, two, other = (circular_shifts(groups, 50, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert (one[:, 0] != one[:, 40] - 40).any()
    assert len({tuple(order.tolist()) for order in one}) > 40
