"""What a picture shows is what was measured."""

import numpy as np
import pytest
import synthetic_run as runs
import torch

from tdhook_train.errors import KeyMissingError
from tdhook_train.plots import HeatPanel, final_scores, heat_map, line_chart
from tdhook_train.plots.sections import attribution, health, patching, probe
from tdhook_train.plots.sections.patching import largest

STEPS = [0, 3, 10]
NAN = float("nan")
LAYERS = ["actor_network.module.0.0", "actor_network.module.0.1", "critic_network.module.0"]


def scores(buffer, r2, null, *, initial=None, layers=LAYERS, targets=("action",)):
    """Append a probe's rows; values are ``[steps, layers, targets]``."""
    keys = ("r2", "r2_null", "r2_initial", "r2_observation")
    coords = {"layer": list(layers), "target": list(targets)}
    buffer.declare("probe", dims=dict.fromkeys(keys, ("layer", "target")), coords=coords)
    r2, null = torch.as_tensor(r2).double(), torch.as_tensor(null).double()
    initial = torch.zeros_like(r2) if initial is None else torch.as_tensor(initial).double()
    for step, row in zip(STEPS, zip(r2, null, initial, strict=True), strict=False):
        values = dict(zip(keys, (*row, torch.full_like(row[0], 0.25)), strict=True))
        buffer.append("probe", values, step=step)
    return buffer


def test_cells_that_do_not_beat_the_null_are_grey_exactly_where_r2_is_at_most_the_null(empty):
    generator = torch.Generator().manual_seed(0)
    r2, null = (torch.rand(3, 3, 1, generator=generator).double() for _ in range(2))
    r2[0, 0], null[0, 0] = 0.5, 0.5  # a tie is no evidence
    r2[1, 1] = NAN
    null[2, 1] = NAN
    policy, value = probe.panels(scores(empty, r2, null), "action")
    expected = ~(r2 > null)[..., 0].T.numpy()
    np.testing.assert_array_equal(np.concatenate([policy.hidden, value.hidden]), expected)
    np.testing.assert_array_equal(np.isnan(np.concatenate([policy.shown, value.shown])), expected)
    assert expected[0, 0]
    assert expected[1, 1]
    assert expected[1, 2]


def test_grey_cells_reach_the_figure_and_hover_keeps_their_score(empty):
    r2 = np.array([0.5, 0.1, 0.7])[:, None, None].repeat(3, 1)
    shown = probe.panels(scores(empty, r2, np.full((3, 3, 1), 0.3)), "action")
    figure = heat_map(shown, unit="R²")
    colored = [trace for trace in figure.data if trace.type == "heatmap" and trace.text is not None]
    np.testing.assert_array_equal(np.isnan(colored[0].z), [[False, True, False]] * 2)
    np.testing.assert_allclose(colored[0].customdata[..., 1], r2[..., 0].T[:2], rtol=1e-6)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0.0, 1.0)


def test_a_null_that_was_never_computed_greys_nothing_and_is_confessed(empty):
    buffer = scores(empty, np.full((3, 3, 1), 0.5), np.full((3, 3, 1), NAN))
    assert not any(panel.hidden.any() for panel in probe.panels(buffer, "action"))
    assert "No null was computed" in probe.section(buffer, ()).pictures[0].note


def test_dots_lie_where_the_lead_over_the_initial_network_is_at_most_the_margin(empty):
    r2 = np.array([0.5, 0.5 + probe.MARGIN / 2, 0.6])[:, None, None].repeat(3, 1)
    panel = probe.panels(scores(empty, r2, np.zeros((3, 3, 1)), initial=np.full((3, 3, 1), 0.5)), "action")[0]
    np.testing.assert_array_equal(panel.dots, [[True, True, False]] * 2)
    row, column = panel.stippled
    np.testing.assert_array_equal(row, [0, 0, 1, 1])
    np.testing.assert_array_equal(column, [0, 1, 0, 1])


def test_dots_of_columns_that_lie_close_together_are_thinned_out():
    steps = np.arange(1000)
    ones = np.ones((2, 1000))
    panel = HeatPanel("", steps, ["a", "b"], ones, dots=ones > 0)
    row, column = panel.stippled
    assert len(row) <= 2 * 27
    assert set(row) == {0, 1}
    assert column.max() > 900


def test_networks_stand_apart_with_the_raw_observation_under_their_layers(empty):
    policy, value = probe.panels(scores(empty, np.full((3, 3, 1), 0.5), np.zeros((3, 3, 1))), "action")
    assert (policy.title, value.title) == ("policy network", "value network")
    assert (len(policy.rows), len(value.rows)) == (2, 1)
    label, values = policy.below
    assert label == "raw observation"
    np.testing.assert_array_equal(values, [0.25] * 3)


def test_of_two_rows_of_one_step_the_last_written_counts(empty):
    buffer = scores(empty, np.full((3, 3, 1), 0.5), np.zeros((3, 3, 1)))
    high = torch.full((3, 1), 0.9, dtype=torch.float64)
    again = {"r2": high, "r2_null": high, "r2_initial": high, "r2_observation": high}
    buffer.append("probe", again, step=3)
    panel = probe.panels(buffer, "action")[0]
    np.testing.assert_array_equal(panel.steps, STEPS)
    np.testing.assert_array_equal(panel.values[0], [0.5, 0.9, 0.5])


