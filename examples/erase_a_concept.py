"""A cart that brakes by its speed: where the network knows it, which units carry it, and what is left without it."""

import sys

import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.latent import AttributionPatching, Leace, LogitDifference, MdlProbe, MeanDifferenceDirection
from tdhook_train.plots import write_report

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/erased"
torch.manual_seed(0)
# 40 rides of 25 moments: position, speed and two senses that say nothing
rides = torch.randn(40, 25, 4)
rides[..., 1] = rides[..., 1].cumsum(1) / 3
x = rides.flatten(0, 1)
fast, left = x[:, 1] > 0, x[:, 0] > 0
action = (fast ^ left).long()  # which side to brake on depends on both
data = TensorDict(input=x, fast=fast, left=left, action=action, batch_size=[len(x)])

net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
optimizer = torch.optim.Adam(net.parameters(), 3e-3)
metric = {"one side rather than the other": LogitDifference(1, 0, logits="output")}
methods = {
    "bits": MdlProbe(layers=["1", "3"], target=["fast", "left", "action"]),
    "patching": AttributionPatching(layers=["1", "3"], targets=metric),
    "speed": MeanDifferenceDirection(layers=["1", "3"], concept="fast"),
}
probes = ProbeSet(data, groups=torch.arange(len(x)) // 25)
with Observer(methods, when=At(0) | Every(optim_steps=100), into=folder, on=probes, overwrite=True) as observer:
    for step in range(401):
        observer.step(net, step=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), action).backward()
        optimizer.step()
    bits, patching = observer.buffer["bits"], observer.buffer["patching"]
    for step, row in zip(bits.steps, bits.series("compression")[:, 1], strict=True):
        print(f"step {step}: compression in the last hidden layer of speed, side, action: ", end="")
        print(", ".join(f"{value:.1f}" for value in row.tolist()))
    last = patching[-1]
    print(f"agreement with exact patching: {', '.join(f'{a:.3f}' for a in last['agreement'][:, 0].tolist())}")
    print(write_report(observer.buffer, folder))


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == action).float().mean().item()


erasure = Leace(layers=["0"], concept="fast")
with erasure.prepare(net) as hooked:
    erased = hooked(data)
print(f"right without erasing: {accuracy(net):.2f}")
with Leace.edit(erased).prepare(net):
    print(f"with speed erased before the first activation: {accuracy(net):.2f}")
print(f"and afterwards: {accuracy(net):.2f}")
