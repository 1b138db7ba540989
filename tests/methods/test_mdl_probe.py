"""MdlProbe against the code written slowly with scikit-learn, part by part, and what it says where there is none."""

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel, Seen
from tdhook_train.errors import TargetError
from tdhook_train.latent import MdlProbe
from tdhook_train.method import Part, look
from tdhook_train.ops.prequential import parts_of

IDENTITY = nn.Sequential(nn.Identity())


def rows(n=200, length=5):
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(n, 3, generator=g), torch.randn(n, generator=g)
    td = {"input": x, "sign": x[:, 0] + 0.5 * noise > 0, "open": x[:, 1] > 0}
    td |= {"three": 7 + (x[:, 2] > 0.4).long() + (x[:, 2] > -0.5), "noise": torch.randint(3, (n,), generator=g)}
    return TensorDict(td, [n]), torch.arange(n) // length


def ends(sizes, portions):
    """By how many rows each part ends, whole trajectories at a time."""
    sent = np.cumsum(sizes)
    return sorted({next(int(s) for s in sent if s >= portion / 100 * sent[-1] - 1e-9) for portion in portions})


def slowly(x, y, groups, portions, seed=0, c=1.0):
    """Bits of the message: Voita and Titov 2020, section 3.2, on rows in the order of their trajectories."""
    ids = np.unique(groups)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).numpy()]
    order = np.concatenate([np.flatnonzero(groups == one) for one in ids])
    x, y, k = x[order], y[order], len(np.unique(y))
    bits, begin = 0.0, 0
    for end in ends([(groups == one).sum() for one in ids], portions):
        seen = np.unique(y[:begin])
        p = np.ones((end - begin, len(seen)))
        if len(seen) > 1:
            model = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000, C=c)
            p = model.fit(x[:begin], y[:begin]).predict_proba(x[begin:end])
        for row, one in zip(p, y[begin:end], strict=True):
            known = row[seen == one]  # of a class not seen, none
            bits -= np.log2(known[0] * (begin + len(seen)) / (begin + k) if len(known) else 1 / (begin + k))
        begin = end
    return bits


def coded(td, groups, model=IDENTITY, probe=None, **known):
    return measured(probe or MdlProbe(target="y"), model, td, groups=groups, **known)


def test_code_lengths_of_every_layer_and_target_are_those_of_the_slow_code():
    td, groups = rows()
    model, targets = mlp(3, 70, 2), ["sign", "three"]
    out = coded(td, groups, model, MdlProbe(target=targets, seed=3))
    x, values = td["input"], []
    for layer in model:
        x = layer(x).detach()
        values.append(x)
    for i, value in enumerate([*values, td["input"]]):
        for j, target in enumerate(targets):
            bits = slowly(value.double().numpy(), td[target].numpy(), groups.numpy(), MdlProbe().portions, 3)
            kind, layer = ("", i) if i < 3 else ("_observation", 0)
            assert float(out["code_length" + kind][layer, j]) == pytest.approx(bits, abs=1e-6)
            uniform = len(td) * np.log2(len(td[target].unique()))
            assert float(out["compression" + kind][layer, j]) == pytest.approx(uniform / bits, abs=1e-6)
    assert out["classes"].tolist() == [[2, 3]] * 3
    assert not out["reason"].any()
    assert out["compression_initial"].isnan().all()  # by hand there is no initial network


def test_rows_that_are_independent_are_sent_one_by_one():
    td, _ = rows()
    slow = slowly(td["input"].double().numpy(), td["noise"].numpy(), np.arange(200), MdlProbe().portions)
    for groups in (None, torch.arange(200)):
        assert float(coded(td, groups, probe=MdlProbe(target="noise"))["code_length"]) == pytest.approx(slow, abs=1e-6)


def test_classes_that_show_themselves_late_have_a_code():
    td, groups = rows()
    late = torch.arange(200) % 2
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).argsort()[groups]  # as they are sent
    for when, one in ((3, 2), (9, 3), (22, 4), (39, 5)):
        late = torch.where(order == when, one, late)
    td["y"] = torch.where(order < 2, 1, late)  # one class alone at first
    bits = slowly(td["input"].double().numpy(), td["y"].numpy(), groups.numpy(), MdlProbe().portions)
    out = coded(td, groups)
    assert float(out["code_length"]) == pytest.approx(bits, abs=1e-6)
    assert np.isfinite(bits)
    assert out["classes"].item() == 6


@pytest.mark.parametrize(("portions", "c"), [((10.0, 30.0, 100.0), 0.1), ((50.0, 100.0), 10.0)])
def test_other_parts_and_penalties(portions, c):
    td, groups = rows()
    out = coded(td, groups, probe=MdlProbe(target="three", portions=portions, C=c))
    bits = slowly(td["input"].double().numpy(), td["three"].numpy(), groups.numpy(), portions, c=c)
    assert float(out["code_length"]) == pytest.approx(bits, abs=1e-6)


def test_random_labels_are_not_compressed_and_those_that_lie_open_are():
    td, groups = rows(1000, 5)
    out = coded(td, groups, probe=MdlProbe(target=["noise", "sign", "open"]))
    noise, some, clear = out["compression"][0].tolist()
    assert 0.9 < noise < 1
    assert 1.2 < some < 2.5
    assert clear > 5


