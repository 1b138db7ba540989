"""What the report shows of returns under ablation."""

import numpy as np
import pytest
import torch
from synthetic_run import layers

from tdhook_train.plots import write_report
from tdhook_train.plots.sections import ablation

STEPS, EPISODES, UNITS = (0, 10, 100), 4, 3


@pytest.fixture
def played(empty):
    """Returns that grow while layers come to be needed, the last most; one layer is two units wide."""
    names, kinds = layers(1)
    kinds, names = kinds[: names.index("critic_network.module.0")], [name for name in names if "actor" in name]
    dims = {"return_ablated": ("layer", "episode"), "drop": ("layer",), "unit_drop": ("layer", "unit")}
    empty.declare("returns", dims=dims, coords={"layer": names, "layer_type": kinds})
    draw = torch.Generator().manual_seed(0)
    for step in STEPS:
        ablated = 10 + torch.rand(len(names), EPISODES, generator=draw, dtype=torch.float64)
        drop = step * torch.linspace(-0.1, 1, len(names), dtype=torch.float64)
        units = drop[:, None] * torch.tensor([0.5, 0.25, 0.1])
        units[1, 2] = torch.nan
        empty.append("returns", {"return_ablated": ablated, "drop": drop, "unit_drop": units}, step=step)
    return empty


def test_drops_stand_over_layers_and_steps_on_the_same_colours(played):
    whole, unit, curves = (picture.figure for picture in ablation.section(played, ()).pictures)
    drop = played["returns"].series("drop").numpy()
    np.testing.assert_allclose(whole.data[-1].z, drop.T, rtol=1e-6)
    np.testing.assert_allclose(unit.data[-1].z, np.where(drop >= 0, drop * 0.5, drop * 0.1).T, atol=1e-6)
    assert unit.data[-1].z[1, -1] == pytest.approx(max(drop[-1, 1] * 0.5, drop[-1, 1] * 0.25))
    for figure in (whole, unit):
        assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 100)
    ablated = played["returns"].series("return_ablated").numpy().mean(-1)
    hover = whole.data[-1].customdata
    np.testing.assert_allclose(hover[..., 2], (ablated + drop).T, rtol=1e-6)
    np.testing.assert_allclose(hover[..., 3], ablated.T, rtol=1e-6)
    drawn = {line.name: line.y for line in curves.data}
    np.testing.assert_allclose(drawn["without the layer that is needed most"], ablated.min(-1))
    np.testing.assert_allclose(drawn["without the layer that is needed least"], ablated.max(-1))


def test_the_page_has_the_section_only_where_it_was_measured(played, run, tmp_path):
    title = "What the agent earns without a part of it"
    assert title in write_report(played, tmp_path / "played").read_text(encoding="utf-8")
    assert ablation.section(run, ()) is None


def test_a_run_in_which_nothing_is_needed_is_drawn(empty):
    empty.declare("returns", dims={"return_ablated": ("layer", "episode"), "drop": ("layer",)}, coords={"layer": ["0"]})
    empty.append("returns", {"return_ablated": torch.ones(1, 2), "drop": torch.tensor([-1.0])}, step=0)
    whole, _ = (picture.figure for picture in ablation.section(empty, ()).pictures)
    assert whole.layout.coloraxis.cmax == 1
