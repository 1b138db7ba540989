"""What attributions cost beside captum, TDHook and zennit: time in turns in one process, peak memory by counting.

The sides take turns in an order drawn anew each round. Captum and TDHook explain one target a call, as they do.
Integrated gradients of captum: ``internal_batch_size`` is as many points of paths as ours puts through at once.

    .venv-peers/bin/python bench/attribution.py [--rounds 20] [--threads 2]    # after `make peers`
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any

import torch
from _results import Row, asking, keep
from _turns import ratio, turns
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_train import attribution

Side = Callable[[], Tensor]
OURS = "tdhook-train"
AS_FAST = {"feature ablation": 2.0, "Shapley sampling, 25": 2.0}
"""How many times as fast as the peer is asked for, where it is not 1; of single cases, in the next."""
ASKED = {
    ("integrated gradients, 50 points", width, 10): {"captum": captum, "TDHook": tdhook}
    for width, captum, tdhook in ((32, 18.0, 6.5), (256, 3.5, 2.4), (512, 2.2, 1.7))
}


def mlp(*widths: int) -> nn.Module:
    """Make linear layers with ReLUs between them."""
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def ours(method: Any, model: nn.Module, x: Tensor) -> Side:
    """Explain all targets in one call: ``[row, target, feature]``."""
    td = TensorDict(input=x, batch_size=[len(x)])

    def run() -> Tensor:
        with method.prepare(model) as explained:
            return explained(td)["attr", "input"]

    return run


def captums(name: str, model: nn.Module, x: Tensor, targets: int, **how: Any) -> Side:
    """Explain one target after another with captum."""
    import captum.attr

    method = getattr(captum.attr, name)(model)
    return lambda: torch.stack([method.attribute(x, target=t, **how).detach() for t in range(targets)], 1)


def tdhooks(model: nn.Module, x: Tensor, targets: int, points: int) -> Side:
    """Explain one target after another with TDHook's integrated gradients, from zeros."""
    from tdhook.attribution import IntegratedGradients

    def of(target: int) -> Callable[..., TensorDict]:
        return lambda outputs, _inputs: TensorDict(out=outputs["output"][..., target], batch_size=outputs.batch_size)

    methods = [IntegratedGradients(init_attr_targets=of(t), n_steps=points) for t in range(targets)]
    zeros = torch.zeros_like(x)

    def run() -> Tensor:
        found = []
        for method in methods:
            td = TensorDict({"input": x, ("baseline", "input"): zeros}, batch_size=[len(x)])
            with method.prepare(model) as hooked:
                found.append(hooked(td)["attr", "input"].detach())
        return torch.stack(found, 1)

    return run


def zennits(model: nn.Module, x: Tensor, targets: int) -> Side:
    """Propagate one target after another by zennit's epsilon-plus."""
    for name in ("torchvision", "torchvision.models", "torchvision.models.resnet", "torchvision.models.vgg"):
        sys.modules.setdefault(name, types.ModuleType(name))  # zennit wants no more of it than these names
    resnet = sys.modules["torchvision.models.resnet"]
    resnet.Bottleneck, resnet.BasicBlock = (type(name, (nn.Module,), {}) for name in ("Bottleneck", "BasicBlock"))
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus

    eye = torch.eye(targets)

    def run() -> Tensor:
        with Gradient(model=model, composite=EpsilonPlus()) as attributor:
            return torch.stack([attributor(x, eye[[t]].expand(len(x), -1))[1] for t in range(targets)], 1)

    return run


def sides(what: str, model: nn.Module, x: Tensor, targets: int) -> dict[str, Side]:
    """Return those that can run here."""
    rows, wanted = len(x), [("output", t) for t in range(targets)]
    has = {name: find_spec(name) is not None for name in ("captum", "tdhook", "zennit")}
    found: dict[str, Side] = {}
    if what == "integrated gradients, 50 points":
        found[OURS] = ours(attribution.IntegratedGradients(targets=wanted), model, x)
        largest = max(part.out_features for part in model if isinstance(part, nn.Linear))
        at_once = max(rows, min(4096, 2**20 // largest))
        how = {"n_steps": 50, "method": "gausslegendre", "internal_batch_size": at_once}
        found |= {"captum": captums("IntegratedGradients", model, x, targets, **how)} if has["captum"] else {}
        return found | ({"TDHook": tdhooks(model, x, targets, 50)} if has["tdhook"] else {})
    if what == "LRP, epsilon-plus":
        found[OURS] = ours(attribution.LRP(targets=wanted, composite="epsilon_plus"), model, x)
        return found | ({"zennit": zennits(model, x, targets)} if has["zennit"] else {})
    peer = {"feature ablation": "FeatureAblation", "Shapley sampling, 25": "ShapleyValueSampling"}[what]
    kind, how, extra = attribution.FeatureAblation, {}, {}
    if peer == "ShapleyValueSampling":
        kind, how, extra = attribution.ShapleySampling, {"permutations": 25}, {"n_samples": 25}
    found[OURS] = ours(kind(targets=wanted, **how), model, x)
    return found | ({"captum": captums(peer, model, x, targets, **extra)} if has["captum"] else {})


def peak(side: Side) -> int:
    """Return the most bytes of tensors alive at once beyond those alive before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = side()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del held
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def report(what: str, widths: Sequence[int], rows: int, targets: int, rounds: int) -> list[Row]:
    """Print the rows of one case, and return those of peers."""
    model, x = mlp(*widths, 10), torch.randn(rows, widths[0])
    title = f"{what}; {len(widths) - 1} × {widths[-1]}, {widths[0]} inputs, {rows} samples, "
    title += f"{targets} target{'s' if targets > 1 else ''}"
    try:
        every = sides(what, model, x, targets)
    except AttributeError as absent:
        print(f"| {title} | left out: {absent} | | | |")
        return []
    seconds = turns(every, rounds)
    exact, case = what.startswith(("integrated", "feature")), title
    expected = every[OURS]()
    for name, side in every.items():
        if exact and not torch.allclose(side(), expected, atol=1e-4, rtol=1e-3):
            title += f" ({name} gives other values)"
        time_ms = statistics.median(seconds[name]) * 1e3
        print(
            f"| {title} | {name} | {time_ms:.2f} | {ratio(seconds, name, OURS):.2f} | {peak(side) / 1e6:.1f} |",
            flush=True,
        )
    asked = ASKED.get((what, widths[-1], targets), dict.fromkeys(seconds, AS_FAST.get(what, 1.0)))
    return [Row(case, name, ratio(seconds, name, OURS), asked[name], better="more") for name in seconds if name != OURS]


def main() -> None:
    """Print the table that ``bench/README.md`` keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    asking(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models = (((32,) * 7, 64), ((256,) * 5, 64), ((784, *(512,) * 4), 256))
    print(f"medians of {options.rounds} rounds, {options.threads} threads, torch {torch.__version__}\n")
    print(f"| case | side | ms | × {OURS} | peak, MB |\n|---|---|---|---|---|")
    found: list[Row] = []
    for targets in (10, 1):
        for widths, rows in models:
            found += report("integrated gradients, 50 points", widths, rows, targets, options.rounds)
    for what in ("LRP, epsilon-plus", "feature ablation", "Shapley sampling, 25"):
        for widths, rows in models[: 1 if what.startswith("Shapley") else 2]:  # captum's takes minutes on the second
            found += report(what, widths, rows, 10, options.rounds)
    if options.keep:
        keep(__file__, found, threads=options.threads, peers=["captum", "tdhook", "zennit"])


if __name__ == "__main__":
    main()
