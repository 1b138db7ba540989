"""Erasing a concept: the closed form of the paper, probes that are left with nothing, the least change."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import above_zero, batch, measured, mlp
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train import ArtifactBuffer, At, HookedModel, Observer, ProbeSet
from tdhook_train.errors import GroupsError, SettingsError, TargetError
from tdhook_train.latent import Erase, Leace


def planted(rows=300, units=6, rank=None, seed=0):
    """Correlated activations about a mean, some of which go by a binary, a threefold and a real concept."""
    g = torch.Generator().manual_seed(seed)
    binary = torch.rand(rows, generator=g) > 0.3
    many = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), rows, replacement=True, generator=g)
    real = torch.randn(rows, generator=g).double()
    z = torch.stack([binary.double(), (many == 1).double(), real], 1)
    x = torch.randn(rows, units, generator=g).double() + 2 * z @ torch.randn(3, units, generator=g).double()
    x = x @ torch.randn(units, rank or units, generator=g).double()
    if rank is not None:
        x = x @ torch.randn(rank, units, generator=g).double()
    return TensorDict({"input": x + 5, "binary": binary, "many": many, "real": real}, [rows])


def coded(td, concept):
    """The concept as the paper has it: one column a class, or the number itself."""
    value = td[concept]
    return nn.functional.one_hot(value).double() if concept == "many" else value.double()[:, None]


def by_the_paper(x, z):
    """Theorem 4.3, step by step: eigenvalues of the covariance, its inverse root, a projection, and back."""
    x, z = x.numpy(), z.numpy()
    sigma_xx = np.cov(x.T)
    sigma_xz = (x - x.mean(0)).T @ (z - z.mean(0)) / (len(x) - 1)
    values, vectors = np.linalg.eigh(sigma_xx)
    kept = values > 1e-9 * values.max()
    root = np.where(kept, values.clip(1e-300) ** 0.5, 0)
    w = vectors @ np.diag(np.where(kept, 1 / np.where(kept, root, 1), 0)) @ vectors.T
    w_plus = vectors @ np.diag(root) @ vectors.T
    columns = w @ sigma_xz
    onto = columns @ np.linalg.pinv(columns, rcond=1e-8)
    p = np.eye(len(values)) - w_plus @ onto @ w
    return torch.as_tensor(p), torch.as_tensor(x.mean(0) - p @ x.mean(0))


def fitted(td, concept, layer=""):
    found = measured(Leace(layer, concept), nn.Identity(), td)
    return found["projection", layer], found["bias", layer], found


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("concept", ["binary", "many", "real"])
def test_it_is_the_closed_form_of_the_paper(concept, rank):
    td = planted(rank=rank)
    p, b, found = fitted(td, concept)
    expected, shift = by_the_paper(td["input"], coded(td, concept))
    assert_close(td["input"] @ p.T + b, td["input"] @ expected.T + shift, atol=1e-7, rtol=0)
    if rank is None:
        assert_close(p, expected, atol=1e-8, rtol=0)
    assert found["rank"].tolist() == [{"binary": 1, "many": 2, "real": 1}[concept]]
    assert found["reason"].tolist() == [0]
    moved = (td["input"] - td["input"] @ p.T - b).var(0).sum() / td["input"].var(0).sum()
    assert_close(found["removed"][0], moved)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("concept", ["binary", "many", "real"])
def test_no_linear_probe_beats_a_constant_afterwards(concept, rank):
    td = planted(rank=rank)
    p, b, _ = fitted(td, concept)
    x, z = td["input"], coded(td, concept)
    erased = x @ p.T + b
    covariance = (erased - erased.mean(0)).T @ (z - z.mean(0)) / len(x)
    assert covariance.abs().max() < 1e-10 * x.std()
    assert LinearRegression().fit(x, z).score(x, z) > 0.3
    assert LinearRegression().fit(erased.float(), z).score(erased.float(), z) < 1e-6
    if concept != "real":
        labels = td[concept].long()
        shares = labels.bincount() / len(labels)
        before, after = ((h - h.mean(0)) / x.std() for h in (x, erased))
        informed, at_a_loss = (
            LogisticRegression(C=1e6, tol=1e-6, max_iter=1000).fit(h, labels) for h in (before, after)
        )
        assert informed.score(before, labels) > shares.max() + 0.1
        assert at_a_loss.score(after, labels) == pytest.approx(shares.max().item())
        entropy = -(shares * shares.log()).sum().item()
        assert log_loss(labels, at_a_loss.predict_proba(after)) == pytest.approx(entropy, abs=1e-6)
        assert log_loss(labels, informed.predict_proba(before)) < entropy - 0.1


def test_several_concepts_are_erased_together():
    td = planted()
    p, b, found = fitted(td, ["binary", "many", "real"])
    z = torch.cat([coded(td, name) for name in ("binary", "many", "real")], 1)
    erased = td["input"] @ p.T + b
    assert ((erased - erased.mean(0)).T @ (z - z.mean(0)) / 300).abs().max() < 1e-9
    assert found["rank"].tolist() == [4]
    twice = TensorDict({"input": erased, **{k: td[k] for k in ("binary", "many", "real")}}, [300])
    again, _, then = fitted(twice, ["binary", "many", "real"])
    assert then["reason"].tolist() == [3]
    assert then["rank"].tolist() == [0]
    assert_close(again, torch.eye(6).double())


def test_it_moves_activations_least_of_all_maps_that_erase():
    td = planted()
    x, z = td["input"], coded(td, "binary")
    p, b, _ = fitted(td, "binary")
    centred = x - x.mean(0)
    sigma_xz = centred.T @ (z - z.mean(0)) / len(x)
    whitened = torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / len(x)))

    def moved(off):
        return off.square().sum().item(), (off @ whitened.T).square().sum().item()

    least = moved(x - x @ p.T - b)
    g = torch.Generator().manual_seed(1)
    others = [sigma_xz] + [sigma_xz + s * torch.randn(6, 1, generator=g).double() for s in (0.01, 0.1, 1.0)]
    for read in others:  # x - Σxz (rᵀ Σxz)⁻¹ rᵀ x erases for any r; r = Σxz is the orthogonal projection
        off = centred @ read @ (sigma_xz / (read.T @ sigma_xz)).T
        rest = centred - off
        assert (rest.T @ z).abs().max() < 1e-9
        assert all(one < other for one, other in zip(least, moved(off), strict=True))
    assert least[1] * 1.0001 < moved(centred @ sigma_xz @ (sigma_xz / (sigma_xz.T @ sigma_xz)).T)[1]


def test_it_is_what_concept_erasure_gives():
    package = pytest.importorskip("concept_erasure", reason="concept-erasure is not installed")
    td = planted()
    for concept in ("binary", "many", "real"):
        fitter = package.LeaceFitter(
            6,
            coded(td, concept).shape[1],
            shrinkage=False,
            constrain_cov_trace=False,
            dtype=torch.float64,
            svd_tol=1e-9,
        )
        fitter.update(td["input"], coded(td, concept))
        p, b, _ = fitted(td, concept)
        assert_close(td["input"] @ p.T + b, fitter.eraser(td["input"]), atol=1e-6, rtol=0)


def test_a_direction_that_single_precision_hardly_holds_is_erased_all_the_same():
    td = planted()
    td["input"][:, 0] = 100 + 1e-4 * (td["binary"].double() + 0.1 * torch.randn(300).double())
    td["input"] = td["input"].float()
    p, b, _ = fitted(td, "binary")
    x, z = td["input"].double(), coded(td, "binary")
    erased = x @ p.T + b
    correlation = torch.corrcoef(torch.stack([erased[:, 0], z[:, 0]]))[0, 1]
    assert torch.corrcoef(torch.stack([x[:, 0], z[:, 0]]))[0, 1] > 0.9
    assert abs(correlation) < 1e-5


@pytest.mark.parametrize(
    ("change", "code", "rank"),
    [
        (lambda td: td.set("binary", torch.ones(300, dtype=torch.bool)), 1, 0),
        (lambda td: td["input"].__setitem__((3, 1), torch.nan), 2, 1),
        (lambda td: td["input"].fill_(0.1), 3, 0),
        (lambda td: td.set("binary", torch.full((300,), torch.nan)), 4, 1),
    ],
)
def test_where_nothing_can_be_erased_the_map_is_the_identity_or_nan_with_a_reason(change, code, rank):
    td = planted()
    change(td)
    p, b, found = fitted(td, "binary")
    assert found["reason"].tolist() == [code]
    assert code in Leace.legend["reason"]
    if code in (1, 3):
        assert torch.equal(p, torch.eye(6).double())
        assert not b.any()
        assert found["removed"].tolist() == found["rank"].tolist() == [0]
    else:
        assert p.isnan().all()
        assert found["removed"].isnan().all()
        with pytest.raises(SettingsError, match="needs finite maps; that of '' is not: `reason` says why"):
            Leace.edit(found)


def test_the_edit_erases_in_a_model_on_the_same_inputs_and_on_others(tmp_path):
    model, td = mlp(3, 6, 5, 2), batch(200)
    method = Leace(("1", "3"), above_zero)
    found = measured(method, model, td)
    edit = Leace.edit(found)
    assert edit.layers == ("1", "3")
    assert pickle.loads(pickle.dumps(edit)) == edit == Erase.fitted(found)
    others = torch.randn(50, 3)
    plain = model(others)
    with edit.prepare(model):
        first = model[:2](others)  # a part of the model is edited as well
        out = model(others)
    assert torch.equal(model(others), plain)
    expected = model[:2](others).double() @ found["projection", "1"].T + found["bias", "1"]
    assert_close(first.double(), expected, atol=1e-6, rtol=0)
    rest = model[2:4](expected.float()).double() @ found["projection", "3"].T + found["bias", "3"]
    assert_close(out, model[4](rest.float()), atol=1e-5, rtol=0)
    with Leace.edit(found.select(("projection", "1"), ("bias", "1"))).prepare(model) as hooked, torch.no_grad():
        with hooked.model.run(td) as run:
            h = run.get("1")
        h, marks = h.resolve(), above_zero(td)
    assert LinearRegression().fit(h, marks).score(h, marks.float()) < 1e-4


def test_from_a_row_of_a_run(tmp_path):
    model, td = mlp(3, 6, 5, 2), batch(60)
    with Observer({"leace": Leace("1", above_zero)}, when=At(0), into=tmp_path, on=ProbeSet(td)) as observer:
        observer.step(model, step=0)
    row = ArtifactBuffer.open(tmp_path)["leace"].at(0)
    assert Leace.edit(row) == Leace.edit(measured(Leace("1", above_zero), model, td))


def test_of_several_networks_each_layer_has_its_own():
    actor, critic, td = mlp(3, 5, 2), mlp(3, 5, 2), batch()
    own = {name: measured(Leace("1", above_zero), net, td) for name, net in (("actor", actor), ("critic", critic))}
    edit = Leace.edit(TensorDict({name: found.select("projection", "bias") for name, found in own.items()}, []))
    assert edit.layers == ("actor.1", "critic.1")
    for name, net in (("actor", actor), ("critic", critic)):
        hooked = HookedModel(net, name=name)
        mine = replace(edit, layers=f"{name}.1")
        with hooked.edited(mine.edits(hooked)):
            h = net[:2](td["input"]).double()
        expected = net[:2](td["input"]).double() @ own[name]["projection", "1"].T + own[name]["bias", "1"]
        assert_close(h, expected, atol=1e-6, rtol=0)


def test_channels_at_every_position():
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh()), torch.randn(40, 2, 5, 5)
    label = torch.rand(40) > 0.5
    x[label] += 0.3
    td = TensorDict({"input": x, "label": label}, [40])
    found = measured(Leace("1", "label"), model, td)
    with Leace.edit(found).prepare(model):
        h = model(x).detach().double()
    assert h.shape == (40, 4, 3, 3)
    each = h.movedim(1, -1).reshape(-1, 4)
    expected = (
        model(x).detach().double().movedim(1, -1).reshape(-1, 4) @ found["projection", "1"].T + found["bias", "1"]
    )
    assert_close(each, expected, atol=1e-6, rtol=0)
    for rows, marks in ((each, label.repeat_interleave(9)), (h.mean((2, 3)), label)):
        centred = marks.double() - marks.double().mean()
        assert (rows.T @ centred / len(rows)).abs().max() < 1e-7


def test_what_does_not_fit_is_named():
    td = planted()
    with pytest.raises(
        SettingsError, match=r"needs \('projection', layer\) and \('bias', layer\), as Leace writes them"
    ):
        Leace.edit(td)
    td["id"] = torch.arange(300)
    with pytest.raises(TargetError, match="concept 'id' has 300 classes, more than 64"):
        fitted(td, "id")
    edit = Leace.edit(fitted(td, "binary")[2])
    on_another = Erase(erasers={"0": dict(edit.erasers)[""]}).prepare(mlp(3, 5, 2))
    with pytest.raises(SettingsError, match="'0' has 5 units, its eraser 6"), on_another as hooked:
        hooked(batch())

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Embedding(7, 3)

        def forward(self, x):
            return x + self.inner(torch.arange(5)).mean(0)

    with pytest.raises(GroupsError, match=r"'inner' gives \(5, 3\) for rows \[24\]"):
        measured(Leace("inner", above_zero), Table(), batch())
