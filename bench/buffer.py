"""What the buffer costs beside a bare TorchRL replay buffer, and beside a file a record.

The sides take turns in random order, row by row, in one process; what concerns memory is measured in processes of its
own.

    python bench/buffer.py [--rows 100000] [--rounds 300] [--million 1000000]
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _results import Row, asking, keep
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

from tdhook_train import ArtifactBuffer

BARE, FILES = "bare LazyMemmapStorage, extend", "torch.save + os.replace"
SAMPLE = 4096
MEMORY = """
import re, sys, torch
from pathlib import Path
from tdhook_train import ArtifactBuffer
def resident(kind):
    return int(re.search(rf'{kind}:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024
"""
READS_ONE_KEY = """
ArtifactBuffer.open(sys.argv[1])['b'].series('score')
before = resident('RssFile')
ArtifactBuffer.open(sys.argv[1])['a'].series('score')
print(resident('RssFile') - before)
"""
WRITES_MANY = """
import tempfile
row = {'attr': torch.ones(60), 'score': torch.ones(())}
with tempfile.TemporaryDirectory(dir=sys.argv[2]) as folder, ArtifactBuffer(folder) as buffer:
    for step in range(int(sys.argv[1])):
        buffer.append('a', row, step=step)
        if step % 2000 == 1999:
            print(resident('VmRSS'))
"""


def row(kilobytes: int) -> TensorDict:
    """Return a row of three keys and about so many kilobytes."""
    return TensorDict(
        {"attr": torch.randn(kilobytes * 256 - 4), "score": torch.randn(()), "net": {"r2": torch.randn(3)}}
    )


def appends(kilobytes: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Return the seconds that one row takes, by side."""
    one = row(kilobytes)
    batch, files = one.unsqueeze(0), folder / "files"
    files.mkdir()
    bare = TensorDictReplayBuffer(storage=LazyMemmapStorage(rounds + 10, scratch_dir=folder / "bare"))
    ours = ArtifactBuffer(folder / "ours")
    unchecked = ArtifactBuffer(folder / "unchecked")
    unchecked.declare("a", checksums=False)

    def save(step: int) -> None:
        torch.save(one.to_dict(), files / "tmp")
        os.replace(files / "tmp", files / f"{step}.pt")

    sides: dict[str, Callable[[int], object]] = {
        BARE: lambda _: bare.extend(batch),
        FILES: save,
        "append": lambda step: ours.append("a", one, step=step),
        "append without checksums": lambda step: unchecked.append("a", one, step=step),
    }
    seconds = taking_turns(sides, rounds)
    ours.close(), unchecked.close()
    return seconds


def taking_turns(sides: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call by side; the first calls of each are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order, turns = list(sides), random.Random(0)
    for turn in range(rounds + 10):
        turns.shuffle(order)
        for name in order:
            began = time.perf_counter()
            sides[name](turn)
            if turn >= 10:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def filled(rows: int, folder: Path) -> tuple[ArtifactBuffer, TensorDictReplayBuffer]:
    """Return our buffer and a bare one with the same rows of 1 KB, and the same meta."""
    ours, part = ArtifactBuffer(folder / "ours"), 10_000
    bare = TensorDictReplayBuffer(storage=LazyMemmapStorage(rows, scratch_dir=folder / "bare"))
    for step in range(0, rows, part):
        batch = torch.stack([row(1)] * min(part, rows - step)).contiguous()
        batch["score"] = torch.arange(float(step), step + len(batch))
        ours.extend("a", batch, step=step)
        bare.extend(ours["a"][step : step + len(batch)])
    return ours, bare


def main() -> None:
    """Measure, and print tables in Markdown."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--rounds", type=int, default=300)
    options.add_argument("--million", type=int, default=1_000_000)
    options.add_argument("--folder", default=None, help="on which file system")
    asking(options)
    given = options.parse_args()
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {cores}, torch {torch.__version__}, Python {platform.python_version()}\n")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for kilobytes in (1, 256):
            (base := Path(folder, str(kilobytes))).mkdir()
            medians = report(f"a row of {kilobytes} KB", appends(kilobytes, given.rounds, base), 1e6, "µs")
            for side, asked in ((BARE, 1.5), (FILES, 1.0)):
                rows.append(Row(f"append, a row of {kilobytes} KB", side, medians["append"] / medians[side], asked))
        rows += many(given.rows, given.rounds, Path(folder))
        read = process(READS_ONE_KEY, Path(folder, "ours"))[-1]
        on_disk = sum(file.stat().st_size for file in Path(folder, "ours", "a").iterdir()) / 2**20
        print(f"opening, and one number of {given.rows} rows: {read:.1f} MiB of {on_disk:.0f} come into memory")
        resident = process(WRITES_MANY, given.million, folder)
        most = ", ".join(f"{max(part):.0f}" for part in np.array_split(resident, 10))
        print(f"writing {given.million} rows, the most resident in each tenth, MiB: {most}")
    if given.keep:
        keep(__file__, rows, threads=torch.get_num_threads())


def many(rows: int, rounds: int, folder: Path) -> list[Row]:
    """Report what reading and opening many rows takes, and return what is kept."""
    ours, bare = filled(rows, folder)
    ours.append("b", {"score": 1.0}, step=0)
    ours.flush()
    reader = ArtifactBuffer.open(folder / "ours")["a"]
    reader[:]  # every checksum was looked at
    column = next((folder / "ours" / "a").glob("*score.column"))
    sampled = report(
        f"sampling {SAMPLE} of {rows} rows of 1 KB",
        taking_turns(
            {
                "bare TorchRL": lambda _: bare.sample(SAMPLE),
                "the writer's": lambda _: ours["a"].sample(SAMPLE),
                "a reader's": lambda _: reader.sample(SAMPLE),
            },
            rounds,
        ),
        1e6,
        "µs",
    )
    read = report(
        f"one number of {rows} rows",
        taking_turns(
            {
                "numpy.fromfile of its column": lambda _: np.fromfile(column, "f4", rows),
                "opening the folder": lambda _: len(ArtifactBuffer.open(folder / "ours")["a"]),
                "opening, and series": lambda _: ArtifactBuffer.open(folder / "ours")["a"].series("score"),
                "series": lambda _: reader.series("score"),
            },
            max(5, rounds // 15),
        ),
        1e3,
        "ms",
    )
    ours.close()
    base, what = "bare TorchRL", f"sampling {SAMPLE} of {rows:,} rows of 1 KB"
    return [
        *(Row(f"{what}, {who}", base, sampled[who] / sampled[base], 1.2) for who in ("the writer's", "a reader's")),
        Row(f"opening {rows:,} rows", "nothing", read["opening the folder"] * 1e3, 100, unit="ms"),
    ]


def process(code: str, *args: object) -> list[float]:
    """Return the numbers that a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", MEMORY + code, *map(str, args)], check=True, stdout=subprocess.PIPE)
    return [float(line) for line in done.stdout.split()]


def report(what: str, seconds: dict[str, list[float]], scale: float, unit: str) -> dict[str, float]:
    """Print medians, and ratios to the first side; return the medians."""
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    first = next(iter(medians.values()))
    print(f"| {what} | {unit} | × the first |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median * scale:.4g} | {median / first:.3f} |")
    print()
    return medians


if __name__ == "__main__":
    main()
