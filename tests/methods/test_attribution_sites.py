"""What every attribution shares: layers as sites, masks, baselines, reductions, memory, rows that do not mix."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.attribution import InputXGradient, IntegratedGradients, Saliency
from tdhook_train.errors import KeyMissingError, NetworkError, SettingsError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def tail(model, start):
    return nn.Sequential(*list(model)[start:])


@pytest.mark.parametrize(("side", "start"), [("output", 2), ("input", 1)])
@pytest.mark.parametrize("kind", [Saliency, InputXGradient, IntegratedGradients])
def test_by_a_layer_as_by_the_inputs_of_what_comes_after_it(kind, side, start):
    model, x = mlp(3, 8, 6, 2), torch.randn(5, 3)
    found = measured(kind(layers="1", side=side), model, td_of(input=x))
    after, given = tail(model, start), nn.Sequential(*list(model)[:start])(x).detach()
    assert_close(found["attr", "1"], measured(kind(), after, td_of(input=given))["attr", "input"])


def test_many_layers_at_once_are_each_alone():
    model, td = mlp(3, 8, 6, 2), td_of(input=torch.randn(5, 3))
    for kind in (Saliency, IntegratedGradients):
        every = measured(kind(layers="**", targets=("output", 1)), model, td)
        for layer in ("0", "1", "2", "3", "4"):
            alone = measured(kind(layers=layer, targets=("output", 1)), model, td)
            assert_close(every["attr", layer], alone["attr", layer])
    assert_close(every["attr", "4"], torch.stack([torch.zeros(5), every["output"][:, 1]], 1))


def test_between_paired_states_a_layers_shares_sum_to_the_change_of_the_output():
    model, x, base = mlp(3, 8, 6, 2), torch.randn(5, 3), torch.randn(5, 3)
    td = TensorDict({"input": x, "baseline": {"input": base}}, [5])
    found = measured(IntegratedGradients(layers="**"), model, td)
    rise = (model(x) - model(base)).detach()
    for layer in ("0", "1", "2", "3"):
        assert_close(found["attr", layer].sum(-1), rise, atol=1e-4, rtol=0)
        assert found["delta", layer].abs().max() < 1e-4


def test_tokens_are_explained_by_their_embedding():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, tokens):
            return self.head(self.table(tokens).tanh().mean(1))

    model, tokens = Reads(), torch.randint(7, (3, 5))
    with pytest.raises(KeyMissingError, match="explain by an embedding: layers='table'"):
        measured(Saliency(), model, td_of(input=tokens))
    found = measured(IntegratedGradients(layers="table"), model, td_of(input=tokens))
    assert found["attr", "table"].shape == (3, 2, 5, 4)
    empty = model.head.bias.detach()
    assert_close(found["attr", "table"].sum((2, 3)), model(tokens).detach() - empty, atol=1e-4, rtol=0)


def test_what_is_masked_stays_as_it_is_and_has_no_share():
    model, x = nn.Linear(4, 1), torch.randn(6, 4)
    mask = torch.rand(6, 4) > 0.5
    td = TensorDict({"input": x, "mask": {"input": mask}}, [6])
    found = measured(IntegratedGradients(targets="output"), model, td)
    assert_close(found["attr", "input"], (model.weight * x * mask).detach())
    assert_close(found["delta"], torch.zeros(6), atol=1e-6, rtol=0)


def test_several_references_are_averaged_over():
    model, x, base = mlp(3, 8, 2), torch.randn(4, 3), torch.randn(4, 5, 3)
    many = measured(IntegratedGradients(), model, TensorDict({"input": x, "baseline": {"input": base}}, [4]))
    each = [
        measured(IntegratedGradients(), model, TensorDict({"input": x, "baseline": {"input": one}}, [4]))
        for one in base.unbind(1)
    ]
    assert_close(many["attr", "input"], torch.stack([one["attr", "input"] for one in each]).mean(0))


def test_other_rows_as_references_do_not_go_by_how_rows_are_cut():
    model, x = nn.Linear(3, 1), torch.randn(200, 3)
    found = measured(IntegratedGradients(baseline="rows", references=40, targets="output"), model, td_of(input=x))
    cut = IntegratedGradients(baseline="rows", references=40, targets="output", rows_per_pass=7)
    assert_close(measured(cut, model, td_of(input=x))["attr", "input"], found["attr", "input"])
    expected = (model.weight * (x - x.mean(0))).detach()  # in the mean over many references
    assert (found["attr", "input"] - expected).abs().mean() < 0.3 * expected.abs().mean()


def test_a_blurred_image_stays_where_it_is_flat():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), torch.ones(2, 3, 4, 4)
    found = measured(IntegratedGradients(baseline="blur"), model, td_of(input=x))
    assert_close(found["attr", "input"], torch.zeros(2, 1, 3, 4, 4), atol=1e-6, rtol=0)
    with pytest.raises(SettingsError, match="baseline='blur' needs images"):
        measured(IntegratedGradients(baseline="blur"), mlp(3, 2), td_of(input=torch.randn(2, 3)))


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", lambda v: v.mean(0)), ("mean_abs", lambda v: v.abs().mean(0))]
)
def test_rows_are_reduced(reduction, expected):
    model, td = mlp(3, 8, 2), td_of(input=torch.randn(6, 3))
    whole, method = measured(Saliency(), model, td), Saliency(reduction=reduction)
    found = measured(method, model, td)["attr", "input"]
    assert_close(found, expected(whole["attr", "input"]))
    assert method.dims(("attr", "input"), 2) == ("target", "feature")


def test_a_bound_on_memory_bounds_the_rows_of_a_pass():
    model, td = mlp(3, 8, 2), td_of(input=torch.randn(40, 3))
    seen = []
    model[0].register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    bound = 10 * 4 * 2 * (8 + 8 + 2 + 2)  # ten rows; the last is the container's own output
    few = measured(IntegratedGradients(max_bytes=bound), model, td)["attr", "input"]
    assert max(seen[2:]) <= 10  # after the trace and the shared pass
    assert_close(few, measured(IntegratedGradients(), model, td)["attr", "input"])


def test_a_layer_without_rows_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.head = nn.Flatten(0), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x) + self.mean(x).sum()

    with pytest.raises(NetworkError, match=r"numbers of each of 4 rows; the output of 'mean' is torch.float32, \[12\]"):
        measured(Saliency(layers="mean"), Odd(), td_of(input=torch.randn(4, 3)))


def test_inputs_that_share_a_gradient():
    class Sum(nn.Module):
        def forward(self, x, y):
            return ((x + y) ** 2).sum(-1)

    x, y = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.25, 2.0]])
    td = td_of(x=x, y=y)
    for kind, expected in (
        (Saliency, (2 * (x + y), 2 * (x + y))),
        (InputXGradient, (2 * (x + y) * x, 2 * (x + y) * y)),
        (IntegratedGradients, ((x + y) * x, (x + y) * y)),
    ):
        with kind(targets="o").prepare(Sum(), ["x", "y"], ["o"]) as hooked:
            out = hooked(td)
        for key, value in zip("xy", expected, strict=True):
            assert_close(out["attr", key], value)
