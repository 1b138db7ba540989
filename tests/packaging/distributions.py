"""How the wheel and the sdist are built, and the wheel installed without any extra."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

# What extras bring, and nothing else that the library needs does; `probes` and `lightning` bring several modules.
OF_EXTRAS = (
    *("gymnasium", "mujoco", "lightning", "lightning_fabric", "pytorch_lightning"),
    *("plotly", "matplotlib", "pandas", "xarray", "pyarrow", "sklearn"),
)
_HIDING = f"""
import sys
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {OF_EXTRAS!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
"""


class Installed(NamedTuple):
    """An environment that has the wheel and what it depends on, and none of what extras bring."""

    site: Path

    def run(self, *args: str, **how: object) -> subprocess.CompletedProcess[str]:
        """Run the interpreter there, in a folder that holds no checkout."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env = {**kept, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", *args]
        return subprocess.run(
            command, env=env, cwd=self.site.parent, capture_output=True, text=True, check=False, **how
        )


def install(wheel: Path, folder: Path) -> Installed:
    """Install a wheel alone; what it depends on is lent by this environment, and what extras bring is hidden."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(folder / "site"), str(wheel)], check=True, capture_output=True)
    (folder / "site" / "sitecustomize.py").write_text(_HIDING)
    return Installed(folder / "site")


def build(kind: str, tree: Path, into: Path) -> Path:
    """Build the wheel or the sdist of a tree, by the build backend alone."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(into)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (made,) = into.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made
