"""Saliency of policies, Greydanus' and SARFA, against loops written from the papers with scipy."""

import numpy as np
import pytest
import torch
from method_cases import measured, mlp
from scipy.ndimage import gaussian_filter
from scipy.special import softmax
from scipy.stats import entropy
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import Greydanus, Sarfa
from tdhook_train.errors import SettingsError, TargetError

SPACING, RADIUS, BLUR = 3, 2.0, 1.5


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def policy(actions=3):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 8, actions))


def l_of_pi(before, after):
    return 0.5 * ((before - after) ** 2).sum()


def sarfa(before, after, action):
    p, q = softmax(before), softmax(after)
    drop = p[action] - q[action]
    if drop <= 0:
        return 0.0
    rest_p, rest_q = (np.delete(x, action) / np.delete(x, action).sum() for x in (p, q))
    k = 1 / (1 + entropy(rest_q, rest_p))
    return 2 * k * drop / (k + drop)


def map_by_hand(model, image, score):
    """Blur one place of one image after another; between places, along one dimension after the other."""
    before = model(image[None]).detach().double().numpy()[0]
    height, width = image.shape[-2:]
    # the reach of the kernel as ours, in pixels; edges continued
    smooth = np.stack([gaussian_filter(c, BLUR, mode="nearest", radius=round(3 * BLUR)) for c in image.numpy()])
    downs, rights = range(0, height, SPACING), range(0, width, SPACING)
    grid = np.zeros((len(downs), len(rights)))
    for i, down in enumerate(downs):
        for j, right in enumerate(rights):
            y, x = np.mgrid[:height, :width]
            mask = np.exp(-((y - down) ** 2 + (x - right) ** 2) / (2 * RADIUS**2))
            moved = torch.tensor(image.numpy() * (1 - mask) + smooth * mask, dtype=torch.float32)
            grid[i, j] = score(before, model(moved[None]).detach().double().numpy()[0])
    across = np.stack([np.interp(range(width), rights, line) for line in grid])
    return torch.tensor(np.stack([np.interp(range(height), downs, line) for line in across.T], 1)).float()


GRID = {"spacing": SPACING, "radius": RADIUS, "blur": BLUR}


def test_greydanus_by_hand():
    model, x = policy(), torch.randn(3, 2, 8, 10)
    found = measured(Greydanus(**GRID), model, td_of(input=x))["attr", "input"]
    assert found.shape == x.shape
    for row, image in zip(found, x, strict=True):
        expected = map_by_hand(model, image, l_of_pi)
        assert_close(row, expected.expand(2, -1, -1), atol=1e-7, rtol=2e-4)
    cut = measured(Greydanus(**GRID, max_bytes=9000), model, td_of(input=x))["attr", "input"]
    assert_close(cut, found, atol=1e-7, rtol=2e-4)


def test_sarfa_by_hand():
    model, x = policy(4), torch.randn(3, 2, 8, 10)
    model[3].weight.data *= 10
    each = measured(Sarfa(**GRID, action="each"), model, td_of(input=x))["attr", "input"]
    chosen = measured(Sarfa(**GRID), model, td_of(input=x))["attr", "input"]
    assert each.max() > 0.01
    for row, image in enumerate(x):
        for action in range(4):
            expected = map_by_hand(model, image, lambda p, q, a=action: sarfa(p, q, a))
            assert_close(each[row, action], expected.expand(2, -1, -1), atol=1e-6, rtol=2e-4)
    best = model(x).argmax(1)
    assert_close(chosen, each[torch.arange(3), best])


@pytest.mark.parametrize("kind", [Greydanus, Sarfa])
def test_flat_observations_by_groups_of_features(kind):
    model, x, base = mlp(5, 16, 3), 2 * torch.randn(6, 5), torch.randn(6, 5)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [6])
    found = measured(kind(groups={"a": [0, 3], "b": [1]}), model, td)
    before = model(x).detach().double().numpy()
    for g, members in enumerate([[0, 3], [1], [2, 4]]):
        changed = x.clone()
        changed[:, members] = base[:, members]
        after = model(changed).detach().double().numpy()
        score = l_of_pi if kind is Greydanus else lambda p, q: sarfa(p, q, p.argmax())
        expected = torch.tensor([score(p, q) for p, q in zip(before, after, strict=True)]).float()
        assert_close(found["shares"][:, g], expected, atol=1e-6, rtol=1e-4)
        for feature in members:
            assert_close(found["attr", "input"][:, feature], expected, atol=1e-6, rtol=1e-4)


