"""A direction between two sides of a contrast, and a model that is steered along it; the listings of TDHook's paper."""

import pytest
import torch
from method_cases import batch, measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from tdhook_train import ArtifactBuffer, At, Observer
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.errors import KeyMissingError, PathError, SetterError, SettingsError
from tdhook_train.latent import ActivationAddition, SteeringVectors


def contrast(plus, minus):
    return TensorDict({("positive", "input"): plus, ("negative", "input"): minus}, [len(plus)])


def test_the_direction_is_the_mean_difference_of_the_sides():
    model, td = mlp(3, 5, 2), batch()
    out = measured(ActivationAddition(("0", "1")), model, td)
    low, high = (model[0](td[side, "input"]) for side in ("positive", "negative"))
    assert_close(out["steer", "0"], (low - high).mean(0).detach())
    assert_close(out["steer", "1"], (low.tanh() - high.tanh()).mean(0).detach())


def test_the_batch_itself_need_not_be_there_and_is_not_run():
    model, ran = mlp(3, 5, 2), []
    model.register_forward_hook(lambda *_: ran.append(None))
    out = measured(ActivationAddition(nn.Linear), model, contrast(torch.randn(4, 3), torch.randn(4, 3)))
    assert list(out["steer"].keys()) == ["0", "2"]
    assert "output" not in out
    assert len(ran) == 3  # the trace and the two sides


def test_positions_are_kept():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4))
    plus, minus = torch.randint(0, 7, (2, 5)), torch.randint(0, 7, (2, 5))
    out = measured(ActivationAddition("1"), model, contrast(plus, minus))
    assert_close(out["steer", "1"], (model(plus) - model(minus)).mean(0).detach())
    assert ActivationAddition("1").dims(("steer", "1"), 2) == ("position", "unit")
    assert ActivationAddition("1").dims(("steer", "1"), 1) == ("unit",)


def test_sides_that_are_missing_or_do_not_fit_are_named():
    model = nn.Sequential(nn.Embedding(7, 3))
    td = TensorDict({("positive", "input"): torch.zeros(1, 2).long(), ("negatve", "input"): torch.zeros(1, 2)}, [1])
    with pytest.raises(
        KeyMissingError, match=r"\('negative', 'input'\) is not in the batch; did you mean 'negatve.inp"
    ):
        measured(ActivationAddition("0"), model, td)
    with pytest.raises(SettingsError, match=r"at '0': positive \(1, 2, 3\), negative \(1, 4, 3\); pad the shorter"):
        measured(ActivationAddition("0"), model, contrast(torch.zeros(1, 2).long(), torch.zeros(1, 4).long()))


def test_a_batch_without_a_size_has_nothing_to_average_over():
    td = TensorDict({"positive": {"input": torch.ones(2, 3)}, "negative": {"input": torch.zeros(2, 3)}}, [])
    with pytest.raises(SettingsError, match=r"averages over the batch, but the TensorDict has batch_size=\[\]"):
        measured(ActivationAddition("0"), mlp(3, 5, 2), td)


def test_a_shared_layer_is_steered_once():
    layer = nn.Linear(3, 3)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(4, 3)
    with SteeringVectors(["0", "2", nn.Linear], steer_fn=lambda _, h: h + 1).prepare(model):
        out = model(x)
    assert_close(out, layer(torch.tanh(layer(x) + 1)) + 1)


def test_an_observer_records_the_direction(tmp_path):
    model, td = mlp(3, 5, 2), batch()
    with Observer({"steer": ActivationAddition(nn.Linear)}, when=At(0), into=tmp_path / "run") as observer:
        observer.step(model, td, step=0)
    row = ArtifactBuffer.open(tmp_path / "run")["steer"]
    assert_close(row.series(("steer", "0"))[0], measured(ActivationAddition("0"), model, td)["steer", "0"])


def doubled(_layer, output):
    return output * 2


def test_every_way_of_calling_the_model_is_steered_until_the_block_ends():
    model, x, asked = mlp(3, 5, 2), torch.randn(4, 3), []

    def steer_fn(layer, output):
        asked.append(layer)
        return output + len(layer)

    plain = model(x)
    with SteeringVectors(["0", nn.Tanh], steer_fn=steer_fn).prepare(model) as hooked:
        by_hand = hooked(TensorDict({"input": x}, [4]))["output"]
        direct = model(x)
    expected = model[2](torch.tanh(model[0](x) + 1) + 1)
    assert_close(direct, expected)
    assert_close(by_hand, expected.detach())
    assert set(asked) == {"0", "1"}
    assert torch.equal(model(x), plain)


