"""BilinearProbe against scikit-learn on the products and on the product kernel, and on planted forms."""

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from scipy.optimize import minimize
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.preprocessing import KernelCenterer
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel
from tdhook_train.errors import GroupsError, PathError
from tdhook_train.latent import BilinearProbe, RidgeProbe
from tdhook_train.ops.bilinear import BilinearRidge, LowRankBilinear
from tdhook_train.ops.folds import circular_shifts, fold_of

ALPHAS = (1e-2, 1.0, 1e2)


def trajectories(n=96, length=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(n, 3, generator=g), 0.1 * torch.randn(n, generator=g)
    td = TensorDict({"input": x, "product": x[:, 0] * x[:, 1] + noise, "linear": x[:, 2] + 1}, [n])
    return td, torch.arange(n) // length


def products(left, right):
    return np.einsum("ni,nj->nij", left, right).reshape(len(left), -1)


def by_scikit_learn(left, right, y, folds, alphas=ALPHAS):
    x, y = products(*(v.detach().double().numpy() for v in (left, right))), y.double().numpy()
    split = PredefinedSplit(folds.numpy())
    return [cross_val_score(Ridge(alpha=a, solver="svd"), x, y, cv=split, scoring="r2").mean() for a in alphas]


def probed(td, groups, model=None, probe=None, **known):
    known = {"groups": groups, "ordered": True, "generator": torch.Generator().manual_seed(0)} | known
    return measured(probe or BilinearProbe(target="product", alphas=ALPHAS), model or mlp(3, 6, 2), td, **known)


@pytest.mark.parametrize("right", [None, "2"])
def test_every_layer_scores_as_ridge_on_all_products_in_scikit_learn(right):
    td, groups = trajectories()
    model, folds = mlp(3, 12, 2), fold_of(groups, 5)  # 144 products of 77 rows, and 4 to 24
    probe = BilinearProbe(target=["product", "linear"], alphas=ALPHAS, right=right, shifts=2)
    out = probed(td, groups, model, probe)
    values = [td["input"]]
    for layer in model:
        values.append(layer(values[-1]))
    observation, *values = values
    for j, target in enumerate(("product", "linear")):
        observed = max(by_scikit_learn(observation, observation, td[target], folds))
        assert out["r2_observation"][:, j].tolist() == pytest.approx([observed] * 3, abs=1e-8)
        for i, value in enumerate(values):
            path = by_scikit_learn(value, value if right is None else values[2], td[target], folds)
            assert float(out["r2"][i, j]) == pytest.approx(max(path), abs=1e-8)
            assert float(out["alpha"][i, j]) == ALPHAS[int(np.argmax(path))]
    assert not out["reason"].any()
    assert not out["null_reason"].any()


@pytest.mark.parametrize("width", [5, 20])  # by the products, and by the rows
def test_one_fit_is_kernel_ridge_on_the_product_of_the_kernels(width):
    g = torch.Generator().manual_seed(0)
    left, right, new_left, new_right = 2 + torch.randn(4, 60, width, generator=g, dtype=torch.float64)
    y = torch.randn(60, 2, generator=g, dtype=torch.float64)
    fit = BilinearRidge(left, right, y, ALPHAS)
    found = fit(new_left, new_right).unflatten(1, (2, 3))
    kernel, new = (left @ left.mT) * (right @ right.mT), (new_left @ left.mT) * (new_right @ right.mT)
    centre = KernelCenterer().fit(kernel.numpy())
    for k, alpha in enumerate(ALPHAS):
        ridge = KernelRidge(alpha=alpha, kernel="precomputed")
        ridge.fit(centre.transform(kernel.numpy()), (y - y.mean(0)).numpy())
        expected = ridge.predict(centre.transform(new.numpy())) + y.mean(0).numpy()
        assert np.abs(found[:, :, k].numpy() - expected).max() < 1e-8
        for t in range(2):
            form = fit.form(3 * t + k)
            of_ridge = Ridge(alpha=alpha, solver="svd").fit(products(left.numpy(), right.numpy()), y[:, t].numpy())
            assert np.abs(form.flatten().numpy() - of_ridge.coef_).max() < 1e-8


class Halves(nn.Module):
    """Two layers that give one half of the input each."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second, self.width = nn.Identity(), nn.Identity(), width

    def forward(self, x):
        return self.first(x[:, : self.width]) + self.second(x[:, self.width :])


def planted(rows=240, width=6, rank=1, noise=0.0):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 2 * width, generator=g)
    a, b = torch.randn(2, rank, width, generator=g)
    y = ((x[:, :width] @ a.T) * (x[:, width:] @ b.T)).sum(1) + noise * torch.randn(rows, generator=g)
    return TensorDict({"input": x, "y": y}, [rows]), torch.arange(rows) // 8


def test_a_planted_form_of_two_layers_is_found_where_no_linear_probe_finds_anything():
    td, groups = planted()
    known = {"groups": groups, "ordered": True, "generator": torch.Generator().manual_seed(0)}
    settings = {"target": "y", "layers": ("first", "second")}
    linear = measured(RidgeProbe(**settings), Halves(6), td, **known)["r2"]
    paired = measured(BilinearProbe(right="second", **settings), Halves(6), td, **known)
    assert (linear < 0.1).all()
    assert float(paired["r2"][0, 0]) > 0.999
    assert float(paired["r2"][1, 0]) < 0.1  # a form of the second half with itself knows nothing of the first
    assert float(paired["p"][0, 0]) == 1 / 40
    assert float(paired["r2_observation"][0, 0]) > 0.999  # the raw input holds both halves


def test_a_planted_form_of_low_rank_is_found_from_fewer_rows_than_it_has_products():
    td, groups = planted(rows=64, width=8)
    known = {"groups": groups, "ordered": True}
    settings = {"target": "y", "layers": "first", "right": "second", "shifts": 0, "alphas": (1e-2, 1.0), "folds": 4}
    low = measured(BilinearProbe(rank=1, **settings), Halves(8), td, **known)
    full = measured(BilinearProbe(**settings), Halves(8), td, **known)
    assert float(low["r2"]) > 0.99
    assert float(full["r2"]) < 0.9
    assert float(low["r2_pooled"]) > 0.99


def test_a_form_of_low_rank_is_a_minimum_that_no_other_start_beats():
    td, _ = planted(rows=80, width=4, rank=2, noise=0.5)
    h, g, y = td["input"][:, :4].double(), td["input"][:, 4:].double(), td["y"].double()
    alpha, start = 3.0, BilinearRidge(h, g, y[:, None], (3.0,)).form(0)
    fit = LowRankBilinear(h, g, y, alpha, 1, start)
    assert fit.converged

    def objective(flat):
        u, v, bias = flat[:4], flat[4:8], flat[8]
        return ((y.numpy() - bias - (h.numpy() @ u) * (g.numpy() @ v)) ** 2).sum() + alpha * (u @ u) * (v @ v)

    rng = np.random.default_rng(0)
    best = min(minimize(objective, rng.normal(size=9)).fun for _ in range(6))
    assert fit.objective == pytest.approx(best, rel=1e-6)
    residual = y - fit(h, g)
    assert float(residual @ residual + alpha * fit.a.square().sum()) == pytest.approx(fit.objective, rel=1e-9)
    assert torch.linalg.matrix_rank(fit.a) == 1
    assert abs(float(residual.mean())) < 1e-9


def test_a_rank_that_leaves_everything_open_gives_the_exact_form():
    td, _ = planted(rows=80, width=3, rank=3, noise=0.5)
    h, g, y = td["input"][:, :3].double(), td["input"][:, 3:].double(), td["y"].double()
    exact = BilinearRidge(h, g, y[:, None], (3.0,))
    wrong = torch.eye(3, dtype=torch.float64)  # a start of full rank, from which the sides find their way
    fit = LowRankBilinear(h, g, y, 3.0, 3, wrong)
    torch.testing.assert_close(fit.a, exact.form(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(fit(h, g), exact(h, g)[:, 0], rtol=0, atol=1e-6)


def test_ranks_that_are_no_bound_change_nothing_in_the_probe():
    td, groups = trajectories()
    model = mlp(3, 4)
    full, bound = (
        probed(td, groups, model, BilinearProbe(target="product", rank=rank, shifts=2)) for rank in (None, 4)
    )
    assert torch.equal(full["r2"], bound["r2"])
    assert not torch.equal(
        full["r2"], probed(td, groups, model, BilinearProbe(target="product", rank=1, shifts=0))["r2"]
    )


def test_fits_that_come_to_no_end_say_so(monkeypatch):
    monkeypatch.setattr("tdhook_train.ops.bilinear._STEPS", 1)
    monkeypatch.setattr("tdhook_train.ops.bilinear._TOLERANCE", -1.0)
    td, groups = trajectories()
    out = probed(td, groups, mlp(3, 4), BilinearProbe(target="product", rank=1, shifts=1, alphas=ALPHAS))
    assert "did not converge" in BilinearProbe.legend["reason"][int(out["reason"])]
    for key in ("r2", "r2_pooled", "alpha", "r2_null", "p"):
        assert out[key].isnan().all()


def test_the_null_takes_the_best_penalty_of_each_shift():
    td, groups = trajectories()
    td["product"] = torch.randn(96, generator=torch.Generator().manual_seed(3))
    model, folds = mlp(3, 4), fold_of(groups, 5)
    probe = BilinearProbe(target="product", alphas=ALPHAS, shifts=4)
    out = probed(td, groups, model, probe, generator=torch.Generator().manual_seed(5))
    turned, value = circular_shifts(groups, 4, torch.Generator().manual_seed(5)), model(td["input"])
    found = [max(by_scikit_learn(value, value, td["product"][s], folds)) for s in turned]
    assert float(out["r2_null"]) == pytest.approx(max(found), abs=1e-8)
    assert float(out["p"]) == (1 + sum(score >= float(out["r2"]) for score in found)) / 5


def test_the_initial_network_is_paired_within_itself():
    td, groups = trajectories()
    first, now = mlp(3, 6, 2), mlp(3, 6, 2)
    probe = BilinearProbe(target="product", alphas=ALPHAS, right="2", layers=("0", "1"))
    out = probed(td, groups, now, probe, initial=HookedModel(first))
    torch.testing.assert_close(out["r2_initial"], probed(td, groups, first, probe)["r2"])
    assert not torch.allclose(out["r2_initial"], out["r2"])


def test_layers_of_zeros_and_units_that_are_dead_know_nothing():
    class Dead(nn.Module):
        def forward(self, x):
            return x * torch.tensor([0.0, 1.0, 0.0])

    td, groups = trajectories()
    probe, same = BilinearProbe(target="product", alphas=ALPHAS, shifts=1), nn.Sequential(nn.Identity())
    alive = probed(td, groups, nn.Sequential(Dead()), probe)
    only = td.clone().set("input", td["input"][:, [1]])
    assert float(alive["r2"]) == pytest.approx(float(probed(only, groups, same, probe)["r2"]), abs=1e-12)
    td["input"] = torch.zeros_like(td["input"])
    out = probed(td, groups, same, probe)
    assert float(out["r2"]) <= 0
    assert int(out["reason"]) == 0


def test_what_is_too_large_to_solve_says_so(monkeypatch):
    monkeypatch.setattr("tdhook_train.latent.bilinear_probe._MAX_SIZE", 40)
    td, groups = trajectories()
    out = probed(td, groups, mlp(3, 7, 2), BilinearProbe(target="product", shifts=1))
    why = [BilinearProbe.legend["reason"][code] for code in out["reason"][:, 0].tolist()]
    assert why == ["the layer gives more features or rows than can be solved"] * 2 + ["scored"]
    assert out["r2"].isnan().tolist() == [[True], [True], [False]]
    assert out["r2_observation"].isfinite().all()


def test_what_is_no_partner_is_refused():
    td, groups = trajectories()
    with pytest.raises(PathError, match="right='9' matches no module"):
        probed(td, groups, None, BilinearProbe(target="product", right="9"))
    with pytest.raises(PathError, match=r"right='\*\*' names \['0', '1', '2'\]"):
        probed(td, groups, None, BilinearProbe(target="product", right="**"))

    class Doubles(nn.Module):
        def forward(self, x):
            return torch.cat([x, x])

    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), Doubles()

        def forward(self, x):
            return self.two(self.one(x))[: len(x)]

    with pytest.raises(GroupsError, match="'one' gives 96 rows, and 'two' 192"):
        probed(td, groups, Some(), BilinearProbe(target="product", layers="one", right="two"))
