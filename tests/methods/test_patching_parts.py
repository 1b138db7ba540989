"""ActivationPatching of parts, sides, ways and substitutes: gates, planted units, and loops by hand."""

import itertools

import pytest
import torch
from method_cases import measured, mlp
from patching_models import HandTransformer
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.testing import assert_close

from tdhook_train.errors import NetworkError, SettingsError, TargetError
from tdhook_train.latent import ActivationPatching


def sourced(base, source, **more):
    return TensorDict({"input": base, "source": {"input": source}, **more}, [len(base)])


class Gate(nn.Module):
    """Two lines that a gate joins: ``inputs[i] = x_i``, and what the gate makes of them."""

    def __init__(self, gate):
        super().__init__()
        self.inputs, self.gate = nn.Linear(2, 2, bias=False), gate
        self.inputs.weight.data.copy_(torch.eye(2))

    def forward(self, x):
        lines = self.inputs(x)
        return getattr(torch, self.gate)(lines, -1).values[:, None]  # of 0 and 1: OR is amax, AND amin


@pytest.mark.parametrize(("gate", "noise", "denoise"), [("max", 0.0, 1.0), ("min", 1.0, 0.0)])
def test_an_or_gate_shows_only_in_denoising_and_an_and_gate_only_in_noising(gate, noise, denoise):
    clean, corrupt = torch.ones(3, 2), torch.zeros(3, 2)
    out = measured(ActivationPatching("inputs", way="both"), Gate(gate), sourced(clean, corrupt))
    for key, expected in (("unit_effect", noise), ("unit_effect_denoise", denoise), ("unit_normalised", noise)):
        assert_close(out[key], torch.full((1, 2, 1), expected))
    assert_close(out["unit_normalised_denoise"], torch.full((1, 2, 1), denoise))
    for key in ("effect", "effect_denoise", "normalised", "normalised_denoise", "gap"):
        assert_close(out[key], torch.ones(1, 1))  # all of it carries all


def test_denoising_is_noising_the_other_way_round():
    model, base, source = mlp(3, 5, 2), torch.randn(6, 3), torch.randn(6, 3)
    both = measured(ActivationPatching(way="both"), model, sourced(base, source))
    there = measured(ActivationPatching(way="noise"), model, sourced(base, source))
    back = measured(ActivationPatching(way="noise"), model, sourced(source, base))
    for key in ("effect", "unit_effect", "normalised", "unit_normalised"):
        assert_close(both[key], there[key], equal_nan=True)
        assert_close(both[f"{key}_denoise"], back[key], equal_nan=True)
    only = measured(ActivationPatching(way="denoise"), model, sourced(base, source))
    assert_close(only["unit_effect_denoise"], back["unit_effect"], equal_nan=True)
    assert "unit_effect" not in only


def test_a_planted_unit_carries_all():
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    model[1].weight.data.zero_()
    model[1].weight.data[:, 4] = torch.tensor([2.0, -1])
    base, source = torch.randn(5, 3), torch.randn(5, 3)
    out = measured(ActivationPatching("0"), model, sourced(base, source))
    planted = torch.zeros(6, 2)
    planted[4] = 1
    assert_close(out["unit_normalised"][0], planted)
    moved = (model[0](source) - model[0](base))[:, 4].abs().mean()
    assert_close(out["unit_effect"][0], (planted * moved * torch.tensor([2.0, 1])).detach())


# ---------------------------------------------------------------------- parts


def patched(model, td, path, side, new, where):
    """Outputs with some entries of one value replaced by those of another, with a raw hook."""

    def into(value):
        value = value.clone()
        value[where] = new[where]
        return value

    module = model.get_submodule(path)
    if side == "output":
        handle = module.register_forward_hook(lambda _module, _args, out: into(out))
    else:
        handle = module.register_forward_pre_hook(lambda _module, args: (into(args[0]),))
    out = model(td["input"]).detach()
    handle.remove()
    return out


def value_at(model, x, path, side="output"):
    seen = []

    def note(_module, args, out):
        seen.append((out if side == "output" else args[0]).detach().clone())

    handle = model.get_submodule(path).register_forward_hook(note)
    model(x)
    handle.remove()
    return seen[0]


