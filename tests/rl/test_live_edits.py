"""Live edits change the network in training as the same edit by hand does, are recorded, and undone in the end."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from losses import LOSSES, Case
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from torchrl.modules import MLP, Actor, ValueOperator
from torchrl.objectives import DDPGLoss

from tdhook_train import At, Every, LiveEdit, Method, Observer, ProbeSet, When
from tdhook_train.errors import NetworkError, PathError, SettingsError
from tdhook_train.health import DormantUnits, ReDo
from tdhook_train.latent import Ablate, SteeringVectors
from tdhook_train.rl import ObservedLoss, networks

STEPS = 8


@dataclass(frozen=True)
class Outputs(Method):
    """What every network gives out, first of all."""

    writes: ClassVar = {"mean": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"mean": model(seen.batch)[model.out_keys[0]].detach().double().mean()})


def live(loss: nn.Module, place: str) -> nn.Module:
    name, _, path = place.partition(".")
    return getattr(loss, name).get_submodule(path)


def place_in(case: Case, name: str) -> str:
    """Find the activation after the first linear layer of the network that is edited."""
    network = {"ClipPPOLoss": "actor_network", "SACLoss": "qvalue_network"}[name]
    (path, *_) = [p for p, m in getattr(case.loss, network).named_modules() if isinstance(m, nn.Tanh | nn.ReLU)]
    return f"{network}.{path}"


def zeroed(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    keep = torch.ones(output.shape[-1])
    keep[1] = 0
    return output * keep


def weights(case: Case) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in case.loss.state_dict().items()}


def hooks(loss: nn.Module) -> int:
    parts = [m for n in networks(loss).values() for m in n.module.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in {id(m): m for m in parts}.values())


def by_hand(name: str, held: range, make: Any = torch.optim.Adam) -> Case:
    """Train with a unit zeroed by a plain hook at some steps."""
    case = LOSSES[name]()
    optimizer = make(case.loss.parameters(), 0.01)
    module = live(case.loss, place_in(case, name))
    for step in range(STEPS):
        with ExitStack() as stack:
            if step in held:
                stack.callback(module.register_forward_hook(zeroed).remove)
            case.update(optimizer)
    return case


@pytest.mark.parametrize("name", ["ClipPPOLoss", "SACLoss"])
def test_a_span_trains_as_the_same_change_by_hand(name, tmp_path):
    case = LOSSES[name]()
    optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
    edit = LiveEdit(Ablate(place_in(case, name), units=1), when=At(2), steps=3)
    observer = Observer({"out": Outputs()}, when=Every(optim_steps=1), into=tmp_path, edits={"lesion": edit})
    ObservedLoss(case.loss, observer, optimizer)
    bare, held = hooks(case.loss), []
    for _ in range(STEPS):
        case.update(optimizer)
        held.append(hooks(case.loss) > bare)
    assert held == [False, False, True, True, True, False, False, False]
    rows = observer.buffer["lesion"]
    assert rows.steps.tolist() == [2, 5]
    assert rows.series("active").tolist() == [1, 0]
    marks = [(event["step"], event["label"]) for event in observer.buffer.events("mark")]
    assert marks == [(2, "lesion begins"), (5, "lesion ends")]
    observer.close()
    found, expected, unedited = weights(case), weights(by_hand(name, range(2, 5))), weights(by_hand(name, range(0)))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not all(torch.equal(found[key], unedited[key]) for key in expected)


@pytest.mark.parametrize("inside", ["a loss", "a module"])
def test_what_is_measured_meanwhile_is_measured_without_the_edit(inside, tmp_path):
    torch.manual_seed(0)
    case = LOSSES["ClipPPOLoss"]()
    model = case.loss if inside == "a loss" else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    td = case.batch if inside == "a loss" else TensorDict(input=torch.randn(5, 3), batch_size=[5])
    place = place_in(case, "ClipPPOLoss") if inside == "a loss" else "1"
    edit = LiveEdit(Ablate(place), when=At(1), steps=2)
    with Observer({"out": Outputs()}, when=At(0, 1, 2, 3), into=tmp_path, edits={"lesion": edit}) as observer:
        given = []
        for step in range(4):
            observer.step(model, td, step=step)
            if inside == "a module":
                given.append(model(td["input"]).detach())
        key = ("actor_network", "mean") if inside == "a loss" else "mean"
        assert len(set(observer.buffer["out"].series(key).tolist())) == 1
        if given:
            assert torch.equal(given[0], given[3])
            assert torch.equal(given[1], model[2].bias.expand(5, 1))
            assert torch.equal(given[2], given[1])


@pytest.mark.parametrize("way", ["close", "exception"])
def test_an_edit_is_undone_on_every_way_out(way, tmp_path):
    case = LOSSES["ClipPPOLoss"]()
    bare = hooks(case.loss)
    edits = {
        "lesion": LiveEdit(Ablate(place_in(case, "ClipPPOLoss")), when=At(0)),
        "steer": LiveEdit(SteeringVectors("**", steer_fn=lambda _, h: h * 2), when=Every(optim_steps=1), steps=50),
    }

    def train() -> None:
        with Observer({"out": Outputs()}, when=At(0), into=tmp_path, edits=edits) as observer:
            optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
            ObservedLoss(case.loss, observer, optimizer)
            case.update(optimizer)
            case.update(optimizer)
            assert hooks(case.loss) > bare + 2
            if way == "exception":
                raise KeyboardInterrupt
            observer.finish()

    with pytest.raises(KeyboardInterrupt) if way == "exception" else nullcontext():
        train()
    assert hooks(case.loss) == bare
    compiled = torch.compile(lambda x: x.cos(), backend="eager", fullgraph=True)  # torch.cos: others compiled it often
    assert compiled(torch.zeros(1)) == 1
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_collector_in_this_process_acts_with_the_edit(tmp_path):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    actor = Actor(TensorDictModule(body, ["observation"], ["action"]))
    loss = DDPGLoss(actor, ValueOperator(MLP(4, 1, num_cells=[4]), in_keys=["observation", "action"]))
    edit = LiveEdit(Ablate("actor_network.module.module.1"), when=At(1), steps=1)
    collector = Collector(
        GymEnv("Pendulum-v1"), actor, frames_per_batch=5, total_frames=15, auto_register_policy_transforms=False
    )
    with Observer({"out": Outputs(networks="actor_network")}, when=At(9), into=tmp_path, edits={"x": edit}) as observer:
        acted = []
        for step, data in enumerate(collector):
            acted.append(torch.equal(data["action"], body[2].bias.expand_as(data["action"])))
            observer.step(loss, data, step=step + 1)
    collector.shutdown()
    assert acted == [False, True, False]


def redone(tmp_path: Path) -> tuple[Case, Observer, dict[str, Any], dict[str, Any]]:
    """Recycle units of SAC at step 3; return what was before."""
    case = LOSSES["SACLoss"]()
    optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
    edit = LiveEdit(ReDo(tau=0.9), when=At(3))
    batch = ProbeSet(case.batch, groups="rows")
    observer = Observer({"d": DormantUnits()}, when=At(3), into=tmp_path, on=batch, edits={"redo": edit})
    ObservedLoss(case.loss, observer, optimizer)
    for _ in range(3):
        case.update(optimizer)
    before = weights(case)
    moments = {key: copy.deepcopy(optimizer.state[value]) for key, value in case.loss.named_parameters()}
    case.loss(case.batch.clone())  # the hook before it writes
    return case, observer, before, moments


def test_dormant_units_are_recycled_in_the_live_members_of_an_ensemble(tmp_path):
    case, observer, before, _ = redone(tmp_path)
    reset, layers = observer.buffer["redo"].at(3)["reset"], observer.buffer["redo"].coords["layer"]
    assert 0 < reset.nansum() < reset.numel()
    after = weights(case)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert {key.partition(".")[0] for key in changed} == {"actor_network_params", "qvalue_network_params"}  # no targets
    (first, *_) = [key for key in before if key.startswith("qvalue_network_params") and key.endswith("weight")]
    for member in range(2):  # each by its own units
        (row, *_) = [i for i, layer in enumerate(layers) if layer.startswith(f"qvalue_network.{member}.")]
        moved = (before[first] != after[first])[member].any(1)
        assert torch.equal(moved, reset[row, : len(moved)] == 1)
    (mark,) = observer.buffer.events("mark")
    assert mark["step"] == 3
    assert "weights written" in mark["label"]
    observer.close()


def test_the_moments_of_weights_that_are_written_begin_anew_and_no_others(tmp_path):
    case, observer, before, moments = redone(tmp_path)
    (optimizer,) = observer.optimizers
    observer.close()
    after = weights(case)
    for key, parameter in case.loss.named_parameters():
        moved, now = before[key] != after[key], optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (now[moment][moved] == 0).all()
            untouched = ~moved & (before[key] != 0)  # an outgoing weight may have been 0 before
            assert torch.equal(now[moment][untouched], moments[key][moment][untouched])
        assert torch.equal(now["step"], moments[key]["step"])


def test_weights_written_behind_an_optimizers_back_are_said(tmp_path):
    case = LOSSES["ClipPPOLoss"]()
    edits = {"redo": LiveEdit(ReDo(), when=At(1, 2))}
    with Observer({"d": DormantUnits()}, when=At(0), into=tmp_path, edits=edits) as observer:
        observer.step(case.loss, case.batch, step=0)
        with pytest.warns(UserWarning, match="'redo' writes weights whose optimizer is not known.*ObservedLoss"):
            observer.step(case.loss, case.batch, step=1)
        observer.optimizers.append(torch.optim.Adam(case.loss.parameters()))
        observer.step(case.loss, case.batch, step=2)  # silently, once it is known: warnings are errors here
        assert observer.buffer["redo"].steps.tolist() == [1, 2]


def test_a_measured_value_sets_an_edit_off(tmp_path):
    case = LOSSES["ClipPPOLoss"]()
    optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
    edits = {"lesion": LiveEdit(Ablate(place_in(case, "ClipPPOLoss"), units=0), when=When("d", "dormant", above=-1.0))}
    with Observer({"d": DormantUnits()}, when=At(2), into=tmp_path, edits=edits) as observer:
        ObservedLoss(case.loss, observer, optimizer)
        for _ in range(4):
            case.update(optimizer)
        assert observer.buffer["lesion"].steps.tolist() == [2]


def test_a_run_that_is_resumed_within_a_span_goes_on_with_it(tmp_path):
    def begun(path: Any) -> tuple[Case, torch.optim.Optimizer, Observer]:
        case = LOSSES["ClipPPOLoss"]()
        optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
        edit = LiveEdit(Ablate(place_in(case, "ClipPPOLoss"), units=1), when=At(1), steps=4)
        observer = Observer({"o": Outputs()}, when=At(0), into=path, edits={"lesion": edit}, resume=True)
        ObservedLoss(case.loss, observer, optimizer)
        return case, optimizer, observer

    whole, optimizer, observer = begun(tmp_path / "whole")
    for _ in range(STEPS):
        whole.update(optimizer)
    observer.close()
    case, optimizer, observer = begun(tmp_path / "resumed")
    for _ in range(3):
        case.update(optimizer)
    kept = copy.deepcopy((weights(case), optimizer.state_dict(), observer.state_dict(), torch.get_rng_state()))
    case.update(optimizer)
    observer.close()
    case, optimizer, observer = begun(tmp_path / "resumed")
    case.loss.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    observer.load_state_dict(kept[2])
    torch.set_rng_state(kept[3])
    for _ in range(3, STEPS):
        case.update(optimizer)
    assert observer.buffer["lesion"].steps.tolist() == [1, 5]
    observer.close()
    assert all(torch.equal(value, weights(case)[key]) for key, value in weights(whole).items())


@pytest.mark.parametrize(
    ("edits", "error", "said"),
    [
        ({"x": LiveEdit(Ablate("actor_network.nothing"), when=At(0))}, PathError, "nothing.*matches no module"),
        ({"x": LiveEdit(Ablate("**", networks="actor"), when=At(0))}, NetworkError, "did you mean 'actor_network'"),
        ({"x": Ablate("**")}, SettingsError, r"e.g. LiveEdit\("),
        ({"o": LiveEdit(Ablate("**"), when=At(0))}, SettingsError, "name of a row that is measured"),
        ({"x": LiveEdit(Ablate("**"), when=When("p", "x", above=1))}, SettingsError, "not measured"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_training(edits, error, said, tmp_path):
    case = LOSSES["ClipPPOLoss"]()

    def begin() -> None:
        with Observer({"o": Outputs()}, when=At(0), into=tmp_path, edits=edits) as observer:
            ObservedLoss(case.loss, observer)

    with pytest.raises(error, match=said):
        begin()
    assert hooks(case.loss) == 0


@pytest.mark.parametrize(
    ("edit", "when", "steps"),
    [(Outputs(), At(0), None), (Ablate("**"), 3, None), (Ablate("**"), At(0), 0), (ReDo(), At(0), 5)],
)
def test_half_an_edit_is_refused(edit, when, steps):
    with pytest.raises(SettingsError):
        LiveEdit(edit, when=when, steps=steps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_loss_runs_eagerly_during_a_span_and_is_not_compiled_anew(tmp_path):
    torch._dynamo.reset()
    # from the call after the one at step 3; first, as code is compiled for how many classes tensordict has met by then
    expected = weights(by_hand("ClipPPOLoss", range(4, 6), torch.optim.SGD))
    case = LOSSES["ClipPPOLoss"]()
    optimizer = torch.optim.SGD(case.loss.parameters(), 0.01)
    edit = LiveEdit(Ablate(place_in(case, "ClipPPOLoss"), units=1), when=At(3), steps=3)
    with Observer({"o": Outputs()}, when=Every(optim_steps=1), into=tmp_path, edits={"lesion": edit}) as observer:
        loss, graphs = torch.compile(ObservedLoss(case.loss, observer, optimizer), backend="eager"), []
        compiled = replace(case, loss=loss)
        for _ in range(STEPS):
            compiled.update(optimizer)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2]
    assert all(torch.allclose(value, weights(case)[key], atol=1e-7) for key, value in expected.items())
