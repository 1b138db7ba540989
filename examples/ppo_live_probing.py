"""Observe a PPO script of your own: what its networks know, rest on and use, while they train.

python examples/ppo_live_probing.py [FRAMES] [FOLDER]
"""

import sys

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_train import ArtifactBuffer, At, Every, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.latent import RidgeProbe
from tdhook_train.plots import write_report
from tdhook_train.rl import ObservedLoss

frames = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
folder = sys.argv[2] if len(sys.argv) > 2 else "runs/example"
torch.manual_seed(0)
env = GymEnv("InvertedDoublePendulum-v5")
policy = nn.Sequential(MLP(9, 2, depth=2, num_cells=64, activation_class=nn.Tanh), NormalParamExtractor())
actor = ProbabilisticActor(
    TensorDictModule(policy.double(), ["observation"], ["loc", "scale"]),
    in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True,
)  # fmt: skip
critic = ValueOperator(MLP(9, 1, depth=2, num_cells=64, activation_class=nn.Tanh).double(), in_keys=["observation"])
collector = Collector(env, actor, frames_per_batch=2048, total_frames=frames, auto_register_policy_transforms=False)
advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
loss = ClipPPOLoss(actor, critic)
optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)

# --- the interpretability: what to measure, when, on what, and where to keep it
observer = Observer(
    {"probe": RidgeProbe(target={"action": "action", "value": "state_value", "cart velocity": ("observation", 5)}),
     "attribution": IntegratedGradients(targets=["loc", "state_value"], rows=64, baseline="mean")},
    when=At(0) | Every(optim_steps=100), into=folder, on=ProbeSet.first(collector, frames=2048), overwrite=True,
)  # fmt: skip
loss = ObservedLoss(loss, observer, optimizer)

for data in collector:
    with torch.no_grad():
        advantage(data)
    for rows in (index for _ in range(10) for index in torch.randperm(2048).split(64)):
        losses = loss(data[rows])
        optimizer.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        optimizer.step()
collector.shutdown()

observer.finish()
observer.close()
print(write_report(ArtifactBuffer.open(folder), folder))
