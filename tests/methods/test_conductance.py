"""What goes through units, and between paired states: closed forms, slow references from the papers, and captum."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import Conductance, InputConductance, IntegratedGradients, LayerIntegratedGradients
from tdhook_train.errors import PathError, SettingsError
from tdhook_train.latent import ActivationPatching


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def compared(x, base, name="baseline"):
    return TensorDict({"input": x, name: {"input": base}}, [len(x)])


class Skip(nn.Module):
    """Something goes past the layers, and is added in place."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.past, self.last = nn.Linear(3, 4), nn.Softplus(), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.act(self.first(x))
        h += self.past(x)
        return self.last(h.sigmoid())


def conductance_by_hand(before, after, x, base, target, steps=2000):
    """Equations 2 and 4 of the paper, in double precision: ``[input, unit]`` for one row, midpoints of the path."""
    total = torch.zeros(0)
    for alpha in ((torch.arange(steps) + 0.5) / steps).tolist():
        point = base + alpha * (x - base)
        inner = torch.autograd.functional.jacobian(before, point)  # [unit, input]
        outer = torch.autograd.functional.jacobian(lambda y, p=point: after(y, p)[target], before(point))  # [unit]
        part = (inner * outer[:, None] * (x - base)).T / steps
        total = part if not len(total) else total + part
    return total


def both(model, x, base, through, units, **more):
    """By unit and target, and by input and target through some of the units."""
    td = compared(x, base)
    return (
        measured(Conductance(layers=through, **more), model, td)["attr", through],
        measured(InputConductance(through=through, units=units, **more), model, td)["attr", "input"],
    )


def test_as_the_paper_defines_it_on_a_chain_and_past_a_skip():
    chain, skip = mlp(3, 5, 4, 2).double(), Skip().double()
    x, base = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    cases = [
        (chain, "1", lambda p: chain[:2](p), lambda y, _: chain[2:](y)),
        (skip, "act", lambda p: skip.act(skip.first(p)), lambda y, p: skip.last((y + skip.past(p)).sigmoid())),
    ]
    for model, through, before, after in cases:
        units, inputs = both(model, x, base, through, (0, 2))
        for target in range(2):
            expected = conductance_by_hand(before, after, x[0], base[0], target, steps=200)  # error of midpoints: 1e-6
            assert_close(units[0, target], expected.sum(0), atol=1e-5, rtol=0)
            assert_close(inputs[0, target], expected[:, [0, 2]].sum(1), atol=1e-5, rtol=0)


def test_a_linear_network_in_closed_form():
    model, x, base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3), torch.randn(5, 3)
    inner, outer = model[0].weight.detach(), model[1].weight.detach()
    units, inputs = both(model, x, base, "0", (1,), points=1)
    moved = (x - base) @ inner.T
    assert_close(units, moved[:, None] * outer)
    assert_close(inputs, outer[:, 1][:, None] * (inner[1] * (x - base))[:, None])


def test_units_of_every_layer_of_a_chain_sum_to_the_rise():
    model, x, base = mlp(4, 16, 8, 2), torch.randn(12, 4), torch.randn(12, 4)
    out = measured(Conductance(), model, compared(x, base))
    rise = (model(x) - model(base)).detach()
    for layer in "01234":
        assert_close(out["attr", layer].sum(2), rise, atol=1e-5, rtol=0)
        assert_close(out["delta", layer], torch.zeros(12, 2), atol=1e-5, rtol=0)
    assert_close(out["attr", "4"], torch.diag_embed(rise), atol=1e-5, rtol=0)


def test_a_first_layer_that_copies_the_input_has_its_integrated_gradients():
    tail, x = mlp(3, 8, 2), torch.randn(6, 3)
    model = nn.Sequential(nn.Identity(), *tail)
    found = measured(Conductance(layers="0"), model, td_of(input=x))["attr", "0"]
    assert_close(found, measured(IntegratedGradients(), tail, td_of(input=x))["attr", "input"])
    given = measured(Conductance(layers="1", side="input"), model, td_of(input=x))["attr", "1"]
    assert_close(given, found)


def test_what_goes_through_a_unit_sums_to_its_conductance():
    model, x, base = Skip(), torch.randn(6, 3), torch.randn(6, 3)
    for unit in range(4):
        units, inputs = both(model, x, base, "act", (unit,))
        assert_close(inputs.sum(2), units[..., unit])
    every = measured(InputConductance(through="first"), model, compared(x, base))["attr", "input"]
    past = measured(InputConductance(through="past"), model, compared(x, base))["attr", "input"]
    whole = measured(IntegratedGradients(), model, compared(x, base))["attr", "input"]
    assert_close(every + past, whole)


