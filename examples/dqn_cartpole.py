"""DQN on CartPole-v1, observed: do its units go dormant, and when does it know the angle of the pole?"""

import sys

import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, StepCounter, TransformedEnv
from torchrl.modules import MLP, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, HardUpdate

from tdhook_train import Every, Observer, ProbeSet
from tdhook_train.health import DormantUnits
from tdhook_train.latent import RidgeProbe
from tdhook_train.rl import ObservedLoss

folder, frames = sys.argv[1] if len(sys.argv) > 1 else "runs/dqn", 6000
torch.manual_seed(0)
env = TransformedEnv(GymEnv("CartPole-v1"), StepCounter())
env.set_seed(0)
net = MLP(4, 2, num_cells=[64, 64], activation_class=nn.ReLU)
actor = QValueActor(net, in_keys=["observation"], spec=env.action_spec)
greedy = EGreedyModule(env.action_spec, eps_init=1.0, eps_end=0.05, annealing_num_steps=frames // 2)
policy = TensorDictSequential(actor, greedy)
loss = DQNLoss(actor, action_space=env.action_spec, delay_value=True)
loss.make_value_estimator(gamma=0.99)
targets = HardUpdate(loss, value_network_update_interval=100)
optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
replay = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=128)
collector = Collector(env, policy, frames_per_batch=200, total_frames=frames, auto_register_policy_transforms=False)

observer = Observer(
    {"probe": RidgeProbe(target={"angle": ("observation", 2)}), "sleep": DormantUnits(layers=nn.ReLU)},
    when=Every(optim_steps=300),
    into=folder,
    on=ProbeSet.first(collector, frames=800),  # of a policy that still acts at random: states of every kind
    overwrite=True,
)
loss = ObservedLoss(loss, observer, optimizer)  # the one line
for data in collector:
    observer.collected(data)  # counts frames
    greedy.step(data.numel())
    replay.extend(data)
    for _ in range(50):
        optimizer.zero_grad()
        loss(replay.sample())["loss"].backward()
        optimizer.step()
        targets.step()
observer.finish()

# the angle is an input, so early layers hold it; does the last one, from which actions are chosen? and its target's?
angle, sleep = (observer.buffer[name].to_xarray() for name in ("probe", "sleep"))
for step in angle.step.values:
    r2 = angle.r2.sel(step=step, target="angle")
    known = [float(r2.sel(layer=f"{name}value_network.module.0.module.4")) for name in ("", "target_")]
    asleep = float(sleep.dormant.sel(step=step, tau=0.1)[1])  # of the second layer's units
    print(f"step {step}: R² of the angle {known[0]:.2f}, in the target {known[1]:.2f}; asleep {asleep:.0%}")
observer.close()
