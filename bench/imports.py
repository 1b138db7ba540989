"""How long ``import tdhook_train`` takes beside ``import torch, tensordict``, in fresh processes that take turns.

python bench/imports.py [--rounds 11]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import torch
from _results import Row, asking, keep
from _turns import ratio, turns

BASE = "import torch, tensordict"
OURS = {  # the package leaves everything for later, also torch: what is said of it is only fair with its names in use
    "import tdhook_train": 1.15,
    "import torch, tensordict, tdhook_train": 1.15,
    "from tdhook_train import HookedModel, Method": None,
    "from tdhook_train import Observer": None,
}


def main() -> None:
    """Measure, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    asking(parser)
    options = parser.parse_args()
    sides = {code: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True) for code in (BASE, *OURS)}
    seconds = turns(sides, options.rounds)
    rows = [Row(f"`{code}`", f"`{BASE}`", ratio(seconds, code, BASE), asked) for code, asked in OURS.items()]
    print(f"{BASE}: {statistics.median(seconds[BASE]):.2f} s")
    for row in rows:
        print(f"{row.what}: {row.value:.3f} ×")
    if options.keep:
        keep(__file__, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
