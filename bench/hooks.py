"""What capturing every layer of a pass costs, in time and in memory, beside raw hooks, nnsight and TDHook.

The sides take turns in one process, in another order each round, drawn at random, every one on a model of its own that
shares its weights with the others. All give the same values, or the script refuses to report. Memory is counted, not
sampled: each side captures once in a process of its own, where torch's profiler notes every allocation.

    python bench/hooks.py [--rounds 100] [--threads 2]    # with the peers: .venv-peers/bin/python, after `make peers`
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
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


# --- what is measured -------------------------------------------------------------------------------------------------


def turns(makes: dict[str, Callable[[], Pass]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each pass; making it ready, and letting go of what it gave, are not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in makes}
    names = list(makes)
    gc.collect()
    gc.freeze()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):  # what ran before decides which memory is at hand
            timed = makes[name]()
            gc.collect()  # what the one before left in cycles
            gc.disable()
            began = time.perf_counter()
            found = timed()
            seconds[name].append(time.perf_counter() - began)
            gc.enable()
            del found, timed
    gc.unfreeze()
    return seconds


def check(passes: dict[str, Pass]) -> int:
    """Refuse sides that do not agree; return the bytes that each captures."""
    expected = passes[BASE]()
    for name, run in passes.items():
        for _ in range(2):  # the second pass as the first
            found = run()
            agrees = found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
            if name != "no capture" and not agrees:
                raise SystemExit(f"{name} captured other values than {BASE}: the comparison is void")
    return sum(value.nbytes for value in expected.values())


def peak(side: Callable[[Case], Pass], case: Case) -> int:
    """Return the most bytes of tensors alive at once during the first capture, beyond those alive before it."""
    run = side(case.twin())
    run()  # fills the caches of libraries and of torch itself
    run = side(case.twin())
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del held
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def peaks() -> dict[str, list[int]]:
    """Return the peak of each case by side, each side in a process of its own."""
    found = {}
    for name in sides():
        command = [sys.executable, str(Path(__file__)), "--peak", name, "--threads", str(torch.get_num_threads())]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


# --- the tables -------------------------------------------------------------------------------------------------------


def first_pass(side: Callable[[Case], Pass], case: Case) -> Pass:
    """Return the wrapping of a model and the first pass through it, in one."""
    twin = case.twin()
    return lambda: side(twin)()


def report(case: Case, rounds: int, memory: dict[str, int]) -> None:
    """Print the table of one case."""
    passes = {name: side(case.twin()) for name, side in sides().items()}
    size = check(passes)
    run = turns({name: lambda run=run: run for name, run in passes.items()}, rounds)
    first = turns({name: partial(first_pass, side, case) for name, side in sides().items()}, rounds)
    print(f"\n{case.title}: {len(case.ran)} layers, {size / 1e6:.2f} MB captured\n")
    print(f"| side | a pass, ms | × {BASE} | wrapping and first pass, ms | peak beyond no capture / captured |")
    print("|---|---|---|---|---|")
    for name in passes:
        ratio = statistics.median(a / b for a, b in zip(run[name], run[BASE], strict=True))
        beyond = (memory[name] - memory["no capture"]) / size
        once, setup = (statistics.median(seconds[name]) * 1e3 for seconds in (run, first))
        print(f"| {name} | {once:.3f} | {ratio:.3f} | {setup:.2f} | {beyond:.3f} |")


def processor() -> str:
    """Return what the system calls it."""
    rows = dict(row.split(":", 1) for row in Path("/proc/cpuinfo").read_text().splitlines() if ":" in row)
    return next((value.strip() for name, value in rows.items() if name.strip() == "model name"), platform.machine())


def main() -> None:
    """Print the tables that ``bench/README.md`` keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        cases = [mlp(), transformer()]
        if options.peak:
            print(json.dumps([peak(SIDES[options.peak], case) for case in cases]))
            return
        for name in PEERS:
            print(name, version(name.lower()) if find_spec(name.lower()) else "is not installed: left out")
        print(f"{os.cpu_count()} cores of an {processor()} ({torch.get_num_threads()} threads), ", end="")
        print(f"torch {torch.__version__}, Python {platform.python_version()}; medians of {options.rounds} rounds")
        found = peaks()
        for i, case in enumerate(cases):
            report(case, options.rounds, {name: each[i] for name, each in found.items()})


if __name__ == "__main__":
    main()
