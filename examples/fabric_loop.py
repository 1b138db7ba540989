"""A bare loop with Fabric, observed: any loop that can say where it is."""

import sys

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.callbacks.batches import as_tensordict
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import RidgeProbe

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/fabric"
torch.manual_seed(0)
x = torch.randn(2000, 6)
data = TensorDataset(x, (x[:, :1] * x[:, 1:2]).tanh())  # a product, which no layer is given

fabric = Fabric(accelerator="cpu", devices=1)
net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 3e-3))
batches = fabric.setup_dataloaders(DataLoader(data, batch_size=50, shuffle=True))

observer = Observer(
    {"probe": RidgeProbe(target={"product": "target"}), "rank": EffectiveRank()},
    when=At(0) | Every(optim_steps=100),
    into=folder,
    on=ProbeSet(as_tensordict(data[:1000]), groups="rows"),  # independent rows
    overwrite=True,
)
step = 0
for epoch in range(10):
    for batch in batches:
        observer.step(model, step=step, epoch=epoch)  # before the step: these are the weights of step `step`
        loss = (model(batch[0]) - batch[1]).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        step += 1
observer.finish(step=step)
r2 = observer.buffer["probe"].to_xarray().r2.sel(target="product")
for at in r2.step.values:
    print(f"step {at}:", {str(layer): round(float(r2.sel(step=at, layer=layer)), 2) for layer in r2.layer.values})
observer.close()