def test_channels_of_an_image_batch_norm_and_writing_in_place():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    ).eval()
    x, base = torch.rand(3, 1, 6, 6), torch.rand(3, 1, 6, 6)
    out = measured(Conductance(layers=("0", "1", "2"), points=200), model, compared(x, base))
    rise = (model(x) - model(base)).detach()
    for layer in "012":
        assert_close(out["attr", layer].flatten(2).sum(2), rise, atol=5e-3, rtol=0)  # kinks in the path, 200 points
    parts = [
        measured(InputConductance(through="1", units=(c,), points=200), model, compared(x, base))["attr", "input"]
        for c in range(3)
    ]
    for channel, part in enumerate(parts):
        assert_close(part.flatten(2).sum(2), out["attr", "1"][:, :, channel].flatten(2).sum(2), atol=1e-5, rtol=0)
    whole = measured(IntegratedGradients(points=200), model, compared(x, base))["attr", "input"]
    assert_close(sum(parts), whole, atol=1e-5, rtol=0)


def test_from_a_layer_through_a_later_one():
    model, x = mlp(3, 6, 5, 2), torch.randn(4, 3)
    given = model[:2](x).detach()
    found = measured(InputConductance(layers="1", through="3", units=(1, 4)), model, td_of(input=x))["attr", "1"]
    tail = measured(InputConductance(through="1", units=(1, 4)), nn.Sequential(*model[2:]), td_of(input=given))[
        "attr", "input"
    ]
    assert_close(found, tail)
    before = measured(InputConductance(layers="3", through="1"), model, td_of(input=x))["attr", "3"]
    assert_close(before, torch.zeros(4, 2, 5))  # nothing goes from a layer through an earlier one


def test_baselines_references_masks_rows_and_passes_are_those_of_the_inputs():
    model, x, references = mlp(3, 6, 2), torch.randn(4, 3), torch.randn(4, 5, 3)
    mask = torch.rand(4, 3) > 0.4
    td = compared(x, references).update({"mask": {"input": mask}})
    for make, where in (
        (lambda **s: Conductance(layers="1", **s), "1"),
        (lambda **s: InputConductance(through="1", units=(2,), **s), "input"),
    ):
        many = measured(make(), model, td)["attr", where]
        alone = [TensorDict({**td.to_dict(), "baseline": {"input": one}}, [4]) for one in references.unbind(1)]
        each = [measured(make(), model, one)["attr", where] for one in alone]
        assert_close(many, torch.stack(each).mean(0))
        assert_close(measured(make(rows_per_pass=3), model, td)["attr", where], many)
        assert_close(measured(make(rows=2), model, td)["attr", where], many[[0, 2]])
        assert_close(measured(make(targets=("output", 1)), model, td)["attr", where], many[:, 1])
        assert_close(measured(make(reduction="mean_abs"), model, td)["attr", where], many.abs().mean(0))
    stays = torch.where(mask[:, None], references, x[:, None])
    rise = model(x) - model(stays.flatten(0, 1)).unflatten(0, (4, 5)).mean(1)
    total = measured(Conductance(layers="1"), model, td)["attr", "1"].sum(2)
    assert_close(total, rise.detach(), atol=1e-5, rtol=0)


def test_two_inputs_of_different_ranks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.y, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.head((self.x(x) + self.y(y).sum(1)).tanh())

    model, td = Two(), td_of(x=torch.randn(4, 3), y=torch.randn(4, 5, 2))
    with IntegratedGradients().prepare(model, ["x", "y"], ["o"]) as hooked:
        whole = hooked(td)
    for method in (InputConductance(through="x"), Conductance(layers=("x", "y"))):
        with method.prepare(model, ["x", "y"], ["o"]) as hooked:
            out = hooked(td)
        if isinstance(method, Conductance):
            for key in "xy":
                assert_close(out["attr", key].flatten(2).sum(2), whole["attr", key].flatten(2).sum(2))
        else:
            assert_close(out["attr", "x"], whole["attr", "x"])
            assert_close(out["attr", "y"], torch.zeros(4, 2, 5, 2))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"through": "9"}, PathError, "through='9' matches no module"),
        ({"through": "*"}, PathError, r"goes through one layer; through='\*' names \['0', '1', '2'\]"),
        ({"through": "0", "units": (8,)}, SettingsError, "'0' has units 0 to 5, not 8"),
    ],
)
def test_units_that_are_not_there_are_refused(settings, error, said):
    with pytest.raises(error, match=said):
        measured(InputConductance(**settings), mlp(3, 6, 2), td_of(input=torch.randn(4, 3)))


