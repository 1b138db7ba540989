import matplotlib as mpl
import pytest
import synthetic_run as runs

from tdhook_train.buffer import ArtifactBuffer


@pytest.fixture
def empty(tmp_path):
    with ArtifactBuffer(tmp_path / "run") as buffer:
        yield buffer


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    with ArtifactBuffer(tmp_path_factory.mktemp("plots") / "run") as buffer:
        runs.fill(buffer, [0, 1, 4, 20, 100, 700], depth=2)
        buffer.note("mark", step=50, label="lr drop")
        yield buffer


@pytest.fixture(scope="session")
def written(run, tmp_path_factory):
    from tdhook_train.plots import write_report

    before = dict(mpl.rcParams)
    path = write_report(run, tmp_path_factory.mktemp("report") / "new", training=runs.training_curve(5))
    return path, before, dict(mpl.rcParams)


@pytest.fixture(scope="session")
def report(written):
    return written[0]
