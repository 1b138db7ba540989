"""A run to ask about, and the command line as a user meets it."""

from dataclasses import dataclass

import pytest
from small_runs import record

from tdhook_train.cli import main


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "small")


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Call the command line in this process, as the entry point does."""

    def call(*args):
        capsys.readouterr()
        try:
            main([str(arg) for arg in args])
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