def test_a_steering_that_would_be_ignored_is_loud():
    def forgets(_layer, output):
        output.mul_(2)

    model, td = mlp(3, 5, 2), TensorDict({"input": torch.randn(4, 3)}, [4])
    with (
        pytest.raises(
            SetterError, match="setting the output of '0': the function changed it in place and returned None"
        ),
        SteeringVectors("0", steer_fn=forgets).prepare(model) as hooked,
    ):
        hooked(td)
    with (
        pytest.raises(PathError, match=r"layers='transformer.h.7.mlp' matches no module of Sequential"),
        SteeringVectors(["transformer.h.7.mlp"], steer_fn=doubled).prepare(model),
    ):
        pass


def test_an_observer_does_not_take_a_method_that_edits(tmp_path):
    with pytest.raises(
        SettingsError, match=r"methods\['steer'\] edits a model and measures nothing; .* SteeringVectors"
    ):
        Observer({"steer": SteeringVectors("0", steer_fn=doubled)}, when=At(0), into=tmp_path / "run")


class Vgg(nn.Sequential):
    """Stands for VGG16: convolutions, activations in place, pooling, a thousand classes."""

    def __init__(self):
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(32, 1000))


@pytest.mark.parametrize("kind", [Saliency, IntegratedGradients])
def test_listing_1_of_the_paper(kind):
    model, image_tensor = Vgg().eval(), torch.randn(3, 16, 16)

    def init_attr_targets(targets, _):
        zebra_logit = targets["output"][..., 340]
        return TensorDict(out=zebra_logit, batch_size=targets.batch_size)

    with kind(init_attr_targets=init_attr_targets).prepare(model) as hooked_model:
        td = TensorDict(
            {
                "input": image_tensor.unsqueeze(0),
                ("baseline", "input"): torch.zeros_like(image_tensor).unsqueeze(0),
            },
            batch_size=1,
        )
        td = hooked_model(td)
    attr = td.get(("attr", "input"))
    x = image_tensor[None].clone().requires_grad_()
    logit = model(x)[0, 340]
    if kind is Saliency:
        assert_close(attr, torch.autograd.grad(logit, x)[0])
    else:  # completeness, up to the error of the quadrature across the kinks of a network of ReLUs
        rise = (logit - model(torch.zeros_like(x))[0, 340]).detach()
        assert_close(attr.sum(), rise + td["delta"].sum())
        assert_close(attr.sum(), rise, atol=1e-2 * float(rise.abs()) + 1e-3, rtol=0)


def given_to(model, module, ids):
    """What a module of the model takes in; in evaluation mode a dropout hands it on."""
    kept = []
    handle = module.register_forward_pre_hook(lambda _module, args: kept.append(args[0].detach()))
    model(ids)
    handle.remove()
    return kept[0]


def test_listing_2_of_the_paper():
    config = GPT2Config(n_layer=8, n_embd=16, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    positive_inputs, negative_inputs, base_inputs = (torch.randint(2, 50, (1, 4)) for _ in range(3))
    original = model(base_inputs)["logits"].detach()

    with ActivationAddition(["transformer.h.7.mlp"]).prepare(model) as hooked_model:
        td = TensorDict({("positive", "input"): positive_inputs, ("negative", "input"): negative_inputs}, batch_size=1)
        td = hooked_model(td)
    steering_vector = td.get(("steer", "transformer.h.7.mlp")).sum(dim=0)

    def steer_fn(module_key, output):
        return output + 4 * steering_vector

    with SteeringVectors(["transformer.h.7.mlp"], steer_fn=steer_fn).prepare(model) as hooked_model:
        td = TensorDict({"input": base_inputs}, batch_size=1)
        td = hooked_model(td)
        generated = model.generate(base_inputs, max_new_tokens=1, do_sample=False)
    steered_token = td.get(("output", "logits")).max(dim=-1).indices[0, -1]

    # the same by hand: the residual stream after the last block is moved by the vector, then normed and read
    plus, minus = (
        given_to(model, model.transformer.h[7].mlp.dropout, ids) for ids in (positive_inputs, negative_inputs)
    )
    vector = (plus - minus)[0].sum(0)
    assert_close(steering_vector, vector)
    stream = given_to(model, model.transformer.ln_f, base_inputs)
    assert_close(td["output", "logits"], model.lm_head(model.transformer.ln_f(stream + 4 * vector)).detach())
    assert generated[0, -1] == steered_token
    assert torch.equal(model(base_inputs)["logits"], original)