def test_final_scores_are_the_values_put_in(empty):
    generator = torch.Generator().manual_seed(0)
    r2, null, initial = (torch.rand(3, 3, 2, generator=generator).double() for _ in range(3))
    table = final_scores(scores(empty, r2, null, initial=initial, targets=("action", "value")))
    assert list(table.index) == LAYERS
    assert list(table["value"].columns) == ["r2", "raw observation", "initial network", "null"]
    for place, target in enumerate(("action", "value")):
        np.testing.assert_array_equal(table[target, "r2"], r2[-1, :, place])
        np.testing.assert_array_equal(table[target, "null"], null[-1, :, place])
        np.testing.assert_array_equal(table[target, "initial network"], initial[-1, :, place])
        np.testing.assert_array_equal(table[target, "raw observation"], [0.25] * 3)


def test_final_scores_without_a_probe_say_so(empty):
    with pytest.raises(KeyMissingError, match="holds no probe scores"):
        final_scores(empty)


def test_attribution_is_the_mean_size_over_the_batch_and_keeps_the_sign_for_the_hover(empty):
    key = ("actor_network", "attr", "observation")
    coords = {"actor_network.target": ["loc", "scale"], "feature": ["x", "v"]}
    empty.declare("ig", dims={key: ("batch", "actor_network.target", "feature")}, coords=coords)
    values = torch.tensor([[[1.0, -4.0], [0.0, 1.0]], [[-1.0, -2.0], [0.0, 3.0]]])
    empty.append("ig", {"actor_network": {"attr": {"observation": values}}}, step=0)
    panels = attribution.panels(empty)
    assert [panel.title for panel in panels] == ["loc · policy network", "scale · policy network"]
    found = {line.name: line for line in panels[0].lines}
    assert {name: line.y.item() for name, line in found.items()} == {"x": 1.0, "v": 3.0}
    assert {name: line.hover["signed mean"].item() for name, line in found.items()} == {"x": 0.0, "v": -3.0}
    assert "units of loc" in panels[0].unit


def test_attribution_of_a_bare_model_without_targets_or_labels(empty):
    empty.append("ig", {("attr", "input"): torch.ones(4, 3)}, step=0)
    empty_dims = empty["ig"].dims(("attr", "input"))
    assert len(empty_dims) == 2
    panel = attribution.panels(empty)[0]
    assert len(panel.lines) >= 3


def test_the_share_of_the_largest_unit_leaves_out_units_that_a_layer_does_not_have(run):
    np.testing.assert_array_equal(largest(np.array([[1.0, np.nan, 3.0], [np.nan] * 3])), [3.0, np.nan])
    units, whole = (run["patching"].series(key).numpy() for key in ("unit_effect", "effect"))
    share = np.nanmax(units[:, :7, :, 0], -1) / whole[:, :7, 0]
    figure = patching.section(run, ()).pictures[0].figure
    colored = [trace for trace in figure.data if trace.type == "heatmap" and trace.text is not None]
    assert len(colored) == 2  # one network an output, not every pair
    np.testing.assert_allclose(colored[0].z, share.T)


def test_health_without_any_dead_unit_is_a_sentence(run):
    pictures = {picture.title: picture for picture in health.section(run, ()).pictures}
    assert pictures["Dead units"].figure is None
    assert "None, in any layer at any tick" in pictures["Dead units"].note
    assert pictures["Dormant units (τ = 0.1)"].figure is not None
    rank = health.measures(run)[-1].share.values
    np.testing.assert_allclose(rank, run["health"].series("effective_rank_centred") / runs.WIDTH)


def test_nothing_to_draw_is_refused():
    with pytest.raises(KeyMissingError, match="no panel"):
        heat_map([], unit="R²")
    with pytest.raises(KeyMissingError, match="no panel"):
        line_chart([])


def test_columns_of_another_schedule_are_matched_by_step(empty):
    coords = {"layer": ["0", "1"]}
    empty.declare("rank", dims={"effective_rank": ("layer",)}, coords=coords)
    empty.declare("size", dims={"width": ("layer",)}, coords=coords)
    for step in (0, 2, 3):
        empty.append("rank", {"effective_rank": torch.tensor([2.0, 3.0])}, step=step)
    for step in (2, 3, 9):
        empty.append("size", {"width": torch.tensor([4.0, 4.0])}, step=step)
    share = health.measures(empty)[0].share.values
    np.testing.assert_array_equal(share, [[NAN, NAN], [0.5, 0.75], [0.5, 0.75]])


def test_more_than_two_networks_wrap_into_rows(empty):
    layers = ["actor_network.module.0", *(f"qvalue_network.{member}.module.0" for member in range(4))]
    buffer = scores(empty, np.full((3, 5, 1), 0.5), np.zeros((3, 5, 1)), layers=layers)
    panels = probe.panels(buffer, "action")
    assert [panel.title for panel in panels][1:3] == ["Q network 0", "Q network 1"]
    figure = heat_map(panels, unit="R²")
    assert len(list(figure.select_xaxes())) == 5
    assert "xaxis5.type" in figure.layout.meta["linear"]


def test_cells_without_a_score_are_counted_with_their_reason(empty):
    legend = {"reason": {0: "scored", 2: "the target is constant"}}
    dims = dict.fromkeys(("r2", "reason"), ("layer", "target"))
    coords = {"layer": ["0", "1"], "target": ["a", "b"]}
    empty.declare("probe", dims=dims, coords=coords, legend=legend)
    reason = torch.tensor([[0, 2], [0, 2]], dtype=torch.int8)
    empty.append("probe", {"r2": torch.tensor([[0.5, NAN], [0.5, NAN]]), "reason": reason}, step=0)
    first, second = (picture.note for picture in probe.section(empty, ()).pictures)
    assert "Cells without" not in first
    assert "Cells without a score: the target is constant (2)." in second
