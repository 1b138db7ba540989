"""Attributions to images are shown as maps, beside the mean image."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensordict import TensorDict
from torch import nn

from tdhook_train import At, Observer, ProbeSet
from tdhook_train.attribution import Saliency
from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.plots import write_report
from tdhook_train.plots.sections import attribution, saliency

ROWS, CHANNELS, HEIGHT, WIDTH = 6, 2, 4, 5


class Corner(nn.Module):
    """Looks at one pixel, and at another one more and more."""

    def __init__(self):
        super().__init__()
        self.much = nn.Parameter(torch.tensor(0.5))

    def forward(self, pixels):
        pixels = pixels.float()
        return torch.stack([3 * pixels[:, 0, 0, 0] + self.much * pixels[:, 1, 2, 4], pixels[:, 0, 1, 1]], 1)


def pixels():
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, CHANNELS, HEIGHT, WIDTH)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture(params=["probe set", "named", "batch"])
def looked(request, tmp_path):
    """Run with maps at five ticks; where the run keeps its probe set, and where it does not."""
    net, td = Corner(), TensorDict(input=pixels(), batch_size=[ROWS])
    on = {"probe set": ProbeSet(td), "named": {"first": ProbeSet(td)}, "batch": "batch"}[request.param]
    with Observer({"maps": Saliency()}, when=At(0, 1, 2, 3, 4), into=tmp_path / "run", on=on) as observer:
        for step in range(5):
            with torch.no_grad():
                net.much.fill_(step)
            observer.step(net, td, step=step)
    return request.param, ArtifactBuffer.open(tmp_path / "run")


def test_maps_are_the_mean_size_over_rows_and_channels(looked):
    kind, run = looked
    first, second = saliency.maps(run)
    assert [first.target, second.target] == ["output.0", "output.1"]
    of_first = {panel.title: panel for panel in first.panels}
    assert [title for title in of_first if title != "mean image"] == ["step 0", "step 1", "step 3", "step 4"]
    for step in (0, 1, 3, 4):
        expected = np.zeros((HEIGHT, WIDTH))
        expected[0, 0], expected[2, 4] = 3 / CHANNELS, step / CHANNELS
        np.testing.assert_allclose(of_first[f"step {step}"].values, expected)
    if kind == "batch":
        assert "mean image" not in of_first
    else:
        np.testing.assert_allclose(of_first["mean image"].values, pixels().double().mean((0, 1)).numpy())


def test_images_have_a_section_of_their_own_and_no_lines(looked, tmp_path):
    _, run = looked
    assert attribution.panels(run) == []
    page = write_report(run, tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    assert "Where the outputs look" in text
    assert "output.1" in text
    assert imread(tmp_path / "report" / "report.png").shape[:2] == (1000, 1600)


def test_a_run_without_images_has_no_such_section(report):
    assert "Where the outputs look" not in report.read_text(encoding="utf-8")
