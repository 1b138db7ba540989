"""PPO on CartPole-v1, changed on the way: 40 steps without the policy's hidden layer, sleeping units started anew."""

import sys
from functools import partial

import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, RewardSum, TransformedEnv
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_train import At, Every, LiveEdit, Observer, When
from tdhook_train.health import DormantUnits, ReDo
from tdhook_train.latent import Ablate
from tdhook_train.rl import ObservedLoss

torch.manual_seed(0)
env = TransformedEnv(GymEnv("CartPole-v1"), RewardSum())
env.set_seed(0)
mlp = partial(MLP, 4, num_cells=[32], activation_class=torch.nn.ReLU)
net = TensorDictModule(mlp(out_features=2), ["observation"], ["logits"])
actor = ProbabilisticActor(net, ["logits"], distribution_class=OneHotCategorical, return_log_prob=True)
critic = ValueOperator(mlp(out_features=1), in_keys=["observation"])
loss = ClipPPOLoss(actor, critic, normalize_advantage=True)
optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
collector = Collector(env, actor, frames_per_batch=400, total_frames=6400, auto_register_policy_transforms=False)

hidden = "actor_network.module.0.module.1"  # the ReLU; a path that is wrong is refused, and the nearest one named
observer = Observer(
    {"health": DormantUnits(layers=torch.nn.ReLU, taus=(0.1,))},
    when=Every(optim_steps=10),
    into=sys.argv[1] if len(sys.argv) > 1 else "runs/edits",
    overwrite=True,
    edits={
        "lesion": LiveEdit(Ablate(hidden), when=At(80), steps=40),
        # once at each crossing, by any layer (over="mean": by their mean), and not again before it has gone below
        "redo": LiveEdit(ReDo(tau=0.1), when=When("health", "dormant", above=0.3)),
    },
)
observer.alert(When("health", "dormant", above=0.2), mark="a fifth of a layer sleeps")
loss = ObservedLoss(loss, observer, optimizer)  # of the optimizer, ReDo clears the moments of what it writes
for data in collector:
    observer.collected(data)
    ended = data["next", "episode_reward"][data["next", "done"]]
    print(f"step {observer.steps_taken}: return {ended.mean():.0f}")
    for _ in range(10):
        with torch.no_grad():
            advantage(data)
        losses = loss(data)
        optimizer.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        optimizer.step()
observer.finish()
for event in observer.buffer.events("mark"):
    print(f"at step {event['step']}: {event['label']}")
observer.close()
