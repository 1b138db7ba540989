"""Patterns name the sites of a model, in the order in which it runs them."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hooks_models import Cnn, Items, Mlp, Thrice, rows
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tdhook_train import HookedModel
from tdhook_train.errors import PathError, SettingsError
from tdhook_train.hooks.paths import Site, chooser, parse


class Nest(nn.Module):
    """Declares its modules in another order than it runs them, two blocks of two layers each."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
        self.stem = nn.Linear(3, 4)
        self.idle = nn.Linear(3, 3)
        self.count = Count()

    def forward(self, x):
        h = self.stem(x)
        self.count(h)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Count(nn.Module):
    """Gives out integers, which are no activations."""

    def forward(self, x):
        return (x > 0).sum(1)


def traced(model, x=None, **kwargs):
    hooked = HookedModel(model, **kwargs)
    hooked.trace(rows(torch.randn(4, 3) if x is None else x))
    return hooked


LEAVES = ("stem", "blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1", "head")


@pytest.mark.parametrize(
    ("layers", "sites"),
    [
        ("**", LEAVES),
        ("*", ("stem", "head", "")[:2]),
        ("blocks.*", ("blocks.0", "blocks.1")),
        ("blocks.*.1", ("blocks.0.1", "blocks.1.1")),
        ("blocks.**", LEAVES[1:5]),
        ("**.0", ("blocks.0.0", "blocks.0", "blocks.1.0")),
        ("*.*.*", LEAVES[1:5]),
        (("head", "stem"), ("stem", "head")),
        (
            ("**", "head", "blocks.0"),
            ("stem", "blocks.0.0", "blocks.0.1", "blocks.0", "blocks.1.0", "blocks.1.1", "head"),
        ),
        ("", ("",)),
    ],
)
def test_patterns_and_the_order_of_the_run(layers, sites):
    assert traced(Nest()).sites(layers) == sites


def test_items_of_tuples_and_mappings_are_sites_of_their_own():
    hooked = traced(Items())
    assert hooked.sites("**") == ("split:0", "split:1", "named:low", "named:high")
    assert hooked.sites("split") == ("split:0", "split:1")
    assert hooked.sites(("named:low", "split:1")) == ("split:1", "named:low")
    with pytest.raises(PathError, match=r"'split:2' matches no module of Items .* did you mean 'split:1' or 'split:0'"):
        hooked.sites("split:2")


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("stm", "'stm' matches no module of Nest that gives out numbers; did you mean 'stem'"),
        ("block.*", "did you mean"),
        ("idle", "'idle' matches no module of Nest that gives out numbers"),  # never ran
        ("count", "'count' matches no module of Nest that gives out numbers"),  # integers
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(layers, text):
    with pytest.raises(PathError, match=text):
        traced(Nest()).sites(("**", layers))


def test_a_module_that_runs_several_times_is_one_site():
    assert traced(Thrice()).sites("**") == ("cell",)


def test_a_leaf_that_works_in_place_and_the_container_it_ends_are_told_apart():
    hooked = traced(Cnn().eval(), torch.randn(4, 2, 4, 4))
    assert hooked.sites("**") == ("conv", "norm", "act", "head")
    assert [row.previous for row in hooked.traced] == [None, "conv", "norm", None, None]  # flatten stands between
    assert [hooked.kind(str(row.site)) for row in hooked.traced] == ["Conv2d", "BatchNorm2d", "ReLU", "Linear", "Cnn"]


def test_a_network_with_a_name_answers_to_it_and_lets_other_names_pass():
    hooked = traced(Mlp(), name="actor")
    assert hooked.sites("actor.0") == hooked.sites("0") == ("0",)
    assert hooked.sites(("actor.**", "critic.**")) == ("0", "1", "2", "3", "4")
    assert hooked.sites("critic.0") == ()
    with hooked.run(rows(torch.randn(4, 3))) as run:
        one, many = run.get("actor.0"), run.get("actor.*")
    assert torch.equal(one.resolve(), many.resolve()["0"])
    assert hooked.has("actor.**")
    assert not hooked.has("critic.0")


def test_sites_need_a_trace():
    with pytest.raises(PathError, match=r"call trace\(inputs\) first"):
        HookedModel(Mlp()).sites("**")


def test_text_is_read_and_written_back():
    for text in ("a.b", "a.b:1", "a:-1", "a:name", ":0", "a:1:name"):
        assert str(parse(text)) == text
    assert parse("a:1") == Site("a", (1,))
    assert parse("a:one:2") == Site("a", ("one", 2))


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.c", False),
        ("a.**.c", "a.c", True),
        ("a.**.c", "a.x.y.c", True),
        ("**.c", "c", True),
        ("a.**", "a", True),
        ("a", "a.b", False),
        ("a*", "ab", True),  # a star is any part of a segment
        ("a*", "a", True),
        ("a*", "ab.c", False),  # and never more than one
        ("*a.b*d", "aa.bcd", True),
        ("*a.b*d", "aa.bc", False),
        ("a.*x+", "a.ax+", True),  # the rest is text
        ("a.*x+", "a.xx", False),
    ],
)
def test_segments(pattern, path, expected):
    assert chooser(pattern)(path, nn.Identity()) is expected


class Norm(nn.LayerNorm):
    pass


class Typed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 4), Norm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)))


