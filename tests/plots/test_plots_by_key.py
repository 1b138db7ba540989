"""Plots of one key: what they draw is what the artifact holds."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.errors import KeyMissingError, SettingsError
from tdhook_train.plots import heat, lines

LAYERS, TARGETS, STEPS = ["actor_network.0", "actor_network.1", "critic_network.0"], ["action", "value"], [0, 2, 10]


def recorded(path, seed=0, steps=STEPS):
    draw = torch.Generator().manual_seed(seed)
    buffer = ArtifactBuffer(path)
    dims = {"r2": ("layer", "target"), "rank": ("layer",), "loss": (), "attr": ("batch", "target", "feature")}
    buffer.declare("probe", dims=dims, coords={"layer": LAYERS, "target": TARGETS, "feature": ["x", "v"]})
    for step in steps:
        shapes = {"r2": (3, 2), "rank": (3,), "loss": (), "attr": (4, 2, 2)}
        row = {key: torch.rand(shape, generator=draw, dtype=torch.float64) for key, shape in shapes.items()}
        buffer.append("probe", row, step=step)
    return buffer


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    return {f"seed {seed}": recorded(folder / str(seed), seed) for seed in range(3)}


@pytest.fixture(scope="module")
def probe(seeds):
    return seeds["seed 0"]["probe"]


def maps(figure):
    return [trace for trace in figure.data if trace.type == "heatmap" and trace.text is not None]


def titles(figure):
    return [note.text for note in figure.layout.annotations]


def test_a_map_has_a_panel_for_each_target_and_network(probe):
    figure = heat(probe, "r2")
    expected = [f"{target} · {network} network" for target in TARGETS for network in ("policy", "value")]
    assert titles(figure) == expected
    drawn = np.concatenate([trace.z for trace in maps(figure)])
    values = probe.series("r2").numpy()
    np.testing.assert_allclose(drawn, np.concatenate([values[..., 0].T, values[..., 1].T]), rtol=1e-6)


def test_a_label_is_chosen_and_a_dimension_is_averaged(probe):
    figure = heat(probe, "r2", at={"target": "value"}, limits=(0, 1))
    np.testing.assert_allclose(maps(figure)[0].z, probe.series("r2").numpy()[:, :2, 1].T, rtol=1e-6)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    figure = lines(probe, "attr", at={"batch": "mean", "target": "action"})
    drawn = {trace.name: trace.y for trace in figure.data}
    np.testing.assert_allclose(drawn["v"], probe.series("attr").numpy()[..., 0, 1].mean(1))


def test_lines_have_the_labels_of_the_artifact(probe):
    figure = lines(probe, "rank")
    assert [trace.name for trace in figure.data] == LAYERS
    for place, trace in enumerate(figure.data):
        np.testing.assert_allclose(trace.y, probe.series("rank")[:, place])
        np.testing.assert_array_equal(trace.x, np.array(STEPS) + 1)
    single = lines(probe, "loss")
    np.testing.assert_allclose(single.data[0].y, probe.series("loss"))
    assert lines(probe, ("meta", "cost")).data[0].name == "meta.cost"


def test_three_seeds_are_a_mean_with_students_interval(seeds):
    figure = lines({label: run["probe"] for label, run in seeds.items()}, "loss")
    values = np.stack([run["probe"].series("loss").numpy() for run in seeds.values()])
    low, high, mean = (trace.y for trace in figure.data)
    expected = stats.t.interval(0.95, 2, loc=values.mean(0), scale=stats.sem(values))
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose([low, high], expected)
    several = heat({label: run["probe"] for label, run in seeds.items()}, "rank")
    ranks = np.stack([run["probe"].series("rank").numpy() for run in seeds.values()])
    np.testing.assert_allclose(np.concatenate([trace.z for trace in maps(several)]), ranks.mean(0).T, rtol=1e-6)
    low, high = stats.t.interval(0.95, 2, loc=ranks.mean(0), scale=stats.sem(ranks))
    hover = np.concatenate([trace.customdata for trace in maps(several)])
    np.testing.assert_allclose(hover[..., 2], low.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hover[..., 3], high.T, rtol=1e-5)


def test_two_runs_are_drawn_each(seeds):
    two = {label: seeds[label]["probe"] for label in ("seed 0", "seed 1")}
    figure = lines(two, "loss")
    assert [(trace.name, trace.line.dash) for trace in figure.data] == [
        ("loss · seed 0", "solid"),
        ("loss · seed 1", "dash"),
    ]
    assert titles(heat(two, "rank")) == [
        f"{network} network · {label}" for network in ("policy", "value") for label in two
    ]


def test_seeds_of_other_schedules_share_the_steps_that_all_have(tmp_path):
    runs = [recorded(tmp_path / str(n), n, steps) for n, steps in enumerate(([0, 1, 5], [0, 5, 9], [0, 3, 5]))]
    figure = heat({n: run["probe"] for n, run in enumerate(runs)}, "rank")
    np.testing.assert_array_equal(maps(figure)[0].customdata[0, :, 0], [0, 5])
    expected = np.mean([run["probe"].at(5)["rank"][0] for run in runs])
    assert maps(figure)[0].z[0, 1] == pytest.approx(expected)


def test_a_merged_run_is_several(seeds, tmp_path):
    for run in seeds.values():
        run.flush()
    merged = ArtifactBuffer.merge({label: run.path for label, run in seeds.items()}, tmp_path / "all", progress=False)
    values = np.stack([run["probe"].series("loss").numpy() for run in seeds.values()])
    np.testing.assert_allclose(lines(merged["probe"], "loss").data[-1].y, values.mean(0))


def test_matplotlib_gives_axes_without_pyplot(probe, seeds):
    axes = heat(probe, "r2", at={"target": "value"}, backend="matplotlib")
    assert [own.get_title(loc="left") for own in axes] == ["policy network", "value network"]
    np.testing.assert_allclose(axes[0].collections[0].get_array(), probe.series("r2").numpy()[:, :2, 1].T)
    single = lines(probe, "rank", backend="matplotlib")
    assert isinstance(single, Axes)
    np.testing.assert_allclose(single.lines[0].get_ydata(), probe.series("rank")[:, 0])
    own = Figure().add_subplot()
    assert lines({label: run["probe"] for label, run in seeds.items()}, "loss", backend=own) is own
    assert len(own.collections) == 1  # the band


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: heat(p, "r3"), KeyMissingError, "did you mean 'r2'"),
        (lambda p: heat(p, "loss"), SettingsError, r"'loss' has the dimensions none beside the steps, expected 1 or 2"),
        (lambda p: heat(p, "attr"), SettingsError, r"batch \(4\), target \(2\), feature \(2\).*at=\{'batch': label\}"),
        (lambda p: heat(p, "r2", at={"targt": "a"}), SettingsError, "no dimension 'targt'; did you mean 'target'"),
        (lambda p: heat(p, "r2", at={"target": "valu"}), SettingsError, "no label 'valu'; did you mean 'value'"),
        (lambda p: heat(p, "r2", backend="bokeh"), SettingsError, "backend='bokeh' is neither"),
        (lambda p: heat(p, "r2", backend=Figure().add_subplot()), SettingsError, "4 panels for one axes"),
        (lambda p: lines({}, "r2"), SettingsError, "no run to draw"),
    ],
)
def test_what_cannot_be_drawn_is_said(probe, call, error, words):
    with pytest.raises(error, match=words):
        call(probe)


def test_an_artifact_without_rows_is_said(empty):
    empty.append("a", {"x": torch.ones(2)}, step=5)
    empty.truncate(after_step=0)
    with pytest.raises(KeyMissingError, match="there is no row of 'x' to draw yet"):
        lines(empty["a"], "x")
    empty.append("a", {"x": torch.full((2,), torch.nan)}, step=5)
    with pytest.raises(SettingsError, match="no finite number"):
        heat(empty["a"], "x")


def test_too_many_panels_are_refused(empty):
    empty.declare("a", dims={"x": ("layer", "unit")}, coords={})
    empty.append("a", {"x": torch.ones(2, 40)}, step=0)
    with pytest.raises(SettingsError, match="a panel for each of 40 labels of 'unit'"):
        heat(empty["a"], "x")
