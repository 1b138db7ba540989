"""PathPatching against the two steps of its papers in raw hooks, and where what a path carries is known."""

import itertools

import pytest
import torch
from method_cases import measured, mlp
from patching_models import HandTransformer
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.errors import NetworkError, PathError
from tdhook_train.hooks import HookedModel
from tdhook_train.latent import ActivationPatching, PathPatching
from tdhook_train.latent.path_patching import mixes
from tdhook_train.method import Part, Seen


def pairs(*shape, rows=4):
    both = torch.randn(2, rows, *shape, dtype=torch.float64)
    return TensorDict({"input": both[0], "source": {"input": both[1]}}, [rows])


def hooked_run(model, x, outputs=None, inputs=None, read=()):
    """Run with outputs and first arguments of some modules replaced; also return what some modules take in."""
    taken, handles = {}, []
    for path, value in (outputs or {}).items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(lambda _module, _args, _out, value=value: value.clone()))
    for path, value in (inputs or {}).items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda _module, _args, value=value: (value.clone(),)))
    for path in read:

        def note(_module, args, path=path):
            taken[path] = args[0].detach().clone()

        handles.append(model.get_submodule(path).register_forward_pre_hook(note))
    out = model(x).detach()
    for handle in handles:
        handle.remove()
    return out, taken


def gives(model, x, paths):
    seen, handles = {}, []
    for path in paths:

        def note(_module, _args, out, path=path):
            seen[path] = out.detach().clone()

        handles.append(model.get_submodule(path).register_forward_hook(note))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def by_hand(model, td, sender, receivers, frozen, part=(Ellipsis,)):
    """Changes [pair, target] by the algorithm of Wang et al., for one part of one sender."""
    base, source = td["input"], td["source", "input"]
    held = gives(model, base, [path for path in frozen if path != sender])
    value = gives(model, base, [sender])[sender]
    value[part] = gives(model, source, [sender])[sender][part]
    out, taken = hooked_run(model, base, held | {sender: value}, read=receivers)
    if receivers:
        out, _ = hooked_run(model, base, inputs=taken)
    return out - model(base).detach()


BLOCK = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "up", "down")
MATRICES = ("embed", *(f"h.{i}.{name}" for i, name in itertools.product(range(2), BLOCK)), "head")
SENDERS = ("embed", "h.0.attn.o_proj", "h.0.down", "h.1.attn.o_proj")
ROUTES = {
    "values of the second block": ("h.1.attn.v_proj",),
    "queries and keys": ("h.1.attn.q_proj", "h.1.attn.k_proj"),
    "the whole attention": ("h.1.attn",),
    "its perceptron": ("h.1.up",),
    "one before the other": ("h.1.attn.v_proj", "h.1.up"),
    "direct": ("head",),
}


@pytest.mark.parametrize("route", ROUTES)
def test_it_is_the_two_steps_of_the_paper(route):
    model, td, receivers = HandTransformer().double(), pairs(3, 3), ROUTES[route]
    settings = {"parts": ("layer", "unit", "head", "position"), "heads": 2, "receivers": receivers}
    out = measured(PathPatching(SENDERS, **settings), model, td)
    kinds = {"unit_effect": 4, "head_effect": 2, "position_effect": 3}
    for i, sender in enumerate(SENDERS):
        assert_close(out["effect"][i], by_hand(model, td, sender, receivers, MATRICES).abs().mean(0))
        for key, count in kinds.items():
            for k in (0, count - 1):
                where = {"unit_effect": (..., k), "head_effect": (..., slice(2 * k, 2 * k + 2))}.get(
                    key, (slice(None), k)
                )
                expected = by_hand(model, td, sender, receivers, MATRICES, where).abs().mean(0)
                assert_close(out[key][i, k], expected)


def test_what_is_frozen_may_be_chosen():
    model, td = HandTransformer().double(), pairs(3, 3)
    for frozen in ((), ("h.*.attn.o_proj",), ("h.*.down", "h.1.attn")):
        known = {"h.*.attn.o_proj": ["h.0.attn.o_proj", "h.1.attn.o_proj"], "h.*.down": ["h.0.down", "h.1.down"]}
        paths = [path for one in frozen for path in known.get(one, [one])]
        out = measured(PathPatching("h.0.attn.o_proj", receivers="h.1.up", frozen=frozen), model, td)
        expected = by_hand(model, td, "h.0.attn.o_proj", ["h.1.up"], paths).abs().mean(0)
        assert expected.min() > 1e-4
        assert_close(out["effect"][0], expected)
    every = measured(PathPatching("h.0.attn.o_proj", receivers="head", frozen=()), model, td)
    assert_close(every["effect"], measured(ActivationPatching("h.0.attn.o_proj"), model, td)["effect"])


