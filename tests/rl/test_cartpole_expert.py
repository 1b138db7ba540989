"""On an agent that somebody else trained: the expert of the `imitation` package, 500 on CartPole-v1."""

import io
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import GymEnv
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from tdhook_train.latent import ActivationPatching, AttributionPatching, LogitDifference, RidgeProbe
from tdhook_train.rl import AblatedReturn

SDIST = "imitation==1.0.1"
MODEL = "tests/testdata/expert_models/cartpole_0/policies/final/model.zip"
make_env = partial(GymEnv, "CartPole-v1")

pytestmark = pytest.mark.slow  # it downloads a package of 1 MB


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imitation")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", SDIST, "-d", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"the sources of {SDIST} cannot be downloaded here, and they alone hold the expert")
    (archive,) = Path(folder).glob("imitation-*.tar.gz")
    with tarfile.open(archive) as sources:
        member = next(name for name in sources.getnames() if name.endswith(MODEL))
        model = sources.extractfile(member).read()
    policy = zipfile.ZipFile(io.BytesIO(model)).read("policy.pth")
    return torch.load(io.BytesIO(policy), map_location="cpu", weights_only=True)


def actor_of(net):
    module = TensorDictModule(net, ["observation"], ["logits"])
    return ProbabilisticActor(module, ["logits"], distribution_class=OneHotCategorical)


@pytest.fixture(scope="module")
def net(weights):
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    names = {"0": "mlp_extractor.policy_net.0", "2": "mlp_extractor.policy_net.2", "4": "action_net"}
    net.load_state_dict({f"{i}.{p}": weights[f"{name}.{p}"] for i, name in names.items() for p in ("weight", "bias")})
    return net.eval()


@pytest.fixture(scope="module")
def states(net):
    """Twenty episodes, played with some chance so that the pole moves."""
    env = make_env()
    env.set_seed(0)
    torch.manual_seed(0)
    played = [env.rollout(100, actor_of(net)) for _ in range(20)]
    groups = torch.cat([torch.full((len(one),), i) for i, one in enumerate(played)])
    whole = torch.cat(played)
    return TensorDict(observation=whole["observation"], batch_size=[len(whole)]), groups


def test_the_expert_holds_the_pole_and_loses_it_without_a_layer(net):
    play = AblatedReturn(make_env, layers="module.0.module.*", units=None, by="zero", episodes=3, max_steps=500)
    with play.prepare(actor_of(net)) as hooked:
        found = hooked(TensorDict(observation=torch.zeros(1, 4), batch_size=[1]))
    assert found["return_intact"].mean() == 500
    assert (found["drop"][:4] > 400).all()  # of all that is hidden


def test_probes_find_the_poles_angular_velocity_above_the_null(net, states):
    td, groups = states
    probe = RidgeProbe(target={"angular velocity": ("observation", 3)})
    with probe.prepare(net, ["observation"], ["logits"]) as hooked:
        found = hooked(td, groups=groups, ordered=True)
    r2, null, p = (found[key][:, 0] for key in ("r2", "r2_null", "p"))
    assert (r2[:4] > 0.9).all()
    assert (r2[:4] > null[:4] + 0.3).all()
    assert (p[:4] == 1 / 40).all()


def test_a_few_units_carry_the_decision_and_the_approximation_finds_them(net, states):
    td, _ = states
    metric = {"right rather than left": LogitDifference(1, 0)}
    found = {}
    for kind in (ActivationPatching, AttributionPatching):
        with kind(layers=["1", "3"], targets=metric, pairs=64).prepare(net, ["observation"], ["logits"]) as hooked:
            found[kind] = hooked(td)
    exact, estimate = (found[kind]["unit_effect"][..., 0] for kind in (ActivationPatching, AttributionPatching))
    torch.testing.assert_close(estimate[1], exact[1])  # all behind the second tanh is linear
    assert found[AttributionPatching]["agreement"][0, 0] > 0.9
    best = exact[0].topk(8).indices
    assert len(set(best.tolist()) & set(estimate[0].topk(8).indices.tolist())) >= 6
