"""What was measured to go wrong in tools of this kind, row by row, and does not here."""

import copy

import pytest
import torch
from hooks_models import Cnn, rows
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss, SACLoss

from tdhook_train import HookedModel
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.errors import NetworkError
from tdhook_train.isolation import Shadow, networks
from tdhook_train.latent import SteeringVectors

KINDS = (Saliency, IntegratedGradients)
each_kind = pytest.mark.parametrize("kind", KINDS)


class AddsInputs(nn.Module):
    def forward(self, x, y):
        return (x + y).square().sum(-1)


def test_inputs_that_are_added_do_not_share_one_scaled_gradient():
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]])
    td = TensorDict({"x": x, "y": y}, [1])
    with IntegratedGradients(targets="output").prepare(AddsInputs(), ["x", "y"]) as hooked:
        attr = hooked(td)["attr"]
    assert_close(attr["x"] + attr["y"], (x + y).square())  # on the path from 0: x (x + y) and y (x + y)
    assert_close(attr["x"], x * (x + y))
    with Saliency(targets="output").prepare(AddsInputs(), ["x", "y"]) as hooked:
        attr = hooked(td)["attr"]
    assert_close(attr["x"], 2 * (x + y))
    assert_close(attr["y"] * y, 2 * (x + y) * y)