def test_modules_that_hold_a_sender_or_lie_in_it_are_not_frozen():
    model, td = HandTransformer().double(), pairs(3, 3)
    by_leaf = measured(PathPatching("h.0.attn.o_proj", receivers="h.1.up"), model, td)
    with_all = measured(
        PathPatching("h.0.attn.o_proj", receivers="h.1.up", frozen=(mixes, "h.0.attn", "h.*")), model, td
    )
    # the block that holds the sender stays free, the one after it is held, but for what the receiver takes in
    assert_close(with_all["effect"], by_leaf["effect"])
    whole = measured(PathPatching("h.0.attn", receivers="h.1.up"), model, td)
    assert_close(whole["effect"], by_leaf["effect"])
    taken = measured(PathPatching("h.0.attn", side="input", receivers="h.0.up", frozen=mixes), model, td)
    assert taken["effect"].min() > 1e-4  # its own projections run


class Linear(nn.Module):
    """A residual stream that two linear blocks add to."""

    def __init__(self):
        super().__init__()
        self.embed, self.one, self.two, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        x = x + self.one(x)
        x = x + self.two(x)
        return self.head(x)


def signed(out):
    """The mean signed change, where all gaps have one sign."""
    return out["normalised"] * out["gap"]


def test_in_a_linear_network_the_paths_add_up_to_the_whole():
    torch.manual_seed(1)
    model, td = Linear().double(), pairs(3, rows=2)
    td["source", "input"] = td["input"] + 1  # the same change in every pair: gaps of one sign
    whole = measured(ActivationPatching("embed"), model, td)
    # every way ends in the head by what is added last: the embedding itself, the first block, the second
    direct = signed(measured(PathPatching("embed", receivers="head"), model, td))
    by_two = signed(measured(PathPatching("embed", receivers="two"), model, td))  # directly
    by_one = signed(measured(PathPatching("embed", receivers="one"), model, td))  # and what the second makes of it
    assert_close(direct + by_two + by_one, signed(whole))
    for one in (direct, by_two, by_one):
        assert one.abs().min() > 1e-3
    through_both = signed(measured(PathPatching("one", receivers="two"), model, td))
    both = signed(measured(PathPatching("one", receivers="head"), model, td)) + through_both
    assert_close(both, signed(measured(ActivationPatching("one"), model, td)))


def test_without_a_path_nothing_moves_and_with_one_alone_everything_does():
    model, td = HandTransformer().double(), pairs(3, 3)
    back = measured(PathPatching(("h.1.down", "h.1.attn.o_proj"), receivers="h.0.**"), model, td)
    assert not back["effect"].any()
    assert not back["unit_effect"].any()
    assert measured(PathPatching("h.0.down", receivers="embed"), model, td)["effect"].eq(0).all()
    chain = mlp(3, 5, 4, 2).double()
    td = pairs(3)
    alone = measured(PathPatching(("0", "1"), receivers="2"), chain, td)
    exact = measured(ActivationPatching(("0", "1")), chain, td)
    for key in ("effect", "unit_effect", "normalised", "unit_normalised", "gap"):
        assert_close(alone[key], exact[key], equal_nan=True)
    assert measured(PathPatching("0", receivers="4"), chain, td)["effect"].eq(0).all()  # the layer between is held
    assert_close(measured(PathPatching("0", receivers="4", frozen=()), chain, td)["effect"], exact["effect"][:1])
    itself = measured(PathPatching(("2", "3", "4")), chain, td)  # by no receiver: what reaches the outputs unheld
    assert itself["effect"][:2].eq(0).all()
    assert_close(itself["effect"][2], exact["gap"][0])


def test_inputs_denoising_and_ablation():
    model, td = HandTransformer().double(), pairs(3, 3)
    taken = measured(PathPatching("h.0.down", side="input", receivers="h.1.up", way="both"), model, td)
    back = TensorDict({"input": td["source", "input"], "source": {"input": td["input"]}}, [4])
    again = measured(PathPatching("h.0.down", side="input", receivers="h.1.up"), model, back)
    assert_close(taken["effect_denoise"], again["effect"])
    assert taken["effect"].min() > 1e-4
    zero = measured(PathPatching("h.0.down", by="zero", receivers="h.1.up"), model, td)
    held = gives(model, td["input"], [path for path in MATRICES if path != "h.0.down"])
    gone = held | {"h.0.down": torch.zeros(4, 3, 4, dtype=torch.float64)}
    _, arrived = hooked_run(model, td["input"], gone, read=["h.1.up"])
    expected = hooked_run(model, td["input"], inputs=arrived)[0] - model(td["input"]).detach()
    assert_close(zero["effect"][0], expected.abs().mean(0))
    assert "normalised" not in zero


