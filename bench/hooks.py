"""What capturing every layer of a pass costs, in time and in memory, beside raw hooks, nnsight and TDHook.

The sides take turns in one process, in another order each round, drawn at random, every one on a model of its own that
shares its weights with the others. All give the same values, or the script refuses to report. Memory is counted, not
sampled: each side captures once in a process of its own, where torch's profiler notes every allocation.

    python bench/hooks.py [--rounds 100] [--threads 2]    # with the peers: .venv-peers/bin/python, after `make peers`
"""

from __future__ import annotations

import argparse
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
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import torch
from _hook_sides import BASE, PEERS, SIDES, Case, Pass, mlp, sides, transformer
from _results import Row, asking, keep, processor

OURS = 'tdhook-train, run.get("**")'
Seconds = dict[str, list[float]]

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

OURS = 'tdhook-train, run.get("**")'
Seconds = dict[str, list[float]]


def first_pass(side: Callable[[Case], Pass], case: Case) -> Pass:
    """Return the wrapping of a model and the first pass through it, in one."""
    twin = case.twin()
    return lambda: side(twin)()


def report(case: Case, rounds: int, memory: dict[str, int]) -> list[Row]:
    """Print the table of one case, and return our rows."""
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
    return ours(case, run, first, (memory[OURS] - memory["no capture"]) / size)


def ours(case: Case, run: Seconds, first: Seconds, beyond: float) -> list[Row]:
    """Return what is asked for of ours: beside raw hooks, and beside peers that copy as well."""

    def than(seconds: Seconds, side: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[OURS], seconds[side], strict=True))

    name = f"{case.title.split(',')[0]}, {len(case.ran)} layers"
    peers = [side for side in run if side.endswith(", copies")]
    return [
        Row(f"{name}: a pass", BASE, than(run, BASE), 1.1),
        *(Row(f"{name}: a pass", peer, than(run, peer), 1.0) for peer in peers),
        *(Row(f"{name}: wrapping and first pass", peer, than(first, peer), 1.0) for peer in peers),
        Row(f"{name}: peak memory beyond no capture", "what is captured", beyond, 1.02),
    ]


def main() -> None:
    """Print the tables that ``bench/README.md`` keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    asking(parser)
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
        rows: list[Row] = []
        for i, case in enumerate(cases):
            rows += report(case, options.rounds, {name: each[i] for name, each in found.items()})
    if options.keep:
        keep(__file__, rows, threads=options.threads, peers=[name.lower() for name in PEERS])


if __name__ == "__main__":
    main()
