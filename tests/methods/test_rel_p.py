"""RelP against networks rewritten with detached factors, straight from the paper, and plain autograd."""

import copy

import pytest
import torch
from bent_nets import FLAT, NETS, TEXT, Attending, Normed, Smooth
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tdhook_train.circuits import RelP
from tdhook_train.errors import NetworkError
from tdhook_train.latent import ActivationPatching, AttributionPatching, LogitDifference


def states_of(shape, rows=6):
    draw = (lambda: torch.randint(9, (rows, 3))) if shape is None else lambda: torch.randn(rows, *shape).double()
    return draw(), draw()


def with_sources(base, source):
    return TensorDict({"input": base, "source": {"input": source}}, [len(base)])


def values_at(model, sites, x):
    """The outputs, and what each site gives out, in one graph; without one, as it was before what works in place."""
    kept = {}
    handles = [
        model.get_submodule(site).register_forward_hook(
            lambda _m, _a, out, site=site: kept.update({site: out if out.requires_grad else out.clone()})
        )
        for site in sites
    ]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out, kept


def by_hand(model, sites, base, source):
    """Signed estimates of every unit, ``[pair, unit, target]`` by site: autograd on the bent network, loops."""
    model.rule = True
    out, before = values_at(model, sites, base.clone())
    model.rule = False
    clean, _ = values_at(model, sites, base.clone())
    assert_close(out, clean)  # bending changes no value
    with torch.no_grad():
        _, after = values_at(model, sites, source.clone())
    found = {}
    for site in sites:
        each = []
        for i in range(out.shape[1]):
            (slope,) = torch.autograd.grad(out[:, i].sum(), before[site], retain_graph=True, allow_unused=True)
            slope = torch.zeros_like(before[site]) if slope is None else slope
            share = (slope * (after[site] - before[site])).detach()
            share = share.movedim(1, -1) if share.ndim == 4 else share
            each.append(share.flatten(1, -2).sum(1) if share.ndim > 2 else share)
        found[site] = torch.stack(each, -1)
    return found


@pytest.mark.parametrize("name", NETS)
def test_every_unit_equals_the_network_with_detached_factors(name):
    make, shape, sites = NETS[name]
    model = make().double().eval()
    base, source = states_of(shape)
    out = measured(RelP(tuple(sites)), model, with_sources(base, source))
    expected = by_hand(model, sites, base, source)
    gap = (model(source) - model(base)).detach()
    moved = 0
    for i, site in enumerate(sites):
        each = expected[site]
        units = each.shape[1]
        assert_close(out["unit_effect"][i, :units], each.abs().mean(0), atol=1e-8, rtol=1e-7)
        assert_close(out["effect"][i], each.sum(1).abs().mean(0), atol=1e-8, rtol=1e-7)
        closed = (each * gap.sign()[:, None]).sum(0) / gap.abs().sum(0)
        assert_close(out["unit_normalised"][i, :units], closed, atol=1e-8, rtol=1e-7)
        moved += int(each.abs().max() > 1e-3)
    assert moved >= 2


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("softmax at the end",)])
def test_it_is_not_the_gradient(name):
    make, shape, sites = NETS[name]
    model = make().double().eval()
    td = with_sources(*states_of(shape))
    relp, atp = (measured(kind((sites[0],)), model, td)["unit_effect"] for kind in (RelP, AttributionPatching))
    assert (relp - atp).abs().max() > 1e-4


@pytest.mark.parametrize("name", NETS)
def test_what_is_found_of_one_layer_goes_by_no_other(name):
    make, shape, sites = NETS[name]
    model = make().double().eval()
    td = with_sources(*states_of(shape))
    together = measured(RelP(tuple(sites)), model, td)["unit_effect"]
    for i, site in enumerate(sites):
        alone = measured(RelP(site), model, td)["unit_effect"][0]
        assert_close(alone, together[i, : len(alone)])


# ---------------------------------------------------------------------- where it is something else that is known


def test_on_relus_it_is_attribution_patching():
    model, td = mlp(3, 5, 4, 2, activation=nn.ReLU).double(), with_sources(*states_of(FLAT))
    model[0].bias.data[0] = -100.0  # a dead unit
    relp, atp = (measured(kind(), model, td) for kind in (RelP, AttributionPatching))
    for key in relp.keys(True, True):
        assert_close(relp[key], atp[key], atol=1e-12, rtol=1e-9, equal_nan=True)
    assert relp["unit_effect"][0, 1:5].max() > 0
    assert (relp["unit_effect"][0, 0] == 0).all()


def test_on_linear_networks_it_is_exact():
    model = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    nn.init.normal_(model[3].running_mean)
    td = with_sources(*states_of(FLAT))
    relp, exact = (measured(kind(), model.double().eval(), td) for kind in (RelP, ActivationPatching))
    for key in ("effect", "unit_effect", "normalised", "unit_normalised", "gap"):
        assert_close(relp[key], exact[key], equal_nan=True)
    assert_close(relp["normalised"], torch.ones_like(relp["normalised"]))
    assert_close(relp["agreement_overall"], torch.ones(2).double())


