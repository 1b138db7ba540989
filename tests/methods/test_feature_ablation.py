"""Feature ablation: what is lost without each group, against a loop that leaves them out one by one."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import FeatureAblation
from tdhook_train.errors import SettingsError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def by_hand(model, x, base, groups):
    """One group after another, one row after another."""
    out = torch.zeros(*model(x).shape, len(groups))
    for i, row in enumerate(x):
        for g, members in enumerate(groups):
            changed = row.clone()
            changed[members] = base[i][members]
            out[i, :, g] = (model(row[None]) - model(changed[None]))[0].detach()
    return out


def test_each_feature_as_by_hand():
    model, x, base = mlp(4, 8, 3), torch.randn(5, 4), torch.randn(5, 4)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [5])
    found = measured(FeatureAblation(), model, td)
    assert_close(found["attr", "input"], by_hand(model, x, base, [[0], [1], [2], [3]]))


def test_groups_by_name_and_what_none_names():
    model, x = mlp(4, 8, 3), torch.randn(5, 4)
    method = FeatureAblation(groups={"a": [0, 3], "b": [1]})
    found = measured(method, model, td_of(input=x))
    expected = by_hand(model, x, torch.zeros_like(x), [[0, 3], [1], [2]])
    assert_close(found["shares"], expected)
    assert_close(found["attr", "input"], expected[..., [0, 1, 2, 0]])


def test_patches_of_an_image_and_groups_of_each_row():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2))
    x = torch.randn(3, 2, 5, 5)
    found = measured(FeatureAblation(patch=2), model, td_of(input=x))["attr", "input"]
    for down in range(3):
        for right in range(3):
            changed, square = x.clone(), (..., slice(2 * down, 2 * down + 2), slice(2 * right, 2 * right + 2))
            changed[square] = 0
            lost = (model(x) - model(changed)).detach()[:, :, None, None, None]
            assert_close(found[square], lost.expand_as(found[square]))
    ids = (torch.arange(25).view(5, 5) // 10).expand(3, 2, 5, 5)
    given = TensorDict({"input": x, "groups": {"input": ids}}, [3])
    rows = measured(FeatureAblation(), model, given)["attr", "input"]
    changed = x.clone()
    changed[:, :, :2] = 0
    assert_close(rows[:, :, 0, 0, 0], (model(x) - model(changed)).detach())


def test_tokens_are_replaced_by_those_of_the_baseline():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, tokens):
            return self.head(self.table(tokens).tanh().mean(1))

    model, tokens = Reads(), torch.randint(1, 7, (3, 5))
    with pytest.raises(
        SettingsError, match=r"'input' is torch.int64; give the batch what replaces it, \('baseline', 'inp"
    ):
        measured(FeatureAblation(), model, td_of(input=tokens))
    td = TensorDict({"input": tokens, "baseline": {"input": torch.zeros_like(tokens)}}, [3])
    found = measured(FeatureAblation(), model, td)["attr", "input"]
    for place in range(5):
        changed = tokens.clone()
        changed[:, place] = 0
        assert_close(found[..., place], (model(tokens) - model(changed)).detach())


def test_several_inputs_by_key():
    class Two(nn.Module):
        def forward(self, x, y):
            return (x.sum(-1) * y.sum(-1))[:, None]

    x, y = torch.randn(4, 2), torch.randn(4, 3)
    method = FeatureAblation(groups={"x": "x", "y0": [("y", 0)]})
    with method.prepare(Two(), ["x", "y"], ["o"]) as hooked:
        out = hooked(td_of(x=x, y=y))
    whole = x.sum(1) * y.sum(1)
    assert_close(out["shares"][:, 0], torch.stack([whole, x.sum(1) * y[:, 0], x.sum(1) * y[:, 1:].sum(1)], 1))


def test_an_input_of_one_number_a_row():
    class Scales(nn.Module):
        def forward(self, x, scale):
            return (x.sum(-1) * scale)[:, None]

    x, scale = torch.randn(4, 2), torch.randn(4)
    with FeatureAblation().prepare(Scales(), ["x", "scale"], ["o"]) as hooked:
        out = hooked(td_of(x=x, scale=scale))
    assert_close(out["attr", "x"][:, 0], x * scale[:, None])
    assert_close(out["attr", "scale"][:, 0], x.sum(1) * scale)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"a": [4]}, "'input' has features 0 to 3, not 4"),
        ({"a": [("inptu", 0)]}, "'inptu' is no input; did you mean 'input'"),
        ({"a": [0], "b": [0]}, "0 is in another group as well"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, said):
    with pytest.raises(SettingsError, match=said):
        measured(FeatureAblation(groups=groups), mlp(4, 2), td_of(input=torch.randn(3, 4)))


def test_the_values_of_captum():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed; `make peers` runs this where it is")
    model, x = mlp(4, 16, 2), torch.randn(6, 4)
    found = measured(FeatureAblation(targets=("output", 1), groups={"a": [0, 1], "b": [2, 3]}), model, td_of(input=x))
    mask = torch.tensor([[0, 0, 1, 1]])
    expected = captum.FeatureAblation(model).attribute(x, target=1, feature_mask=mask)
    assert_close(found["attr", "input"], expected, atol=1e-5, rtol=0)
