"""What probes and patching cost beside the same by scikit-learn and by hooks of one's own; what a tick of four costs.

The sides take turns in one process. Those of scikit-learn are given the activations; ours runs the network as well,
and scores the raw input beside the layers. Scores and effects are compared before a time is printed.

    OMP_NUM_THREADS=2 .venv/bin/python bench/latent.py [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
from _results import Row, asking, keep
from _turns import ratio, turns
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import PredefinedSplit
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_train import Every, Observer, ProbeSet
from tdhook_train.latent import ActivationPatching, LogisticProbe, RidgeProbe
from tdhook_train.ops.folds import fold_of
from tdhook_train.rl.demo import methods_for
from tdhook_train.rl.ppo import make_ppo

OURS = "tdhook-train"
ROWS, LAYERS, TARGETS, FOLDS = 8_000, 14, 8, 5
Side = Callable[[], Tensor]


def mlp(*widths: int) -> nn.Sequential:
    """Make linear layers, a tanh after each."""
    return nn.Sequential(*(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())))


@torch.no_grad()
def activations(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Return what every layer gives out."""
    return [x := layer(x) for layer in net]


def probed(probe: RidgeProbe | LogisticProbe, net: nn.Module, td: TensorDict, key: str) -> Side:
    """Score every layer on every target: ``[layer, target]``."""

    def run() -> Tensor:
        with probe.prepare(net) as hooked:
            return hooked(td, groups=td["trajectory"])[key]

    return run


