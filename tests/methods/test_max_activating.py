"""Top rows of each unit: against NumPy's sort of everything at once, for one batch and for a stream of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import batch, measured, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl import modules as rl
from torchrl.objectives import ClipPPOLoss

from tdhook_train import ArtifactBuffer, At, Every, Observer, ProbeSet
from tdhook_train.errors import NetworkError, SettingsError
from tdhook_train.latent import MaxActivating

EACH = At(0) | Every(batches=1)


class Gives(nn.Module):
    """Layers whose activations the test chooses, row by row."""

    def __init__(self, *values):
        super().__init__()
        self.values = values
        self.layers = nn.ModuleList(nn.Identity() for _ in values)

    def forward(self, x):
        for value, layer in zip(self.values, self.layers, strict=True):
            layer(value)
        return x


def ranked(*values, td=None, **settings):
    rows = max(len(value) for value in values)
    td = TensorDict(input=torch.arange(rows * 2.0).view(rows, 2), batch_size=[rows]) if td is None else td
    return measured(MaxActivating(layers="layers.*", **settings), Gives(*values), td)


def by_numpy(column, k):
    """The first k of a stable descending sort: values and rows."""
    order = np.argsort(-column.numpy(), kind="stable")[:k]
    return column.numpy()[order], order


def test_the_rows_of_each_unit_are_those_of_a_sort():
    narrow, wide = torch.randn(50, 3), torch.randn(50, 5, dtype=torch.float64)
    out = ranked(narrow, wide, k=7)
    assert out["value"].shape == (2, 5, 7)
    for layer, value in enumerate((narrow, wide)):
        for unit in range(value.shape[1]):
            values, rows = by_numpy(value[:, unit], 7)
            np.testing.assert_array_equal(out["value"][layer, unit], values)
            np.testing.assert_array_equal(out["row"][layer, unit], rows)
    assert out["value"][0, 3:].isnan().all()
    assert (out["row"][0, 3:] == -1).all()
    assert (out["position"][0, 3:] == -1).all()
    assert out["reason"].tolist() == [0, 0]


def test_the_inputs_are_those_of_the_rows():
    value = torch.randn(40, 4)
    out = ranked(value, k=3)
    for unit in range(4):
        for rank in range(3):
            kept = out["top", "input"][out["sample"][0, unit, rank]]
            assert torch.equal(kept, out["input"][out["row"][0, unit, rank]])
    assert len(out["top", "input"]) == 12  # 4 units, 3 rows of each, however many are the same


def test_each_row_is_kept_once_and_the_rest_is_nan():
    value = torch.arange(10.0)[:, None].expand(10, 4).clone()  # all units are greatest on the same rows
    out = ranked(value, k=2)
    assert out["top", "input"].shape == (8, 2)  # the size goes by how many there may be, not by how many there are
    assert torch.equal(out["top", "input"][:2], out["input"][[8, 9]])
    assert out["top", "input"][2:].isnan().all()
    assert out["sample"][0].tolist() == [[1, 0]] * 4


def test_inputs_of_the_greatest_alone_or_of_none():
    value = torch.randn(30, 3)
    out = ranked(value, k=4, inputs=1)
    assert out["top", "input"].shape == (3, 2)
    assert (out["sample"][0, :, 1:] == -1).all()
    for unit in range(3):
        assert torch.equal(out["top", "input"][out["sample"][0, unit, 0]], out["input"][value[:, unit].argmax()])
    none = ranked(value, k=4, inputs=0)
    assert not any(key[0] == "top" for key in none.keys(True, True))
    assert (none["sample"] == -1).all()


def test_of_equal_values_the_first_rows():
    value = torch.tensor([1.0, 2, 2, 0, 2])[:, None]
    assert ranked(value, k=4)["row"][0, 0].tolist() == [1, 2, 4, 0]


def test_fewer_rows_than_k_leave_nan():
    out = ranked(torch.tensor([[1.0], [3.0]]), k=3)
    assert out["row"][0, 0].tolist() == [1, 0, -1]
    assert out["value"][0, 0].tolist()[:2] == [3.0, 1.0]
    assert out["value"][0, 0, 2].isnan()
    assert out["sample"][0, 0, 2] == -1


def test_what_is_not_finite_is_passed_over_and_said():
    value = torch.tensor([[torch.nan, 1.0], [2.0, torch.inf], [1.0, 0.5], [-torch.inf, 2.0]])
    out = ranked(value, torch.ones(4, 2), k=4)
    assert out["row"][0].tolist() == [[1, 2, -1, -1], [3, 0, 2, -1]]
    assert out["row"][1].tolist() == [[0, 1, 2, 3]] * 2  # a constant layer: the first rows
    assert out["reason"].tolist() == [1, 0]
    lost = ranked(torch.full((4, 2), torch.nan), k=2)
    assert lost["value"].isnan().all()
    assert lost["top", "input"].isnan().all()


def test_a_layer_without_rows_has_a_reason():
    out = ranked(torch.randn(6, 2), torch.randn(3, 2), k=2)
    assert out["reason"].tolist() == [0, 2]
    assert out["value"][1].isnan().all()


@pytest.mark.parametrize("kind", ["image", "sequence"])
def test_units_count_where_they_are_greatest(kind):
    if kind == "image":
        model, x = nn.Sequential(nn.Conv2d(2, 3, 2)), torch.randn(12, 2, 5, 6)
        flat = model(x).detach().numpy().reshape(12, 3, -1)
    else:
        model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(12, 7, 4)
        flat = model(x).detach().numpy().swapaxes(1, 2)
    out = measured(MaxActivating(k=5), model, TensorDict(input=x, batch_size=[12]))
    for unit in range(3):
        values, rows = by_numpy(torch.tensor(flat[:, unit].max(-1)), 5)
        np.testing.assert_allclose(out["value"][0, unit], values, rtol=1e-6)
        np.testing.assert_array_equal(out["row"][0, unit], rows)
        np.testing.assert_array_equal(out["position"][0, unit], flat[rows, unit].argmax(-1))


def test_a_place_that_is_not_finite_leaves_the_row_its_others():
    value = torch.tensor([[[1.0], [torch.inf], [3.0]], [[2.0], [0.0], [torch.nan]]])  # [row, place, unit]
    out = ranked(value, k=2)
    assert out["value"][0, 0].tolist() == [3.0, 2.0]
    assert out["row"][0, 0].tolist() == [0, 1]
    assert out["position"][0, 0].tolist() == [2, 0]


def test_hidden_states_have_their_rows_behind_the_layers():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    model, x = Last(), torch.randn(6, 5, 3)
    td = TensorDict(input=x, batch_size=[6])
    out = measured(MaxActivating(layers="lstm:1:0", k=2), model, td)
    best, layer = model.lstm(x)[1][0].detach().max(0)  # [layer, row, unit] -> [row, unit]
    for unit in range(4):
        values, rows = by_numpy(best[:, unit], 2)
        np.testing.assert_allclose(out["value"][0, unit], values, rtol=1e-5)
        np.testing.assert_array_equal(out["position"][0, unit], layer[rows, unit])


# ------------------------------------------------------------------------------------------------- a stream


@pytest.mark.parametrize("sizes", [(60,), (1, 9, 30, 20), (2, 2, 56), (59, 1)])
@pytest.mark.parametrize("inputs", [None, 1, 0])
def test_a_stream_gives_what_all_at_once_gives(sizes, inputs):
    model, td, method = mlp(3, 6, 2), batch(60), MaxActivating(k=4, inputs=inputs)
    td["input"] = td["input"].round()  # equal rows, and so equal values, in several batches
    whole = measured(method, model, td)
    stream = method.over(model, td.split(sizes), progress=False)
    keys = {*MaxActivating.writes} - {"top"} | ({("top", "input")} if inputs != 0 else set())
    assert set(stream.keys(True, True)) == keys
    for key in keys:
        torch.testing.assert_close(stream[key], whole[key], rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("row", [3, 18])
def test_a_stream_remembers_what_was_not_finite(row):
    td = batch(20)
    td["input"][row] = torch.nan
    found = MaxActivating(k=2).over(mlp(3, 2), td.split(10), progress=False)
    assert found["reason"].tolist() == [1]


def test_a_stream_refuses_to_mix_weights():
    model, td = mlp(3, 6, 2), batch(20)

    def training():
        for part in td.split(10):
            yield part
            with torch.no_grad():
                model[0].weight += 0.1

    with pytest.raises(NetworkError, match="the weights changed after 10 rows"):
        MaxActivating().over(model, training(), progress=False)


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(SettingsError, match="needs at least one batch"):
        MaxActivating().over(mlp(3, 2), [], progress=False)


def test_a_stream_leaves_the_model_as_found():
    model, td = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train(), batch(20)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    MaxActivating().over(model, td.split(10), progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------- live


def ppo():
    actor = TensorDictModule(nn.Sequential(mlp(3, 4, 2), rl.NormalParamExtractor()), ["observation"], ["loc", "scale"])
    actor = rl.ProbabilisticActor(actor, ["loc", "scale"], distribution_class=rl.TanhNormal)
    return ClipPPOLoss(actor, rl.ValueOperator(mlp(3, 7, 1), in_keys=["observation"]))


def test_of_several_networks_live(tmp_path):
    loss, rows = ppo(), TensorDict(observation=torch.randn(32, 3), batch_size=[32])
    method = MaxActivating(layers="**.0", k=3)
    probe = ProbeSet(rows, groups=torch.arange(32) // 8)
    with Observer({"top": method}, when=EACH, on=probe, into=tmp_path) as observer:
        for step in range(2):
            observer.step(loss, step=step)
    stored = ArtifactBuffer.open(tmp_path)["top"]
    row, layers = stored.last()[0], stored.coords["layer"]
    for name in ("actor_network", "critic_network"):
        at = next(i for i, layer in enumerate(layers) if layer.startswith(name))
        path = layers[at].removeprefix(f"{name}.")
        with replace(method, layers=path).prepare(getattr(loss, name)) as hooked:
            alone = hooked(rows)
        units = alone["value"].shape[1]
        torch.testing.assert_close(row["value"][at, :units], alone["value"][0])
        assert torch.equal(row["row"][at, :units], alone["row"][0])
        sample = row[name, "top", "observation"][row["sample"][at, :units]]
        assert torch.equal(sample, rows["observation"][row["row"][at, :units]])
    assert stored.to_xarray()["value"].sizes["rank"] == 3


def test_under_inference_mode():
    with torch.inference_mode():
        out = measured(MaxActivating(k=2), mlp(3, 4, 2), batch(8))
    assert out["value"].shape == (3, 4, 2)
