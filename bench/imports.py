"""How long ``import tdhook_train`` takes beside ``import torch, tensordict``, in fresh processes that take turns.

python bench/imports.py [--rounds 11]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from _turns import ratio, turns

SIDES = {"torch, tensordict": "import torch, tensordict", "tdhook_train": "import tdhook_train"}


def main() -> None:
    """Print the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    seconds = turns(
        {
            name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True)
            for name, code in SIDES.items()
        },
        options.rounds,
    )


if __name__ == "__main__":
    main()
