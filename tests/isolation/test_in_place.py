"""The guard: a live module is found as it was, whatever was done to it in between."""

import sys

import pytest
import torch
from torch import nn

from tdhook_train.isolation import in_place, isolated
from tdhook_train.undo import devices_of


class Counter(nn.Module):
    """Keeps count of its calls in a buffer that it replaces rather than writes to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1
        return x


def training_model():
    """Dropout, a BatchNorm that trains, one that is frozen, gradients of the step that was just taken."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4), Counter()
    )
    model[4].eval()
    model[1].weight.requires_grad_(False)
    model(torch.randn(6, 3)).square().sum().backward()
    return model


def everything(model):
    return {
        "training": [module.training for module in model.modules()],
        "state": {key: value.tolist() for key, value in model.state_dict().items()},
        "objects": [id(v) for v in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "rng": torch.get_rng_state().tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def disturb(model):
    """What a careless measurement might do."""
    torch.rand(5)
    model.train()
    model(torch.randn(6, 3)).sum().backward()
    model(torch.randn(6, 3)).sum().backward()
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_flags_buffers_gradients_and_random_states_are_as_before(mode, error):
    model = training_model()

    def measured():
        with in_place(model, seed=0), torch.enable_grad():
            disturb(model)
            if error is not None:
                raise error

    with mode():
        before = everything(model)
        if error is None:
            measured()
        else:
            with pytest.raises(error):
                measured()
        assert everything(model) == before


def test_inside_everything_is_in_evaluation_and_random_numbers_follow_from_the_seed():
    model, draws = training_model(), []
    for seed in (3, 3, 4):
        with in_place(model, seed):
            assert not any(module.training for module in model.modules())
            assert not torch.is_inference_mode_enabled()
            draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[1] != draws[2]
    assert model.training
    assert not model[4].training


def test_gradients_can_be_taken_inside_inference_mode():
    model = training_model()
    with torch.inference_mode(), in_place(model, seed=0), torch.enable_grad():
        x = torch.randn(6, 3, requires_grad=True)
        (grad,) = torch.autograd.grad(model(x).sum(), [x])
    assert grad.shape == (6, 3)


def test_devices_that_the_model_does_not_use_are_not_seeded(monkeypatch):
    seeded = []
    for module in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(module, "manual_seed", seeded.append)
        if hasattr(module, "manual_seed_all"):
            monkeypatch.setattr(module, "manual_seed_all", seeded.append)
    with in_place(nn.Linear(3, 2), seed=0):
        pass
    assert seeded == []


def test_a_live_view_is_the_module_itself_under_the_guard():
    model = training_model()
    view, before = isolated(model), everything(model)
    assert view.modules[""] is model
    with view.open(seed=0), torch.enable_grad():
        disturb(model)
    assert everything(model) == before


class Careless(nn.Module):
    """Makes a buffer in its first call, writes to it in the others."""

    def forward(self, x):
        if "seen" in self._buffers:
            self.seen.add_(1)
        else:
            self.register_buffer("seen", torch.ones(()))
        return x


def test_buffers_that_were_not_there_and_frozen_weights_are_found_as_before():
    model = nn.Sequential(nn.Linear(3, 3), Careless())
    model[0].weight.requires_grad_(False)
    with in_place(model, seed=0):
        model(torch.randn(2, 3))
        model(torch.randn(2, 3))
        model.requires_grad_(True)
        model[0].bias.requires_grad_(False)
    assert not list(model.buffers())
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    model(torch.randn(2, 3))
    buffer = model[1].seen
    with in_place(model, seed=0):
        model(torch.randn(2, 3))
        assert model[1].seen == 2
    assert model[1].seen is buffer
    assert buffer == 1


def test_the_random_state_of_a_device_that_holds_buffers_alone_is_kept(monkeypatch):
    asked = []

    class Backend:
        def get_rng_state(self, device):
            asked.append(("get", str(device)))
            return "state"

        def set_rng_state(self, state, device):
            asked.append(("set", str(device), state))

        def manual_seed(self, seed):
            asked.append(("seed", seed))

    model = nn.Module()
    model.register_buffer("where", torch.zeros(1))
    guard = sys.modules[in_place.__module__]  # the name of the module is that of the function in it
    monkeypatch.setattr(guard, "devices_of", lambda modules: {torch.device("cuda", 1)})
    monkeypatch.setattr("torch.get_device_module", lambda device: Backend())
    with in_place(model, seed=7):
        pass
    assert asked == [("get", "cuda:1"), ("seed", 7), ("set", "cuda:1", "state")]


def test_devices_in_use_are_those_of_parameters_and_of_buffers():
    class OnDevice:
        is_cpu = is_meta = False

        def __init__(self, index):
            self.device = torch.device("cuda", index)

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, device="meta"))
    assert devices_of(model.modules()) == set()
    held = nn.Module()
    held._parameters["weight"], held._buffers["mean"], held._buffers["none"] = OnDevice(0), OnDevice(1), None
    assert devices_of([held]) == {torch.device("cuda", 0), torch.device("cuda", 1)}
