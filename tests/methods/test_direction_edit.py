"""A layer moved along a direction: projections that are asked for, everything else as it was."""

import pickle

import pytest
import torch
from method_cases import above_zero, batch, measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train import At, LiveEdit, Observer
from tdhook_train.errors import SettingsError
from tdhook_train.latent import DirectionEdit, MeanDifferenceDirection

U = torch.tensor([3.0, 0, 4, 0, 0]).double() / 5


def given_out(edit, model, x, layer):
    """What the layer gives out with the edit, and without."""
    kept, plain = [], []
    handle = model.get_submodule(layer).register_forward_hook(lambda *args: plain.append(args[2].detach()))
    with edit.prepare(model):
        later = model.get_submodule(layer).register_forward_hook(lambda *args: kept.append(args[2].detach()))
        out = model(x)
    handle.remove()
    later.remove()
    return kept[0], plain[0], out


@pytest.mark.parametrize("length", [1, 0.01, 30])
@pytest.mark.parametrize(
    ("by", "amount", "asked"),
    [("add", 2.5, lambda p: p + 2.5), ("set", -1.5, lambda p: 0 * p - 1.5), ("project_out", None, lambda p: 0 * p)],
)
def test_the_projection_is_what_was_asked_for_and_the_rest_stays(by, amount, asked, length):
    model, x = mlp(3, 5, 2).double(), torch.randn(7, 3).double()
    edited, plain, out = given_out(DirectionEdit("1", U * length, by, amount), model, x, "1")
    assert_close(plain, model[:2](x))
    assert_close(edited @ U, asked(plain @ U))
    across = torch.eye(5).double() - torch.outer(U, U)
    assert_close(edited @ across, plain @ across)
    assert_close(out, model[2](edited))
    assert_close(model(x), model[2](plain))  # afterwards the model is as it was


def test_every_position_of_an_image_along_its_channels():
    model, x = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh()).double(), torch.randn(4, 2, 6, 6).double()
    edited, plain, _ = given_out(DirectionEdit("1", U, "set", 1.0), model, x, "1")
    assert_close(torch.einsum("bchw,c->bhw", edited, U), torch.ones(4, 4, 4).double())
    assert_close(edited[:, [1, 3, 4]], plain[:, [1, 3, 4]])


def test_a_direction_for_each_layer_as_it_was_measured():
    model, td = mlp(3, 6, 5, 2).double(), batch().double()
    found = measured(MeanDifferenceDirection(("0", "2"), above_zero), model, td)["direction"]
    edit = DirectionEdit(direction=found, by="project_out")
    assert edit.layers == ("0", "2")
    assert edit == DirectionEdit(direction={"0": found["0"].tolist(), "2": found["2"]}, by="project_out")
    assert pickle.loads(pickle.dumps(edit)) == edit
    assert hash(edit) == hash(DirectionEdit(direction=found, by="project_out"))
    assert edit != DirectionEdit("0", direction=found, by="project_out")
    with edit.prepare(model) as hooked, hooked.model.run(td) as run:
        first, second = run.get("0"), run.get("2")
    for site, value in (("0", first), ("2", second)):
        assert_close(value.resolve() @ found[site], torch.zeros(24).double())
    with (
        pytest.raises(SettingsError, match="'1' needs numbers of its own; "),
        DirectionEdit("1", found, "project_out").prepare(model),
    ):
        pass


def test_the_members_of_an_ensemble_are_all_edited():
    members, x = [mlp(3, 5, 2) for _ in range(3)], torch.randn(4, 3)
    stacked, net = TensorDict.from_modules(*members, as_module=False).data, mlp(3, 5, 2)

    def one(weights):
        with weights.to_module(net):
            return net(x)

    edit = DirectionEdit("1", U, "set", 1.0)
    with edit.prepare(net):
        found = torch.vmap(one)(stacked)
    for member, given in zip(members, found, strict=True):
        assert_close(given, given_out(edit, member, x, "1")[2], atol=1e-6, rtol=1e-5)


def test_a_live_network_is_edited_for_a_span(tmp_path):
    model, x = mlp(3, 5, 2), torch.randn(6, 3)
    plain = model(x)
    edits = {"without": LiveEdit(DirectionEdit(direction={"1": U}, by="project_out"), when=At(1), steps=2)}
    with Observer({}, when=At(0), into=tmp_path, edits=edits) as observer:
        outs = []
        for step in range(5):
            observer.step(model, TensorDict(input=x, batch_size=[6]), step=step)
            outs.append(model(x))
    assert [torch.equal(out, plain) for out in outs] == [True, False, False, True, True]
    assert_close(outs[1], given_out(DirectionEdit("1", U, "project_out"), model, x, "1")[2])


def test_a_direction_that_does_not_fit_is_named():
    model = mlp(3, 5, 2)
    with (
        pytest.raises(SettingsError, match="'2' has 2 units, the direction 5"),
        DirectionEdit("2", U, "set", 0.0).prepare(model),
    ):
        model(torch.zeros(1, 3))
    with pytest.raises(SettingsError, match=r"by='project_out' needs no amount, got 1\.0"):
        DirectionEdit("0", U, "project_out", 1.0)
    nothing = measured(MeanDifferenceDirection("0", lambda td: td["input"][:, 0] > 99), model, batch())
    with pytest.raises(
        SettingsError, match="needs finite numbers; where nothing was found there are none, and `reason`"
    ):
        DirectionEdit(direction=nothing["direction"], by="project_out")
    assert all(not module._forward_hooks for module in model.modules())
