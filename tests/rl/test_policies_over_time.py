"""Networks that handle time run on whole sequences, and what they give is laid end to end."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from losses import LOSSES
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.testing import assert_close

from tdhook_train import At, HookedModel, Method, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.errors import GroupsError, NetworkError
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.rl import ObservedLoss

OVER_TIME = ("DTLoss", "OnlineDTLoss", "DreamerModelLoss", "DreamerV3ModelLoss", "DreamerV3Loss")


@dataclass(frozen=True)
class Values(Method):
    """What one layer gives out, as the shared pass gives it."""

    layer: str = ""

    writes: ClassVar = {"value": "*any"}

    def taps(self, model: HookedModel) -> Any:
        return model.sites(self.layer)

    def labels(self, seen: Any, model: HookedModel) -> Any:
        return {}

    def measure(self, seen: Any, model: HookedModel) -> TensorDict:
        (site,) = self.taps(model)
        return TensorDict({"value": seen.values[site]})


class Cumulative(nn.Module):
    """Adds up what it is given over time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, observation: Tensor) -> Tensor:
        return self.head(self.inner(observation).cumsum(-2))


def by_hand(net: Cumulative, td: TensorDictBase) -> Tensor:
    return torch.cat([net.head(net.inner(sequence).cumsum(0)) for sequence in td["input"]]).detach()


def sequences(*shape: int) -> TensorDict:
    generator = torch.Generator().manual_seed(3)
    return TensorDict(input=torch.randn(*shape, 3, generator=generator), batch_size=shape)


def observed(into: Any, methods: dict[str, Any], net: nn.Module, td: TensorDictBase, **options: Any) -> Any:
    with Observer(methods, when=At(0), into=into, **options) as observer:
        observer.step(net, td, step=0)
        return {name: observer.buffer[name].at(0).clone() for name in methods}


def test_values_and_gradients_are_those_of_each_sequence_on_its_own(tmp_path):
    torch.manual_seed(0)
    net, td = Cumulative(), sequences(4, 5)
    methods = {"head": Values("head"), "inner": Values("inner"), "saliency": Saliency(targets=("output", 1))}
    rows = observed(tmp_path, methods, net, td)
    assert_close(rows["head"]["value"], by_hand(net, td))
    assert_close(rows["inner"]["value"], net.inner(td["input"].reshape(-1, 3)).detach())
    # d sum(out[..., 1]) / d x_t: x_t counts once for each moment from t on
    left = torch.arange(5, 0, -1).repeat(4)[:, None]
    assert_close(rows["saliency"]["attr", "input"], left * (net.head.weight[1] @ net.inner.weight).detach())


def test_a_network_whose_head_begins_at_zero_is_known_by_its_layers(tmp_path):
    torch.manual_seed(0)
    net, td = Cumulative(), sequences(4, 5)
    net.after = nn.Linear(2, 2)
    net.forward = lambda x: net.after(Cumulative.forward(net, x))
    nn.init.zeros_(net.after.weight)
    assert_close(observed(tmp_path, {"head": Values("head")}, net, td)["head"]["value"], by_hand(net, td))


def test_a_network_that_takes_nothing_but_sequences_is_run_on_them(tmp_path):
    torch.manual_seed(0)
    net, td = nn.Sequential(nn.Conv1d(5, 5, 1), nn.Flatten(1), nn.Unflatten(1, (5, 3))), sequences(4, 5)
    found = observed(tmp_path, {"out": Values("0")}, net, td)["out"]["value"]
    assert_close(found, net[0](td["input"]).reshape(20, 3).detach())


def test_batches_of_another_shape_follow_one_another(tmp_path):
    torch.manual_seed(0)
    net = Cumulative()
    with Observer({"head": Values("head")}, when=At(0, 1, 2), into=tmp_path) as observer:
        batches = [sequences(4, 5), sequences(2, 10), sequences(20)]
        for step, td in enumerate(batches):
            observer.step(net, td, step=step)
        found = observer.buffer["head"].series("value")
    expected = [by_hand(net, td if td.ndim > 1 else td[None]) for td in batches]
    assert_close(found, torch.stack(expected))


