"""Every loss that TorchRL exports is observed by its own networks, with the weights that it trains, without a trace."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from losses import LOSSES, REFUSED, Case
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from torch import Tensor, nn
from torchrl import objectives

from tdhook_train import At, Every, HookedModel, Method, Observer, ProbeSet
from tdhook_train.attribution import Saliency
from tdhook_train.errors import KeyMissingError, NetworkError
from tdhook_train.health import EffectiveRank
from tdhook_train.isolation import Shadow
from tdhook_train.keys import path_of
from tdhook_train.observer.measure import Tick
from tdhook_train.rl import ObservedLoss, networks
from tdhook_train.schedule import Times

# torchrl 0.14 says so of its own BCLoss
pytestmark = pytest.mark.filterwarnings("ignore:The name target_actor_network_params wasn't part of:UserWarning")

OBSERVED = [name for name in LOSSES if name not in REFUSED]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Means(Method):
    """The mean of every layer and of every output: tells which weights were measured, and on what."""

    writes: ClassVar = {"mean": "layer", "given": "output"}

    def taps(self, model: HookedModel) -> Any:
        return model.sites("**")

    def measure(self, seen: Any, model: HookedModel) -> TensorDict:
        outputs = [seen.batch.get((model.name, *path_of(key))) for key in model.out_keys]
        means = torch.stack([mean(seen.values[site]) for site in self.taps(model)])
        return TensorDict({"mean": means, "given": torch.stack([mean(value) for value in outputs])})


def mean(value: Tensor) -> Tensor:
    return value.double().mean()


def held(loss: nn.Module, name: str) -> tuple[nn.Module, TensorDictBase | None]:
    """Return a network's module, and the weights that the loss calls it with where those are not its own."""
    first, _, rest = name.partition(".")
    if isinstance(part := getattr(loss, first, None), objectives.LossModule):
        return held(part, rest)
    module = part or getattr(loss, first.removeprefix("target_"))
    params = loss._modules.get(f"{first}_params")
    if params is None:
        return module, None
    return module, params.data[int(rest)] if rest else params.data


def copied(loss: nn.Module, name: str) -> nn.Module:
    """Copy a network by hand, and put the trained weights into the copy."""
    module, weights = held(loss, name)
    twin = copy.deepcopy(module)
    if weights is not None:
        weights.clone().to_module(twin)
    return twin.eval().requires_grad_(False)


