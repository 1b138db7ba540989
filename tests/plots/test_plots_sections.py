"""Sections of the report: similarity, classes, onsets, provenance; and what an evil name does in them: nothing."""

import numpy as np
import pandas as pd
import pytest
import synthetic_run as runs
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict
from torch import nn

from tdhook_train import At, Observer, ProbeSet
from tdhook_train.attribution import Saliency
from tdhook_train.latent import Cka, LogisticProbe
from tdhook_train.plots import HeatPanel, Mark, onsets, provenance, write_report
from tdhook_train.plots.axes import draw_heat
from tdhook_train.plots.sections import ablation, others, probe, saliency, similarity
from tdhook_train.plots.sections import training as curve


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of a small network with Cka and LogisticProbe, at three ticks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(60, 3)
    td = TensorDict(input=x, label=(x[:, 0] > 0).long(), batch_size=[60])
    methods = {"alike": Cka(to=("initial", "previous", "layers")), "classes": LogisticProbe(target="label")}
    folder = tmp_path_factory.mktemp("measured") / "run"
    data = ProbeSet(td, groups=torch.arange(60) // 10)
    with Observer(methods, when=At(0, 1, 5), into=folder, on=data) as observer:
        for step in (0, 1, 5):
            with torch.no_grad():
                net[0].weight.mul_(1 + step)
                net[0].weight[0] += step
            observer.step(net, td, step=step)
        yield observer.buffer


def test_similarity_has_a_map_over_training_and_one_of_layers_beside_layers(measured):
    pictures = {picture.title: picture for picture in similarity.section(measured, ()).pictures}
    initial = pictures["Each layer beside itself at initialisation"].chart.panels[0]
    np.testing.assert_array_equal(initial.values, measured["alike"].series("cka_initial").numpy().T)
    among = pictures["Layers of the network beside each other"].chart
    assert [panel.title for panel in among.panels] == ["step 0", "step 1", "step 5"]
    np.testing.assert_array_equal(among.panels[2].values, measured["alike"].at(5)["cka_layers"].numpy())
    figure = among.figure()
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext)
    assert figure.data[0].text[0][1] == "0</b><br>and <b>2 Tanh"


def test_layers_of_two_networks_are_compared_within_each(empty):
    layers = ["actor_network.a", "actor_network.b", "critic_network.b", "critic_network.c"]
    empty.declare("alike", dims={"cka_layers": ("layer", "other")}, coords={"layer": layers, "other": ["a", "b", "c"]})
    values = torch.arange(12.0).reshape(4, 3)
    empty.append("alike", {"cka_layers": values}, step=0)
    policy, value = (picture.chart.panels[0].values for picture in similarity.section(empty, ()).pictures)
    np.testing.assert_array_equal(policy, [[0, 1], [3, 4]])
    np.testing.assert_array_equal(value, [[7, 8], [10, 11]])


def test_classes_are_shown_as_balanced_accuracy_beside_their_null(measured):
    section = probe.section(measured, ())
    picture = section.pictures[0]
    assert picture.title == "How well the classes of “label” can be told apart in each layer"
    panel = picture.chart.panels[0]
    artifact = measured["classes"]
    np.testing.assert_array_equal(panel.values, artifact.series("balanced_accuracy")[..., 0].numpy().T)
    np.testing.assert_array_equal(panel.hover["AUC"], artifact.series("auc")[..., 0].numpy().T)
    null = artifact.series("balanced_accuracy_null")[..., 0].numpy().T
    np.testing.assert_array_equal(panel.hidden, ~(panel.values > null))


def test_the_page_has_both_and_the_picture_shows_the_classes(measured, tmp_path):
    text = write_report(measured, tmp_path).read_text(encoding="utf-8")
    assert "How far the layers have moved" in text
    assert "Balanced accuracy of a probe" in text
    assert probe.unit(measured) == "balanced accuracy"


def test_every_row_of_returns_under_ablation_is_shown(empty):
    for name in ("first", "second"):
        dims = {"return_ablated": ("layer", "episode"), "drop": ("layer",)}
        empty.declare(name, dims=dims, coords={"layer": ["0"]})
        empty.append(name, {"return_ablated": torch.ones(1, 2), "drop": torch.tensor([1.0])}, step=0)
    titles = [picture.title for picture in ablation.section(empty, ()).pictures]
    assert [title for title in titles if "without a layer" in title] == [
        "Return lost without a layer (first)",
        "Return lost without a layer (second)",
    ]


def test_the_mean_image_is_of_the_version_that_the_last_row_was_measured_on(tmp_path):
    class First(nn.Module):
        def forward(self, pixels):
            return pixels[:, 0, 0, :1] * 2

    def states(value):
        return TensorDict(input=torch.full((4, 1, 2, 2), value), batch_size=[4])

    net, on = First(), ProbeSet(states(1.0))
    with Observer({"maps": Saliency()}, when=At(0, 1), into=tmp_path / "run", on=on) as observer:
        observer.step(net, states(0.0), step=0)
        on.refresh(states(7.0))
        observer.step(net, states(0.0), step=1)
        (shown,) = saliency.maps(observer.buffer)
    np.testing.assert_array_equal(shown.panels[0].values, np.full((2, 2), 7.0))


