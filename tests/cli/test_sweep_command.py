"""`tdhook-train sweep`: the user's own model and methods, named on the command line."""

import os

import pytest
import torch
from small_runs import process, record

from tdhook_train import ArtifactBuffer, ProbeSet

MODEL = """
import torch
from torch import nn
from shapes import WIDTH

class Net(nn.Sequential):
    pass

def make():
    return Net(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

def broken():
    raise ZeroDivisionError("no width")

number = 3
"""
METHODS = """
from tdhook_train.health import DormantUnits
from tdhook_train.latent import RidgeProbe

def z(td):
    return td["z"]

METHODS = {"probe": RidgeProbe(target=["y", "z"], shifts=3), "health": DormantUnits(taus=(0.1,))}

def of_function():
    return {"probe": RidgeProbe(target={"y": "y", "z": z}, shifts=3)}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    (place / "ckpt").mkdir()
    record(place / "live", checkpoints=place / "ckpt")
    (place / "shapes.py").write_text("WIDTH = 4\n")
    (place / "mymodel.py").write_text(MODEL)
    (place / "myprobes.py").write_text(METHODS)
    return place


def args(place, into, **other):
    given = {"build": place / "mymodel.py:make", "methods": place / "myprobes.py:METHODS", "data": place / "live"}
    given |= {"into": place / into, **other}
    return [place / "ckpt", *(part for name, value in given.items() for part in (f"--{name}", value))]


def test_rows_are_those_of_the_run(cli, place):
    done = cli("sweep", *args(place, "swept"))
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(place / "swept")
    assert done.err == ""  # no progress bar in a pipe
    with ArtifactBuffer.open(place / "swept") as swept, ArtifactBuffer.open(place / "live") as live:
        assert swept["probe"].steps.tolist() == [0, 1, 2, 3, 4]
        for name, key in (("probe", "r2"), ("health", "dormant")):
            assert torch.equal(swept[name].series(key)[::2], live[name].series(key))


@pytest.mark.slow
def test_two_workers_of_a_real_process_take_functions_from_a_file(place):
    given = args(place, "two", workers=2, methods="myprobes.py:of_function", build="mymodel:make")
    done = process("sweep", *given, cwd=place, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
    with ArtifactBuffer.open(place / "two") as two, ArtifactBuffer.open(place / "live") as live:
        assert torch.equal(two["probe"].series("r2")[::2], live["probe"].series("r2"))
        assert two["probe"].settings[0]["target"] == {"y": "y", "z": "myprobes.z"}


def test_a_glob_in_quotes_is_every_file_that_it_matches(cli, place, monkeypatch):
    monkeypatch.chdir(place)
    done = cli("sweep", "ckpt/step_*.pt", *args(place, "by_glob")[1:])
    assert done.code == 0, done.err
    with ArtifactBuffer.open(place / "by_glob") as one:
        assert one["probe"].steps.tolist() == [0, 1, 2, 3, 4]


def test_data_may_be_a_file_of_a_probe_set(cli, place):
    (file,) = (place / "live" / "probe_sets").glob("*.pt")
    assert ProbeSet.load(file).ready
    assert cli("sweep", *args(place, "by_file", data=file)).code == 0
    with ArtifactBuffer.open(place / "by_file") as one:
        assert len(one["probe"]) == 5


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"build": "mymodel"}, "not of the form"),
        ({"build": "nowhere.at_all:make"}, "there is no module 'nowhere'"),
        ({"build": "mymodl.py:make"}, "did you mean 'mymodel.py'"),
        ({"build": "mymodel.py:mak"}, "did you mean 'make'?"),
        ({"build": "mymodel.py:broken"}, "raised ZeroDivisionError: no width"),
        ({"build": "mymodel.py:number"}, "is a int, expected a function"),
        ({"build": "wrong.py:make"}, "could not be imported: SyntaxError"),
        ({"methods": "mymodel.py:number"}, "gives a int, expected a mapping"),
        ({"data": "nothing.pt"}, "does not exist"),
        ({"data": "mymodel.py"}, "is no file of ProbeSet.save"),
        ({"data": "ckpt/step_0.pt"}, "is no file of ProbeSet.save"),
        ({"step": "("}, "is no regular expression"),
    ],
)
def test_what_is_wrong_is_one_line(cli, place, monkeypatch, other, said):
    monkeypatch.chdir(place)
    (place / "wrong.py").write_text("def make(:\n")
    done = cli("sweep", *args(place, "wrong", **other))
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err


def test_a_method_that_raises_is_named_with_its_checkpoint(cli, place):
    (place / "bad.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from tdhook_train import Method\n"
        "@dataclass(frozen=True)\n"
        "class Bad(Method):\n"
        "    writes: ClassVar = {'x': ''}\n"
        "    def measure(self, seen, model):\n"
        "        raise ValueError('on purpose')\n"
        "METHODS = {'bad': Bad()}\n"
    )
    given = args(place, "bad_run", methods=place / "bad.py:METHODS")
    done = cli("sweep", *given)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "ValueError: on purpose" in done.err
    assert "step_0.pt" in done.err
    assert "raise ValueError('on purpose')" in cli("sweep", *given, "--traceback").err