def test_what_two_classes_cost_before_anything_is_known_is_a_bit_a_row():
    td, groups = rows()
    probe = MdlProbe(target="y", portions=(50.0, 100.0))
    td["y"] = torch.arange(200) % 2
    td["input"] = torch.zeros(200, 3)
    # without features the fit is the share of the first half, which is one half
    assert float(coded(td, groups // 2, probe=probe)["code_length"]) == pytest.approx(200, abs=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 40, [7] * 6, [1, 90, 2, 3, 4], [50, 50], [3, 97]])
def test_parts_are_whole_trajectories_that_end_where_a_portion_is_reached(sizes):
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups))]  # their rows need not lie together
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(4))
    parts = parts_of(groups, [portion / 100 for portion in MdlProbe().portions], 4)
    expected = ends([sizes[i] for i in order], MdlProbe().portions)
    assert torch.bincount(parts).cumsum(0).tolist() == expected
    for one in range(len(sizes)):
        assert len(parts[groups == one].unique()) == 1
    assert parts_of(torch.arange(1000), [0.001, 0.01, 1.0], 0).bincount().tolist() == [1, 9, 990]


def test_the_initial_network_is_coded_by_as_it_was_and_what_is_remembered_changes_nothing():
    td, groups = rows()
    first, now, memo = mlp(3, 6, 2), mlp(3, 6, 2), {}
    probe = MdlProbe(target=["sign", "three"])
    expected = coded(td, groups, first, probe)["code_length"]
    for _ in range(2):
        out = coded(td, groups, now, probe, initial=HookedModel(first), memo=memo)
        torch.testing.assert_close(out["code_length_initial"], expected)
        assert not torch.allclose(out["code_length"], expected)
    assert memo


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_cannot_be_coded_says_why_and_leaves_the_rest_alone(bad):
    class Breaks(nn.Module):
        def forward(self, x):
            return torch.where(torch.arange(len(x))[:, None] == 3, bad, x)

    td, groups = rows()
    td["one"] = torch.full((200,), 4)
    whole = mlp(3, 6, 2)
    probe = MdlProbe(target=["sign", "one"])
    out, alone = coded(td, groups, nn.Sequential(*whole[:2], Breaks()), probe), coded(td, groups, whole, probe)
    assert out["reason"].tolist() == [[0, 1], [0, 1], [4, 1]]
    for key in ("code_length", "compression"):
        assert out[key].isfinite().tolist() == [[True, False], [True, False], [False, False]]
        torch.testing.assert_close(out[key][:2, 0], alone[key][:2, 0])
    wide = nn.Sequential(nn.Linear(3, 4096), nn.Linear(4096, 2))
    assert coded(td, groups, wide, probe)["reason"].tolist() == [[5, 1], [0, 1]]


@pytest.mark.parametrize("groups", [torch.zeros(200), (torch.arange(200) > 0).long() * 5])
def test_one_trajectory_or_one_that_holds_nearly_all_has_no_code(groups):
    td, _ = rows()
    seed = next(s for s in range(9) if torch.randperm(2, generator=torch.Generator().manual_seed(s))[0] == 0)
    out = coded(td, groups, mlp(3, 6, 2), MdlProbe(target="sign", portions=(1.0, 100.0), seed=seed))
    assert out["reason"].tolist() == [[3]] * 3
    assert out["compression"].isnan().all()
    assert out["compression_observation"].isnan().all()


def test_a_layer_that_does_not_vary_says_nothing():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.full_like(x, 0.1)

    td, groups = rows()
    out = coded(td, groups, nn.Sequential(Constant()), MdlProbe(target="sign"))
    x = np.zeros((200, 1))
    assert float(out["code_length"]) == pytest.approx(
        slowly(x, td["sign"].numpy(), groups.numpy(), MdlProbe().portions), abs=1e-6
    )
    assert 0.9 < float(out["compression"]) < 1.01


def test_quantities_are_refused():
    td, groups = rows()
    with pytest.raises(TargetError, match=r"'y' is torch.float32, and MdlProbe tells classes apart.*RidgeProbe"):
        coded(td.set("y", td["input"][:, 0]), groups)


def test_two_networks_together_are_each_alone():
    td, groups = rows()
    probe, models = MdlProbe(target=["sign", "three"]), {"actor": mlp(3, 6, 2), "critic": mlp(3, 70, 1)}

    def part(name):
        hooked = HookedModel(models[name], name=name)
        hooked.trace(td)
        return Part(Seen(td, look(hooked, td, hooked.sites("**"))[0], groups=groups), hooked)

    both = probe.across({name: part(name) for name in models})
    assert both.labels["layer"] == [f"{name}.{i}" for name in models for i in range(3)]
    assert both.labels["target_classes"] == ["False, True", "7, 8, 9"]
    for i, name in enumerate(models):
        for key, value in probe.across({name: part(name)}).values.items():
            torch.testing.assert_close(both.values[key][3 * i : 3 * i + 3], value, equal_nan=True)
