"""The same values as nnsight and TDHook, where they are installed: `make peers`."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hooks_models import rows
from torch import nn
from torch.testing import assert_close

from tdhook_train import HookedModel


@dataclass
class Case:
    model: nn.Module
    x: torch.Tensor
    layers: tuple[str, ...]  # in the order in which they run
    early: str  # two layers of one shape, the second of which runs later
    late: str
    key: str | tuple[str, str] = "output"  # where HookedModel writes the output that is compared, and
    end: Callable = lambda output: output  # how it is taken from what the model returns


def mlp():
    # nothing in place: nnsight hands out the tensor itself, which a ReLU in place would write to
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    return Case(model, torch.randn(5, 3), ("0", "1", "2", "4"), early="1", late="2")


def gpt2():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    body = "transformer.wte", "transformer.h.0.attn:0", "transformer.h.0.mlp", "transformer.h.1", "transformer.ln_f"
    return Case(
        transformers.GPT2LMHeadModel(config).eval(),
        torch.randint(50, (3, 7)),
        (*body, "lm_head"),
        early="transformer.h.0.mlp",
        late="transformer.h.1.mlp",
        key=("output", "logits"),
        end=lambda output: output.logits,
    )


@pytest.fixture(params=[mlp, gpt2])
def case(request):
    return request.param()


@pytest.fixture
def traced(case):
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed; `make peers` runs this where it is")
    return nnsight.NNsight(case.model)


def module_of(layer):
    return layer.partition(":")[0]


def value_of(layer, output):
    return output[0] if layer.endswith(":0") else output


def edited_by_nnsight(traced, case, edit):
    with traced.trace(case.x):
        edit(traced)
        output = case.end(traced.output).save()
    return output.detach()


def edited_here(case, edit):
    with HookedModel(case.model).run(rows(case.x)) as run:
        edit(run)
    return run.output[case.key]


def captured_here(case):
    with HookedModel(case.model).run(rows(case.x)) as run:
        found = {layer: run.get(layer) for layer in case.layers}
    return {layer: proxy.resolve() for layer, proxy in found.items()}


def test_several_layers_read_in_one_pass_are_those_of_nnsight(case, traced):
    with traced.trace(case.x):
        expected = {}.save()
        for layer in case.layers:
            expected[layer] = value_of(layer, traced.get(module_of(layer)).output).detach()
    assert_close(captured_here(case), expected)


def test_a_layer_overwritten_by_a_constant_gives_the_output_of_nnsight(case, traced):
    value = torch.randn_like(captured_here(case)[case.early])  # the two have one shape

    def edit(model):
        model.get(case.late).output = value

    found = edited_here(case, lambda run: run.set(case.late, value))
    assert_close(found, edited_by_nnsight(traced, case, edit))
    assert not torch.allclose(found, case.end(case.model(case.x)))


def test_a_scaled_layer_gives_the_output_of_nnsight(case, traced):
    def edit(model):
        layer = model.get(case.late)
        layer.output = layer.output * 2.5

    found = edited_here(case, lambda run: run.set(case.late, lambda value: value * 2.5))
    assert_close(found, edited_by_nnsight(traced, case, edit))
    assert not torch.allclose(found, case.end(case.model(case.x)))


def test_a_layer_overwritten_by_the_value_of_another_gives_the_output_of_nnsight(case, traced):
    def edit(model):
        value = model.get(case.early).output
        model.get(case.late).output = value

    found = edited_here(case, lambda run: run.set(case.late, run.get(case.early)))
    assert_close(found, edited_by_nnsight(traced, case, edit))
    assert not torch.allclose(found, case.end(case.model(case.x)))


@pytest.mark.parametrize("which", ["early", "late"])
def test_the_gradient_at_a_layer_is_that_of_nnsight(case, traced, which):
    layer = getattr(case, which)
    with traced.trace(case.x):
        value = traced.get(layer).output
        with case.end(traced.output).square().sum().backward():
            expected = value.grad.save()
    with HookedModel(case.model).run(rows(case.x)) as run:
        gradient = run.get_grad(layer)
        run.backward(lambda outputs: outputs[case.key].square().sum())
    assert expected.any()
    assert_close(gradient.resolve(), expected)


def test_several_layers_read_in_one_pass_are_those_of_tdhook(case):
    caching = pytest.importorskip(
        "tdhook.latent.activation_caching", reason="TDHook is not installed; `make peers` runs this where it is"
    )
    names = {module_of(layer): layer for layer in case.layers}

    def first(*, key, output, **_):
        return value_of(names[key], output)

    pattern = "|".join(f"(?:{name})$" for name in names).replace(".", r"\.")
    method = caching.ActivationCaching(pattern, callback=first)
    with (
        torch.no_grad(),
        method.prepare(case.model, ["input"], ["output" if case.key == "output" else "logits"]) as hooked,
    ):
        expected = hooked(rows(case.x))["cache"]
    found = captured_here(case)
    assert set(expected.keys()) == set(names)
    for name, layer in names.items():
        assert_close(found[layer], expected[name])
