"""SAC on Pendulum-v1, observed: policy, both critics and their targets, on fixed states and on those visited now."""

import sys

import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.health import EffectiveRank
from tdhook_train.latent import RidgeProbe
from tdhook_train.rl import ObservedLoss

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/sac"
torch.manual_seed(0)
env = GymEnv("Pendulum-v1")
env.set_seed(0)
net = torch.nn.Sequential(MLP(3, 2, num_cells=[32, 32]), NormalParamExtractor())
actor = ProbabilisticActor(
    TensorDictModule(net, ["observation"], ["loc", "scale"]),
    ["loc", "scale"],
    distribution_class=TanhNormal,
    distribution_kwargs={"low": -2, "high": 2},
)
critic = ValueOperator(MLP(4, 1, num_cells=[32, 32]), in_keys=["observation", "action"])
loss = SACLoss(actor, critic, num_qvalue_nets=2, action_spec=env.action_spec)
loss.make_value_estimator(gamma=0.99)
optimizer, targets = torch.optim.Adam(loss.parameters(), 1e-3), SoftUpdate(loss, tau=0.05)
replay = TensorDictReplayBuffer(storage=LazyTensorStorage(5000), batch_size=128)
# two episodes a batch
collector = Collector(env, actor, frames_per_batch=400, total_frames=4000, auto_register_policy_transforms=False)

observer = Observer(
    {"probe": RidgeProbe(layers="**", target={"speed": ("observation", 2)}, shifts=0), "health": EffectiveRank()},
    when=At(0) | Every(optim_steps=60),
    into=folder,
    on={"first": ProbeSet.first(collector, frames=400), "now": "collected"},  # the same states, and those visited now
    overwrite=True,
)
loss = ObservedLoss(loss, observer, optimizer)  # the one line
for data in collector:
    observer.collected(data)
    replay.extend(data.reshape(-1))
    for _ in range(30):
        losses = loss(replay.sample())
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss")).backward()
        optimizer.step()
        targets.step()
observer.finish()
for name in ("health.first", "health.now"):
    rank = observer.buffer[name].to_xarray().effective_rank
    print(name, *sorted({str(layer).split(".module")[0] for layer in rank.layer.values}), "at steps", rank.step.values)
observer.close()
