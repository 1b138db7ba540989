"""One report of several runs."""

import numpy as np
import pytest
import synthetic_run as runs
from matplotlib.image import imread

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import SettingsError
from tdhook_train.plots import write_report
from tdhook_train.plots.panels import HeatPanel, Line, LinePanel
from tdhook_train.plots.sections import cost, probe
from tdhook_train.plots.several import heat_panels_together, line_panels_together, together

STEPS = [0, 4, 100]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    found = {f"seed {n}": runs.fill(ArtifactBuffer(folder / str(n)), STEPS, depth=1, seed=n) for n in range(3)}
    found["seed 1"].note("mark", step=50, label="lr drop")
    found["seed 1"].note("skip", step=60, why="budget", detail="too dear")
    return found


def test_maps_of_three_runs_are_their_mean_and_grey_where_most_are(seeds):
    sections = {label: [probe.section(run, ())] for label, run in seeds.items()}
    picture = together(sections)[0].pictures[0]
    panel = picture.chart.panels[0]
    r2, null = (
        np.stack([run["probe"].series(key).numpy()[:, :5, 0] for run in seeds.values()]) for key in ("r2", "r2_null")
    )
    np.testing.assert_allclose(panel.values, r2.mean(0).T)
    np.testing.assert_array_equal(panel.hidden, ((r2 <= null).sum(0) >= 2).T)
    assert "Mean over 3 runs" in picture.note
    assert "mean null" in panel.hover


def test_a_cell_is_grey_where_it_is_in_most_runs():
    grey = [[[True, True, False]], [[True, False, False]], [[True, True, False]]]
    panels = {
        n: [HeatPanel("", np.arange(3), ["0"], np.ones((1, 3)), grey=np.array(own))] for n, own in enumerate(grey)
    }
    (panel,) = heat_panels_together(panels)
    np.testing.assert_array_equal(panel.hidden, [[True, True, False]])


def test_costs_of_two_runs_stand_side_by_side(seeds):
    two = {label: [cost.section(seeds[label], None, ())] for label in ("seed 0", "seed 2")}
    chart = together(two)[0].pictures[0].chart
    assert [panel.title for panel in chart.panels] == ["seed 0", "seed 2"]


def test_curves_that_were_read_at_other_points_meet_between_them_and_nowhere_else():
    def panel(x, y):
        return LinePanel("", "return", (Line("a", np.array(x), np.array(y, dtype=float)),))

    given = {"a": panel([0, 10], [0, 10]), "b": panel([0, 5, 10], [0, 0, 0]), "c": panel([5, 10], [1, 2])}
    (line,) = line_panels_together({label: [own] for label, own in given.items()})[0].lines
    np.testing.assert_array_equal(line.x, [0, 5, 10])
    np.testing.assert_allclose(line.y, [0, 2, 4])


@pytest.mark.parametrize("count", [2, 3])
def test_the_page_and_the_picture_of_several(seeds, tmp_path, count):
    chosen = dict(list(seeds.items())[:count])
    curves = {label: runs.training_curve(5 + n, seed=n) for n, label in enumerate(chosen)}
    path = write_report(chosen, tmp_path, training=curves)
    text = path.read_text(encoding="utf-8")
    assert ("Mean over 3 runs" in text) == (count == 3)
    assert "seed 1: lr drop" in text
    assert "too dear" in text
    assert all(f'<th scope="row">{label}</th>' in text for label in chosen)
    assert imread(tmp_path / "report.png").shape[:2] == (1000, 1600)


def test_runs_are_labelled_by_their_folders_and_a_merged_one_is_several(seeds, tmp_path):
    folders = [run.path for run in seeds.values()]
    assert "<dt>0</dt>" in write_report(folders, tmp_path / "listed").read_text(encoding="utf-8")
    merged = ArtifactBuffer.merge({label: run.path for label, run in seeds.items()}, tmp_path / "all", progress=False)
    text = write_report(merged, tmp_path / "merged").read_text(encoding="utf-8")
    assert "Mean over 3 runs" in text
    assert "<dt>seed 2</dt>" in text


def test_wrong_runs_are_refused(seeds, tmp_path):
    first = seeds["seed 0"]
    with pytest.raises(SettingsError, match="there is no run"):
        write_report([], tmp_path)
    with pytest.raises(SettingsError, match="was given twice"):
        write_report([first, first], tmp_path)
    with pytest.raises(SettingsError, match="one curve for 3 runs"):
        write_report(seeds, tmp_path, training=runs.training_curve())
    with pytest.raises(SettingsError, match="a curve of 'seed 9'; the runs are seed 0"):
        write_report(seeds, tmp_path, training={"seed 9": runs.training_curve()})
