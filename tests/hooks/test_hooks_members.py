"""Inside vmap a value hides its members; what leaves the pass has them, and what enters may."""

import pytest
import torch
from hooks_models import rows
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close
from torchrl.modules import MultiAgentMLP

from tdhook_train import HookedModel
from tdhook_train.errors import SetterError


class Ensemble(nn.Module):
    """Two members with weights of their own, run together by vmap."""

    def __init__(self, members=2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.stacked = nn.ParameterDict(
            {name.replace(".", "_"): torch.randn(members, *p.shape) for name, p in self.net.named_parameters()}
        )

    def forward(self, x):
        weights = {name: self.stacked[name.replace(".", "_")] for name, _ in self.net.named_parameters()}
        return torch.vmap(lambda w: torch.func.functional_call(self.net, w, x))(weights)

    def member(self, i, x):
        """The member's layers by hand."""
        w0, b0, w2, b2 = (self.stacked[f"{layer}_{what}"][i] for layer in (0, 2) for what in ("weight", "bias"))
        pre = x @ w0.T + b0
        return pre, pre.tanh(), pre.tanh() @ w2.T + b2


def by_hand(model, x, layer):
    return torch.stack([model.member(i, x)[layer] for i in range(2)], 1).detach()


def test_values_carry_their_members_behind_the_batch_and_can_be_used():
    model, x = Ensemble(), torch.randn(5, 3)
    hooked = HookedModel(model, out_keys=["q"])
    hooked.trace(rows(x))
    assert hooked.sites("**") == ("net.0", "net.1", "net.2")
    with hooked.run(rows(x)) as run:
        every, mean = run.get("net.*"), run.get("net.1", reduce=lambda h: h.mean(0))
    for layer, value in enumerate(every.resolve().values()):
        assert_close(value, by_hand(model, x, layer))
        assert value.numpy().shape[:2] == (5, 2)
    assert_close(mean.resolve(), by_hand(model, x, 1).mean(0))


def test_values_are_set_for_all_members_or_for_each():
    model, x, hidden = Ensemble(), torch.randn(5, 3), torch.randn(5, 2, 4)
    hooked = HookedModel(model, out_keys=["q"])

    def q(value):
        with hooked.run(rows(x)) as run:
            run.set("net.1", value)
        return run.output["q"]

    def head(h):
        w, b = model.stacked["2_weight"], model.stacked["2_bias"]
        return (torch.einsum("rmi,moi->rmo", h, w) + b).movedim(1, 0).detach()

    assert_close(q(hidden), head(hidden))
    assert_close(q(hidden[:, 0]), head(hidden[:, :1].expand(5, 2, 4)))  # one value for every member
    assert_close(q(lambda h: h * 2), head(by_hand(model, x, 1) * 2))
    with hooked.run(rows(x)) as run:
        run.set("net.1", run.get("net.0"))
    assert_close(run.output["q"], head(by_hand(model, x, 0)))
    with pytest.raises(SetterError, match=r"shape \(2, 5, 4\) was given where the module has \(5, 4\)"):
        q(torch.randn(2, 5, 4))


def test_gradients_are_read_and_bent_for_each_member():
    model, x = Ensemble(), torch.randn(5, 3)
    with HookedModel(model, out_keys=["q"]).run(rows(x)) as run:
        pre, hidden = run.get_grad("net.0"), run.get_grad("net.1")
        run.set_grad("net.1", lambda g: g * torch.tensor([[1.0], [10.0]]))
        run.backward(lambda out: out["q"][..., 0].sum())
    weights = model.stacked["2_weight"][:, 0].detach().expand(5, 2, 4)
    assert_close(hidden.resolve(), weights)
    slope = 1 - by_hand(model, x, 1).square()
    assert_close(pre.resolve(), weights * slope * torch.tensor([[1.0], [10.0]]))


def test_where_vmap_hides_the_batch_itself_rows_come_first_as_well():
    class Each(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return torch.vmap(self.layer, in_dims=1)(x.T)

    model, x = Each(), torch.randn(5, 3)
    with HookedModel(model).run(rows(x)) as run:
        value, entered = run.get("layer"), run.get_input("layer")
    assert_close(value.resolve(), model.layer(x).detach())
    assert torch.equal(entered.resolve(), x)


def test_one_vmap_inside_another():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x):
            outer, inner = torch.arange(1.0, 3.0), torch.arange(1.0, 4.0)
            return torch.vmap(lambda a: torch.vmap(lambda b: self.act(x * a + b))(inner))(outer)

    x = torch.randn(5, 4)
    with HookedModel(Nested(), out_keys=["y"]).run(rows(x)) as run:
        value, grad = run.get("act"), run.get_grad("act")
        run.set("act", lambda h: h * 2)
        run.backward("y")
    a, b = torch.arange(1.0, 3.0)[None, :, None, None], torch.arange(1.0, 4.0)[None, None, :, None]
    assert_close(value.resolve(), (x[:, None, None] * a + b).tanh())
    assert torch.equal(grad.resolve(), torch.full((5, 2, 3, 4), 2.0))
    assert_close(run.output["y"], 2 * (x[:, None, None] * a + b).tanh().movedim(0, 2))


@pytest.mark.parametrize("share", [False, True])
def test_a_multi_agent_network_gives_agents_behind_rows_whether_they_share_weights_or_not(share):
    net = MultiAgentMLP(
        n_agent_inputs=3, n_agent_outputs=2, n_agents=4, centralized=False, share_params=share, depth=1, num_cells=8
    )
    x = torch.randn(5, 4, 3)
    with HookedModel(net).run(TensorDict({"input": x}, [5])) as run:
        first, act = run.get("_empty_net.0"), run.get("_empty_net.1")
    weight, bias = net.params["0", "weight"], net.params["0", "bias"]
    weight, bias = (weight.expand(4, 8, 3), bias.expand(4, 8)) if share else (weight, bias)
    expected = (torch.einsum("rai,aoi->rao", x, weight) + bias).detach()
    assert_close(first.resolve(), expected)
    assert_close(act.resolve(), expected.tanh())
