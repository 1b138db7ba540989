"""The wheel alone, without any extra: what works, and what the rest says of itself."""

from __future__ import annotations

import pytest

WORKS = """
import tdhook_train, torch, sys
from pathlib import Path
from tensordict import TensorDict
assert Path(tdhook_train.__file__).parent.parent == Path("site").resolve(), tdhook_train.__file__
import tdhook_train.attribution, tdhook_train.checkpoints, tdhook_train.circuits, tdhook_train.cli
import tdhook_train.emergence, tdhook_train.health, tdhook_train.latent, tdhook_train.metrics, tdhook_train.rl
import tdhook_train.weights
from tdhook_train import ArtifactBuffer, Every, Observer, ProbeSet, sweep
from tdhook_train.attribution import Saliency
from tdhook_train.emergence import half_maximum
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import RidgeProbe

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

x = torch.randn(60, 3)
td = TensorDict(input=x, y=x[:, 0], traj=torch.arange(60) // 6, batch_size=[60])
methods = {"probe": RidgeProbe(target="y", directions=True), "rank": EffectiveRank()}
when, model = Every(optim_steps=1), make()
with Observer(methods, when=when, into="run", on=ProbeSet(td, groups="traj")) as observer:
    for step in (1, 2):
        observer.step(model, step=step)
rows = ArtifactBuffer.open("run")["probe"]
assert rows.steps.tolist() == [1, 2] and rows.series("r2")[:, 0].min() > 0.9
with Saliency(targets=("output", 1)).prepare(make()) as hooked:
    assert hooked(td)["attr", "input"].shape == (60, 3)
torch.save(make().state_dict(), "step=7.pt")
after = sweep(["step=7.pt"], build=make, methods=methods, data="run", into="after", progress=False)
assert after["rank"].steps.tolist() == [7]
assert half_maximum([0, 1, 2, 3, 4], [0.0, 0.0, 1.0, 1.0, 1.0]).onset > 0
"""

READ = "from tdhook_train import ArtifactBuffer\nrows = ArtifactBuffer.open('run')['probe']\n"
DOORS = {
    "callbacks": ("import tdhook_train.callbacks", "lightning"),
    "one callback": ("from tdhook_train.callbacks import ProbeCallback", "lightning"),
    "plots": ("import tdhook_train.plots", "plots"),
    "the report": ("from tdhook_train.plots import write_report", "plots"),
    "an environment": (
        "from tdhook_train.rl.ppo import make_ppo; make_ppo('CartPole-v1', frames=128)",
        "mujoco",
    ),
    "to_pandas": (f"{READ}rows.to_pandas('r2')", "tables"),
    "to_xarray": (f"{READ}rows.to_xarray()", "tables"),
    "to_parquet": (f"{READ}rows.to_parquet('rows.parquet')", "tables"),
    "emergence_table": (
        f"{READ}from tdhook_train.emergence import emergence_table; emergence_table(rows)",
        "tables",
    ),
    **{
        f"metrics.{call}": (f"{READ}from tdhook_train import metrics; metrics.{call}", "tables")
        for call in ("layer_similarity(rows)", "direction_cosine(rows)", "probe_transfer(rows)", "churn(rows, 'y')")
    },
    "SklearnProbe": ("from tdhook_train.latent import SklearnProbe; SklearnProbe(target='y')", "probes"),
    "IcaDirection": ("from tdhook_train.latent import IcaDirection; IcaDirection(concept='y')", "probes"),
}
COMMANDS = {
    "demo": (("demo", "--frames", "128", "--out", "demo"), "mujoco,plots"),
    "report": (("report", "run"), "plots"),
    "export": (("export", "run", "--to", "parquet"), "tables"),
    "export csv": (("export", "run", "--to", "csv"), "tables"),
    "export netcdf": (("export", "run", "--to", "netcdf"), "tables"),
}


@pytest.fixture(scope="session")
def used(installed):
    """The environment, in whose folder a run was recorded."""
    done = installed.run("-c", WORKS)
    assert done.returncode == 0, done.stderr
    return installed


def test_without_extras_networks_are_observed_and_rows_are_read(used):
    for command in (("--help",), ("ls", "run"), ("show", "run", "probe/r2"), ("doctor",)):
        done = used.run("-m", "tdhook_train.cli", *command)
        assert done.returncode == 0, done.stderr


def test_what_extras_bring_is_hidden(installed):
    done = installed.run("-c", "import gymnasium")
    assert "No module named 'gymnasium'" in done.stderr


@pytest.mark.parametrize("door", DOORS)
def test_a_door_without_its_extra_says_how_to_install_it(used, door):
    source, extra = DOORS[door]
    done = used.run("-c", source)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert said.startswith("tdhook_train.errors.MissingPackageError: ")
    assert f'pip install "tdhook-train[{extra}]"' in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_its_extra_says_how_to_install_it(used, command):
    args, extra = COMMANDS[command]
    done = used.run("-m", "tdhook_train.cli", *args)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f'pip install "tdhook-train[{extra}]"' in " ".join(done.stderr.split())
