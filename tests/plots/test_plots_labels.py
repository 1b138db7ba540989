"""Names and places on axes."""

import itertools

import numpy as np
import pytest

from tdhook_train.plots import final_scores, score_table
from tdhook_train.plots.axes import spread
from tdhook_train.plots.labels import by_network, network_name, short_layers, thin_out
from tdhook_train.plots.png import main_targets
from tdhook_train.plots.step_axis import count, edges, positions, ticks


def test_layers_are_told_apart_by_network_and_members_of_an_ensemble_by_number():
    labels = ["actor_network.module.0.1", "qvalue_network.0.module.2", "qvalue_network.1.module.2"]
    assert by_network(labels) == {"actor_network": [0], "qvalue_network.0": [1], "qvalue_network.1": [2]}
    assert by_network(["critic_network.0", "critic_network.1"]) == {"critic_network": [0, 1]}
    assert by_network(["0", "encoder.layers.1", "model.head"]) == {"": [0, 1, 2]}


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("actor_network", "policy network"),
        ("critic_network", "value network"),
        ("target_value_network", "target value network"),
        ("qvalue_network.1", "Q network 1"),
        ("", "network"),
    ],
)
def test_networks_have_the_names_that_readers_use(network, name):
    assert network_name(network) == name


def test_layers_have_the_names_that_somebody_gave_or_those_of_their_class():
    labels = ["actor_network.module.0.module.0", "actor_network.module.0.module.1"]
    assert short_layers(labels, ["Linear", "NormalParamExtractor:1"]) == ["1 Linear", "2 scale"]
    assert short_layers(labels) == ["1 · 0", "2 · 1"]
    assert short_layers(["0"]) == ["1 · 0"]
    assert short_layers(["a.b.0", "a.c"], ["Linear", "Linear"]) == ["b.0", "c"]
    assert short_layers(["net.conv1", "net.head:1"], ["Conv2d", "Head:1"]) == ["conv1", "head:1"]
    assert short_layers(["conv", "0"], ["Conv2d", "Tanh"]) == ["1 Conv2d", "2 Tanh"]  # one way for all
    assert short_layers(["a.module.0", "b.module.0"], ["Linear", "Linear"]) == ["1 Linear", "2 Linear"]
    assert short_layers(["x" * 25, "y"], ["Linear", "Linear"]) == ["1 Linear", "2 Linear"]


def test_labels_are_thinned_out_evenly():
    assert thin_out(list("abcde"), 5) == [0, 1, 2, 3, 4]
    assert thin_out(list("abcde"), 3) == [0, 2, 4]
    assert len(thin_out(["x"] * 300, 32)) <= 32


@pytest.mark.parametrize("steps", [[0], [5000], [0, 1, 2, 4, 8], [0, 300, 301], [10, 20, 10_000]])
def test_borders_enclose_their_steps_and_nothing_else(steps):
    steps = np.array(steps)
    borders, at = edges(steps), positions(steps)
    assert (borders > 0).all()
    assert (borders[:-1] < at).all()
    assert (at < borders[1:]).all()


@pytest.mark.parametrize(
    ("low", "high"), [(0.7, 16_000), (0.7, 1.5), (5000, 5200), (3334, 7501), (0.7, 2.9), (1e6, 3e6)]
)
@pytest.mark.parametrize("scale", ["log", "linear"])
def test_there_are_ticks_on_every_range_and_none_outside(low, high, scale):
    places, texts = ticks(scale, low, high)
    assert len(places) == len(texts) == len(set(places)) >= 1
    assert all(low <= place <= high for place in places)


def test_the_end_of_a_run_is_labelled_where_no_decade_is_near():
    assert ticks("log", *edges(np.arange(921))[[0, -1]])[1] == ["0", "1", "10", "100", "500"]
    assert ticks("log", *edges(np.arange(1501))[[0, -1]])[1] == ["0", "1", "10", "100", "1k"]


def test_counts_are_short():
    assert [count(number) for number in (0, 1, 999, 1000, 15_680, 2.5e6)] == ["0", "1", "999", "1k", "15.68k", "2.5M"]


def test_labels_at_line_ends_do_not_overlap_and_keep_their_order():
    heights = spread([0.9, 0.88, 0.02, 0.01, 0.0], gap=0.1)
    assert all(upper - lower >= 0.1 - 1e-9 for upper, lower in itertools.pairwise(heights))
    assert heights[-1] == 0.0
    assert heights[0] == 0.9


def test_the_picture_shows_action_value_and_a_velocity_where_there_are_such():
    assert main_targets(["x", "cart velocity", "value", "action"]) == ["action", "value", "cart velocity"]
    assert main_targets(["a", "b", "c", "d"]) == ["a", "b", "c"]
    assert main_targets(["speed"]) == ["speed"]


def test_score_table_marks_what_is_no_evidence(run):
    table = score_table(run)
    scores = final_scores(run)
    lines = {line.split()[0]: line for line in table.splitlines()[1:] if line.startswith(("actor", "critic"))}
    assert list(lines) == list(scores.index)
    for target in scores.columns.get_level_values("target").unique():
        for layer, row in scores[target].iterrows():
            known = "~" if row["r2"] <= row["initial network"] + 0.01 else ""
            mark = "-" if row["r2"] <= row["null"] else known
            assert f"{row['r2']:.2f} {mark}".strip() in lines[layer]
    assert table.splitlines()[-2].startswith("raw observation")


def test_layers_of_several_agents_are_told_apart():
    labels = [f"actor_network.module.0._empty_net.{layer}:agent {agent}" for layer in range(2) for agent in range(2)]
    shown = short_layers(labels, ["Linear", "Linear", "Tanh", "Tanh"])
    assert shown == ["1 Linear agent 0", "2 Linear agent 1", "3 Tanh agent 0", "4 Tanh agent 1"]
