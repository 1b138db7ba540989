"""Grad-CAM: the weighted maps as loops over the paper's equations."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.nn.functional import interpolate
from torch.testing import assert_close

from tdhook_train.attribution import GradCam, GuidedBackpropagation
from tdhook_train.errors import NetworkError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(5 * 4 * 4, 6), nn.ReLU(), nn.Linear(6, 3)),
    )


def by_hand(front, back, x):
    """Equations 1 and 2, row by row, target by target, map by map."""
    out = []
    for row in x:
        maps = front(row[None]).detach().requires_grad_()
        of_row = []
        for score in back(maps)[0]:
            (grad,) = torch.autograd.grad(score, maps, retain_graph=True)
            total = torch.zeros_like(maps[0, 0])
            for k in range(maps.shape[1]):
                total = total + grad[0, k].mean() * maps[0, k]
            of_row.append(total.clamp(min=0))
        out.append(torch.stack(of_row))
    return torch.stack(out).detach()


def test_the_last_convolution_by_default_by_hand():
    model, x = cnn(), torch.randn(4, 2, 8, 8)
    found = measured(GradCam(), model, td_of(input=x))
    expected = by_hand(model[:3], model[3:], x)
    assert_close(found["attr", "2"], expected)
    assert expected.any()
    assert_close(found["upsampled", "2"], interpolate(expected, (8, 8), mode="bilinear"))
    assert ("guided", "2") not in found.keys(True)
    one = measured(GradCam(targets=("output", 1)), model, td_of(input=x))
    assert_close(one["attr", "2"], expected[:, 1])
    names = GradCam().dims(("attr", "2"), 4)
    assert names == ("batch", "target", "place_0", "place_1")


def test_other_layers_rows_cut_and_reduced():
    model, x = cnn(), torch.randn(4, 2, 8, 8)
    td = td_of(input=x)
    found = measured(GradCam(layers=["1", "3"], max_bytes=1), model, td)
    for layer, start in (("1", 2), ("3", 4)):
        assert_close(found["attr", layer], by_hand(model[:start], model[start:], x))
    inside = measured(GradCam(layers="2", side="input"), model, td)
    assert_close(inside["attr", "2"], by_hand(model[:2], model[2:], x))
    mean = measured(GradCam(reduction="mean", rows=2), model, td)["attr", "2"]
    assert_close(mean, by_hand(model[:3], model[3:], x[[0, 2]]).mean(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("inplace", [False, True])
def test_guided_is_times_guided_backpropagation(inplace):
    model, x = cnn(), torch.randn(4, 2, 8, 8)
    model[3] = nn.ReLU(inplace)
    td = td_of(input=x)
    found = measured(GradCam(variant="guided"), model, td)
    guided = measured(GuidedBackpropagation(), model, td)["attr", "input"]
    assert found["guided", "2"].shape == (4, 3, 2, 8, 8)
    assert_close(found["guided", "2"], guided * found["upsampled", "2"][:, :, None])
    assert GradCam().dims(("guided", "2"), 5)[2:] == ("channel", "height", "width")


def test_tokens_have_a_place_each_and_a_layer_without_places_one_number():
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), torch.randn(5, 4, 3)
    found = measured(GradCam(layers="1"), model, td_of(input=x))["attr", "1"]
    axes = nn.Sequential(model[0], model[1])
    back = nn.Sequential(model[2], model[3])
    turned = by_hand(lambda row: axes(row).mT, lambda maps: back(maps.mT), x)
    assert_close(found, turned)
    flat, y = mlp(3, 5, 2), torch.randn(4, 3)
    h = flat[:2](y)
    expected = torch.einsum("tk,rk->rt", flat[2].weight, h).relu().detach()
    assert_close(measured(GradCam(layers="1"), flat, td_of(input=y))["attr", "1"], expected)


def test_a_line_of_time_is_upsampled_and_of_several_inputs_the_image():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(2, 4, 3, stride=2), nn.Linear(12 + 3, 2)

        def forward(self, sound, speed):
            return self.head(torch.cat([self.conv(sound).relu().flatten(1), speed], 1))

    model, td = Two(), td_of(sound=torch.randn(3, 2, 8), speed=torch.randn(3, 3))
    out = measured(GradCam(), model, td, in_keys=["sound", "speed"], out_keys=["o"])
    assert out["attr", "conv"].shape == (3, 2, 3)
    assert_close(out["upsampled", "conv"], interpolate(out["attr", "conv"], 8, mode="linear"))


def test_what_cannot_be_shown_is_said():
    with pytest.raises(NetworkError, match=r"GradCam needs layers=.*, Sequential ran no convolution: 2 Linear"):
        measured(GradCam(), mlp(3, 4, 2), td_of(input=torch.randn(5, 3)))
    with pytest.raises(NetworkError, match="needs one image that Sequential reads, in as many dimensions as '1'"):
        measured(GradCam(layers="1", variant="guided"), mlp(3, 4, 2), td_of(input=torch.randn(5, 3)))


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
def test_the_values_of_captum():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    model, x = cnn(), torch.randn(4, 2, 8, 8)
    found = measured(GradCam(variant="guided"), model, td_of(input=x))
    for i in range(3):
        cam = captum.LayerGradCam(model, model[2]).attribute(x, target=i, relu_attributions=True)
        assert_close(found["attr", "2"][:, i], cam[:, 0].detach(), atol=1e-5, rtol=0)
        way = captum.GuidedGradCam(model, model[2])
        guided = way.attribute(x.clone().requires_grad_(), target=i, interpolate_mode="bilinear")
        assert_close(found["guided", "2"][:, i], guided.detach(), atol=1e-5, rtol=0)
