"""ActivationPatching against a loop that patches one layer or unit of one network at a time, by hand."""

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.errors import TargetError
from tdhook_train.latent import ActivationPatching


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.act, self.head = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.act(self.inner(x)) + x)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(12, 2)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x):
        return self.head(self.norm(self.act(self.conv(x))).flatten(1))


class Tuples(nn.Module):
    """The unit that is read in two places, and a module that gives out two tensors."""

    def __init__(self):
        super().__init__()
        self.body, self.split, self.head = nn.Linear(3, 4), Split(), nn.Linear(2, 2)

    def forward(self, x):
        first, second = self.split(self.body(x))
        return self.head(first * second.tanh())


class Split(nn.Module):
    def forward(self, x):
        return x[..., :2], x[..., 2:]


class InputTwice(nn.Sequential):
    """A chain that reads the value before its activation once more."""

    def forward(self, x):
        h = self[0](x)
        return self[2](self[1](h) + h)


NETS = {
    "mlp": (lambda: mlp(3, 5, 4, 2), (3,), ["0", "1", "2", "3", "4"]),
    "mlp of relus": (lambda: mlp(3, 5, 4, 2, activation=nn.ReLU), (3,), ["0", "1", "2", "3", "4"]),
    "residual": (Residual, (3,), ["inner", "act", "head"]),
    "convolution": (Conv, (2, 3, 3), ["conv", "act", "norm", "head"]),
    "tuples": (Tuples, (3,), ["body", "split:0", "split:1", "head"]),
}


def replaced(output, item, value):
    if item is None:
        return value
    return tuple(value if i == item else v for i, v in enumerate(output))


def run_by_hand(model, x, site, edit):
    """The outputs with ``edit`` put in the place of what one module gives out."""
    path, _, item = site.partition(":")
    item = int(item) if item else None

    def hook(_module, _args, output):
        return replaced(output, item, edit(output if item is None else output[item]))

    handle = model.get_submodule(path).register_forward_hook(hook)
    out = model(x.clone())
    handle.remove()
    return out.detach()


def by_hand(model, base, source, sites):
    """Effects and normalised effects of every layer and unit, one pass and one unit at a time."""
    clean, other = model(base.clone()).detach(), model(source.clone()).detach()
    sign, size = (other - clean).sign(), (other - clean).abs().sum(0)
    rows = {}
    for site in sites:
        taken = []
        run_by_hand(model, source, site, lambda value, taken=taken: taken.append(value.detach().clone()) or value)
        (new,) = taken
        axis = 1 if new.ndim == 4 else new.ndim - 1

        def whole(value, new=new):
            return new.clone()

        def unit(value, k, new=new, axis=axis):
            value = value.clone()
            value.select(axis, k).copy_(new.select(axis, k))
            return value

        outs = [run_by_hand(model, base, site, whole)]
        outs += [run_by_hand(model, base, site, lambda v, k=k: unit(v, k)) for k in range(new.shape[axis])]
        rows[site] = (
            torch.stack([(out - clean).abs().mean(0) for out in outs]),
            torch.stack([((out - clean) * sign).sum(0) / size for out in outs]),
        )
    return rows, size / len(base)


def with_sources(base, source):
    return TensorDict({"input": base, "source": {"input": source}}, [len(base)])


@pytest.mark.parametrize("name", NETS)
def test_every_layer_and_unit_equals_the_loop(name):
    make, shape, sites = NETS[name]
    model = make().eval()
    base, source = torch.randn(6, *shape), torch.randn(6, *shape)
    out = measured(ActivationPatching(), model, with_sources(base, source))
    expected, gap = by_hand(model, base, source, sites)
    assert len(out["effect"]) == len(sites)
    for i, site in enumerate(sites):
        effect, normalised = expected[site]
        units = len(effect) - 1
        assert_close(out["effect"][i], effect[0], atol=1e-5, rtol=1e-4)
        assert_close(out["unit_effect"][i, :units], effect[1:], atol=1e-5, rtol=1e-4)
        assert_close(out["normalised"][i], normalised[0], atol=1e-5, rtol=1e-4)
        assert_close(out["unit_normalised"][i, :units], normalised[1:], atol=1e-5, rtol=1e-4)
        assert out["unit_effect"][i, units:].isnan().all()
        assert out["unit_normalised"][i, units:].isnan().all()
        assert_close(out["gap"][i], gap)