def test_marks_have_labels_on_the_maps_of_the_picture():
    axes = Figure().add_subplot()
    panel = HeatPanel("", np.array([0, 10]), ["0"], np.ones((1, 2)))
    draw_heat(axes, panel, [Mark(5, "lr drop")])
    assert [(text.get_text(), text.get_position()[0]) for text in axes.texts] == [("lr drop", 6.0)]
    bare = Figure().add_subplot()
    draw_heat(bare, panel, [Mark(5, "lr drop")], labels=False)
    assert not bare.texts


def test_onsets_stand_on_the_return_curve_and_in_a_table(run, monkeypatch):
    table = pd.DataFrame(
        {
            "layer": ["a", "b", "a"],
            "target": ["value", "value", "action"],
            "onset_half": [300.0, 200.0, np.nan],
            "start": [0.1, 0.1, 0.1],
            "plateau": [0.3, 0.9, 1.0],
            "low": [1.0, 2.0, np.nan],
            "high": [400.0, 300.0, np.nan],
            "reason": ["", "", "never <beats> its null"],
        }
    )
    monkeypatch.setattr(onsets, "onset_table", lambda artifact, key: table)
    monkeypatch.setattr(probe, "onset_table", lambda artifact, key: table)
    found = onsets.main_onsets(run)
    assert found == [onsets.Onset("value", "b", 200.0)]
    training = pd.DataFrame({"frames": [0, 1000], "step": [0, 400], "return": [0.0, 10.0]})
    drawn = curve.section(training, (), found).pictures[0].chart.panels[0].lines[-1]
    assert (drawn.x.tolist(), drawn.y.tolist(), drawn.weight) == ([500.0], [5.0], "markers")
    listing = probe.section(run, ()).pictures[-1].listings[0]
    assert listing.rows[1] == ("b", "value", "200", "2", "300", "")
    assert listing.rows[2] == ("a", "action", "–", "–", "–", "never <beats> its null")


def test_provenance_names_versions_fingerprints_attempts_and_events(empty):
    for step in (0, 5):
        empty.append("probe", {"x": torch.ones(2)}, step=step, weights=step - 1, data=7, cost=0.25)
    empty.note("skip", step=3, why="budget", detail="too dear")
    run, rows, events, settings = provenance.section(empty, {"seed": 3}).pictures
    facts = dict(run.listings[0].rows)
    assert facts["seed"] == "3"
    assert facts["version of torch"] == torch.__version__
    assert facts["attempts"] == "1"
    assert rows.listings[0].rows[0] == (
        "probe",
        "2",
        "0 to 5",
        "2: ffffffffffffffff 0000000000000004",
        "1: 0000000000000007",
        "1",
        "0.50",
    )
    assert "1 ticks skipped, 0 errors, 0 marks" in events.note
    (event,) = events.listings[0].rows
    assert event[:2] == ("3", "skip")
    assert "why: budget; detail: too dear" in event[2]
    assert settings.listings[0].rows[0][0] == "probe"


def test_names_of_every_kind_are_escaped_everywhere(empty, tmp_path):
    names = [f"{evil}{number}" for number, evil in enumerate(runs.EVIL)]
    runs.fill_with(empty, names)
    path = write_report(
        {names[0]: empty, names[1]: empty}, tmp_path, title=names[2], facts=dict.fromkeys(names, names[0])
    )
    source = path.read_text(encoding="utf-8")
    assert "<script>window.evil" not in source
    assert "<img" not in source
    assert "</style></script>" not in source
    assert source.count("</script>") == source.count("<script>") + source.count('<script type="application/json"')


def test_what_has_no_section_of_its_own_is_shown_by_its_shape(empty, tmp_path):
    dims = {"agreement": ("layer", "target"), "overall": ("target",), "code": ("layer",), "kept": ("batch", "unit")}
    coords = {"layer": ["a", "b"], "target": ["left", "right"]}
    empty.declare("patches", dims=dims, coords=coords)
    for step in (0, 3):
        values = {"agreement": torch.tensor([[0.5, 1.0], [0.25, torch.nan]]) + step, "overall": torch.ones(2)}
        more = {"code": torch.zeros(2, dtype=torch.int8), "kept": torch.ones(4, 3)}
        empty.append("patches", values | more, step=step)
    section = others.section(empty, ())
    assert [picture.title for picture in section.pictures] == ["agreement (patches)", "overall (patches)"]
    maps = section.pictures[0].chart
    assert [panel.title for panel in maps.panels] == ["left · network", "right · network"]
    np.testing.assert_array_equal(maps.panels[0].values, [[0.5, 3.5], [0.25, 3.25]])
    assert maps.limits == (0.25, 4.0)
    assert "What else was measured" in write_report(empty, tmp_path).read_text(encoding="utf-8")


def test_what_has_a_section_is_not_shown_again(run, measured):
    assert others.section(run, ()) is None
    assert others.section(measured, ()) is None
