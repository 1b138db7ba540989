"""Dormant units start anew: which weights are written, and with what, on networks with units planted asleep."""

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train.errors import SettingsError
from tdhook_train.health import DormantUnits, ReDo
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Seen


def asleep(module, *units):
    """Make units of a layer with a ReLU after it never respond."""
    with torch.no_grad():
        module.weight[list(units)] = 0
        module.bias[list(units)] = -1.0


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.bias.fill_(1.0)  # awake but for those planted
    asleep(model[0], 1, 4)
    asleep(model[2], 0)
    return model


def rewritten(method, model, inputs, seed=0):
    hooked = HookedModel(model)
    td = TensorDict(input=inputs, batch_size=[len(inputs)])
    hooked.trace(td)
    return method.rewritten(Seen(td, generator=torch.Generator().manual_seed(seed)), hooked)


def written(model, new):
    """Write by hand into a copy."""
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, one in new.items():
            parameters[name][one.where] = one.value[one.where]
    return twin


def test_units_that_never_respond_are_recycled_and_no_output_changes():
    model, x = mlp(), torch.randn(64, 3)
    new = rewritten(ReDo(tau=0.0), model, x)
    where = {name: one.where for name, one in new.items()}
    rows, columns = torch.zeros(6, 1, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    rows[[1, 4]], columns[:, [1, 4]] = True, True
    later = torch.zeros(5, 1, dtype=torch.bool)
    later[0] = True
    assert torch.equal(where["0.weight"], rows.expand(6, 3))
    assert torch.equal(where["0.bias"], rows[:, 0])
    assert torch.equal(where["2.weight"], columns | later.expand(5, 6))
    assert torch.equal(where["2.bias"], later[:, 0])
    assert torch.equal(where["4.weight"], later.T.expand(2, 5))
    assert set(where) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}
    assert (new["2.weight"].value[:, [1, 4]] == 0).all()
    assert (new["4.weight"].value[:, 0] == 0).all()
    twin = written(model, new)
    assert torch.equal(twin(x), model(x))
    assert (twin[:2](x)[:, [1, 4]] != 0).any(0).all()  # they respond again


def test_new_weights_are_drawn_as_the_layers_own_are():
    model = nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 1))
    asleep(model[0], *range(400))
    new = rewritten(ReDo(tau=0.0), model, torch.randn(8, 50))["0.weight"].value
    bound = 1 / math.sqrt(50)  # nn.Linear draws evenly from ± 1/√inputs
    assert new.abs().max() <= bound
    assert new.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    again = rewritten(ReDo(tau=0.0), model, torch.randn(8, 50))["0.weight"].value
    other = rewritten(ReDo(tau=0.0), model, torch.randn(8, 50), seed=1)["0.weight"].value
    assert torch.equal(new, again)
    assert not torch.equal(new, other)


class Own(nn.Linear):
    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.25)
        nn.init.trunc_normal_(self.bias)


def test_a_layers_own_way_to_begin_is_kept_and_the_processs_generator_is_not_drawn_from():
    model = nn.Sequential(Own(3, 4), nn.ReLU(), nn.Linear(4, 1))
    asleep(model[0], 2)
    x, rng = torch.randn(8, 3), torch.get_rng_state()
    one, other = (rewritten(ReDo(tau=0.0), model, x, seed)["0.bias"].value[2] for seed in (0, 1))
    assert one != other
    assert (rewritten(ReDo(tau=0.0), model, x)["0.weight"].value == 0.25).all()
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("tau", [0.0, 0.025, 0.5])
def test_a_unit_is_dormant_as_the_health_measure_says(tau):
    model, x = mlp(), torch.randn(64, 3)
    td = TensorDict(input=x, batch_size=[64])
    with ReDo(tau=tau).prepare(model) as hooked:
        found = hooked(td)
    with DormantUnits(layers=("1", "3"), taus=(tau,)).prepare(model) as hooked:
        expected = hooked(td)["dormancy"]
    assert torch.equal(found["dormancy"].nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(found["reset"] == 1, expected <= tau)
    assert found["reset"].isnan().equal(expected.isnan())


def test_channels_are_recycled_through_a_flattening():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))
    asleep(model[0], 2)
    x = torch.randn(16, 2, 5, 5)
    new = rewritten(ReDo(tau=0.0), model, x)
    assert new["0.weight"].where.flatten(1).any(1).tolist() == [False, False, True, False]
    assert new["3.weight"].where.any(0).nonzero().flatten().tolist() == list(range(18, 27))
    assert torch.equal(written(model, new)(x), model(x))
    convs = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    asleep(convs[0], 1)
    new = rewritten(ReDo(tau=0.0), convs, x)
    assert new["2.weight"].where[:, 1].all()
    assert new["2.weight"].where.sum() == 3 * 9
    assert torch.equal(written(convs, new)(x), convs(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        hidden = torch.relu(self.one(x))
        return self.out(hidden + self.two(hidden))


def test_layers_that_several_read_or_that_norms_stand_behind_are_left_alone():
    normed = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1))
    for model in (Residual(), normed, nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))):
        assert rewritten(ReDo(tau=9.0), model, torch.randn(8, 3)) == {}


def test_layers_are_chosen_by_what_makes_them_or_by_their_activation():
    model, x = mlp(), torch.randn(64, 3)
    by_maker, by_activation = (set(rewritten(ReDo(layers=site, tau=0.0), model, x)) for site in ("2", "3"))
    assert by_maker == by_activation == {"2.weight", "2.bias", "4.weight"}


def test_measuring_changes_nothing_and_drawing_needs_a_generator():
    model, x = mlp(), torch.randn(8, 3)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    td = TensorDict(input=x, batch_size=[8])
    with ReDo().prepare(model) as hooked:
        hooked(td)
        with pytest.raises(SettingsError, match="needs a generator"):
            ReDo().rewritten(Seen(td), hooked.model)
        ReDo().rewritten(Seen(td, generator=torch.Generator()), hooked.model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
