"""Two models to capture in, and the sides of the comparison: each wraps a model and returns a pass that captures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_train import HookedModel

Captured = dict[str, Tensor]
Pass = Callable[[], Captured]
Keep = Callable[[Tensor], Tensor]


@dataclass
class Case:
    """A model and a batch; its layers are the modules that hold no other and that run."""

    title: str
    model: nn.Module
    batch: Tensor
    key: str = "output"  # what the output is called, where it needs a name
    ran: tuple[str, ...] = ()  # the paths of the layers, in the order in which they run

    def __post_init__(self) -> None:
        self.ran = self.ran or tuple(copies(self)())

    def twin(self) -> Case:
        """The same with a model of its own, on which nothing was done yet; the weights are shared."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        model = copy.deepcopy(self.model, {id(weight): weight for weight in weights})
        return replace(self, model=model)

    def layers(self) -> dict[str, nn.Module]:
        """The modules that hold no other, by path."""
        return {name: part for name, part in self.model.named_modules() if not list(part.children())}


def mlp() -> Case:
    """Eight hidden layers."""
    layers = [part for _ in range(8) for part in (nn.Linear(512, 512), nn.ReLU())]
    return Case("MLP, 8 × (Linear(512, 512), ReLU), batch 256", nn.Sequential(*layers), torch.randn(256, 512))


def transformer() -> Case:
    """A GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 6, "n_embd": 128, "n_head": 4, "vocab_size": 1000, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, use_cache=False)
    title = "GPT-2, 6 layers, width 128, 4 heads, vocabulary 1,000, batch 8 × 64 tokens"
    return Case(title, GPT2LMHeadModel(config).eval(), torch.randint(1000, (8, 64)), key="logits")


# --- the sides: each wraps the model of a case and returns a pass that captures --------------------------------------


def same(value: Tensor) -> Tensor:
    """Keep a reference."""
    return value


def copied(value: Tensor) -> Tensor:
    """Keep a copy."""
    return value.detach().clone()


def bare(case: Case) -> Pass:
    """Capture nothing."""

    def run() -> Captured:
        case.model(case.batch)
        return {}

    return run


def _place(layers: dict[str, nn.Module], keep: Keep, into: Captured) -> list[Any]:
    def hook(name: str) -> Callable[..., None]:
        def store(_module: nn.Module, _args: Any, output: Tensor) -> None:
            into[name] = keep(output)

        return store

    return [module.register_forward_hook(hook(name)) for name, module in layers.items()]


def left(keep: Keep, case: Case) -> Pass:
    """Leave raw hooks in place."""
    into: Captured = {}
    _place(case.layers(), keep, into)

    def run() -> Captured:
        case.model(case.batch)
        found = dict(into)
        into.clear()
        return found

    return run


def copies(case: Case) -> Pass:
    """Place raw hooks that copy, and remove them after the pass."""
    layers = case.layers()

    def run() -> Captured:
        into: Captured = {}
        handles = _place(layers, copied, into)
        try:
            case.model(case.batch)
        finally:
            for handle in handles:
                handle.remove()
        return into

    return run


def ours(case: Case) -> Pass:
    """Get every layer in a run."""
    hooked, td = HookedModel(case.model), TensorDict({"input": case.batch}, batch_size=[len(case.batch)])

    def run() -> Captured:
        with hooked.run(td) as run:
            every = run.get("**")
        return every.resolve()

    return run


def nnsight_cache(case: Case) -> Pass:
    """Have nnsight cache every layer, which keeps references."""
    from nnsight import NNsight

    model = NNsight(case.model)
    envoys = {name: model.get(name) for name in case.ran}

    def run() -> Captured:
        with model.trace(case.batch) as tracer:
            cache = tracer.cache(modules=list(envoys.values())).save()
        return {name: cache[envoy.path].output for name, envoy in envoys.items()}

    return run


def nnsight_copies(case: Case) -> Pass:
    """Copy the output of one layer after another in a trace of nnsight."""
    from nnsight import NNsight

    model = NNsight(case.model)

    def run() -> Captured:
        with model.trace(case.batch):
            found = {}.save()
            for name in case.ran:  # one that never comes would be waited for
                found[name] = model.get(name).output.detach().clone()
        return found

    return run


def _tdhook(case: Case, keep: Keep) -> tuple[Any, TensorDict]:
    from tdhook.latent.activation_caching import ActivationCaching

    names = "|".join(f"{name}$" for name in case.layers()).replace(".", r"\.")
    method = ActivationCaching(names, callback=None if keep is same else lambda *, output, **_: keep(output))
    td = TensorDict({"input": case.batch}, batch_size=[])  # position embeddings would not fit a batch size
    return method.prepare(case.model, ["input"], [case.key]), td


def tdhook_left(case: Case) -> Pass:
    """Leave the hooks of TDHook's ActivationCaching in place, which keep references."""
    context, td = _tdhook(case, same)
    hooked = context.__enter__()
    return lambda: dict(hooked(td.copy())["cache"].items())


def tdhook_copies(case: Case) -> Pass:
    """Place the hooks of TDHook's ActivationCaching for one pass, with a callback that copies."""
    context, td = _tdhook(case, copied)

    def run() -> Captured:
        with context as hooked:
            return dict(hooked(td.copy())["cache"].items())

    return run


BASE = "raw hooks that copy"
SIDES: dict[str, Callable[[Case], Pass]] = {
    "no capture": bare,
    "raw hooks that refer, left in place": partial(left, same),
    "raw hooks that copy, left in place": partial(left, copied),
    BASE: copies,
    'tdhook-train, run.get("**")': ours,
    "nnsight, cache (refers)": nnsight_cache,
    "nnsight, copies": nnsight_copies,
    "TDHook, hooks left in place (refers)": tdhook_left,
    "TDHook, copies": tdhook_copies,
}
PEERS = "nnsight", "TDHook"


def sides() -> dict[str, Callable[[Case], Pass]]:
    """Return those that can run here."""
    absent = tuple(name for name in PEERS if find_spec(name.lower()) is None)
    return {name: side for name, side in SIDES.items() if not name.startswith(absent)}