def test_heads_are_blocks_of_what_the_output_projection_takes_in():
    model, base, source = HandTransformer(width=6, heads=3), torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    td = sourced(base, source)
    layers = ["h.0.attn.o_proj", "h.1.attn.o_proj"]
    method = ActivationPatching(layers, side="input", parts=("head", "position", "layer"), heads=3)
    out = measured(method, model, td)
    clean = model(base).detach()
    assert out["head_effect"].shape == (2, 3, 2)
    assert out["position_effect"].shape == (2, 5, 2)
    for i, path in enumerate(layers):
        new = value_at(model, source, path, "input")
        for key, part, where in [
            *(("head_effect", h, (..., slice(2 * h, 2 * h + 2))) for h in range(3)),
            *(("position_effect", p, (slice(None), p)) for p in range(5)),
            ("effect", ..., ...),
        ]:
            expected = (patched(model, td, path, "input", new, where) - clean).abs().mean(0)
            assert_close(out[key][i, part], expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(SettingsError, match="6 units need a number of heads that divides them, got heads=4"):
        measured(ActivationPatching(layers, side="input", parts="head", heads=4), model, td)


def test_units_and_positions_of_a_sequence():
    model, base, source = HandTransformer(), torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    td, clean = sourced(base, source), model(base).detach()
    out = measured(ActivationPatching("h.0.up", parts=("unit", "position")), model, td)
    new = value_at(model, source, "h.0.up")
    for u in range(8):
        expected = (patched(model, td, "h.0.up", "output", new, (..., u)) - clean).abs().mean(0)
        assert_close(out["unit_effect"][0, u], expected, atol=1e-6, rtol=1e-4)
    for p in range(5):
        expected = (patched(model, td, "h.0.up", "output", new, (slice(None), p)) - clean).abs().mean(0)
        assert_close(out["position_effect"][0, p], expected, atol=1e-6, rtol=1e-4)


def test_positions_of_an_image_are_its_pixels_and_a_vector_has_none():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    base, source = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    td, clean = sourced(base, source), model(base).detach()
    out = measured(ActivationPatching(("0", "1", "3"), parts=("position", "unit")), model, td)
    new = value_at(model, source, "0")
    for i, (y, x) in enumerate(itertools.product(range(2), range(2))):
        expected = (patched(model, td, "0", "output", new, (..., y, x)) - clean).abs().mean(0)
        assert_close(out["position_effect"][0, i], expected)
        assert_close(out["position_effect"][1, i], expected)
    assert out["position_effect"][2].isnan().all()  # the last layer has no positions
    assert out["unit_effect"].shape == (3, 3, 2)
    assert out["unit_effect"][2, 2].isnan().all()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, num_layers=2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        _, hidden = self.rnn(x)
        return self.head(hidden.transpose(0, 1).flatten(1))


def test_hidden_states_have_their_rows_in_the_second_dimension():
    model, base, source = Recurrent(), torch.randn(5, 6, 3), torch.randn(5, 6, 3)
    out = measured(ActivationPatching("rnn:1", parts=("layer", "unit", "position")), model, sourced(base, source))
    states = [model.rnn(x)[1].detach() for x in (base, source)]

    def change(where):
        hidden = states[0].clone()
        hidden[where] = states[1][where]
        return (model.head(hidden.transpose(0, 1).flatten(1)) - model(base)).abs().mean(0).detach()

    assert_close(out["effect"][0], change(...))
    for u in range(4):
        assert_close(out["unit_effect"][0, u], change((..., u)), atol=1e-6, rtol=1e-4)
    for layer in range(2):  # the layers stand where other values have positions
        assert_close(out["position_effect"][0, layer], change(layer), atol=1e-6, rtol=1e-4)
    drawn = measured(ActivationPatching("rnn:1", by="mean"), model, sourced(base, source))
    mean = torch.cat(states, 1).mean(1, keepdim=True).expand_as(states[0])
    expected = model.head(mean.transpose(0, 1).flatten(1)) - model(base)
    assert_close(drawn["effect"][0], expected.abs().mean(0).detach())


# ---------------------------------------------------------------------- what replaces


@pytest.mark.parametrize("by", ["zero", "mean", "resample"])
def test_ablations_equal_the_loop(by):
    model, base, source = mlp(3, 5, 4, 2), torch.randn(6, 3), torch.randn(6, 3)
    td = sourced(base, source)
    out = measured(ActivationPatching(("0", "1"), by=by), model, td, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    drawn = torch.empty(6, dtype=torch.int64)
    for i in range(6):  # each in the drawn order takes the one before it
        drawn[order[i]] = order[i - 1]
    assert (drawn != torch.arange(6)).all()
    for i, path in enumerate(("0", "1")):
        value, other = value_at(model, base, path), value_at(model, source, path)
        mean = torch.cat([value, other]).mean(0).expand(6, -1)
        new = {"zero": torch.zeros(6, 5), "mean": mean, "resample": value[drawn]}[by]
        for unit in range(5):
            expected = (patched(model, td, path, "output", new, (..., unit)) - model(base)).abs().mean(0).detach()
            assert_close(out["unit_effect"][i, unit], expected, atol=1e-6, rtol=1e-4)
        expected = (patched(model, td, path, "output", new, ...) - model(base)).abs().mean(0).detach()
        assert_close(out["effect"][i], expected)
    assert "normalised" not in out
    assert "gap" not in out


def test_a_draw_by_hand_is_the_same_every_time_and_leaves_the_global_state():
    model, td = mlp(3, 5, 2), TensorDict(input=torch.randn(8, 3), batch_size=[8])
    state = torch.get_rng_state()
    one, two = (measured(ActivationPatching("0", by="resample"), model, td)["effect"] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    other = measured(ActivationPatching("0", by="resample"), model, td, generator=torch.Generator().manual_seed(8))
    assert not torch.allclose(other["effect"], one)


# ---------------------------------------------------------------------- interchange


class Conjunction(nn.Module):
    """``a AND b`` by a unit that holds it, beside units that hold a and b and go nowhere."""

    def __init__(self):
        super().__init__()
        self.hidden, self.act, self.head = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor([[1.0, 1], [1, 0], [0, 1]]))
            self.hidden.bias.copy_(torch.tensor([-1.0, 0, 0]))  # of 0 and 1: 1 where both are
            self.head.weight.copy_(torch.tensor([[-1.0, 0, 0], [1, 0, 0]]))
            self.head.bias.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, x):
        return self.head(self.act(self.hidden(x)))


def all_pairs():
    bits = torch.tensor(list(itertools.product([0.0, 1], repeat=4)))
    return bits[:, :2], bits[:, 2:]


def test_interchange_accuracy_is_1_where_the_unit_is_the_variable():
    base, source = all_pairs()
    td = sourced(base, source, decided=source.prod(1).long())  # with the variable a AND b of the source
    out = measured(ActivationPatching("act", counterfactual="decided"), Conjunction(), td)
    assert out["interchange"].tolist() == [1.0]
    chance = (base.prod(1) == source.prod(1)).float().mean()  # where the unit does nothing the base decides
    assert_close(out["unit_interchange"][0], torch.stack([torch.tensor(1.0), chance, chance]))
    plain = measured(ActivationPatching("act"), Conjunction(), td)
    for key in ("effect", "unit_effect", "normalised", "unit_normalised", "gap"):
        assert_close(out[key], plain[key])


def test_interchange_with_a_variable_that_no_unit_is():
    base, source = all_pairs()
    decided = (source[:, 0] * base[:, 1]).long()  # only a of the source
    td = sourced(base, source, decided=decided)
    out = measured(ActivationPatching("act", counterfactual="decided"), Conjunction(), td)
    right = (source.prod(1).long() == decided).float().mean()
    assert_close(out["unit_interchange"][0, 0], right)
    by_class = measured(ActivationPatching("act", counterfactual="decided", decision=decides), Conjunction(), td)
    assert_close(by_class["unit_interchange"], out["unit_interchange"])
    with pytest.raises(TargetError, match="'input' needs the number of one class a row"):
        measured(ActivationPatching("act", counterfactual="input"), Conjunction(), td)


def decides(outputs):
    return (outputs["output"][:, 1] > 0).long()


# ---------------------------------------------------------------------- memory, and what cannot be


@pytest.mark.parametrize("max_bytes", [1, 600, 10**9])
def test_memory_changes_nothing(max_bytes):
    model, td = HandTransformer(), sourced(torch.randn(3, 4, 3), torch.randn(3, 4, 3))
    settings = {"layers": ("h.0.up", "h.1.attn.o_proj"), "parts": ("unit", "head", "position"), "heads": 2}
    whole = measured(ActivationPatching(**settings), model, td)
    some = measured(ActivationPatching(**settings, max_bytes=max_bytes), model, td)
    for key in ("unit_effect", "head_effect", "position_effect", "unit_normalised"):
        assert_close(some[key], whole[key], equal_nan=True, atol=1e-6, rtol=1e-4)


def test_a_bound_on_memory_is_kept():
    rows = []

    class Watched(nn.Sequential):
        def forward(self, x):
            rows.append(len(x))
            assert x.ndim == 2  # so that all of it runs on every version
            return super().forward(x)

    class Last(nn.Linear):
        def forward(self, x):
            assert x.ndim == 2
            return super().forward(x)

    model, td = Watched(nn.Linear(3, 40), Last(40, 2)), sourced(torch.randn(6, 3), torch.randn(6, 3))
    measured(ActivationPatching("0", max_bytes=30 * 4 * (40 + 2 + 2)), model, td)
    assert 12 < max(rows) <= 30


def test_not_a_number_is_what_comes_of_it():
    model, base, source = mlp(3, 5, 2), torch.randn(6, 3), torch.randn(6, 3)
    source[0] = torch.nan
    out = measured(ActivationPatching(), model, sourced(base, source))
    assert out["effect"].isnan().all()
    assert out["unit_effect"][0].isnan().all()
    line, source = nn.Sequential(nn.Identity(), nn.Linear(3, 2)), torch.randn(6, 3)
    source[0, 1] = torch.nan  # of one unit alone
    one = measured(ActivationPatching("0"), line, sourced(base, source))["unit_effect"][0]
    assert one[1].isnan().all()
    moved = (source - base).abs().mean(0)[:, None] * line[1].weight.T.abs()
    assert_close(one[[0, 2]], moved[[0, 2]].detach())


def test_a_constant_metric_has_no_gap():
    td = sourced(torch.randn(6, 3), torch.randn(6, 3))
    targets = {"constant": lambda td: td["output"][:, 0] * 0 + 3, "free": lambda td: td["output"][:, 1]}
    out = measured(ActivationPatching(targets=targets), mlp(3, 5, 2), td)
    assert out["gap"][:, 0].eq(0).all()
    assert out["effect"][:, 0].eq(0).all()
    assert out["normalised"][:, 0].isnan().all()
    assert out["unit_normalised"][..., 0].isnan().all()
    assert_close(out["normalised"][:, 1], torch.ones(3))


def test_one_row_and_values_without_rows_are_refused():
    model = mlp(3, 5, 2)
    with pytest.raises(SettingsError, match="ActivationPatching pairs rows with each other and needs 2 or more, got 1"):
        measured(ActivationPatching(), model, TensorDict(input=torch.randn(1, 3), batch_size=[1]))
    one = measured(
        ActivationPatching(), model, sourced(torch.randn(1, 3), torch.randn(1, 3))
    )  # with a source it may be one
    assert_close(one["normalised"], torch.ones(3, 2))

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.head = Mean(), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x - self.mean(x))

    with pytest.raises(NetworkError, match=r"patches row by row; the output of 'mean' has \(3,\) for 12 rows"):
        measured(ActivationPatching("mean"), Net(), sourced(torch.randn(6, 3), torch.randn(6, 3)))


def test_sources_of_some_inputs_leave_the_others():
    first = TensorDictModule(nn.Linear(2, 3), ["a"], ["h"])
    second = TensorDictModule(nn.Bilinear(3, 2, 2), ["h", "b"], ["out"])
    model = TensorDictSequential(first, second)
    a, b, other = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 2)
    td = TensorDict({"a": a, "b": b, "source": {"a": other}}, [4])
    out = measured(ActivationPatching("**", targets="out"), model, td)
    bilinear = second.module
    expected = bilinear(first.module(other), b) - bilinear(first.module(a), b)
    assert_close(out["gap"][0], expected.abs().mean(0).detach())
    assert_close(out["effect"], out["gap"])