@pytest.mark.parametrize(
    ("layers", "sites"),
    [
        (nn.Linear, ("stem", "head")),
        (nn.LayerNorm, ("norm",)),  # a subclass counts
        (Typed, ("",)),
        (lambda module: hasattr(module, "weight") and module.weight.shape[0] == 4, ("stem", "norm")),
        (lambda path, module: path.startswith("h") and isinstance(module, nn.Linear), ("head",)),
        ([nn.LayerNorm, "head", "stem"], ("stem", "norm", "head")),
    ],
    ids=["class", "subclass", "container", "predicate", "predicate of path and module", "several"],
)
def test_a_class_or_a_predicate_selects(layers, sites):
    hooked = traced(Typed())
    assert hooked.sites(layers) == sites
    assert hooked.has(layers)


def named_nothing(_module):
    return False


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (nn.Conv2d, "Conv2d matches no module of Typed"),
        (named_nothing, "named_nothing matches no module of Typed"),
    ],
)
def test_a_class_or_a_predicate_that_selects_nothing(layers, text):
    hooked = traced(Typed())
    assert not hooked.has(layers)
    with pytest.raises(PathError, match=text):
        hooked.sites(layers)


def test_what_is_no_selector_is_refused():
    with pytest.raises(SettingsError, match="a path, a pattern, a module class or a predicate, got int"):
        traced(Typed()).sites(3)


class Shared(nn.Module):
    """One linear layer under two names, the second inside a container."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.middle = nn.Tanh()
        self.block = nn.Sequential(self.first)

    def forward(self, x):
        return self.block(self.middle(self.first(x)))


def test_a_shared_module_answers_to_each_of_its_names():
    hooked = traced(Shared())
    assert hooked.sites("first") == ("first",)
    assert hooked.sites("block.0") == ("block.0",)  # as it was asked for
    assert hooked.sites("block.*") == ("first",)  # once, under the first of its names
    assert hooked.sites("**") == ("first", "middle")
    assert hooked.sites(["block.0", "middle", "first"]) == ("block.0", "first", "middle")
    assert hooked.kind("block.0") == "Linear"
    with pytest.raises(PathError, match=r"'block.1' matches no module of Shared .*did you mean 'block.0'"):
        hooked.sites("block.1")


@dataclass
class Parts:
    low: torch.Tensor
    rest: dict
    count: int = 0


class Gives(nn.Module):
    """Gives out a dataclass with a mapping of a tuple in it."""

    def forward(self, x):
        return Parts(x - 1, {"pair": (x * 2, [x * 3, (x > 0).sum()])})


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.gives = Gives()

    def forward(self, x):
        parts = self.gives(x)
        return parts.low + parts.rest["pair"][1][0]


def test_items_of_items_are_sites():
    hooked, x = traced(Takes()), torch.randn(4, 3)
    assert hooked.sites("gives") == ("gives:low", "gives:rest:pair:0", "gives:rest:pair:1:0")
    assert hooked.sites("gives:rest") == ("gives:rest:pair:0", "gives:rest:pair:1:0")
    with hooked.run(rows(x)) as run:
        inner, last = run.get("gives:rest:pair:1:0"), run.get("gives:rest:0:-1:0")  # by place in a mapping as well
        run.set("gives:rest:pair:1:0", lambda value: value * 10)
        changed = run.get("gives:rest:pair:1:0")
        run.set("gives:low", torch.zeros(4, 3))
    assert torch.equal(inner.resolve(), x * 3)
    assert torch.equal(last.resolve(), x * 3)
    assert torch.equal(changed.resolve(), x * 3 * 10)
    assert torch.equal(run.output["output"], x * 3 * 10)


def test_fields_of_a_named_tuple_a_frozen_dataclass_and_any_object():
    class Point(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    @dataclass(frozen=True)
    class Frozen:
        x: torch.Tensor
        y: torch.Tensor

    class Plain:
        def __init__(self, x, y):
            self.x, self.y = x, y

    for make in (Point, Frozen, Plain):
        given = []

        class Out(nn.Module):
            def forward(self, value, make=make, given=given):
                given.append(make(value * 2, value * 3))
                return given[-1]

        class Sum(nn.Module):
            def __init__(self, out):
                super().__init__()
                self.out = out

            def forward(self, value):
                pair = self.out(value)
                return pair.x + pair.y

        value = torch.randn(4, 3)
        with HookedModel(Sum(Out())).run(rows(value)) as run:
            y = run.get("out:y")
            run.set("out:x", torch.zeros(4, 3))
        assert torch.equal(y.resolve(), value * 3)
        assert torch.equal(run.output["output"], value * 3)
        assert torch.equal(given[0].x, value * 2)  # what the module gave out is not written to


def test_the_output_of_a_hugging_face_model():
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=8, bos_token_id=1, eos_token_id=1)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(0, 11, (2, 5))
    hooked = HookedModel(model)
    expected = model(ids, output_hidden_states=True)
    hooked.trace(rows(ids))
    assert hooked.sites("transformer") == ("transformer:last_hidden_state",)
    with hooked.run(rows(ids)) as run:
        states, first = run.get("transformer:last_hidden_state"), run.get("transformer:0")
        run.set("transformer:last_hidden_state", lambda value: value * 2)
    assert torch.equal(states.resolve(), expected.hidden_states[-1])
    assert torch.equal(first.resolve(), expected.hidden_states[-1])
    torch.testing.assert_close(run.output["output", "logits"], model.lm_head(expected.hidden_states[-1] * 2))
