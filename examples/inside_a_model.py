"""Read, patch, differentiate and steer a network by hand: what carries the answer to "do the signs agree"?

Run with: python examples/inside_a_model.py
"""

import torch
from tensordict import TensorDict
from torch import nn

from tdhook_train import HookedModel
from tdhook_train.attribution import Saliency
from tdhook_train.latent import ActivationAddition, SteeringVectors

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(2, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 1)
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(300):
    x = torch.rand(256, 2) * 2 - 1
    agree = (x.prod(1) > 0).float()
    loss = nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], agree)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

agreeing, opposed = torch.tensor([[0.7, 0.6], [-0.5, -0.8]]), torch.tensor([[0.7, -0.6], [-0.5, 0.8]])
hooked = HookedModel(model)

# Read every layer in one pass; a value before an activation in place is what it was before it.
with hooked.run(TensorDict(input=agreeing, batch_size=[2])) as run:
    layers = run.get("**")
    hidden = run.get("3")
print("logits where the signs agree:", run.output["output"].flatten().tolist())
print("active units of each layer:  ", {k: int((v > 0).any(0).sum()) for k, v in layers.resolve().items()})

# Put what the third layer held there into a pass over inputs whose signs differ: the answer goes along.
with hooked.run(TensorDict(input=opposed, batch_size=[2])) as run:
    run.set("3", hidden)
print("logits where they differ, patched:", run.output["output"].flatten().tolist())

# Which units push the answer up? Two targets from one forward pass, and nobody's .grad is touched.
with hooked.run(TensorDict(input=opposed, batch_size=[2])) as run:
    pushes = run.get_grad("3", reduce=lambda g: g.mean(0))
    run.backward({"logit": "output", "confidence": lambda out: out["output"].abs().sum()})
print("strongest unit for each target:", pushes.resolve().abs().argmax(1).tolist())

# The same by methods: what it looks at, the direction of "agrees", and a model steered along it.
with Saliency(targets=("output", 0)).prepare(model) as saliency:
    print("gradient at the inputs:", saliency(TensorDict(input=opposed, batch_size=[2]))["attr", "input"].tolist())
contrast = TensorDict({"positive": {"input": agreeing}, "negative": {"input": opposed}}, batch_size=[2])
with ActivationAddition("3").prepare(model) as sides:
    direction = sides(contrast)["steer", "3"]
with SteeringVectors("3", steer_fn=lambda _layer, output: output + direction).prepare(model):
    print("logits where they differ, steered:", model(opposed).flatten().tolist())
print("and afterwards as before:         ", model(opposed).flatten().tolist())
