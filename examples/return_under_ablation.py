"""PPO on CartPole-v1: which layers and units the policy earns its return with, while it learns to."""

import sys
from functools import partial

import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_train import At, Every, Observer
from tdhook_train.plots import write_report
from tdhook_train.rl import AblatedReturn, ObservedLoss

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/ablation"
torch.manual_seed(0)
make_env = partial(GymEnv, "CartPole-v1")
env = make_env()
env.set_seed(0)
mlp = partial(MLP, 4, num_cells=[8], activation_class=torch.nn.Tanh)
net = TensorDictModule(mlp(out_features=2), ["observation"], ["logits"])
actor = ProbabilisticActor(net, ["logits"], distribution_class=OneHotCategorical, return_log_prob=True)
critic = ValueOperator(mlp(out_features=1), in_keys=["observation"])
loss = ClipPPOLoss(actor, critic, normalize_advantage=True)
optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
collector = Collector(env, actor, frames_per_batch=400, total_frames=4_000, auto_register_policy_transforms=False)

observer = Observer(
    # the hidden layer and its eight units, one at a time, in an environment of their own
    {"return": AblatedReturn(make_env, torch.nn.Tanh, units="each", episodes=2, max_steps=100)},
    when=At(0) | Every(optim_steps=25),
    into=folder,
    overwrite=True,
)
loss = ObservedLoss(loss, observer, optimizer)
for data in collector:
    for _ in range(10):
        with torch.no_grad():
            advantage(data)
        losses = loss(data.reshape(-1))
        optimizer.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        optimizer.step()
observer.finish()
rows = observer.buffer["return"]
returns, drops = rows.series(("actor_network", "return_intact")).mean(-1), rows.series("unit_drop")
for step, intact, (lost,) in zip(rows.steps, returns, drops, strict=True):
    needed = (lost > 0.2 * intact).nonzero().flatten().tolist()
    print(f"step {step}: return {intact:.0f}; more than a fifth of it is lost without one of units {needed}")
print(write_report(observer.buffer, folder))
observer.close()