def called(case: Case, name: str, module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Run a network in evaluation mode, as its loss would call it."""
    batch = case.complete
    mode = module.training
    module.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), set_interaction_type(InteractionType.DETERMINISTIC):
        torch.manual_seed(seed)
        if name in case.inputs:
            out = {"output": module(batch[case.inputs[name]])}
        else:
            given = module(batch)
            out = {key: given[key] for key in module.out_keys}
    module.train(mode)
    return out


def shake(loss: nn.Module, seed: int = 1) -> None:
    """Move every weight, those of targets and buffers included, as training would."""
    generator = torch.Generator().manual_seed(seed)
    parts = [loss, *(value for value in vars(loss).values() if isinstance(value, nn.Module))]
    found = {id(value): value for part in parts for value in (*part.parameters(), *part.buffers())}
    with torch.no_grad():
        for value in found.values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator), alpha=0.1)


def bits(value: Any) -> Any:
    """Bring nested values to what compares bit for bit."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    return [bits(part) for part in value] if isinstance(value, list | tuple) else value


def everything(case: Case, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a training leaves behind."""
    kept = {name: module for name, module in vars(case.loss).items() if isinstance(module, nn.Module)}
    parts = [part for module in (case.loss, *kept.values()) for part in module.modules()]
    return {
        "loss": bits(dict(case.loss.state_dict())),
        "modules": {name: bits(dict(module.state_dict())) for name, module in kept.items()},
        "optimizer": bits(optimizer.state_dict()),
        "rng": bits(torch.get_rng_state()),
        "gradients": [p.grad is None for p in case.loss.parameters()],
        "frozen": [p.requires_grad for p in case.loss.parameters()],
        "modes": [part.training for part in parts],
        "hooks": [len(getattr(part, hooks)) for part in parts for hooks in HOOKS],
    }


def by_hand(case: Case, name: str, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Give the mean of every layer and of every output of a network copied by hand."""
    hooked = HookedModel(copied(case.loss, name), [case.inputs[name]] if name in case.inputs else None)
    with torch.random.fork_rng(devices=[]), set_interaction_type(InteractionType.DETERMINISTIC):
        torch.manual_seed(seed)
        hooked.trace(case.complete)
        with hooked.run(case.complete) as run:
            proxies = {site: run.get(site) for site in hooked.sites("**")}
    means = {f"{name}.{site}": mean(proxy.resolve()) for site, proxy in proxies.items()}
    return means, torch.stack([mean(run.output[key]) for key in hooked.out_keys])


def fed(case: Case) -> Any:
    """Choose what networks are measured on that the batch in training cannot feed."""
    return ProbeSet(case.complete, groups="rows") if case.needs else "batch"


def test_every_loss_that_torchrl_exports_is_in_the_table():
    exported = {
        name
        for name, kind in vars(objectives).items()
        if inspect.isclass(kind) and issubclass(kind, objectives.LossModule) and kind is not objectives.LossModule
    }
    assert {type(build().loss).__name__ for build in LOSSES.values()} == exported


@pytest.mark.parametrize("name", OBSERVED)
def test_the_networks_of_a_loss_are_named_as_it_names_them(name):
    case = LOSSES[name]()
    assert set(networks(case.loss)) == case.names


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_without_a_network_is_refused_before_training(name, tmp_path):
    case = LOSSES[name]()
    with pytest.raises(NetworkError, match=case.error):
        networks(case.loss)
    with Observer({"means": Means()}, when=At(0), into=tmp_path) as observer:
        with pytest.raises(NetworkError, match=case.error):
            ObservedLoss(case.loss, observer)
        assert "loss_cost" in case.loss(case.batch)


@pytest.mark.parametrize("name", OBSERVED)
def test_each_shadow_gives_what_the_losss_own_weights_give(name):
    case = LOSSES[name]()
    shadows = {part: Shadow(network) for part, network in networks(case.loss).items()}
    assert set(shadows) == case.names
    for part, shadow in shadows.items():
        before = called(case, part, copied(case.loss, part))
        shake(case.loss)
        shadow.refresh()
        module, weights = held(case.loss, part)
        if weights is None:
            expected = called(case, part, module)
        else:
            with weights.to_module(module, preserve_module_state=False):
                expected = called(case, part, module)
        assert bits(called(case, part, shadow.module)) == bits(expected)
        assert bits(before) != bits(expected)


@pytest.mark.parametrize("name", OBSERVED)
def test_training_ends_in_the_same_bits_with_an_observer(name, tmp_path):
    bare = LOSSES[name]()
    optimizer = torch.optim.Adam(bare.loss.parameters(), 0.01)
    for _ in range(10):
        bare.update(optimizer)
    expected = everything(bare, optimizer)

    watched = LOSSES[name]()
    optimizer = torch.optim.Adam(watched.loss.parameters(), 0.01)
    methods = {"means": Means(), "health": EffectiveRank(), "attribution": Saliency()}
    observer = Observer(methods, when=Every(optim_steps=2) | At(0), into=tmp_path, on=fed(watched))
    assert ObservedLoss(watched.loss, observer, optimizer) is watched.loss
    for _ in range(10):
        watched.update(optimizer)
    observer.finish()
    for row in methods:
        assert observer.buffer[row].steps.tolist() == [0, 2, 4, 6, 8, 10]
    observer.close()
    found = everything(watched, optimizer)
    for part, value in expected.items():
        assert found[part] == value, part


@pytest.mark.parametrize("name", OBSERVED)
def test_rows_hold_what_a_copy_made_by_hand_gives(name, tmp_path):
    case = LOSSES[name]()
    optimizer = torch.optim.Adam(case.loss.parameters(), 0.01)
    observer = Observer({"means": Means()}, when=At(0, 3), into=tmp_path, on=fed(case))
    ObservedLoss(case.loss, observer, optimizer)
    expected = {}
    for step in range(4):
        seed = Tick(Times(step)).generator("model").initial_seed()
        expected[step] = {part: by_hand(case, part, seed) for part in case.names}
        case.update(optimizer)
    rows = observer.buffer["means"]
    for step in (0, 3):
        row, layers = rows.at(step), {}
        for part, (means, given) in expected[step].items():
            assert torch.equal(row[part, "given"], given), part
            layers |= means
        assert dict(zip(rows.coords["layer"], row["mean"], strict=True)) == layers
    observer.close()


@pytest.mark.parametrize("name", ["ACTLoss", "QMixerLoss"])
def test_a_network_that_the_batch_cannot_feed_is_named_with_what_it_lacks(name, tmp_path):
    case = LOSSES[name]()
    part, key = next(iter(case.needs.items()))
    with Observer({"means": Means()}, when=At(0), into=tmp_path) as observer:
        ObservedLoss(case.loss, observer)
        with pytest.raises(KeyMissingError, match=re.escape(f"{key!r} of {part} is not in the batch")):
            case.loss(case.batch)


def test_a_network_that_the_batch_cannot_feed_is_left_alone_where_no_method_asks_for_it(tmp_path):
    case = LOSSES["QMixerLoss"]()
    fed = tuple(case.names - set(case.needs))
    with Observer({"means": Means(networks=fed)}, when=At(0), into=tmp_path) as observer:
        ObservedLoss(case.loss, observer)
        case.loss(case.batch)
        for part in fed:
            seed = Tick(Times(0)).generator("model").initial_seed()
            assert torch.equal(observer.buffer["means"].at(0)[part, "given"], by_hand(case, part, seed)[1])


@pytest.mark.parametrize("name", ["ClipPPOLoss", "SACLoss"])
@pytest.mark.parametrize("converted", ["before", "after"])
def test_a_loss_of_double_precision_is_measured_in_double_precision(converted, name, tmp_path):
    case = LOSSES[name]()
    case = replace(case, batch=case.batch.apply(lambda value: value.double() if value.is_floating_point() else value))
    if converted == "before":
        case.loss.double()
    with Observer({"means": Means()}, when=At(0), into=tmp_path) as observer:
        ObservedLoss(case.loss, observer)
        case.loss.double()
        case.loss(case.batch)
        for part in case.names:
            given = by_hand(case, part, Tick(Times(0)).generator("model").initial_seed())[1]
            assert torch.equal(observer.buffer["means"].at(0)[part, "given"], given)
