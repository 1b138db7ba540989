import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdhook_train.buffer import ArtifactBuffer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def buffer(path):
    with ArtifactBuffer(path) as buffer:
        yield buffer


@pytest.fixture
def start():
    """Start a Python process that runs some lines; it is killed at the end where it still runs."""
    processes = []

    def start(code, *args):
        command = [sys.executable, "-c", code, *map(str, args)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def forked():
    """Run a function in a fork of this process and return what it returns, or its error, as text."""

    def forked(function):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # OpenMP's threads do not live in a fork, which would wait for them
            try:
                text = str(function())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as file:
            text = file.read()
        os.waitpid(child, 0)
        return text

    return forked


@pytest.fixture
def fill():
    """Append rows that hold their own step in every number, so that a torn row shows."""

    def fill(buffer, steps, name="probe", width=50):
        for step in steps:
            row = {"attr": torch.full((4, width), float(step)), ("net", "code"): torch.full((3,), step)}
            buffer.append(name, row, step=step)

    return fill