def actor():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), NormalParamExtractor())
    module = TensorDictModule(net, ["observation"], ["loc", "scale"])
    return ProbabilisticActor(module, ["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)


class Q(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def sac():
    return SACLoss(actor(), TensorDictModule(Q(), ["observation", "action"], ["state_action_value"]))


def test_a_loss_is_not_searched_in_vain_for_the_networks_that_it_keeps_apart():
    critic = TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"])
    loss = ClipPPOLoss(actor(), critic)
    assert not [name for name, _ in loss.named_modules() if name.startswith("actor_network.")]
    with pytest.raises(NetworkError, match=r"ClipPPOLoss is a TorchRL loss, .*ObservedLoss, .*Shadow\(networks"):
        HookedModel(loss)
    with HookedModel(Shadow(networks(loss)["actor_network"]).module).run(
        TensorDict({"observation": torch.randn(4, 3)}, [4])
    ) as run:
        every = run.get("module.0.module.*")
    assert list(every.resolve())[:3] == [f"module.0.module.{i}" for i in range(3)]


def test_the_q_networks_that_are_explained_are_those_that_were_trained():
    loss = sac()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(torch.randn_like(parameter))  # training
    td = TensorDict({"observation": torch.randn(4, 3), "action": torch.randn(4, 2)}, [4])
    found = []
    for i in range(2):
        with Saliency(targets="state_action_value").prepare(Shadow(networks(loss)[f"qvalue_network.{i}"]).module) as q:
            found.append(q(td)["attr", "observation"])
        w = loss.qvalue_network_params["module", "net"].data[i]
        x = torch.cat([td["observation"], td["action"]], 1)
        slope = 1 - (x @ w["0", "weight"].T + w["0", "bias"]).tanh().square()
        assert_close(found[i], ((slope * w["2", "weight"]) @ w["0", "weight"])[:, :3])
    with Saliency(targets="state_action_value").prepare(loss.qvalue_network) as q:
        stale = q(td)["attr", "observation"]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(stale, found[0])


def test_values_taken_inside_a_vmapped_ensemble_can_be_used():
    loss = sac()
    td = TensorDict({"observation": torch.randn(4, 3), "action": torch.randn(4, 2)}, [4])

    class Members(nn.Module):
        """The loss's own way of running its Q networks."""

        def __init__(self):
            super().__init__()
            self.q = loss.qvalue_network

        def forward(self, batch):
            return loss._vmap_qnetworkN0(batch, loss.qvalue_network_params.data)["state_action_value"]

    with HookedModel(Members(), ["batch"]).run(TensorDict({"batch": td}, [4])) as run:
        hidden, output = run.get("q.module.net.0"), run.get("q.module.net.2")
    assert hidden.resolve().numpy().shape == (4, 2, 8)
    assert float(hidden.resolve()[0, 0, 0]) == hidden.resolve()[0, 0, 0].item()
    assert torch.equal(output.resolve().movedim(1, 0), run.output["output"])


def trained(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    data = torch.randn(20, 16, 3)
    for step, batch in enumerate(data):
        model(batch).square().sum().backward()
        if method is not None and step % 5 == 0:
            with method.prepare(model) as hooked:
                hooked(rows(batch))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(
    "method",
    [
        Saliency(),
        IntegratedGradients(points=4),
        SteeringVectors("0", steer_fn=lambda _, h: h + 1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_training_in_train_mode_is_not_moved_by_what_is_measured_in_between(method):
    bare, observed = trained(None), trained(method)
    for name, value in bare.items():
        assert torch.equal(observed[name], value), name


@each_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_where_gradients_are_off(kind, mode):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    with kind(targets="output").prepare(model) as hooked:
        expected = hooked(rows(x))["attr", "input"]
        with mode():
            found = hooked(rows(x.clone()))["attr", "input"]
    assert torch.equal(found, expected)
    assert not found.is_inference()


@each_kind
def test_the_batch_asks_for_no_gradients_and_holds_no_graph(kind):
    chain = TensorDictModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), ["obs"], ["output"])
    td = TensorDict({"obs": torch.randn(5, 3), "hidden": torch.zeros(5, 4)}, [5])
    with kind(targets=("output", 0)).prepare(chain) as hooked:
        out = hooked(td)
    for batch in (td, out):
        assert not any(value.requires_grad or value.grad_fn for value in batch.values(True, True))
    assert set(td.keys()) == {"obs", "hidden"}


def test_a_value_before_an_activation_in_place_is_what_it_was():
    model, x = Cnn().eval(), torch.randn(4, 2, 4, 4)
    with HookedModel(model).run(rows(x)) as run:
        before, after = run.get("norm"), run.get("act")
    assert (before.resolve() < 0).any()
    assert torch.equal(after.resolve(), before.resolve().clamp(min=0))


def test_no_layer_keeps_a_forward_of_its_own_that_would_run_old_weights():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), torch.randn(4, 3)
    attributes = [sorted(vars(module)) for module in model.modules()]
    with SteeringVectors(nn.Linear, steer_fn=lambda _, h: h * 2).prepare(model) as hooked:
        hooked(rows(x))
    for kind in KINDS:
        with kind().prepare(model) as hooked:
            hooked(rows(x))
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.fill_(3.0)
    assert torch.equal(twin(x), torch.full((4, 3), 3.0))


@each_kind
def test_several_targets_are_kept_apart_and_share_their_forward_passes(kind):
    model, x, ran = nn.Linear(3, 4), torch.randn(5, 3), []
    model.register_forward_hook(lambda *_: ran.append(None))
    passes = {}
    for targets in (("output", 0), [("output", i) for i in range(4)]):
        ran.clear()
        with kind(targets=targets).prepare(model) as hooked:
            attr = hooked(rows(x))["attr", "input"]
        passes[str(targets)] = len(ran)
    assert len(set(passes.values())) == 1
    weight = model.weight.detach().expand(5, 4, 3)
    assert_close(attr, weight * x[:, None] if kind is IntegratedGradients else weight)


def test_the_memory_of_integrated_gradients_is_capped():
    model, x, sizes = nn.Linear(3, 2), torch.randn(40, 3), []
    with IntegratedGradients(points=50, targets=("output", 0)).prepare(model) as hooked:
        free = hooked(rows(x))
    model.register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    with IntegratedGradients(points=50, targets=("output", 0), rows_per_pass=16).prepare(model) as hooked:
        capped = hooked(rows(x))
    passes = sizes[2:]  # after the trace and the pass that observers share, which are over the batch itself
    assert max(passes) <= 16
    assert_close(capped["attr", "input"], free["attr", "input"])
    assert_close(capped["delta"], free["delta"], atol=1e-6, rtol=0)  # of numbers near 0: only an absolute bound says
