"""Logistic regression by shared Newton steps gives what scikit-learn gives, one fit at a time."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from torch.nn import functional

from tdhook_train.ops.classification import class_scores, fold_scores, pooled_scores
from tdhook_train.ops.folds import circular_shifts, fold_of
from tdhook_train.ops.logistic import LogisticDesign


def problem(seed, mean=0.0, dtype=torch.float64, n=180, widths=(3, 9, 1, 6)):
    """Blocks, folds, a binary and a four-class target, trajectories in blocks."""
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": dtype}
    blocks = [torch.randn(n, width, **draw) * (0.1 + 3 * torch.rand(width, **draw)) + mean for width in widths]
    groups = torch.arange(n) // 9
    noise = torch.randn(n, 2, generator=g, dtype=torch.float64)
    two = (blocks[0].double().sum(1) - len(blocks[0][0]) * mean + noise[:, 0] > 0.5).long()
    four = two + 2 * (blocks[1][:, 2].double() - mean + noise[:, 1] > 0).long()
    return blocks, fold_of(groups, 5), two, four, groups


def by_scikit_learn(x, y, c=1.0):
    model = LogisticRegression(solver="newton-cholesky", tol=1e-12, C=c, max_iter=1000)
    return model.fit(x.double().numpy(), y.numpy())


def check(blocks, folds, y, classes, c=1.0, atol=1e-9):
    fit = LogisticDesign(blocks, folds, c).fit(y[:, None], classes)
    assert fit.fitted.all()
    assert fit.converged.all()
    for i, block in enumerate(blocks):
        for k in range(int(folds.max()) + 1):
            model, held = by_scikit_learn(block[folds != k], y[folds != k], c), folds == k
            width = block.shape[1]
            assert np.abs(fit.weights[i, k, 0, 0, :, :width].numpy() - model.coef_).max() < atol
            logits = torch.from_numpy(model.decision_function(block[held].double().numpy())).view(int(held.sum()), -1)
            found = fit.held_out[i, held, 0, 0]
            moved = (lambda z: z) if classes == 2 else (lambda z: z.log_softmax(-1))  # the sum of intercepts is free
            assert (moved(found) - moved(logits)).abs().max() < atol * 10
            if classes == 2:
                assert abs(float(fit.intercepts[i, k]) - float(model.intercept_[0])) < atol * (1 + block.abs().max())
    return fit


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coefficients_equal_those_of_scikit_learn_on_blocks_of_unequal_width(seed, dtype):
    blocks, folds, two, four, _ = problem(seed, dtype=dtype)
    check(blocks, folds, two, 2)
    check(blocks, folds, four, 4)


@pytest.mark.parametrize("classes", [2, 4])
def test_fits_may_train_on_the_parts_before_theirs_and_on_all(classes):
    blocks, parts, two, four, _ = problem(1)
    y = two if classes == 2 else four
    trains = torch.cat([torch.ones(5, 5).tril(-1), torch.ones(1, 5)])
    fit = LogisticDesign(blocks, parts, 1.0, trains).fit(y[:, None], classes)
    assert fit.fitted[:, 0].tolist() == [False, *[True] * 5]
    assert fit.converged.all()
    for i, block in enumerate(blocks):
        for k in range(1, 6):
            model = by_scikit_learn(block[parts < k], y[parts < k])
            assert np.abs(fit.weights[i, k, 0, 0, :, : block.shape[1]].numpy() - model.coef_).max() < 1e-9
            if k < 5:
                p = model.predict_proba(block[parts == k].numpy())
                found = fit.held_out[i, parts == k, 0, 0]
                found = found.softmax(-1) if classes > 2 else torch.cat([1 - found.sigmoid(), found.sigmoid()], -1)
                assert np.abs(found.numpy() - p).max() < 1e-9


@pytest.mark.parametrize("c", [1e-3, 1e3])
def test_another_penalty(c):
    blocks, folds, two, four, _ = problem(0)
    check(blocks, folds, two, 2, c=c)
    check(blocks, folds, four, 4, c=c)


def test_features_far_from_zero():
    blocks, folds, two, _, _ = problem(0, mean=1000.0)
    fit = LogisticDesign(blocks, folds, 1.0).fit(two[:, None], 2)
    near = LogisticDesign([block - 1000 for block in blocks], folds, 1.0).fit(two[:, None], 2)
    assert (fit.held_out - near.held_out).abs().max() < 1e-9  # scikit-learn itself is off by 1e-6 here


def test_features_of_very_different_size():
    blocks, folds, two, _, _ = problem(0)
    check([blocks[1] * torch.logspace(-4, 4, 9, dtype=torch.float64)], folds, two, 2, atol=1e-7)


def test_classes_that_can_be_separated():
    blocks, folds, two, four, _ = problem(0)
    check([blocks[0], 100 * two[:, None].double() + blocks[1]], folds, two, 2, atol=1e-8)
    check([5 * functional.one_hot(four).double()], folds, four, 4)


def test_more_features_than_rows_columns_that_repeat_and_columns_that_do_not_vary():
    blocks, folds, two, _, _ = problem(1, n=60, widths=(80, 9))
    blocks[1][:, 3], blocks[1][:, 4] = blocks[1][:, 0], 0.1
    fit = check(blocks, folds, two, 2)
    assert not fit.weights[1, ..., 4].any()


def test_a_rare_class():
    blocks, folds, _, _, _ = problem(2, n=400)
    y = (torch.arange(400) % 9 == 0).long() * (torch.arange(400) > 40)
    check(blocks, folds, y, 2)


def test_a_fold_whose_training_rows_lack_a_class_is_not_fitted_and_leaves_the_others_alone():
    blocks, folds, two, _, _ = problem(0)
    y = torch.where(folds == 1, 2, two)  # the third class lies in one fold
    fit = LogisticDesign(blocks, folds, 1.0).fit(torch.stack([y, two * 2 - two.roll(1) * two], 1), 3)
    assert fit.fitted[:, 0].tolist() == [True, False, True, True, True]
    assert fit.converged.all()
    model = by_scikit_learn(blocks[1][folds != 3], y[folds != 3])
    assert np.abs(fit.weights[1, 3, 0, 0].numpy() - model.coef_).max() < 1e-9


def test_targets_and_blocks_are_the_same_alone_and_together():
    blocks, folds, two, _, _ = problem(0)
    targets = torch.stack([two, two.roll(3), (blocks[1][:, 0] > 1).long()], 1)
    together = LogisticDesign(blocks, folds, 1.0).fit(targets, 2)
    for i, block in enumerate(blocks):
        for t in range(3):
            alone = LogisticDesign([block], folds, 1.0).fit(targets[:, [t]], 2)
            assert (alone.held_out[0, :, 0] - together.held_out[i, :, t]).abs().max() < 1e-8


@pytest.mark.parametrize("classes", [2, 4])
def test_shifted_targets_are_fitted_to_some_thousandths_of_a_nat(classes):
    blocks, folds, two, four, groups = problem(0)
    y = two if classes == 2 else four
    shifts = circular_shifts(groups, 7, torch.Generator().manual_seed(0))
    design = LogisticDesign(blocks, folds, 1.0)
    rough = design.fit_shifted(y[:, None], classes, shifts)
    assert rough.converged.all()

    def loss(fit, s, i, k):
        w, b = fit.weights[i, k, 0, s].double(), fit.intercepts[i, k, 0, s].double()
        z = functional.pad(blocks[i], (0, w.shape[1] - blocks[i].shape[1])) @ w.T + b
        z = torch.cat([torch.zeros_like(z), z], 1) if classes == 2 else z
        return functional.cross_entropy(z[folds != k], turned[folds != k], reduction="sum") + w.square().sum() / 2

    for s, shift in enumerate(shifts):
        turned = y[shift]
        exact = design.fit(turned[:, None], classes)
        for i, k in np.ndindex(len(blocks), 5):
            assert -1e-6 < float(loss(rough, s, i, k) - loss(exact, 0, i, k)) < 3e-3


def test_scores_are_those_of_scikit_learn_ties_and_absent_classes_included():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (40, 1, 1), generator=g)
    y[y == 1] = 3  # four classes, of which one is absent
    z = torch.randn(2, 40, 1, 1, 4, generator=g, dtype=torch.float64).mul(2).round()  # with ties
    accuracy, auc, loss = class_scores(z, y)
    truth = y.flatten().numpy()
    for i in range(2):
        logits = z[i, :, 0, 0]
        p = logits.softmax(-1).numpy()
        assert float(loss[i]) == pytest.approx(log_loss(truth, p, labels=range(4)), abs=1e-12)
        assert float(accuracy[i]) == pytest.approx(_accuracy(truth, p.argmax(1)), abs=1e-12)
        areas = [roc_auc_score(truth == k, p[:, k]) for k in (0, 2, 3)]
        assert float(auc[i]) == pytest.approx(np.mean(areas), abs=1e-12)


def _accuracy(truth, found):
    return np.mean([np.mean(found[truth == k] == k) for k in np.unique(truth)])


@pytest.mark.parametrize("rounded", [False, True])
def test_scores_of_two_classes_are_those_of_scikit_learn(rounded):
    g = torch.Generator().manual_seed(1)
    y = (torch.rand(50, 2, 3, generator=g) < 0.3).long()
    z = torch.randn(4, 50, 2, 3, 1, generator=g, dtype=torch.float64)
    z = z.mul(2).round() if rounded else z
    found = class_scores(z, y)
    for i, t, s in np.ndindex(4, 2, 3):
        truth, own = y[:, t, s].numpy(), z[i, :, t, s, 0].numpy()
        expected = (
            balanced_accuracy_score(truth, own > 0),
            roc_auc_score(truth, own),
            log_loss(truth, 1 / (1 + np.exp(-own))),
        )
        assert found[:, i, t, s].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_mean_over_folds_leaves_out_those_that_were_not_fitted_or_hold_out_one_class():
    g = torch.Generator().manual_seed(2)
    folds = torch.arange(60) % 4
    y = torch.randint(2, (60, 1, 1), generator=g)
    y[folds == 1] = 0
    z = torch.randn(1, 60, 1, 1, 1, generator=g, dtype=torch.float64)
    fitted = torch.tensor([[True], [True], [False], [True]])
    (mean, used), pooled = fold_scores(z, y, folds, fitted), pooled_scores(z, y, folds, fitted)
    assert used[:, 0].tolist() == [True, False, False, True]
    kept = [class_scores(z[:, folds == k], y[folds == k]) for k in (0, 3)]
    assert (mean - (kept[0] + kept[1]) / 2).abs().max() < 1e-12
    assert torch.equal(pooled, class_scores(z[:, folds != 2], y[folds != 2]))
    none = torch.zeros(4, 1, dtype=torch.bool)
    (mean, used), pooled = fold_scores(z, y, folds, none), pooled_scores(z, y, folds, none)
    assert mean.isnan().all()
    assert pooled.isnan().all()
    assert not used.any()