class Conserving(nn.Module):
    """A network without biases in which everything goes through each of the layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(4, bias=False), *(nn.Linear(4, 4, bias=False) for _ in range(3))
        )  # fmt: skip
        self.attention = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)
        self.after, self.act, self.last = nn.RMSNorm(4), nn.GELU(), nn.Identity()

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(*[self.norm(x)] * 3, need_weights=False)[0]
        x = self.after(x)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(self.act(self.last(x)).mean(1))


def test_coefficients_times_values_add_up_to_the_metric():
    model = Conserving().double()
    td, layers = TensorDict({"input": states_of(TEXT)[0]}, [6]), ("embed", "after", "last", "act", "head")
    out = measured(RelP(layers, by="zero", parts="layer"), model, td)  # h' = 0: the estimate is minus the sum of c h
    expected = model(td["input"]).abs().mean(0).detach()
    assert_close(out["effect"], expected.expand(len(layers), -1))
    gradients = measured(AttributionPatching(layers, by="zero", parts="layer"), model, td)
    assert (gradients["effect"][0] - expected).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sigmoid_has_no_pole_at_zero(dtype):
    """(sigmoid(x) - 1/2) / x = tanh(x/2) / 2x, and 1/4 at 0."""
    x = torch.tensor([0.0, 1e-12, -1e-7, 1e-5, -1e-3, 4e-3, 0.1, -2.0, 30.0], dtype=torch.float64)
    slope = torch.where(x == 0, 0.25, torch.tanh(x / 2) / (2 * torch.where(x == 0, 1, x))).to(dtype)
    model, td = nn.Sequential(nn.Identity(), nn.Sigmoid()).to(dtype), with_sources(*[x.to(dtype)[:, None]] * 2)
    td["source", "input"] = td["input"] + 1
    for i in range(len(x)):
        out = measured(RelP("0", parts="layer"), model, td[[i, i]])
        step = (td["source", "input"] - td["input"])[i]
        assert_close(out["effect"][0], slope[i] * step, rtol=2e-5 if dtype == torch.float32 else 1e-9, atol=0)


def test_attention_by_the_gradient_reaches_queries_and_keys():
    model, td = Attending().double(), with_sources(*states_of(TEXT))
    constant = measured(RelP(("q", "k", "v")), model, td)["effect"]
    gradient = measured(RelP(("q", "k", "v"), attention="gradient"), model, td)["effect"]
    assert (constant[:2] == 0).all()
    expected = measured(AttributionPatching(("q", "k", "v")), model, td)["effect"]  # it has no other rule
    assert_close(gradient, expected)
    assert gradient.min() > 0
    fused = Attending("fused").double()
    fused.load_state_dict(model.state_dict())
    assert_close(measured(RelP(("q", "k", "v"), attention="gradient"), fused, td)["effect"], expected)


def test_the_largest_estimates_are_held_against_exact_patching():
    model, td = Smooth().double(), with_sources(*states_of(FLAT))
    settings = {"layers": ("first", "second"), "targets": LogitDifference(1, 0, logits="output")}
    relp = measured(RelP(**settings, verify=3), model, td)
    exact = measured(ActivationPatching(**settings), model, td)
    for rank in range(3):
        layer, unit = relp["top_layer"][rank, 0], relp["top_part"][rank, 0]
        assert_close(relp["top_exact"][rank, 0], exact["unit_effect"][layer, unit, 0])
        assert_close(relp["top_estimate"][rank, 0], relp["unit_effect"][layer, unit, 0])
    assert relp["agreement"].isfinite().all()


def twisted(td):
    return td["output"][:, 0].tanh() * td["output"].softmax(-1)[:, 1] * td["input"][:, 0]


def test_metrics_go_by_the_gradient():
    model, (base, source) = nn.Linear(3, 2).double(), states_of(FLAT)
    out = measured(RelP("", targets=twisted, parts="layer"), model, with_sources(base, source))
    before, after = model(base).detach().requires_grad_(), model(source).detach()
    (slope,) = torch.autograd.grad(twisted({"output": before, "input": base}).sum(), before)
    assert_close(out["effect"][0, 0], (slope * (after - before)).sum(1).abs().mean().detach())


def test_of_what_layers_take_in():
    model, td = Smooth().double(), with_sources(*states_of(FLAT))
    inputs = measured(RelP(("second", "head"), side="input"), model, td)
    named = nn.Sequential(*copy.deepcopy([model.first, nn.GELU(), model.second, nn.Tanh(), model.head]))
    outputs = measured(RelP(("1", "3")), named, td)
    assert_close(inputs["unit_effect"], outputs["unit_effect"], equal_nan=True)


class Members(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        h = self.first(x)
        return torch.vmap(lambda w: (h @ w).tanh())(self.weight).sum(0)


def test_members_inside_vmap_are_refused():
    td = with_sources(torch.randn(6, 3), torch.randn(6, 3))
    with pytest.raises(NetworkError, match="RelP cannot follow values into torch"):
        measured(RelP("first"), Members(), td)
    assert measured(AttributionPatching("first"), Members(), td)["effect"].min() > 0


# ---------------------------------------------------------------------- data that says nothing


def test_a_state_patched_with_itself_changes_nothing():
    base, _ = states_of(TEXT)
    out = measured(RelP(), Conserving().double(), with_sources(base, base))
    assert out["unit_effect"].nan_to_num().abs().max() == 0
    assert out["agreement"].isnan().all()


def test_what_is_not_a_number_stays_in_its_pair():
    base, source = states_of(FLAT)
    model = Smooth().double()
    fine = measured(RelP(("first",), pairs=6), model, with_sources(base[:5], source[:5]))
    assert fine["unit_effect"].isfinite().all()
    base[5] = torch.nan
    out = measured(RelP(("first",), pairs=6), model, with_sources(base, source))
    assert out["unit_effect"].isnan().all()  # a mean over pairs


def test_constant_values_have_a_finite_coefficient():
    model, td = Normed().double(), with_sources(*states_of(FLAT))
    nn.init.zeros_(model.first.weight)
    nn.init.zeros_(model.first.bias)  # the norm sees nothing but zeros
    out = measured(RelP(("first", "norm")), model, td)
    assert (out["effect"] == 0).all()
