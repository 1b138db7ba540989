"""Ridge regression from statistics gives what scikit-learn gives by refitting."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict, cross_val_score

from tdhook_train.ops.folds import circular_shifts, fold_of
from tdhook_train.ops.ridge import RidgeDesign

ALPHAS = (1e-2, 1.0, 1e3)


def problem(seed, mean=0.0, dtype=torch.float64, n=180, widths=(3, 9, 1, 6)):
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": dtype}
    blocks = [torch.randn(n, width, **draw) * torch.rand(width, **draw) * 3 + mean for width in widths]
    groups = torch.randint(12, (n,), generator=g)
    y = torch.stack([blocks[0].sum(1), blocks[1][:, 2] ** 2, torch.randn(n, **draw)], 1).double()
    y = y + 0.3 * torch.randn(n, 3, generator=g, dtype=torch.float64) + 5
    return blocks, fold_of(groups, 5), y, groups


def by_scikit_learn(blocks, folds, y):
    split = PredefinedSplit(folds.numpy())
    mean, pooled = np.empty((2, len(blocks), y.shape[1], len(ALPHAS)))
    for at in np.ndindex(mean.shape):
        model, x = Ridge(alpha=ALPHAS[at[2]], solver="svd"), blocks[at[0]].double().numpy()
        target = y[:, at[1]].numpy()
        mean[at] = cross_val_score(model, x, target, cv=split, scoring="r2").mean()
        pooled[at] = r2_score(target, cross_val_predict(model, x, target, cv=split))
    return torch.from_numpy(mean), torch.from_numpy(pooled)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_equal_those_of_scikit_learn_on_blocks_of_unequal_width(seed, dtype):
    blocks, folds, y, _ = problem(seed, dtype=dtype)
    mean, pooled = by_scikit_learn(blocks, folds, y)
    found_mean, found_pooled = RidgeDesign(blocks, folds, ALPHAS).score(y)
    assert found_mean.shape == (4, 3, 3)
    assert (found_mean - mean).abs().max() < 1e-10
    assert (found_pooled - pooled).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_far_from_zero(dtype):
    blocks, folds, y, _ = problem(0, mean=1000.0, dtype=dtype)
    mean, pooled = by_scikit_learn(blocks, folds, y)
    found_mean, found_pooled = RidgeDesign(blocks, folds, ALPHAS).score(y)
    assert (found_mean - mean).abs().max() < 1e-10
    assert (found_pooled - pooled).abs().max() < 1e-10


def test_a_target_far_from_zero():
    blocks, folds, y, _ = problem(0)
    mean, pooled = by_scikit_learn(blocks, folds, y)
    found_mean, found_pooled = RidgeDesign(blocks, folds, ALPHAS).score(y + 1e6)
    assert (found_mean - mean).abs().max() < 1e-8
    assert (found_pooled - pooled).abs().max() < 1e-8


def test_more_features_than_rows_and_columns_that_repeat():
    blocks, folds, y, _ = problem(1, n=60, widths=(80, 4))
    blocks[1][:, 3] = blocks[1][:, 0]
    mean, pooled = by_scikit_learn(blocks, folds, y)
    found_mean, found_pooled = RidgeDesign(blocks, folds, ALPHAS).score(y)
    assert (found_mean - mean).abs().max() < 1e-8
    assert (found_pooled - pooled).abs().max() < 1e-8


def test_folds_of_very_different_size():
    blocks, _, y, _ = problem(2)
    folds = torch.zeros(len(y), dtype=torch.int64)
    folds[3:6], folds[100:] = 1, 2
    mean, pooled = by_scikit_learn(blocks, folds, y)
    found_mean, found_pooled = RidgeDesign(blocks, folds, ALPHAS).score(y)
    assert (found_mean - mean).abs().max() < 1e-9
    assert (found_pooled - pooled).abs().max() < 1e-10


def test_a_block_scores_the_same_alone_and_beside_wider_ones():
    blocks, folds, y, _ = problem(0)
    together = RidgeDesign(blocks, folds, ALPHAS).score(y)
    for i, block in enumerate(blocks):
        alone = RidgeDesign([block], folds, ALPHAS).score(y)
        for a, b in zip(alone, together, strict=True):
            assert (a[0] - b[i]).abs().max() < 1e-12


def test_shifted_scores_are_the_scores_of_shifted_targets():
    blocks, folds, y, groups = problem(0)
    order = groups.argsort(stable=True)
    blocks, folds, y, groups = [b[order] for b in blocks], folds[order], y[order], groups[order]
    design = RidgeDesign(blocks, folds, ALPHAS)
    shifts = circular_shifts(groups, 11, torch.Generator().manual_seed(0))
    found = design.score_shifted(y, shifts)
    expected = torch.stack([design.score(y[shift])[0].amax(-1) for shift in shifts])
    oracle = by_scikit_learn(blocks, folds, y[shifts[3]])[0].amax(-1)
    assert found.shape == (11, 4, 3)
    assert (found - expected).abs().max() < 1e-6
    assert (found[3] - oracle).abs().max() < 1e-6


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_fold_in_which_the_target_does_not_vary_is_left_out_of_the_average(value):
    blocks, folds, y, _ = problem(0)
    y[folds == 1, 2] = value
    found, pooled = RidgeDesign(blocks, folds, ALPHAS).score(y)
    kept = [k for k in range(5) if k != 1]
    expected = torch.empty(len(blocks), len(ALPHAS), dtype=torch.float64)
    for i, alpha in np.ndindex(*expected.shape):
        scores = []
        for k in kept:
            train, test = folds != k, folds == k
            model = Ridge(alpha=ALPHAS[alpha], solver="svd").fit(blocks[i][train].numpy(), y[train, 2].numpy())
            scores.append(r2_score(y[test, 2].numpy(), model.predict(blocks[i][test].numpy())))
        expected[i, alpha] = np.mean(scores)
    assert ((found[:, 2] - expected) / expected.abs().clamp_min(1)).abs().max() < 1e-8
    assert pooled.isfinite().all()
