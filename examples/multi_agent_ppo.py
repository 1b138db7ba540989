"""Two agents, each with weights of its own, learn to meet on a line. On whose place does each decide? Seen in MAPPO."""

import sys

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import MultiAgentMLP, NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import MAPPOLoss

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients
from tdhook_train.rl import ObservedLoss


class Meeting(EnvBase):
    """32 pairs on lines. Both agents see both places, and move their own; both pay for being apart."""

    def __init__(self) -> None:
        super().__init__(batch_size=[32])
        self.observation_spec = Composite(observation=Unbounded((32, 2, 2)), shape=[32])
        self.action_spec, self.reward_spec = Bounded(-1, 1, (32, 2, 1)), Unbounded((32, 2, 1))

    def _reset(self, _: TensorDict | None = None) -> TensorDict:
        return TensorDict(observation=torch.randn(32, 1, 2).expand(32, 2, 2), batch_size=[32])

    def _step(self, td: TensorDict) -> TensorDict:
        places = td["observation"] + 0.5 * td["action"].mT  # [pair, who sees, whose]
        return TensorDict(observation=places, reward=-places.diff(dim=-1).abs(), batch_size=[32])

    _set_seed = staticmethod(torch.manual_seed)


env, size = Meeting(), {"share_params": False, "depth": 1, "num_cells": 32}
env.set_seed(0)
net = torch.nn.Sequential(MultiAgentMLP(2, 2, 2, centralized=False, **size), NormalParamExtractor())
policy = TensorDictModule(net, ["observation"], ["loc", "scale"])
actor = ProbabilisticActor(policy, ["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)
critic = TensorDictModule(MultiAgentMLP(2, 1, 2, centralized=True, **size), ["observation"], ["state_value"])
optimizer = torch.optim.Adam((loss := MAPPOLoss(actor, critic)).parameters(), 3e-3)
observer = Observer(
    {"rests": IntegratedGradients(targets=["loc"])}, when=At(0) | Every(optim_steps=100), overwrite=True,
    into=sys.argv[1] if len(sys.argv) > 1 else "runs/agents", on=ProbeSet(env.rollout(10)),
)  # fmt: skip
loss = ObservedLoss(loss, observer, optimizer)  # the one line
collector = Collector(
    env, actor, frames_per_batch=320, total_frames=9600, reset_at_each_iter=True, auto_register_policy_transforms=False
)
for data in (batch for batch in collector for _ in range(10)):
    optimizer.zero_grad()
    sum(value for name, value in loss(data).items() if name.startswith("loss")).backward()
    optimizer.step()
observer.finish()
rests = observer.buffer["rests"].series(("actor_network", "attr", "observation")).abs().mean(1)
for step, now in zip(observer.buffer["rests"].steps, rests, strict=True):  # now: [who decides, who sees, whose place]
    print(f"step {step}: on the other's place rest", *(f"{now[i, i, 1 - i] / now[i].sum():.0%}" for i in range(2)))
observer.close()
