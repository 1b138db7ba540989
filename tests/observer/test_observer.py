"""When the observer measures, what it writes, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import ArtifactBuffer, At, Budget, Every, Method, Observer, ProbeSet
from tdhook_train.errors import (
    ClosedError,
    GroupsError,
    KeyMissingError,
    NetworkError,
    PathError,
    RunExistsError,
    SchemaError,
    SettingsError,
)
from tdhook_train.latent import RidgeProbe


@dataclass(frozen=True)
class MeanWeight(Method):
    """A number that tells which weights were measured."""

    noise: float = 0.0

    writes: ClassVar = {"mean": "", "drawn": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        drawn = torch.rand((), generator=seen.generator)
        return TensorDict({"mean": model.module.weight.detach().mean(), "drawn": drawn})


@dataclass(frozen=True)
class Broken(Method):
    writes: ClassVar = {"x": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        raise ZeroDivisionError("broken on purpose")


def batch(rows: int = 40) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator)
    return TensorDict(input=x, y=x[:, 0] + 0.1 * torch.randn(rows, generator=generator), batch_size=[rows])


def trained(observer: Observer, steps: int, *, model: nn.Linear | None = None, first: int = 0) -> list[float]:
    """Take plain steps, telling the observer before each; return the mean weight behind every step."""
    model = model or nn.Linear(3, 2)
    means = []
    for step in range(first, steps):
        means.append(model.weight.detach().mean().item())
        observer.step(model, batch(), step=step)
        with torch.no_grad():
            model.weight += 1.0
    return means


def test_rows_hold_the_weights_of_their_step(tmp_path: Path) -> None:
    observer = Observer({"m": MeanWeight()}, when=At(0) | Every(optim_steps=4), into=tmp_path)
    means = trained(observer, 10)
    rows = observer.buffer["m"]
    assert rows.steps.tolist() == [0, 4, 8]
    torch.testing.assert_close(rows.series("mean"), torch.tensor([means[0], means[4], means[8]]))
    assert len(rows.series(("meta", "weights")).unique()) == 3
    assert len(rows.series(("meta", "data")).unique()) == 1
    assert (rows.series(("meta", "cost")) > 0).all()
    observer.close()


def test_finish_measures_the_last_weights_once(tmp_path: Path) -> None:
    observer = Observer({"m": MeanWeight()}, when=Every(optim_steps=5), into=tmp_path)
    trained(observer, 8)
    assert observer.finish(step=8)
    assert not observer.finish(step=8)
    assert observer.buffer["m"].steps.tolist() == [5, 8]
    observer.close()


def test_draws_follow_from_seed_and_step_alone(tmp_path: Path) -> None:
    def draws(name: str, seed: int, steps: range) -> dict[int, float]:
        observer = Observer({"m": MeanWeight()}, when=Every(optim_steps=1), into=tmp_path / name, seed=seed)
        model = nn.Linear(3, 2)
        for step in steps:
            torch.rand(step + 1)  # the global generator is somebody else's
            observer.step(model, batch(), step=step)
        rows = observer.buffer["m"]
        found = dict(zip(rows.steps.tolist(), rows.series("drawn").tolist(), strict=True))
        observer.close()
        return found

    all_steps, some = draws("a", 1, range(1, 9)), draws("b", 1, range(5, 9))
    assert {step: all_steps[step] for step in some} == some
    assert len(set(all_steps.values())) == len(all_steps)
    assert draws("c", 2, range(1, 9)) != all_steps


def test_resuming_gives_the_rows_of_an_uninterrupted_run(tmp_path: Path) -> None:
    def observer(name: str, **options: Any) -> Observer:
        return Observer({"m": MeanWeight()}, when=At(0) | Every(optim_steps=3), into=tmp_path / name, **options)

    torch.manual_seed(0)
    whole = observer("whole")
    trained(whole, 12)

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    broken = observer("broken")
    trained(broken, 7, model=model)
    state, weights = broken.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    trained(broken, 10, model=model, first=7)  # goes on past the checkpoint, then dies
    broken.close()

    model.load_state_dict(weights)
    again = observer("broken", resume=True)
    again.load_state_dict(state)
    assert again.buffer["m"].steps.tolist() == [0, 3, 6]
    trained(again, 12, model=model, first=7)
    for key in ("mean", "drawn", ("meta", "step"), ("meta", "weights"), ("meta", "data")):
        assert torch.equal(again.buffer["m"].series(key), whole.buffer["m"].series(key)), key
    again.close()
    whole.close()


def test_the_initial_network_of_a_resumed_run_is_the_first_one(tmp_path: Path) -> None:
    probe = RidgeProbe(target="y", shifts=0)
    model = nn.Linear(3, 3)
    nn.init.orthogonal_(model.weight)  # keeps all that its input says of y
    with Observer({"p": probe}, when=Every(optim_steps=1), into=tmp_path) as observer:
        observer.step(model, batch(), step=1)
        first = observer.buffer["p"].series("r2_initial")[0]
    with torch.no_grad():
        model.weight.zero_()
    with Observer({"p": probe}, when=Every(optim_steps=1), into=tmp_path, resume=True) as observer:
        observer.step(model, batch(), step=2)
        torch.testing.assert_close(observer.buffer["p"].at(2)["r2_initial"], first)
        assert first[0, 0] > 0.9
        assert observer.buffer["p"].at(2)["r2"][0, 0] < 0


@pytest.mark.parametrize("policy", ["raise", "warn", "skip"])
def test_an_error_of_one_method_leaves_no_half_row(policy: Any, tmp_path: Path) -> None:
    observer = Observer({"bad": Broken(), "m": MeanWeight()}, when=At(0), into=tmp_path, on_error=policy)
    model = nn.Linear(3, 2)
    if policy == "raise":
        with pytest.raises(ZeroDivisionError, match="on purpose") as raised:
            observer.step(model, batch(), step=0)
        assert raised.value.__notes__ == ["while 'bad' was measured at step 0"]
        assert list(observer.buffer) == []
    elif policy == "warn":
        with pytest.warns(UserWarning, match="measuring 'bad' at step 0 failed: broken on purpose"):
            observer.step(model, batch(), step=0)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            observer.step(model, batch(), step=0)
    if policy != "raise":
        assert list(observer.buffer) == ["m"]
    (event,) = observer.buffer.events("error")
    assert (event["row"], event["step"]) == ("bad", 0)
    assert "ZeroDivisionError" in event["error"]
    observer.close()


def test_past_its_budget_a_tick_is_skipped_and_the_skip_recorded(tmp_path: Path) -> None:
    observer = Observer({"m": MeanWeight()}, when=Every(optim_steps=1), into=tmp_path, budget=Budget(overhead=1e-6))
    trained(observer, 6)
    assert observer.buffer["m"].steps.tolist() == [1]  # the first sets the estimate
    assert [event["step"] for event in observer.buffer.events("skip")] == [2, 3, 4, 5]
    observer.close()


def test_pause_and_mark(tmp_path: Path) -> None:
    observer = Observer({"m": MeanWeight()}, when=Every(optim_steps=1), into=tmp_path)
    model = nn.Linear(3, 2)
    observer.step(model, batch(), step=1)
    with observer.pause():
        observer.step(model, batch(), step=2)
    observer.mark("learning rate drop")
    observer.step(model, batch(), step=3)
    assert observer.buffer["m"].steps.tolist() == [1, 3]
    assert [(e["step"], e["label"]) for e in observer.buffer.events("mark")] == [(2, "learning rate drop")]
    observer.close()


def test_several_probe_sets_give_rows_of_their_own(tmp_path: Path) -> None:
    sets = {"first": ProbeSet(batch()[:20], groups="rows"), "second": ProbeSet(batch()[20:], groups="rows")}
    observer = Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, on=sets)
    observer.step(nn.Linear(3, 2), step=0)
    assert list(observer.buffer) == ["m.first", "m.second"]
    prints = [observer.buffer[name].series(("meta", "data")).item() for name in observer.buffer]
    assert prints == [sets["first"].fingerprint, sets["second"].fingerprint]
    stored = ProbeSet.load(tmp_path / "probe_sets" / "second.pt")
    assert stored.fingerprint == sets["second"].fingerprint
    observer.close()


def test_a_folder_that_holds_a_run_is_refused_unless_asked(tmp_path: Path) -> None:
    with Observer({"m": MeanWeight()}, when=At(0), into=tmp_path) as observer:
        observer.step(nn.Linear(3, 2), batch(), step=0)
    with pytest.raises(RunExistsError, match="resume=True"):
        Observer({"m": MeanWeight()}, when=At(0), into=tmp_path)
    assert ArtifactBuffer.open(tmp_path)["m"].steps.tolist() == [0]
    with Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, overwrite=True) as observer:
        assert list(observer.buffer) == []


def test_a_live_module_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[1].eval()  # frozen on purpose
    model(batch()["input"]).sum().backward()
    modes = [m.training for m in model.modules()]
    grads = [p.grad.clone() for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    given = batch()
    keys = set(given.keys())
    with Observer({"p": RidgeProbe(target="y")}, when=At(0), into=tmp_path) as observer:
        observer.step(model, given, step=0)
        assert observer.buffer["p"].coords["layer"] == ["0", "1", "2", "3"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())
    assert set(given.keys()) == keys


def test_a_resumed_run_goes_on_with_its_probe_set(tmp_path: Path) -> None:
    first = ProbeSet(batch(20), groups="rows")
    with Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, on=first) as observer:
        observer.step(nn.Linear(3, 2), step=0)
    again = ProbeSet.first(frames=10)  # would collect other frames
    with Observer({"m": MeanWeight()}, when=At(1), into=tmp_path, on=again, resume=True) as observer:
        observer.step(nn.Linear(3, 2), step=1)
        assert len(observer.buffer["m"].series(("meta", "data")).unique()) == 1
    with pytest.raises(SchemaError, match=r"were measured on ProbeSet\(20 rows"):
        Observer({"m": MeanWeight()}, when=At(2), into=tmp_path, on=ProbeSet(batch(30)), resume=True)


def test_a_resumed_run_that_starts_again_is_refused(tmp_path: Path) -> None:
    with Observer({"m": MeanWeight()}, when=At(0) | Every(optim_steps=2), into=tmp_path) as observer:
        trained(observer, 6)
    with Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, resume=True) as observer:
        with pytest.raises(RunExistsError, match=r"rows up to step 4, but the training is at step 0.*load_state_dict"):
            observer.step(nn.Linear(3, 2), batch(), step=0)
        assert observer.buffer["m"].steps.tolist() == [0, 2, 4]


def test_a_probe_set_that_never_fills_is_said_at_the_end(tmp_path: Path) -> None:
    with Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, on=ProbeSet.first(frames=64)) as observer:
        model = nn.Linear(3, 2)
        observer.attach(model)
        with pytest.warns(
            UserWarning, match=r"step 0 is not measured on ProbeSet\(0 of 64 .*no more frames than the f"
        ):
            observer.step(model, step=0)
        with pytest.warns(UserWarning, match=r"nothing was measured on ProbeSet\(0 of 64 .*ask for fewer frames"):
            observer.finish(step=1)


@pytest.mark.parametrize("later", [True, False])
def test_only_the_moment_that_never_comes_again_is_warned_of(later: bool, tmp_path: Path) -> None:
    with Observer({"m": MeanWeight()}, when=At(0, 1), into=tmp_path, on=ProbeSet.first(frames=64)) as observer:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            observer.step(nn.Linear(3, 2), step=int(later))
        assert len(said) == (not later)
        assert len(observer.buffer.events("skip")) == 1


def test_finishing_what_is_closed_is_said(tmp_path: Path) -> None:
    observer = Observer({"m": MeanWeight()}, when=At(0), into=tmp_path)
    observer.step(nn.Linear(3, 2), batch(), step=0)
    observer.close()
    with pytest.warns(UserWarning, match=r"finish\(\) before close\(\)"):
        assert not observer.finish(step=1)


@pytest.mark.parametrize("scale", ["frames", "epochs"])
@pytest.mark.parametrize("told", [True, False])
def test_a_scale_that_nobody_told_of_is_said_at_the_end(told: bool, scale: str, tmp_path: Path) -> None:
    when = At(0) | (Every(**{scale: 5}) & At(3))
    with Observer({"m": MeanWeight()}, when=when, into=tmp_path) as observer:
        observer.step(
            nn.Linear(3, 2), batch(), step=0, **{scale.removesuffix("s") if scale == "epochs" else scale: told}
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            observer.finish(step=1)
        assert [f"what goes by {scale} was never due" in str(one.message) for one in said] == [True] * (not told)


def test_one_observer_observes_one_model(tmp_path: Path) -> None:
    with Observer({"m": MeanWeight()}, when=Every(optim_steps=1), into=tmp_path) as observer:
        observer.step(nn.Linear(3, 2), batch(), step=1)
        with pytest.raises(NetworkError, match="observes another Linear; make one more observer for this Linear"):
            observer.step(nn.Linear(3, 2), batch(), step=2)


def test_an_error_in_the_shared_pass_follows_the_same_policy(tmp_path: Path) -> None:
    with Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, on_error="skip") as observer:
        assert not observer.step(nn.Linear(7, 2), batch(), step=0)  # the batch does not fit
        (event,) = observer.buffer.events("error")
        assert event["row"] == "the shared pass"


def test_bad_settings_are_refused_when_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs methods"):
        Observer({}, when=At(0), into=tmp_path)
    with pytest.raises(SettingsError, match="no Method"):
        Observer({"m": 3}, when=At(0), into=tmp_path)  # type: ignore[dict-item]
    with pytest.raises(SettingsError, match="'my probe' is no name: use letters"):
        Observer({"my probe": MeanWeight()}, when=At(0), into=tmp_path)
    with pytest.raises(SettingsError, match="'right now' is no name: use letters"):
        Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, on={"right now": "batch"})
    with pytest.raises(SettingsError, match=r"budget=0.05 is no Budget; e.g. budget=Budget\(overhead"):
        Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, budget=0.05)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="no trigger"):
        Observer({"m": MeanWeight()}, when=100, into=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="did you mean 'raise'"):
        Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, on_error="raises")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="needs methods"):
        Observer(MeanWeight(), when=At(0), into=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"on=a TensorDict is neither .* see ProbeSet"):
        Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, on=batch())  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="neither"):
        Observer({"m": MeanWeight()}, when=At(0), into=tmp_path, on="batches")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())  # nothing was made


def test_what_cannot_be_measured_is_refused_before_training(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    observer = Observer({"p": RidgeProbe(layers="encodr.*", target="y")}, when=At(0), into=tmp_path)
    with pytest.raises(PathError, match=r"layers='encodr\.\*' matches no module of Sequential"):
        observer.attach(model)
    observer.close()


def test_a_batch_may_be_made_only_where_something_is_due(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> TensorDict:
        made.append(len(made))
        return batch()

    model = nn.Linear(3, 2)
    with (
        Observer({"p": RidgeProbe(target="y")}, when=Every(optim_steps=3), into=tmp_path / "made") as late,
        Observer({"p": RidgeProbe(target="y")}, when=Every(optim_steps=3), into=tmp_path / "given") as early,
    ):
        for step in range(7):
            late.step(model, make, step=step)
            early.step(model, batch(), step=step)
        assert len(made) == late.buffer["p"].steps.numel() > 1
        assert torch.equal(late.buffer["p"].series("r2"), early.buffer["p"].series("r2"))


def test_a_missing_target_and_a_missing_batch_are_named(tmp_path: Path) -> None:
    observer = Observer({"p": RidgeProbe(target="rewrd")}, when=At(0), into=tmp_path)
    given = batch().set("reward", torch.randn(40))
    with pytest.raises(KeyMissingError, match="target 'rewrd' is not in the batch; did you mean 'reward'"):
        observer.step(nn.Linear(3, 2), given, step=0)
    observer.close()
    observer = Observer({"p": RidgeProbe(target="y")}, when=At(0), into=tmp_path / "other")
    with pytest.raises(KeyMissingError, match='on="batch" needs the batch'):
        observer.step(nn.Linear(3, 2), step=0)
    observer.close()
    with pytest.raises(ClosedError, match="closed"):
        observer.mark("late")


@pytest.mark.parametrize(("name", "error"), [("groups", GroupsError), ("key", KeyMissingError)])
def test_probe_set_refuses_groups_that_do_not_fit(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        ProbeSet(batch(), groups=torch.zeros(3) if name == "groups" else "episode")


def test_probe_set_cuts_trajectories_where_an_environment_ends() -> None:
    td = batch(6).reshape(2, 3).set(("next", "done"), torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=torch.bool)[..., None])
    assert ProbeSet(td).groups.tolist() == [0, 0, 1, 2, 2, 2]


def test_probe_set_cuts_trajectories_at_done_flags() -> None:
    td = batch(6).set(("next", "done"), torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)[:, None])
    probe_set = ProbeSet(td)
    assert probe_set.groups is not None
    assert probe_set.groups.tolist() == [0, 0, 1, 1, 1, 2]
    assert probe_set.ordered


def test_first_frames_keep_whole_trajectories_in_time_order() -> None:
    # two environments, in two batches; trajectory ids as a collector gives them
    ids = torch.tensor([[0, 0, 0, 2, 2, 2], [1, 1, 3, 3, 3, 3]])
    done = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    time = torch.arange(6).expand(2, 6)
    td = TensorDict(
        {("collector", "traj_ids"): ids, ("next", "done"): done[..., None], "t": time, "_private": time},
        batch_size=[2, 6],
    )
    probe_set = ProbeSet.first(frames=10)
    probe_set.add(td[:, :3])
    assert not probe_set.ready
    probe_set.add(td[:, 3:])
    assert probe_set.ready
    assert probe_set.groups is not None
    assert probe_set.groups.tolist() == [0, 0, 0, 1, 1, 3, 3, 3]  # 2 was cut off
    assert probe_set.td["t"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert "_private" not in set(probe_set.td.keys())
    assert probe_set.ordered


def test_first_frames_give_the_collectors_slot_back() -> None:
    class Collector:
        postproc = None

    collector = Collector()
    probe_set = ProbeSet.first(collector, frames=4)
    given = batch(8).set(("next", "done"), torch.ones(8, 1, dtype=torch.bool))
    assert collector.postproc is not None
    assert collector.postproc(given) is given
    assert probe_set.ready
    assert collector.postproc is None


def test_importing_the_package_brings_no_torchrl_lightning_or_plotly() -> None:
    code = "import sys, tdhook_train; print({'torchrl', 'lightning', 'plotly', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
