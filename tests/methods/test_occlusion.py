"""Occlusion: what is lost with each window, averaged over the windows of a feature, against loops."""

import itertools

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import Occlusion
from tdhook_train.errors import SettingsError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def by_hand(model, x, base, window, stride):
    """One window after another; a window starts wherever the one before it has not reached the end."""
    whole = model(x).detach()
    lost, count = torch.zeros(*whole.shape, *x.shape[1:]), torch.zeros(x.shape[1:])
    starts = []
    for size, wide, apart in zip(x.shape[1:], window, stride, strict=True):
        along = [0]
        while along[-1] + wide < size:
            along.append(along[-1] + apart)
        starts.append(along)
    for corner in itertools.product(*starts):
        square = tuple(slice(start, start + wide) for start, wide in zip(corner, window, strict=True))
        changed = x.clone()
        changed[(slice(None), *square)] = base[(slice(None), *square)]
        drop = whole - model(changed).detach()
        lost[(slice(None), slice(None), *square)] += drop.view(*drop.shape, *[1] * len(square))
        count[square] += 1
    return lost / count


def image_model():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(60, 2))


def sequence_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(28, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("model", "shape", "settings", "window", "stride"),
    [
        (image_model, (2, 6, 7), {}, (2, 3, 3), (2, 1, 1)),
        (image_model, (2, 6, 7), {"window": 3, "stride": 2}, (2, 3, 3), (2, 2, 2)),
        (image_model, (2, 6, 7), {"window": (1, 4, 2), "stride": (1, 3, 2)}, (1, 4, 2), (1, 3, 2)),
        (sequence_model, (7, 4), {"window": 3, "stride": 2}, (3, 4), (2, 4)),
        (sequence_model, (7, 4), {"window": (2, 3), "stride": (1, 2)}, (2, 3), (1, 2)),
        (lambda: mlp(9, 8, 2), (9,), {"window": 4, "stride": 3}, (4,), (3,)),
        (lambda: mlp(9, 8, 2), (9,), {"window": 20}, (9,), (1,)),
    ],
)
def test_every_window_by_hand(model, shape, settings, window, stride):
    model, x, base = model(), torch.randn(3, *shape), torch.randn(3, *shape)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [3])
    expected = by_hand(model, x, base, window, stride)
    found = measured(Occlusion(**settings), model, td)["attr", "input"]
    assert_close(found, expected, atol=1e-6, rtol=1e-4)
    cut = measured(Occlusion(**settings, max_bytes=500), model, td)["attr", "input"]
    assert_close(cut, expected, atol=1e-6, rtol=1e-4)


def test_a_linear_network_in_closed_form():
    model, x = nn.Linear(5, 2), torch.randn(3, 5)
    found = measured(Occlusion(window=1), model, td_of(input=x))["attr", "input"]
    assert_close(found, (model.weight * x[:, None]).detach(), atol=1e-6, rtol=1e-4)
    halves = measured(Occlusion(window=2, stride=2), model, td_of(input=x))["attr", "input"]
    assert_close(halves[..., 0], (model.weight * x[:, None])[..., :2].sum(-1).detach(), atol=1e-6, rtol=1e-4)
    assert_close(halves[..., 4], found[..., 4])  # the last window is cut off


def test_several_inputs_of_different_ranks_layers_masks_and_tokens():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(7, 3), nn.Linear(3, 2)

        def forward(self, tokens, image, number):
            return self.mix(self.table(tokens).tanh().sum(1)) * number[:, None] + image.sum((1, 2, 3))[:, None]

    model = Many()
    tokens, image, number = torch.randint(1, 7, (3, 4)), torch.randn(3, 2, 3, 3), torch.randn(3)
    mask = torch.rand(3, 2, 3, 3) > 0.3
    td = TensorDict(
        {
            "tokens": tokens,
            "image": image,
            "number": number,
            "baseline": {"tokens": torch.zeros_like(tokens)},
            "mask": {"image": mask},
        },
        [3],
    )
    with Occlusion(window=1).prepare(model, ["tokens", "image", "number"], ["o"]) as hooked:
        found = hooked(td)
    for place in range(4):
        changed = tokens.clone()
        changed[:, place] = 0
        lost = (model(tokens, image, number) - model(changed, image, number)).detach()
        assert_close(found["attr", "tokens"][..., place], lost, atol=1e-5, rtol=1e-4)
    without = model(tokens, image, torch.zeros(3))
    assert_close(found["attr", "number"], (model(tokens, image, number) - without).detach(), atol=1e-5, rtol=1e-4)
    both = (image * mask).sum(1, keepdim=True) * mask
    assert_close(found["attr", "image"][:, 1], both, atol=1e-5, rtol=1e-4)
    with Occlusion(window=2, layers="mix").prepare(model, ["tokens", "image", "number"], ["o"]) as hooked:
        assert hooked(td)["attr", "mix"].shape == (3, 2, 2)


def test_settings_that_do_not_fit():
    td = td_of(input=torch.randn(3, 4))
    with pytest.raises(SettingsError, match="needs stride of at most the window, got 3 of 2"):
        measured(Occlusion(window=2, stride=3), mlp(4, 2), td)
    with pytest.raises(SettingsError, match=r"\(1, 2\) has 2 number\(s\), rows have 1 dimension\(s\)"):
        measured(Occlusion(window=(1, 2)), mlp(4, 2), td)
    assert Occlusion(window=[1, 2]) == Occlusion(window=(1, 2))


def test_what_does_not_look_has_exactly_0():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    assert measured(Occlusion(window=2), model, td_of(input=torch.randn(4, 3)))["attr", "input"].eq(0).all()


@pytest.mark.parametrize(("window", "stride"), [((2, 3, 3), (2, 2, 3)), ((1, 2, 4), (1, 1, 2))])
def test_the_values_of_captum(window, stride):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    model, x = image_model(), torch.randn(3, 2, 6, 7)
    found = measured(Occlusion(targets=("output", 1), window=window, stride=stride), model, td_of(input=x))
    expected = captum.Occlusion(model).attribute(x, sliding_window_shapes=window, strides=stride, target=1)
    assert_close(found["attr", "input"], expected, atol=1e-5, rtol=0)
