"""A buffer of evidence: stream activations to disk while a network trains, then fit a sparse dictionary to them.

Run with: python examples/artifact_buffer.py [FOLDER]
"""

import sys

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data.replay_buffers import SamplerWithoutReplacement

from tdhook_train import ArtifactBuffer, HookedModel

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/buffer"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
hooked, optimizer = HookedModel(model), torch.optim.Adam(model.parameters(), lr=1e-2)

with ArtifactBuffer(folder, overwrite=True) as buffer:
    # Without limits nothing is dropped; here the newest rows stay of one artifact, evenly spaced steps of another.
    buffer.declare("activations", dims={"hidden": "unit"}, capacity=8_000)
    buffer.declare("loss", capacity=30, keep="log-spaced")
    for step in range(500):
        x = torch.randn(128, 4)
        loss = (model(x)[:, 0] - x.prod(1)).square().mean()
        if step % 5 == 0:  # many rows a step: one for each input
            with hooked.run(TensorDict(input=x, batch_size=[128])) as run:
                hidden = run.get("1")
            buffer.extend("activations", TensorDict(hidden=hidden.resolve(), batch_size=[128]), step=step)
        buffer.append("loss", {"loss": loss, "norm": model[2].weight.norm()}, step=step, frames=128 * step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # It is a TorchRL replay buffer: samplers, transforms, batch sizes and prefetch are those of TorchRL.
    dictionary, decoder = nn.Linear(32, 64), nn.Linear(64, 32)
    fitting = torch.optim.Adam([*dictionary.parameters(), *decoder.parameters()], lr=3e-3)
    buffer.declare("dictionary", files=["weights"])  # its size may differ from one to the next
    for rows in buffer["activations"].replay(batch_size=500, sampler=SamplerWithoutReplacement()):
        code = dictionary(rows["hidden"]).relu()
        error = (decoder(code) - rows["hidden"]).square().mean()
        fitting.zero_grad()
        (error + 1e-3 * code.abs().mean()).backward()
        fitting.step()
    buffer.append("dictionary", {"weights": dict(decoder.state_dict()), "error": error}, step=500)

# Afterwards, or from another process while the training runs.
run = ArtifactBuffer.open(folder)
print("activations:", len(run["activations"]), "rows, from step", int(run["activations"].steps[0]))
print("kept steps of the loss:", run["loss"].steps.tolist())
low = run["loss"].where("loss", lambda loss: loss < 0.5 * loss[0], keys=[("meta", "step")])
print("below half of the first loss at steps", low["meta", "step"].tolist())
print("dictionary:", tuple(run["dictionary"].at(500)["weights", "weight"].shape))
print(run["loss"].to_pandas().tail(3).to_string())
print("damaged:", run.verify())