def test_a_sequential_that_reads_a_value_twice_is_no_chain():
    model = InputTwice(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    base, source = torch.randn(6, 3), torch.randn(6, 3)
    out = measured(ActivationPatching(), model, with_sources(base, source))
    expected, _ = by_hand(model, base, source, ["0", "1", "2"])
    for i, site in enumerate(("0", "1", "2")):
        assert_close(out["effect"][i], expected[site][0][0], atol=1e-5, rtol=1e-4)


def test_a_state_patched_with_itself_changes_nothing():
    x = torch.randn(6, 3)
    out = measured(ActivationPatching(), mlp(3, 5, 2), with_sources(x, x.clone()))
    for key in ("effect", "unit_effect", "gap"):
        assert not out[key].nan_to_num().any()
    assert out["normalised"].isnan().all()  # there is no gap to close


def test_a_whole_layer_of_a_chain_gives_the_source():
    base, source = torch.randn(6, 3), torch.randn(6, 3)
    model = mlp(3, 5, 4, 2)
    out = measured(ActivationPatching(targets=["output"]), model, with_sources(base, source))
    assert_close(out["effect"], out["gap"])
    assert_close(out["normalised"], torch.ones(5, 2))
    assert_close(out["gap"], (model(source) - model(base)).detach().abs().mean(0).expand(5, 2))


def test_units_before_and_after_an_elementwise_activation_are_the_same():
    for activation in (nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU):
        model = mlp(3, 5, 4, 2, activation=activation)
        out = measured(ActivationPatching(), model, with_sources(torch.randn(6, 3), torch.randn(6, 3)))
        assert torch.equal(out["unit_effect"][0], out["unit_effect"][1])
        assert torch.equal(out["effect"][2], out["effect"][3])
        expected, _ = by_hand(model, torch.zeros(2, 3), torch.ones(2, 3), ["0", "1"])
        assert_close(expected["0"][0], expected["1"][0])
    # softmax mixes units: replacing one before it is not the same
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2))
    out = measured(ActivationPatching(), model, with_sources(torch.randn(6, 3), torch.randn(6, 3)))
    assert not torch.allclose(out["unit_effect"][0], out["unit_effect"][1])


def test_rows_are_paired_half_the_batch_further_on():
    x, model = torch.randn(10, 3), mlp(3, 5, 2)
    base = x[[0, 2, 5, 7]]
    expected, gap = by_hand(model, base, x[[5, 7, 0, 2]], ["0"])
    out = measured(ActivationPatching(pairs=4, layers="0"), model, TensorDict({"input": x}, [10]))
    assert_close(out["unit_effect"][0], expected["0"][0][1:], atol=1e-5, rtol=1e-4)
    assert_close(out["gap"][0], gap)
    many = measured(ActivationPatching(pairs=999, layers="0"), model, TensorDict({"input": x[:9]}, [9]))
    assert_close(many["gap"][0], by_hand(model, x[:8], x[[4, 5, 6, 7, 0, 1, 2, 3]], ["0"])[1])


def test_targets_by_feature_by_function_and_by_name():
    model = mlp(3, 5, 3)
    td = with_sources(torch.randn(6, 3), torch.randn(6, 3))
    every = measured(ActivationPatching(targets="output"), model, td)
    some = measured(ActivationPatching(targets={"last": ("output", 2), "gap": logit_gap}), model, td)
    assert every["effect"].shape == (3, 3)
    assert_close(some["unit_effect"][..., 0], every["unit_effect"][..., 2], equal_nan=True)
    gap = logit_gap({"output": model(td["source", "input"]) - model(td["input"])}).detach()
    assert_close(some["gap"][0, 1], gap.abs().mean())
    with pytest.raises(TargetError, match=r"target 'output' has features \(3,\), not number 7"):
        measured(ActivationPatching(targets=("output", 7)), model, td)


def test_a_function_reads_what_the_batch_holds_of_the_patched_state():
    torch.manual_seed(0)
    model, td = mlp(3, 4, 2), TensorDict(input=torch.randn(8, 3), klass=torch.tensor([0, 1, 1, 0] * 2), batch_size=[8])
    td["source", "input"] = torch.randn(8, 3)
    td["source", "klass"] = 1 - td["klass"]

    def true_class(td):
        return td["output"].gather(1, td["klass"][:, None])[:, 0]

    found = measured(ActivationPatching(targets={"true": true_class}), model, td)["unit_effect"]
    both = [measured(ActivationPatching(targets=("output", i)), model, td[td["klass"] == i]) for i in range(2)]
    assert_close(found, sum(one["unit_effect"] for one in both) / 2, equal_nan=True)  # as many rows of each


def logit_gap(outputs):
    return outputs["output"][:, 0] - outputs["output"][:, 1]


def test_chunks_of_a_wide_layer_change_nothing():
    model, td = mlp(3, 40, 2), with_sources(torch.randn(6, 3), torch.randn(6, 3))
    whole = measured(ActivationPatching(), model, td)
    cut = measured(ActivationPatching(max_bytes=30 * 4 * (40 + 40 + 2)), model, td)
    for key in ("effect", "normalised", "gap", "unit_effect", "unit_normalised"):
        assert_close(whole[key], cut[key], equal_nan=True)


def test_a_network_that_insists_on_two_dimensions():
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.body(x)
            assert h.ndim == 2
            return self.head(h)

    model, base, source = Strict(), torch.randn(6, 3), torch.randn(6, 3)
    out = measured(ActivationPatching(), model, with_sources(base, source))
    expected, _ = by_hand(model, base, source, ["body"])
    assert_close(out["unit_effect"][0], expected["body"][0][1:], atol=1e-5, rtol=1e-4)


def test_one_row_makes_no_pair():
    with pytest.raises(ValueError, match="pair"):
        measured(ActivationPatching(), mlp(3, 5, 2), TensorDict({"input": torch.randn(1, 3)}, [1]))