class Shared(nn.Module):
    """A layer that runs twice, and positions that have no rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.twice, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.where = nn.Embedding(4, 3)

    def forward(self, x):
        x = self.embed(x) + self.where(torch.arange(x.shape[1]))
        x = x + self.twice(x).tanh()
        x = x + self.twice(x).tanh()
        return self.head(x.mean(1))


def test_a_module_that_runs_twice_and_one_without_rows():
    model, td = Shared().double(), pairs(4, 3)  # as many positions as pairs
    direct = measured(PathPatching("embed", receivers="head"), model, td)
    moved = (td["source", "input"] - td["input"]) @ model.embed.weight.T  # what the shared layer gives is held, twice
    expected = (moved.mean(1) @ model.head.weight.T).detach()
    assert_close(direct["effect"][0], expected.abs().mean(0))
    # it takes in at both calls what comes to it directly, the first time and the second
    out = measured(PathPatching("embed", receivers="twice"), model, td)
    base, source = (model.embed(td[key]) + model.where.weight for key in ("input", ("source", "input")))
    held = base + model.twice(base).tanh()
    new = base + model.twice(source).tanh() + model.twice(held + source - base).tanh()
    assert_close(out["effect"][0], (model.head(new.mean(1)) - model(td["input"])).abs().mean(0).detach())


class Remembering(nn.Module):
    """A memory beside the way past it."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(3, 4), nn.GRU(4, 4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x)
        out, hidden = self.rnn(x)
        return self.head(x.mean(1) + out[:, -1] + hidden[0])


def test_all_that_a_memory_gives_out_is_held():
    model, td = Remembering().double(), pairs(5, 3)
    out = measured(PathPatching("embed", receivers="head"), model, td)
    moved = (td["source", "input"] - td["input"]).mean(1) @ model.embed.weight.T @ model.head.weight.T
    assert_close(out["effect"][0], moved.abs().mean(0).detach())
    through = measured(PathPatching("embed", receivers="rnn"), model, td)
    base, source = (model.embed(td[key]) for key in ("input", ("source", "input")))
    (out, hidden), (last, state) = model.rnn(base), model.rnn(source)
    expected = (last[:, -1] + state[0] - out[:, -1] - hidden[0]) @ model.head.weight.T
    assert_close(through["effect"][0], expected.abs().mean(0).detach())
    states = measured(PathPatching("rnn:1", receivers="head"), model, td)["effect"][0]  # rows in the second dimension
    assert_close(states, ((state[0] - hidden[0]) @ model.head.weight.T).abs().mean(0).detach())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_where_gradients_are_off(mode):
    model, td = HandTransformer().double(), pairs(3, 3)
    method = PathPatching("h.0.down", receivers="h.1.up")
    expected = measured(method, model, td)
    with mode():
        assert_close(measured(method, model, td.clone())["effect"], expected["effect"])


def test_memory_and_many_parts():
    model, td = mlp(3, 40, 2).double(), pairs(3)
    whole = measured(PathPatching("0", receivers="2"), model, td)
    some = measured(PathPatching("0", receivers="2", max_bytes=20 * 4 * 82), model, td)
    for key in whole.keys(True, True):
        assert_close(whole[key], some[key], equal_nan=True)
    half = measured(PathPatching("0", receivers=[nn.Linear, lambda path, _module: path == "2"]), model, td)
    assert_close(half["unit_effect"], whole["unit_effect"])


def test_not_numbers_and_networks_whose_rows_mix():
    model, td = mlp(3, 5, 2).double(), pairs(3)
    td["source", "input"][0] = torch.nan
    assert measured(PathPatching("0", receivers="2"), model, td)["effect"].isnan().all()
    td["input"][:] = torch.nan
    assert measured(PathPatching("0", receivers="2"), model, td)["unit_effect"].isnan().all()

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.body(x)
            return self.head(h - h.mean(0))

    with pytest.raises(NetworkError, match="rows of Mixing mix"):
        measured(PathPatching("body", receivers="head"), Mixing().double(), pairs(3))


def test_receivers_that_are_not_there():
    with pytest.raises(PathError, match=r"receivers='heed' matches no module of Linear.*did you mean 'head'"):
        measured(PathPatching("embed", receivers="heed"), Linear(), pairs(3).float())
    with pytest.raises(PathError, match=r"frozen='h\.\*' matches no module of Linear"):
        measured(PathPatching("embed", frozen="h.*"), Linear(), pairs(3).float())
    assert PathPatching(receivers=["a", "b"]).receivers == ("a", "b")
    assert PathPatching().settings()["frozen"].endswith("path_patching.mixes")


def test_networks_without_a_receiver_are_left_out():
    td = pairs(3).float()

    def part(name, model):
        hooked = HookedModel(model, name=name)
        hooked.trace(td)
        return Part(Seen(hooked(td)), hooked)

    parts = {"actor": part("actor", Linear()), "critic": part("critic", mlp(3, 5, 2))}
    both = PathPatching("**", receivers="actor.two").across(parts)
    assert both.labels["layer"] == [f"actor.{name}" for name in ("embed", "one", "two", "head")]
    every = PathPatching(("actor.embed", "critic.0"), receivers=("actor.two", "critic.2")).across(parts)
    assert_close(every.values["unit_effect"][0, :3], both.values["unit_effect"][0])
