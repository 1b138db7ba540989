"""The entry point: help without torch, exit codes, one line for an error."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from small_runs import COMMAND, process

from tdhook_train import ArtifactBuffer
from tdhook_train.cli.app import app
from tdhook_train.cli.doctor import CORE, EXTRAS

COMMANDS = ["demo", "sweep", "ls", "show", "report", "export", "watch", "doctor"]


@pytest.mark.parametrize("command", [[], *([one] for one in COMMANDS)])
def test_help_needs_no_torch(command):
    code = (
        "import sys\n"
        "from tdhook_train.cli import main\n"
        f"try: main({[*command, '--help']})\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "heavy = {'torch', 'tensordict', 'numpy', 'pandas', 'rich', 'torchrl', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for line in command and ["Examples:", f"    tdhook-train {command[0]}"]:
        assert any(shown.startswith(line) for shown in map(str.rstrip, done.stdout.replace("  Ex", "Ex").split("\n")))


def test_every_command_is_listed():
    assert [command.name for command in app.registered_commands] == COMMANDS
    shown = process("--help").stdout
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("command", ["ls", "show", "report", "watch"])
def test_a_path_without_a_run_is_one_line_and_2(cli, run, command):
    for path, said in ((run.parent / "nope", "does not exist"), (run / "probe", "holds no run")):
        done = cli(command, path)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert done.err.startswith("error: ")
        assert said in done.err


def test_the_folder_around_a_run_will_do(cli, run, tmp_path):
    (tmp_path / "artifacts").symlink_to(run)
    assert cli("show", tmp_path, "probe/r2").out == cli("show", run, "probe/r2").out


def test_traceback_shows_it_all_wherever_it_stands(cli, tmp_path):
    for args in (["--traceback", "ls", tmp_path], ["ls", tmp_path, "--traceback"]):
        done = cli(*args)
        assert done.code == 2
        assert "Traceback" in done.err
        assert "check_run" in done.err


def test_an_option_that_does_not_exist_is_2(cli, run):
    assert cli("ls", run, "--larg").code == 2
    assert cli("shw", run).code == 2


def test_warnings_are_one_line(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "manifest.json").unlink()
    done = process("ls", tmp_path / "r")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_is_130_and_quiet(tmp_path):
    with ArtifactBuffer(tmp_path / "r") as buffer:  # this process goes on writing
        buffer.append("a", {"x": 1.0}, step=1)
        watching = subprocess.Popen(
            [*COMMAND, "watch", str(tmp_path / "r"), "--every", "0.05"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            assert watching.stdout.readline().split()[0] == "key"  # it is in its loop
            watching.send_signal(signal.SIGINT)
            _, err = watching.communicate(timeout=60)
        finally:
            watching.kill()
    assert watching.returncode == 130
    assert err == ""


def test_several_runs_are_reported_together(cli, run, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("tdhook_train.plots.write_report", lambda runs, out: given.append((runs, out)) or out)
    (tmp_path / "other").symlink_to(run)
    assert cli("report", run, tmp_path / "other", "--out", tmp_path).code == 0
    ((runs, out),) = given
    assert out == tmp_path
    assert list(runs) == [str(run), str(tmp_path / "other")]  # paths, since both are called "small"
    assert all(isinstance(buffer, ArtifactBuffer) for buffer in runs.values())


def test_doctor_knows_the_extras_of_the_package(cli, tmp_path):
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    extras = {
        name: {line.split(">")[0].split("[")[0] for line in lines}
        for name, lines in project["optional-dependencies"].items()
        if name not in ("all", "dev")
    }
    assert {name: set(packages) for name, packages in EXTRAS.items()} == extras
    assert set(CORE[1:]) <= {line.split(">")[0] for line in project["dependencies"]}
    done = cli("doctor", tmp_path)
    assert done.code == 0
    assert "takes memory maps" in done.out
    assert "threads of torch" in done.out


def test_doctor_says_what_is_missing_and_how_to_get_it(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(EXTRAS, "plots", ("plotly", "no-such-package"))
    assert 'no-such-package: pip install "tdhook-train[plots]"' in cli("doctor", tmp_path).out


def test_a_disk_that_takes_no_memory_maps_ends_with_1(cli, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("No such device")

    monkeypatch.setattr("tdhook_train.cli.doctor.mmap.mmap", refused)
    done = cli("doctor", tmp_path)
    assert done.code == 1
    assert "takes no memory maps: No such device" in done.out
    assert cli("doctor", tmp_path / "nowhere").code == 1
