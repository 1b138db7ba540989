"""When did it learn what, and in which order? Five small nets learn two products at once."""

import sys
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import ArtifactBuffer, At, Geometric, Observer, ProbeSet
from tdhook_train.emergence import across_seeds, earlier, emergence_table
from tdhook_train.latent import RidgeProbe

folder, seeds, steps = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/when"), 5, 400


def walks(count: int, length: int = 50) -> TensorDict:
    """Trajectories of six numbers that wander, of which the net is to learn two products; the last number is chance."""
    x = torch.zeros(count, length, 7)
    for t in range(length):
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * torch.randn(count, 7)
    two, three = x[..., 0] * x[..., 1], x[..., 2] * x[..., 3] * x[..., 4]
    td = TensorDict(input=x[..., :6], two=two, three=three, chance=x[..., 6], batch_size=[count, length])
    return td.set("traj", torch.arange(count)[:, None].expand(count, length)).reshape(-1)


for seed in range(seeds):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    observer = Observer(
        {"probe": RidgeProbe(target=["two", "three", "chance"])},
        when=At(0) | Geometric(first=1, last=steps, n=24, of="optim_steps"),
        into=folder / str(seed),
        on=ProbeSet(walks(20), groups="traj"),  # whole trajectories: with them there is a null
        overwrite=True,
    )
    data = walks(400)
    for step in range(steps):
        observer.step(net, step=step)  # before the step: these are the weights of step `step`
        batch = data[torch.randint(len(data), (256,))]
        loss = (net(batch["input"]) - torch.stack([batch["two"], batch["three"]], 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    observer.finish(step=steps)
    observer.close()

runs = {seed: ArtifactBuffer.open(folder / str(seed))["probe"] for seed in range(seeds)}
table = emergence_table(runs)
print(table[table.run == 0].drop(columns=["run", "change_points", "reason_sigmoid"]).round(2).to_string(index=False))
last = table[table.layer == "4"].set_index(["target", "run"]).onset_half
for target in ("two", "three", "chance"):
    found = across_seeds(last[target])
    print(f"{target}: step {found.onset:.0f} ({found.low:.0f} to {found.high:.0f}), {found.learned} of {found.seeds}")
order = earlier(last["two"], last["three"])
print(f"two before three by {order.decades:.2f} decades, p = {order.p:.3f} {order.reason}")
