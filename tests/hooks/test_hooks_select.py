"""Patterns name the sites of a model, in the order in which it runs them."""

import pytest
import torch
from hooks_models import Cnn, Items, Mlp, Thrice, rows
from torch import nn

from tdhook_train import HookedModel
from tdhook_train.errors import PathError
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
    assert [row.kind for row in hooked.traced] == ["Conv2d", "BatchNorm2d", "ReLU", "Linear", "Cnn"]


def test_a_network_with_a_name_answers_to_it_and_lets_other_names_pass():
    hooked = traced(Mlp(), name="actor")
    assert hooked.sites("actor.0") == hooked.sites("0") == ("0",)
    assert hooked.sites(("actor.**", "critic.**")) == ("0", "1", "2", "3", "4")
    assert hooked.sites("critic.0") == ()
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
        ("a*", "ab", False),  # a star is one whole segment
    ],
)
def test_segments(pattern, path, expected):
    assert chooser(pattern)(path, nn.Identity()) is expected
