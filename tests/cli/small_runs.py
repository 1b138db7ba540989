"""Runs to ask about, and the command line as a user meets it."""

import subprocess
import sys

import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.attribution import Saliency
from tdhook_train.health import DormantUnits
from tdhook_train.latent import RidgeProbe

COMMAND = [sys.executable, "-m", "tdhook_train.cli"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def batch(rows=40):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    return TensorDict(input=x, y=x[:, 0], z=x[:, 1] * 2, batch_size=[rows])


def methods():
    return {
        "probe": RidgeProbe(target=["y", "z"], shifts=3),
        "health": DormantUnits(taus=(0.1,)),
        "look": Saliency(targets=("output", 0), rows=5),
    }


def record(folder, steps=5, checkpoints=None):
    """Observe a model whose weights shrink, at steps 0, 2, 4 …"""
    model = net()
    with Observer(methods(), when=At(0) | Every(optim_steps=2), into=folder, on=ProbeSet(batch(), groups="rows")) as o:
        for step in range(steps):
            o.step(model, batch(), step=step)
            if checkpoints is not None:
                torch.save(model.state_dict(), checkpoints / f"step_{step}.pt")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter *= 0.9
        o.mark("lr drop")
    return folder


def process(*args, **kwargs):
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **kwargs
    )