class Agent(nn.Module):
    """Looks at a camera, at its speed, or at both."""

    def __init__(self, looks):
        super().__init__()
        self.see, self.feel, self.looks = nn.Linear(2 * 6 * 6, 3), nn.Linear(4, 3), looks

    def forward(self, camera, speed):
        seen = self.see(camera.flatten(1)) if self.looks else camera.flatten(1)[:, :3] * 0
        return seen + self.feel(speed)


@pytest.mark.parametrize("kind", [Greydanus, Sarfa])
def test_a_policy_that_ignores_its_pixels_gives_0(kind):
    td = td_of(camera=torch.randn(4, 2, 6, 6), speed=torch.randn(4, 4))
    blind, seeing = Agent(looks=False), Agent(looks=True)
    blind.feel.load_state_dict(seeing.feel.state_dict())
    for model in (blind, seeing):
        with kind(spacing=2).prepare(model, ["camera", "speed"], ["logits"]) as hooked:
            found = hooked(td)
        assert found["attr", "camera"].eq(0).all() != model.looks
        assert found["attr", "speed"].ne(0).any()
        with kind(spacing=2).prepare(model, ["camera", "speed"], ["logits"]) as hooked:
            moved = hooked(td.clone().set("camera", td["camera"] * 3))["attr", "speed"]
        if model is blind or kind is Greydanus:
            assert_close(moved, found["attr", "speed"])  # images stay as they are while speeds are replaced


def test_masks_layers_and_references():
    model, x = policy(), torch.randn(3, 2, 8, 10)
    mask = torch.zeros(3, 2, 8, 10, dtype=torch.bool)
    td = TensorDict({"input": x, "mask": {"input": mask}}, [3])
    assert measured(Greydanus(**GRID), model, td)["attr", "input"].eq(0).all()
    mask[..., :5] = True
    found = measured(Greydanus(**GRID), model, TensorDict({"input": x, "mask": {"input": mask}}, [3]))["attr", "input"]
    for row, image in enumerate(x):
        expected = map_by_hand(lambda moved, image=image: model(torch.where(mask[0], moved, image)), image, l_of_pi)
        expected = expected * mask[0]
        assert_close(found[row], expected, atol=1e-7, rtol=2e-4)
    layer = measured(Greydanus(**GRID, layers="0"), model, td_of(input=x))["attr", "0"]
    tail = nn.Sequential(*list(model)[1:])
    inside = measured(Greydanus(**GRID), tail, td_of(input=model[0](x).detach()))["attr", "input"]
    assert_close(layer, inside, atol=1e-8, rtol=1e-4)
    flat, y = mlp(4, 8, 3), torch.randn(3, 4)
    many = measured(Sarfa(baseline="rows", references=5), flat, td_of(input=y))["attr", "input"]
    assert many.shape == (3, 4)


def test_illegal_moves_and_sure_policies_have_numbers():
    class Masked(nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.full_like(x[:, :1], -torch.inf)], 1)

    x = torch.tensor([[900.0, 1.0, 2.0], [1.0, 0.5, 2.0]])
    found = measured(Sarfa(action="each", targets=[("output", i) for i in range(4)]), Masked(), td_of(input=x))
    assert found["attr", "input"].isfinite().all()
    # the first row's choice is sure: without feature 0 its probability falls from 1 to that of 0 among 0, 1 and 2
    p = 1 - softmax([0.0, 1.0, 2.0])[0]
    assert_close(found["attr", "input"][0, 0, 0], torch.tensor(2 * p / (1 + p)).float())


def test_settings_that_do_not_fit():
    with pytest.raises(SettingsError, match="Greydanus needs no patch"):
        Greydanus(patch=3)
    with pytest.raises(SettingsError, match="action='best' is none of 'chosen', 'each'"):
        Sarfa(action="best")
    with pytest.raises(TargetError, match="compares the logits of 2 or more actions"):
        measured(Sarfa(targets=("output", 1)), mlp(3, 2), td_of(input=torch.randn(3, 3)))
    assert Greydanus().dims(("attr", "input"), 4) == ("batch", "channel", "height", "width")
    assert Sarfa(action="each").dims(("attr", "input"), 3) == ("batch", "target", "feature")
    assert Sarfa(action="chosen", reduction="mean").dims(("attr", "input"), 1) == ("feature",)


def test_one_score_for_whatever_targets_are_named():
    model, x = mlp(4, 8, 3), torch.randn(5, 4)
    every = measured(Greydanus(), model, td_of(input=x))["attr", "input"]
    assert_close(measured(Greydanus(targets="output"), model, td_of(input=x))["attr", "input"], every)
    each = [measured(Greydanus(targets=("output", i)), model, td_of(input=x))["attr", "input"] for i in range(3)]
    assert_close(sum(each), every)
