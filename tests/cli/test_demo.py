"""The demo as a user runs it: its rows, its report, its last line; Ctrl-C; errors in one line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import pytest
import torch
from tensordict import TensorDict
from typer.testing import CliRunner

from tdhook_train import ArtifactBuffer, At, Observer, ProbeSet
from tdhook_train.cli import app, main
from tdhook_train.errors import EnvironmentNameError, MissingPackageError, RunExistsError, SettingsError
from tdhook_train.health import DormantUnits
from tdhook_train.latent import RidgeProbe
from tdhook_train.plots import write_report
from tdhook_train.rl.demo import Demo
from tdhook_train.rl.ppo import Ppo, make_env

COMMAND = [sys.executable, "-m", "tdhook_train.cli", "demo"]
LAYERS_OF_BOTH = 14 + 13  # policy: 7 linear, 6 tanh and the scale; value: 7 linear and 6 tanh


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("runs") / "demo"
    done = subprocess.run([*COMMAND, "--frames", "600", "--out", str(out)], capture_output=True, text=True, check=False)
    return out, done


def test_a_short_demo_ends_with_the_report(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = demo
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out / "report.html")
    assert "actor_network" in done.stdout  # the table of final scores
    assert "critic_network" in done.stdout
    assert "PPO on InvertedDoublePendulum-v5" in done.stderr  # the progress bar
    assert "of training time" in done.stderr
    assert (out / "report.html").stat().st_size > 1_000_000  # plotly is inside
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_short_demo_leaves_rows_of_all_methods(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = demo
    buffer = ArtifactBuffer.open(out / "artifacts")
    assert list(buffer) == ["probe", "attribution", "patching", "health"]
    ticks = len(buffer["probe"].steps)
    assert ticks > 30
    assert len(buffer["health"].series("dormant")) == ticks
    assert buffer["attribution"].coords["feature"][5] == "cart velocity"
    for network in ("actor_network", "critic_network"):
        assert buffer["attribution"].series((network, "attr", "observation")).shape == (ticks, 64, 1, 9)
    assert buffer["patching"].coords["target"] == ["action", "value"]
    assert (out / "artifacts" / "probe_sets" / "probe_set.pt").is_file()
    assert (out / "artifacts" / "initial" / "weights.pt").is_file()


def test_the_probe_scores_every_layer_of_both_networks(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    probe = ArtifactBuffer.open(demo[0] / "artifacts")["probe"]
    targets = ["action", "value", "cart velocity", "hinge 1 velocity", "hinge 2 velocity"]
    assert probe.coords["target"] == targets
    assert len(probe.coords["layer"]) == LAYERS_OF_BOTH
    for key in ("r2", "r2_observation", "r2_initial", "r2_null"):
        assert probe.series(key).shape == (len(probe.steps), LAYERS_OF_BOTH, len(targets))
    assert probe.steps[0] == 0
    torch.testing.assert_close(probe.series("r2")[0], probe.series("r2_initial")[0])  # step 0 is the initial network


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_recorded_and_writes_the_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [*COMMAND, "--frames", "100000", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        committed = 0
        for _ in range(600):  # a reader in another process, while the training runs
            time.sleep(0.1)
            if (out / "artifacts" / "manifest.json").is_file():
                with ArtifactBuffer.open(out / "artifacts") as buffer:
                    committed = len(buffer["health"]) if "health" in buffer else 0
            if committed >= 2:
                break
        assert committed >= 2
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout.splitlines()[-1] == str(out / "report.html")
    assert (out / "report.html").is_file()
    with ArtifactBuffer.open(out / "artifacts") as buffer:
        assert all(len(buffer[name]) >= committed for name in ("probe", "attribution", "patching", "health"))


@pytest.mark.parametrize("behind", [KeyboardInterrupt, ValueError])
def test_ctrl_c_that_comes_as_another_error_is_ctrl_c(
    behind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(*_: object) -> None:
        # what becomes of an exception inside `with params.to_module(...)`: its __exit__ gives out a TensorDict
        try:
            raise behind
        finally:
            bool(TensorDict(a=torch.zeros(1)))

    monkeypatch.setattr(Ppo, "update", update)
    run = Demo(frames=400, out=tmp_path, progress=False).run
    if behind is KeyboardInterrupt:
        assert run().interrupted
    else:
        with pytest.raises(RuntimeError, match="boolean"):
            run()


def test_a_folder_that_holds_a_run_is_refused_before_training(tmp_path: Path) -> None:
    ArtifactBuffer(tmp_path / "artifacts").close()
    with pytest.raises(RunExistsError, match="overwrite"):
        Demo(frames=600, out=tmp_path).run()


def test_an_environment_that_does_not_exist_is_named_with_the_nearest() -> None:
    with pytest.raises(EnvironmentNameError, match=r"no environment 'InvertedDoublPendulum-v5'.* mean 'Inv"):
        make_env("InvertedDoublPendulum-v5")


def test_without_mujoco_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr("tdhook_train.rl.ppo.GymEnv", missing)
    with pytest.raises(MissingPackageError, match=r'pip install "tdhook-train\[mujoco\]"'):
        make_env("InvertedDoublePendulum-v5")


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(SettingsError, match="at least 200 frames"):
        Demo(frames=10).run()


def test_errors_of_ours_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tdhook-train", "demo", "--env", "CartPole-v17"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: no environment 'CartPole-v17'")


def test_the_report_of_a_run_of_ones_own(tmp_path: Path) -> None:
    for name, target in (("probed", "y"), ("healthy", None)):
        methods = {"m": DormantUnits() if target is None else RidgeProbe(target=target)}
        x = torch.randn(40, 3)
        batch = TensorDict(input=x, y=x[:, 0], batch_size=[40])
        with Observer(methods, when=At(0), into=tmp_path / name, on=ProbeSet(batch, groups="rows")) as observer:
            observer.step(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), step=0)
            shown = CliRunner().invoke(app, ["report", str(tmp_path / name)])  # while it is open
        assert shown.exit_code == 0, shown.output
        assert shown.output.splitlines()[-1] == str(tmp_path / name / "report.html")
        assert ("R² of a linear probe" in shown.output) == (target is not None)
    CliRunner().invoke(app, ["report", str(tmp_path / name), "--out", str(tmp_path / "elsewhere")])
    picture = (tmp_path / "elsewhere" / "report.png").read_bytes()
    assert write_report(tmp_path / name, tmp_path / "again").with_suffix(".png").read_bytes() == picture


def test_help_shows_an_example() -> None:
    shown = CliRunner().invoke(app, ["demo", "--help"])
    assert shown.exit_code == 0
    assert "tdhook-train demo --frames 6000" in shown.output