# ---------------------------------------------------------------------- between paired states


def test_between_paired_states_units_sum_to_the_change_at_every_layer_of_a_chain():
    model, x, other = mlp(3, 8, 6, 2), torch.randn(6, 3), torch.randn(6, 3)
    for td, base, source in (
        (compared(x, other, "source"), x, other),
        (compared(x, other), other, x),
        (td_of(input=x), x, x.roll(3, 0)),
    ):
        out = measured(LayerIntegratedGradients(), model, td)
        change = (model(source) - model(base)).detach()
        for layer in "01234":
            assert_close(out["attr", layer].sum(2), change, atol=1e-5, rtol=0)
            assert out["delta", layer].abs().max() < 1e-5


def test_where_something_goes_past_the_layer_the_rest_stays_in_the_base_state():
    model, x, other = Skip(), torch.randn(6, 3), torch.randn(6, 3)
    h = lambda v: model.act(model.first(v))  # noqa: E731
    patched = lambda into, of: model.last((h(of) + model.past(into)).sigmoid())  # noqa: E731
    for td, base, source in ((compared(x, other, "source"), x, other), (compared(x, other), other, x)):
        out = measured(LayerIntegratedGradients(layers="act"), model, td)
        change = (patched(base, source) - model(base)).detach()
        assert_close(out["attr", "act"].sum(2), change, atol=1e-5, rtol=0)


def test_in_a_linear_tail_it_is_the_effect_of_patching_each_unit():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(8, 3)
    td = compared(x, torch.randn(8, 3), "source")
    found = measured(LayerIntegratedGradients(layers="1"), model, td)["attr", "1"]
    effect = measured(ActivationPatching(layers="1"), model, td)["unit_effect"][0]
    assert_close(found.abs().mean(0).T, effect)


def test_rows_masks_and_passes_of_pairs():
    model, x = mlp(3, 8, 2), torch.randn(9, 3)
    mask = torch.rand(9, 8) > 0.5
    td = TensorDict({"input": x, "mask": {"1": mask}}, [9])
    out = measured(LayerIntegratedGradients(layers="1"), model, td)
    h = model[:2](x)
    ends = torch.where(mask, h.roll(4, 0), h)
    assert_close(out["attr", "1"].sum(2), (model[2](ends) - model(x)).detach(), atol=1e-5, rtol=0)
    assert (out["attr", "1"] * ~mask[:, None] == 0).all()
    cut = measured(LayerIntegratedGradients(layers="1", rows_per_pass=2), model, td)
    assert_close(cut["attr", "1"], out["attr", "1"])
    with pytest.raises(SettingsError, match="pairs rows with each other and needs 2 or more, got 1"):
        measured(LayerIntegratedGradients(layers="1"), model, td_of(input=x[:1]))


# ---------------------------------------------------------------------- peers


def test_the_conductances_of_captum():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    model, x, base = mlp(4, 8, 6, 2).double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    units, inputs = both(model, x, base, "1", (3,), targets=("output", 1))
    layer = captum.LayerConductance(model, model[1]).attribute(x, base, target=1, n_steps=4000)
    assert_close(units, layer.detach(), atol=1e-5, rtol=0)  # it takes differences between 4,000 steps
    neuron = captum.NeuronConductance(model, model[1]).attribute(
        x, 3, base, target=1, n_steps=100, method="gausslegendre"
    )
    assert_close(inputs, neuron.detach(), atol=1e-5, rtol=0)


def test_between_paired_states_the_values_of_captum():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    model, x, base = mlp(4, 8, 6, 2).double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    found = measured(LayerIntegratedGradients(layers="1", targets=("output", 1)), model, compared(base, x, "source"))
    expected = captum.LayerIntegratedGradients(model, model[1]).attribute(x, base, target=1, n_steps=200)
    assert_close(found["attr", "1"], expected.detach(), atol=1e-5, rtol=0)