def ridge(width: int) -> tuple[str, dict[str, Side]]:
    """Eight targets from fourteen layers, five folds, seven penalties."""
    net, x = mlp(*[width] * (LAYERS // 2 + 1)), torch.randn(ROWS, width)
    td = TensorDict(input=x, y=torch.randn(ROWS, TARGETS) + x[:, :TARGETS], batch_size=[ROWS])
    td["trajectory"] = torch.arange(ROWS) // 100
    split = PredefinedSplit(fold_of(td["trajectory"], FOLDS).numpy())
    layers, y = [h.double().numpy() for h in activations(net, x)], td["y"].double().numpy()
    probe = RidgeProbe(target="y", shifts=0)

    def loops() -> Tensor:
        fits = [[RidgeCV(probe.alphas, cv=split, scoring="r2").fit(h, y[:, t]) for t in range(TARGETS)] for h in layers]
        return torch.tensor([[fit.best_score_ for fit in row] for row in fits])

    title = f"ridge, {FOLDS} folds × 7 α, {LAYERS} layers of {width}, {TARGETS} targets, {ROWS:,} rows"
    return title, {OURS: probed(probe, net, td, "r2"), "RidgeCV in loops": loops}


def logistic(width: int, classes: int) -> tuple[str, dict[str, Side]]:
    """One target from fourteen layers, five folds."""
    rows = ROWS // 4
    net, x = mlp(*[width] * (LAYERS // 2 + 1)), torch.randn(rows, width)
    td = TensorDict(input=x, y=(x[:, :classes] + torch.randn(rows, classes)).argmax(1), batch_size=[rows])
    td["trajectory"] = torch.arange(rows) // 100
    folds = fold_of(td["trajectory"], FOLDS).numpy()
    layers, y = [h.double().numpy() for h in activations(net, x)], td["y"].numpy()

    def loops() -> Tensor:
        scores = torch.zeros(LAYERS, 1)
        for i, h in enumerate(layers):
            for fold in range(FOLDS):
                out = folds == fold
                fit = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(h[~out], y[~out])
                scores[i] += balanced_accuracy_score(y[out], fit.predict(h[out])) / FOLDS
        return scores

    title = f"logistic, {FOLDS} folds, {LAYERS} layers of {width}, {classes} classes, {rows:,} rows"
    probe = LogisticProbe(target="y", shifts=0)
    return title, {OURS: probed(probe, net, td, "balanced_accuracy"), "LogisticRegression in loops": loops}


def patching() -> tuple[str, dict[str, Side]]:
    """All units of a policy, over paired states."""
    net = mlp(*[32] * 7)
    base, source = torch.randn(2, 64, 32)
    td = TensorDict({"input": base, ("source", "input"): source}, batch_size=[64])
    method = ActivationPatching(layers=nn.Tanh, targets={"first": ("output", 0)}, parts="unit")

    def ours() -> Tensor:
        with method.prepare(net) as hooked:
            return hooked(td)["unit_effect"][..., 0]

    @torch.no_grad()
    def loops() -> Tensor:
        clean, taken = net(base)[:, 0], activations(net, source)[1::2]
        effects = torch.zeros(6, 32)
        for i, value in enumerate(taken):
            for unit in range(32):

                def swap(
                    _module: nn.Module, _args: object, out: Tensor, value: Tensor = value, u: int = unit
                ) -> Tensor:
                    out = out.clone()
                    out[:, u] = value[:, u]
                    return out

                handle = net[2 * i + 1].register_forward_hook(swap)
                effects[i, unit] = (net(base)[:, 0] - clean).abs().mean()
                handle.remove()
        return effects

    return "patching every unit of a 6 × 32 policy, 64 pairs", {OURS: ours, "hooks, unit by unit": loops}


def compare(title: str, sides: dict[str, Side], rounds: int, asked: float) -> list[Row]:
    """Print the rows of one case, after its values were compared, and return the peer's."""
    ours, theirs = (side().to(torch.float64) for side in sides.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    seconds = turns(sides, rounds)
    for name, taken in seconds.items():
        wanted = f"{asked:g}" if name != OURS else ""
        print(
            f"| {title} | {name} | {statistics.median(taken) * 1e3:.1f} | {ratio(seconds, name, OURS):.1f} | {wanted} |"
        )
    return [Row(title, name, ratio(seconds, name, OURS), asked, better="more") for name in sides if name != OURS]


def tick(rounds: int) -> list[Row]:
    """Print what the four methods of the demo cost together, beside each alone, and return the ratio."""
    ppo = make_ppo("InvertedDoublePendulum-v5", frames=5_000, seed=0)
    batch = next(iter(ppo.collector))
    every, probes = methods_for(ppo), ProbeSet(batch[:2048], feature_names={"observation": ppo.features})
    asked = {"all four": every} | {name: {name: method} for name, method in every.items()}
    with tempfile.TemporaryDirectory() as folder:
        observers = {
            name: Observer(methods, when=Every(optim_steps=1), into=f"{folder}/{i}", on=probes)
            for i, (name, methods) in enumerate(asked.items())
        }
        seconds = turns({name: lambda o=o: o.step(ppo.loss) for name, o in observers.items()}, rounds)
        for observer in observers.values():
            observer.close()
    dearest = max((name for name in asked if name != "all four"), key=lambda name: statistics.median(seconds[name]))
    for name, taken in seconds.items():
        share = f"{ratio(seconds, 'all four', dearest):.2f} × {dearest}" if name == "all four" else ""
        print(f"| one tick: {name} | {statistics.median(taken) * 1e3:.1f} | {share} |")
    ppo.collector.shutdown()
    together = ratio(seconds, "all four", dearest)
    return [Row("one tick of the demo, all four methods", "the dearest method alone", together, 1.8)]


def main() -> None:
    """Print the tables that ``bench/README.md`` keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="without the case in which the peer takes ten minutes")
    asking(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"medians of {options.rounds} rounds, {options.threads} threads, torch {torch.__version__}\n")
    print(f"| case | side | ms | × {OURS} | asked for |\n|---|---|---|---|---|")
    rows: list[Row] = []
    for width in (32,) if options.short else (32, 256):
        rows += compare(*ridge(width), options.rounds if width == 32 else 1, 20)
    for width, classes in ((32, 2), (256, 2), (32, 4)):
        rows += compare(*logistic(width, classes), options.rounds, 5)
    rows += compare(*patching(), 4 * options.rounds, 5)
    print("\n| what | ms | ratio |\n|---|---|---|")
    rows += tick(4 * options.rounds)
    if options.keep:
        keep(__file__, rows, threads=options.threads, peers=["scikit-learn"])


if __name__ == "__main__":
    main()
