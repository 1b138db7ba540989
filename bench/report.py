"""How long a large report takes to write, how large it is, and how soon a browser shows its first heat map.

The run is made up: probe scores of 500 ticks × 30 layers × 10 targets with all that a probe writes. Needs a Chromium
(Debian's package) and playwright (`make test-browser` installs both); without them only writing is measured.

    python bench/report.py [--ticks 500] [--layers 30] [--targets 10] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _results import Row, asking, keep

from tdhook_train import ArtifactBuffer
from tdhook_train.plots import write_report

KEYS = ("r2", "r2_pooled", "r2_observation", "r2_initial", "r2_null", "p")
# From the navigation on, in the page's own clock: when the first map is there, and when the frame after it began.
PAINTED = """() => new Promise(done => {
  const look = () => document.querySelector('.plot .heatmaplayer image')
    ? requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))
    : requestAnimationFrame(look);
  look();
})"""


def made_up(folder: Path, ticks: int, layers: int, targets: int) -> ArtifactBuffer:
    """Record a run of so many ticks."""
    draw = torch.Generator().manual_seed(0)
    names = [
        f"{network}_network.module.0.module.{number}"
        for network in ("actor", "critic")
        for number in range(layers // 2)
    ]
    buffer = ArtifactBuffer(folder)
    coords = {"layer": names, "target": [f"target {number}" for number in range(targets)]}
    buffer.declare("probe", dims=dict.fromkeys(KEYS, ("layer", "target")), coords=coords)
    shape = (len(names), targets)
    for tick in range(ticks):
        row = {key: torch.rand(shape, generator=draw, dtype=torch.float64) for key in KEYS}
        buffer.append("probe", row, step=10 * tick, cost=0.01)
    return buffer


def opened(page: Path, rounds: int) -> list[float]:
    """Return seconds from the navigation to the frame after the first heat map, each in a fresh browser context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        where = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=where, args=["--no-sandbox"])
        found = []
        for _ in range(rounds):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            tab = context.new_page()
            tab.goto(page.as_uri(), wait_until="commit")
            found.append(tab.evaluate(PAINTED) / 1e3)
            context.close()
        browser.close()
    return found


def main() -> None:
    """Write it, measure it, open it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("ticks", 500), ("layers", 30), ("targets", 10), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asking(parser)
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        with made_up(Path(folder) / "run", given.ticks, given.layers, given.targets) as buffer:
            began = time.perf_counter()
            page = write_report(buffer, Path(folder) / "report")
            print(f"written in {time.perf_counter() - began:.1f} s, {page.stat().st_size / 1e6:.1f} MB")
        try:
            found = opened(page, given.rounds)
        except Exception as error:
            print(f"not opened: {type(error).__name__}: {str(error).splitlines()[0]}")
            return
    shown = ", ".join(f"{seconds:.2f}" for seconds in found)
    print(f"first heat map after {statistics.median(found):.2f} s (median of {shown}); asked for: 2")
    if given.keep:
        what = f"first heat map of {given.ticks} ticks × {given.layers} layers × {given.targets} targets"
        keep(__file__, [Row(what, "nothing", statistics.median(found), 2, unit="s")], threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
