"""Checkpoints of a small net, and sweeps over them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import ArtifactBuffer, Method, sweep
from tdhook_train.latent import Cka, RidgeProbe


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def data() -> TensorDict:
    torch.manual_seed(1)
    x = torch.randn(40, 3)
    return TensorDict({"input": x, "y": x[:, :1] * x[:, 1:2]}, [40])


@dataclass(frozen=True)
class Counted(Method):
    """The sum of the weights; writes a line to a file each time, and does what is asked at a call of it."""

    file: str
    at: int = 0
    does: str = ""

    writes: ClassVar = {"sum": "", "drawn": ""}

    def measure(self, seen: Any, model: Any) -> TensorDict:
        with Path(self.file).open("a") as file:
            file.write(f"{os.getpid()} {seen.clock.step}\n")
        if self.does and seen.clock.step == self.at:
            exec(self.does, {})
        total = torch.stack([weight.double().sum() for weight in model.module.state_dict().values()]).sum()
        return TensorDict({"sum": total, "drawn": torch.rand(1, generator=seen.generator)[0]})

    def settings(self) -> dict[str, Any]:
        return {"method": "Counted"}  # what it does on the way changes no number


def methods(file: Path, at: int = 0, does: str = "") -> dict[str, Any]:
    return {
        "probe": RidgeProbe(target="y"),
        "similarity": Cka("**", ("previous", "initial")),
        "counted": Counted(str(file), at, does),
    }


def write(folder: Path, steps: Any) -> Path:
    """Write the checkpoints of these steps; each is what it is whatever others there are."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        torch.manual_seed(step)
        torch.save({"model": net().state_dict(), "step": step}, folder / f"{step}.pt")
    return folder


def run(folder: Path, into: Path, given: Any, **options: Any) -> ArtifactBuffer:
    return sweep(folder, net, given, data(), into, progress=False, in_keys=["input"], **options)


def calls(file: Path) -> list[int]:
    """The steps at which the method was called."""
    return [int(line.split()[1]) for line in file.read_text().splitlines()] if file.exists() else []
