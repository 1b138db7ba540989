"""Live edits and what else is due: how they come and go beside each other, alerts, pauses, checkpoints and errors."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_train import At, Every, LiveEdit, Method, Observer, ProbeSet, When
from tdhook_train.edit import Rewrite, Rewritten
from tdhook_train.health import ReDo
from tdhook_train.latent import Ablate, SteeringVectors

# nothing is trained in some of these, so that no optimizer is known
pytestmark = pytest.mark.filterwarnings("ignore:.*writes weights whose optimizer is not known:UserWarning")

EACH = At(0) | Every(optim_steps=1)


@dataclass(frozen=True)
class Weight(Method):
    """The first weight."""

    writes: ClassVar = {"weight": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"weight": next(model.module.parameters()).detach().flatten()[0].clone()})


@dataclass(frozen=True)
class Add(Rewrite):
    """Adds 1 to the first weight."""

    writes: ClassVar = {"before": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        return TensorDict({"before": next(model.module.parameters()).detach().flatten()[0].clone()})

    def rewritten(self, seen: Any, model: Any) -> dict[str, Rewritten]:
        name, value = next(model.module.named_parameters())
        where = torch.zeros_like(value, dtype=torch.bool)
        where.view(-1)[0] = True
        return {name: Rewritten(value.detach() + 1, where)}


def made() -> tuple[nn.Sequential, TensorDict]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, TensorDict(input=torch.randn(5, 3), batch_size=[5])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def ablated(model: nn.Sequential, x: Tensor) -> bool:
    return torch.equal(model(x), model[2].bias.expand(len(x), 1))


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


@pytest.fixture(autouse=True)
def _nothing_is_left_on_torch():
    yield
    left = stance()
    torch.compiler.set_stance("default")
    assert left == "default"
    assert torch.backends.mha.get_fastpath_enabled()


class Attends(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, 8, batch_first=True))


def test_spans_may_end_in_another_order_than_they_began(tmp_path):
    torch.manual_seed(0)
    model, td = Attends(), TensorDict(input=torch.randn(2, 3, 4), batch_size=[2])
    edits = {
        "first": LiveEdit(Ablate("0", units=0), when=At(0), steps=2),
        "second": LiveEdit(Ablate("0", units=1), when=At(1), steps=3),
    }
    found = []
    with Observer({"w": Weight()}, when=At(9), into=tmp_path, edits=edits) as observer:
        for step in range(6):
            observer.step(model, td, step=step)
            found.append((stance(), torch.backends.mha.get_fastpath_enabled()))
            model(td["input"])
    edited, free = ("force_eager", False), ("default", True)
    assert found == [edited, edited, edited, edited, free, free]


def broken(_: str, __: Tensor) -> Tensor:
    raise ZeroDivisionError("broken on purpose")


def interrupted(_: str, __: Tensor) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("fn", "error"), [(broken, ZeroDivisionError), (interrupted, KeyboardInterrupt)])
def test_an_error_inside_an_edit_is_the_error_that_is_seen(fn, error, tmp_path):
    model, td = made()
    edits = {"x": LiveEdit(SteeringVectors("1", fn), when=At(0)), "y": LiveEdit(Ablate("2"), when=At(0))}

    def train() -> None:
        with Observer({"w": Weight()}, when=At(9), into=tmp_path, edits=edits) as observer:
            observer.step(model, td, step=0)
            model(td["input"])

    with pytest.raises(error):
        train()
    assert hooks(model) == 0


def test_an_observer_that_is_forgotten_takes_its_edits_along(tmp_path):
    model, td = made()
    observer = Observer({"w": Weight()}, when=At(9), into=tmp_path, edits={"x": LiveEdit(Ablate("1"), when=At(0))})
    observer.step(model, td, step=0)
    assert ablated(model, td["input"])
    buffer = observer.buffer
    del observer
    gc.collect()
    assert hooks(model) == 0
    buffer.close()


def test_a_checkpoint_gives_its_spans_back_at_once_and_a_checkpoint_of_that_has_them_too(tmp_path):
    model, td = made()

    def observed(path: Any) -> Observer:
        edit = LiveEdit(Ablate("1"), when=At(1), steps=4)
        return Observer({"w": Weight()}, when=EACH, into=path, edits={"x": edit}, resume=True)

    with observed(tmp_path) as observer:
        for step in range(3):
            observer.step(model, td, step=step)
        state = observer.state_dict()
    with observed(tmp_path) as observer:
        observer.load_state_dict(state)
        assert observer.state_dict()["edits"] == state["edits"] == {"x": 5}
        observer.attach(model)
        assert ablated(model, td["input"])  # what is collected before the first step is collected with it
    with observed(tmp_path) as observer:
        observer.attach(model)
        observer.load_state_dict(state)
        assert ablated(model, td["input"])
        observer.step(model, td, step=5)
        assert not ablated(model, td["input"])
        assert observer.state_dict()["edits"] == {}


def test_a_span_lasts_as_many_steps_in_a_pause(tmp_path):
    model, td = made()
    edit = LiveEdit(Ablate("1"), when=At(1), steps=2)
    found = []
    with Observer({"w": Weight()}, when=At(9), into=tmp_path, edits={"x": edit}) as observer, ExitStack() as stack:
        for step in range(5):
            if step == 2:
                stack.enter_context(observer.pause())
            observer.step(model, td, step=step)
            found.append(ablated(model, td["input"]))
    assert found == [False, True, True, False, False]


@pytest.mark.parametrize("background", [False, True])
def test_an_alert_may_close_the_observer(background, tmp_path):
    model, td = made()
    edit = LiveEdit(Ablate("1"), when=At(1))
    observer = Observer({"w": Weight()}, when=EACH, into=tmp_path, edits={"x": edit}, background=background)
    observer.alert(At(1), call=lambda o: o.close())
    for step in range(3):
        assert observer.step(model, td, step=step) == (step < 2)
    assert hooks(model) == 0
    assert observer.subject is None


def test_an_alert_may_call_whatever_an_observer_has(tmp_path):
    model, td = made()
    seen = []
    with Observer({"w": Weight()}, when=EACH, into=tmp_path) as observer:

        def everything(o: Observer) -> None:
            o.mark("here")
            with o.pause():
                o.step(model, td, step=2)
            o.step(model, td, step=2)
            seen.append(o.state_dict()["clock"]["step"])

        observer.alert(At(2), call=everything)
        for step in range(4):
            observer.step(model, td, step=step)
        assert observer.buffer["w"].steps.tolist() == [0, 1, 2, 3]
    assert seen == [2]


def test_several_edits_may_begin_before_anything_was_measured(tmp_path):
    model, td = made()
    edits = {"a": LiveEdit(Ablate("1"), when=At(2), steps=1), "b": LiveEdit(Add(), when=At(2, 3))}
    with Observer({"w": Weight()}, when=At(3), into=tmp_path, edits=edits) as observer:
        for step in range(5):
            observer.step(model, td, step=step)
        assert observer.buffer["a"].steps.tolist() == [2, 3]
        assert observer.buffer["b"].steps.tolist() == [2, 3]
        assert observer.buffer["w"].steps.tolist() == [3]


def test_every_row_of_a_step_holds_the_weights_before_they_were_written(tmp_path):
    model, td = made()
    when = {"one": EACH, "two": When("one", "weight", above=-9.0), "three": When("two", "weight", above=-9.0)}
    methods = {"one": Weight(), "two": Weight(), "three": Weight()}
    edits = {"add": LiveEdit(Add(), when=At(0)), "again": LiveEdit(Add(), when=When("one", "weight", above=-9.0))}
    first = float(model[0].weight[0, 0].detach())
    with Observer(methods, when=when, into=tmp_path, edits=edits) as observer:
        observer.step(model, td, step=0)
        found = {row: observer.buffer[row].at(0)["weight"].item() for row in methods}
        assert observer.buffer["add"].at(0)["before"].item() == first
        words = {int(observer.buffer[row].series(("meta", "weights"))[0]) for row in methods}
    assert found == dict.fromkeys(methods, first)
    assert len(words) == 1
    assert model[0].weight[0, 0].item() == pytest.approx(first + 2)


def test_weights_are_written_from_what_the_network_does_without_the_other_edits(tmp_path):
    model, td = made()
    edits = {
        "lesion": LiveEdit(Ablate("1", units=(0, 1)), when=At(0)),
        "redo": LiveEdit(ReDo(tau=0.0), when=At(1)),
    }
    with Observer({"w": Weight()}, when=At(9), into=tmp_path, on=ProbeSet(td), edits=edits) as observer:
        observer.step(model, td, step=0)
        observer.step(model, td, step=1)
        found = observer.buffer["redo"].at(1)["reset"]
        assert found.shape == (1, 4)
        assert found.sum() == 0


def test_parameters_that_lie_in_one_piece_of_memory_are_told_apart(tmp_path):
    model, td = made()
    flat = torch.cat([value.detach().flatten() for value in model.parameters()])
    begin = 0
    for value in model.parameters():
        value.data = flat[begin : (begin := begin + value.numel())].view_as(value)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(td["input"]).sum().backward()
    optimizer.step()
    before = {name: optimizer.state[value]["exp_avg"].clone() for name, value in model.named_parameters()}
    edits = {"add": LiveEdit(Add(), when=At(0))}
    with Observer({"w": Weight()}, when=At(9), into=tmp_path, edits=edits) as observer:
        observer.optimizers.append(optimizer)
        observer.step(model, td, step=0)
    before["0.weight"][0, 0] = 0
    assert all(torch.equal(optimizer.state[value]["exp_avg"], before[n]) for n, value in model.named_parameters())