def test_a_probe_set_keeps_the_shape_of_its_sequences_in_its_file(tmp_path):
    torch.manual_seed(0)
    net, td = Cumulative(), sequences(4, 5)
    ProbeSet(td).save(tmp_path / "set.pt")
    methods = {"head": Values("head")}
    given = observed(tmp_path / "a", methods, net, td, on=ProbeSet(td))
    stored = observed(tmp_path / "b", methods, net, td, on=ProbeSet.load(tmp_path / "set.pt"))
    for rows in (given, stored):
        assert_close(rows["head"]["value"], by_hand(net, td))


def test_the_network_at_initialisation_runs_on_sequences_as_well(tmp_path):
    torch.manual_seed(0)
    net, td = Cumulative(), sequences(8, 5)
    target = by_hand(net, td)[:, 0]
    methods = {"probe": RidgeProbe(layers=["inner", "head"], target=lambda _: target, alphas=(1e-8,))}
    with Observer(methods, when=At(1), into=tmp_path, on=ProbeSet(td, groups="rows")) as observer:
        observer.attach(net)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(-2)
        observer.step(net, step=1)
        row = observer.buffer["probe"].at(1)
    # what the head gave at first determines the target, what it adds up does not row by row
    assert_close(row["r2_initial"][1], torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-4)
    assert row["r2_initial"][0] < 0.9


@pytest.mark.parametrize("method", [IntegratedGradients(), ActivationPatching(), Saliency(rows=4)], ids=repr)
def test_a_method_with_passes_of_its_own_on_other_rows_is_refused(method, tmp_path):
    says = r"Cumulative handles time: it runs on the whole batch \[4, 5\].*reads the shared pass.*networks="
    with pytest.raises(NetworkError, match=says):
        observed(tmp_path, {"one": method}, Cumulative(), sequences(4, 5))


def test_a_probe_of_a_layer_without_a_value_a_row_says_so(tmp_path):
    case = LOSSES["DTLoss"]()
    methods = {"rank": EffectiveRank(), "probe": RidgeProbe(target=("observation", 0))}
    with Observer(methods, when=At(0), into=tmp_path, on=ProbeSet(case.batch, groups="rows")) as observer:
        ObservedLoss(case.loss, observer)
        with pytest.raises(GroupsError, match=r"gives \(2, 9, 4\) for 6 rows; name layers with one row a sample"):
            case.loss(case.batch)


def test_values_of_the_whole_batch_can_be_set_and_read_with_their_graph():
    torch.manual_seed(0)
    net, td = Cumulative(), sequences(4, 5)
    hooked, rows = HookedModel(net), td.reshape(-1)
    hooked.sequences = (4, 5)
    twice = copy.deepcopy(net)
    with torch.no_grad():
        twice.inner.weight.mul_(2)
        twice.inner.bias.mul_(2)
    with hooked.run(rows) as run:
        inner = run.get("inner", detach=False)
        run.backward("output")
        gradient = run.get_grad("inner")
    assert inner.resolve().shape == (20, 4)
    assert_close(gradient.resolve(), torch.arange(5, 0, -1).repeat(4)[:, None] * net.head.weight.sum(0).detach())
    for value in (inner.resolve().detach() * 2, lambda h: h * torch.full((20, 1), 2.0)):
        with hooked.run(rows) as run:
            run.set("inner", value)
        assert_close(run.output["output"], by_hand(twice, td))
    with hooked.run(td) as run:  # given whole, everything comes out whole
        inner = run.get("inner")
    assert inner.resolve().shape == (4, 5, 4)
    assert run.output["output"].shape == (4, 5, 2)


@pytest.mark.parametrize("name", OVER_TIME)
def test_other_networks_of_such_a_loss_take_every_method(name, tmp_path):
    case = LOSSES[name]()
    apart = tuple(case.names - {"actor_network", "world_model", "model_loss.world_model"})
    methods = {"ig": IntegratedGradients(networks=apart)} if apart else {"rank": EffectiveRank()}
    with Observer(methods, when=At(0), into=tmp_path, on=ProbeSet(case.complete, groups="rows")) as observer:
        ObservedLoss(case.loss, observer)
        case.loss(case.batch)
        assert len(observer.buffer[next(iter(methods))].steps) == 1
