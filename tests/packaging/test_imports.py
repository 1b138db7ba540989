"""What ``import tdhook_train`` loads, and what it leaves for later."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tdhook_train

# Each takes longer to import than all of ours.
LARGE = (
    *("torchrl", "sklearn", "pandas", "xarray", "pyarrow", "plotly", "matplotlib"),
    *("lightning", "gymnasium", "mujoco", "loky", "rich", "typer"),
)


def loaded(source: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter holds after some statements."""
    code = f"import sys\n{source}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_that_can_wait():
    ours = loaded("import tdhook_train")
    assert ours.isdisjoint({*LARGE, "scipy", "tqdm"})
    assert ours <= loaded("import torch, tensordict") | {"tdhook_train"}


@pytest.mark.parametrize(
    ("source", "later"),
    [
        ("from tdhook_train import HookedModel, Method, Every", LARGE),
        ("import tdhook_train.attribution, tdhook_train.health, tdhook_train.latent", LARGE),
        ("import tdhook_train.cli", (*set(LARGE) - {"rich", "typer"}, "torch", "tensordict")),
    ],
)
def test_a_door_loads_what_is_behind_it_and_no_more(source, later):
    assert sorted(loaded(source).intersection(later)) == []


def test_what_is_named_is_there():
    for name in tdhook_train.__all__:
        assert getattr(tdhook_train, name).__module__.startswith("tdhook_train.")
    assert dir(tdhook_train) == sorted(tdhook_train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Observers'"):
        _ = tdhook_train.Observers
