"""How far parameters moved: against copies of them, by hand and through a training."""

import copy
import itertools

import pytest
import torch
from method_cases import batch, measured, mlp
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss

from tdhook_train import ArtifactBuffer, At, Every, HookedModel, Observer, ProbeSet
from tdhook_train.weights import WeightDistance


def flat(module):
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def test_it_is_the_distance_of_each_layer_as_one_vector():
    first = mlp(3, 5, 2)
    now = copy.deepcopy(first)
    with torch.no_grad():
        now[0].weight += 0.5
        now[2].bias *= -3
    out = measured(WeightDistance(), now, batch(), initial=HookedModel(first, ["input"], ["output"]))
    for i, layer in enumerate((0, 2)):
        a, b = flat(now[layer]), flat(first[layer])
        assert out["l2_initial"][i].item() == pytest.approx(float((a - b).norm()))
        assert out["relative_initial"][i].item() == pytest.approx(float((a - b).norm() / b.norm()))
        cosine = torch.nn.functional.cosine_similarity(a, b, 0)
        assert out["cosine_initial"][i].item() == pytest.approx(float(cosine))
        assert out["norm"][i].item() == pytest.approx(float(a.norm()))
    assert out["l2_initial"][0].item() == pytest.approx(0.5 * 15**0.5, rel=1e-6)


def test_parameters_of_containers_are_layers_and_a_named_module_is_all_below_it():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.inner = mlp(3, 4, 2)

        def forward(self, x):
            return self.inner(x * self.scale)

    model = Scaled()
    with WeightDistance().prepare(model) as hooked:
        assert hooked.method.labels(None, hooked.model)["layer"] == ["Scaled", "inner.0", "inner.2"]
    named = measured(WeightDistance(layers="inner"), model, batch())
    assert named["norm"].tolist() == pytest.approx([float(flat(model.inner).norm())])
    assert named["l2_initial"].isnan().all()  # by hand there is no first network


def test_a_layer_of_zeros_has_no_direction():
    model = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    out = measured(WeightDistance(), model, batch(), initial=HookedModel(copy.deepcopy(model), ["input"], ["output"]))
    assert out["l2_initial"].tolist() == [0]
    assert out["relative_initial"].isnan().all()
    assert out["cosine_initial"].isnan().all()


def observed(folder, model, steps, resume_with=None):
    """Observe weights that change, at every second step; return them, and the observer's state."""
    method, kept = {"w": WeightDistance(to=("initial", "previous"))}, []
    into = ArtifactBuffer(folder, resume=resume_with is not None)
    with Observer(method, when=At(0) | Every(optim_steps=2), into=into, on=ProbeSet(batch())) as observer:
        if resume_with is not None:
            observer.load_state_dict(resume_with)
        for step in steps:
            observer.step(model, step=step)
            if step % 2 == 0:
                kept.append([flat(model[i]) for i in (0, 2)])
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.1 * torch.randn_like(p)
        return kept, observer.state_dict()


@pytest.mark.parametrize("resumed", [False, True])
def test_in_a_training_both_ends_are_the_weights_of_then(tmp_path, resumed):
    model = mlp(3, 5, 2)
    kept, state = observed(tmp_path / "r", model, range(3 if resumed else 7))
    if resumed:
        kept += observed(tmp_path / "r", model, range(3, 7), state)[0]
    with ArtifactBuffer.open(tmp_path / "r") as buffer:
        rows = buffer["w"]
        assert rows.coords["layer"] == ["0", "2"]
        l2, before = rows.series("l2_initial"), rows.series("l2_previous")
    expected = [[(a - b).norm() for a, b in zip(now, kept[0], strict=True)] for now in kept]
    torch.testing.assert_close(l2, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    steps = [[(a - b).norm() for a, b in zip(x, y, strict=True)] for x, y in itertools.pairwise(kept)]
    torch.testing.assert_close(before[1:], torch.tensor(steps, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert before[0].isnan().all()


def test_the_live_weights_of_a_loss_are_measured(tmp_path):
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(3, 2), ["input"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
    )
    loss = ClipPPOLoss(actor, ValueOperator(nn.Linear(3, 1), in_keys=["input"]))
    weight = loss.actor_network_params["module", "0", "module", "weight"]
    observer = Observer({"w": WeightDistance()}, when=Every(optim_steps=1) | At(0), into=tmp_path, on=ProbeSet(batch()))
    with observer:
        observer.step(loss, step=0)
        with torch.no_grad():
            weight += 2.0
        observer.step(loss, step=1)
        rows = observer.buffer["w"]
        assert rows.coords["layer"] == ["actor_network.module.0.module", "critic_network.module"]
        l2 = rows.series("l2_initial")
    torch.testing.assert_close(l2[1], torch.tensor([2.0 * 6**0.5, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)
