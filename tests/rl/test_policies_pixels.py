"""Policies on pixels: every method, bytes that the network converts, stacked frames, maps stored as images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.testing import assert_close
from torchrl.modules import MLP, ConvNet, OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss

from tdhook_train import At, Every, Observer, ProbeSet
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.errors import NetworkError
from tdhook_train.health import DeadUnits, DormantUnits, EffectiveRank
from tdhook_train.latent import ActivationPatching, RidgeProbe
from tdhook_train.rl import ObservedLoss

ROWS, SIDE, ACTIONS = 12, 6, 3


class Scaled(nn.Module):
    """Pixels from 0 to 255, bytes or not."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 255


class ScaledBytes(nn.Module):
    """Scales bytes, and takes numbers for scaled already."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def trunk(channels: int, outputs: int, scale: type[nn.Module] = Scaled) -> nn.Sequential:
    convolved = ConvNet(channels, num_cells=[4, 2], kernel_sizes=3, strides=1)
    return nn.Sequential(scale(), convolved, MLP(2 * (SIDE - 4) ** 2, outputs, num_cells=[5]))


def loss(channels: int, scale: type[nn.Module] = Scaled) -> ClipPPOLoss:
    torch.manual_seed(0)
    logits = TensorDictModule(trunk(channels, ACTIONS, scale), ["pixels"], ["logits"])
    policy = ProbabilisticActor(logits, ["logits"], distribution_class=OneHotCategorical, return_log_prob=True)
    return ClipPPOLoss(policy, ValueOperator(trunk(channels, 1, scale), in_keys=["pixels"]))


def batch(channels: int = 3, *, as_bytes: bool) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (ROWS, channels, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return TensorDict(
        pixels=pixels if as_bytes else pixels.float(),
        action=nn.functional.one_hot(torch.arange(ROWS) % ACTIONS, ACTIONS),
        action_log_prob=torch.full((ROWS,), -1.0),
        advantage=torch.randn(ROWS, 1, generator=generator),
        value_target=torch.randn(ROWS, 1, generator=generator),
        collector={"traj_ids": torch.arange(ROWS) // 2},
        batch_size=[ROWS],
    )


def methods() -> dict[str, Any]:
    explained = {"targets": [("logits", 0), ("logits", 1)], "networks": "actor_network"}
    return {
        "probe": RidgeProbe(layers=[nn.Conv2d, nn.Linear], target=brightness),
        "patching": ActivationPatching(layers=[nn.Conv2d, nn.Linear], pairs=4),
        "dead": DeadUnits(),
        "dormant": DormantUnits(),
        "rank": EffectiveRank(),
        "saliency": Saliency(**explained),
        "ig": IntegratedGradients(**explained),
    }


def brightness(td: TensorDictBase) -> Tensor:
    return td["pixels"].float().flatten(1).mean(1)


def train(channels: int, *, as_bytes: bool, into: Any = None) -> tuple[list[Tensor], Any]:
    made, td = loss(channels), batch(channels, as_bytes=as_bytes)
    optimizer, observer = torch.optim.Adam(made.parameters(), 0.01), None
    if into is not None:
        observer = Observer(methods(), when=At(0) | Every(optim_steps=2), into=into)
        ObservedLoss(made, observer, optimizer)
    for _ in range(3):
        losses = made(td.clone())
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*(value.detach().clone() for value in made.state_dict().values()), torch.get_rng_state()], observer


@pytest.mark.parametrize("as_bytes", [False, True], ids=["floats", "bytes"])
@pytest.mark.parametrize("channels", [3, 4], ids=["colours", "stacked frames"])
def test_every_method_measures_pixels_and_leaves_the_training_alone(channels, as_bytes, tmp_path):
    bare, _ = train(channels, as_bytes=as_bytes)
    watched, observer = train(channels, as_bytes=as_bytes, into=tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))
    rows = {name: observer.buffer[name].at(0) for name in methods()}
    policy = loss(channels).actor_network
    pixels = batch(channels, as_bytes=False)["pixels"].requires_grad_()
    logits = policy.module[0].module(pixels)
    for i in range(2):
        (slope,) = torch.autograd.grad(logits[:, i].sum(), pixels, retain_graph=True)
        assert_close(rows["saliency"]["actor_network", "attr", "pixels"][:, i], slope)
    total = rows["ig"]["actor_network", "attr", "pixels"].flatten(2).sum(2)
    rise = (logits - policy.module[0].module(torch.zeros_like(pixels)))[:, :2].detach()
    assert_close(total - rows["ig"]["actor_network", "delta"], rise, atol=1e-4, rtol=1e-3)
    (first, *_, last) = [i for i, n in enumerate(observer.buffer["patching"].coords["layer"]) if "actor" in n]
    assert_close(rows["patching"]["normalised"][last, :ACTIONS], torch.ones(ACTIONS))
    assert rows["patching"]["normalised"][first, :ACTIONS].isfinite().all()
    assert rows["probe"]["r2"].isfinite().all()
    observer.close()


@pytest.mark.parametrize("targets", [[("logits", 0), ("logits", 1)], ("logits", 1)], ids=["several", "one"])
def test_maps_of_pixels_are_stored_as_images(targets, tmp_path):
    method = Saliency(targets=targets, networks="actor_network")
    with Observer({"maps": method}, when=At(0), into=tmp_path, on=ProbeSet(batch(as_bytes=True))) as observer:
        ObservedLoss(made := loss(3), observer)
        made(batch(as_bytes=True))
        dims = observer.buffer["maps"].dims(("actor_network", "attr", "pixels"))
    image = ("channel", "height", "width")
    assert tuple(dim.rpartition(".")[2] for dim in dims if dim != "batch") == (
        ("target", *image) if isinstance(targets, list) else image
    )


@pytest.mark.parametrize("kind", [Saliency, IntegratedGradients])
def test_a_network_that_takes_bytes_for_something_else_than_numbers_is_refused(kind, tmp_path):
    method = kind(targets=[("logits", 0)], networks="actor_network")
    with Observer({"maps": method}, when=At(0), into=tmp_path) as observer:
        ObservedLoss(made := loss(3, ScaledBytes), observer)
        with pytest.raises(NetworkError, match=r"another 'logits.0' for 'pixels' as floating-point numbers than as"):
            made(batch(as_bytes=True))
