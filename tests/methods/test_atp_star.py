"""AtPStar against the paper's formulas written out pair by pair, where AtP is blind, and where it may be seen to be."""

from dataclasses import replace

import pytest
import torch
from method_cases import measured, mlp
from patching_models import HandTransformer
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from tdhook_train.errors import NetworkError, PathError, SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.latent import ActivationPatching, AtPStar, AttributionPatching
from tdhook_train.method import Part, Seen
from tdhook_train.ops.attention_patterns import Attention, attention_like, in_heads

ATTENTION = {"query": "h.*.attn.q_proj", "key": "h.*.attn.k_proj", "value": "h.*.attn.v_proj"}
ATTENTION |= {"joined": "h.*.attn.o_proj", "heads": 2}
ALL = ("layer", "unit", "head", "position")
KEYS = ("effect", "unit_effect", "head_effect", "position_effect")


def pairs(*shape, rows=3):
    both = torch.randn(2, rows, *shape, dtype=torch.float64)
    return TensorDict({"input": both[0], "source": {"input": both[1]}}, [rows])


def curved(model):
    """With queries so long that the softmax is far from linear."""
    for block in model.h:
        nn.init.normal_(block.attn.q_proj.weight, std=2)
    return model


def noted(model, x, paths, held=()):
    """What modules give out, still in the graph, and the outputs; some modules held at what they give."""
    seen, handles = {}, []
    for path in paths:

        def keep(_module, _args, out, path=path):
            seen[path] = out

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    handles += [model.get_submodule(path).register_forward_hook(lambda _m, _a, out: out.detach()) for path in held]
    out = model(x)
    for handle in handles:
        handle.remove()
    return seen, out


def parts_of(kind, width, heads, positions):
    """Index of every part of [position, unit], as slices."""
    everything, size = slice(None), width // heads
    return {
        "layer": [(everything, everything)],
        "unit": [(everything, u) for u in range(width)],
        "head": [(everything, slice(h * size, (h + 1) * size)) for h in range(heads)],
        "position": [(p, everything) for p in range(positions)],
    }[kind]


def weights_by_hand(model, block, q, k):
    """Softmax of one row, head by head, as in the forward of the network."""
    attn, rows = model.h[block].attn, []
    for h in range(attn.heads):
        size = q.shape[-1] // attn.heads
        own = slice(h * size, (h + 1) * size)
        logits = q[:, own] @ k[:, own].T / size**0.5
        if attn.bias is not None:
            logits = logits + attn.bias
        if attn.causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
        rows.append(logits.softmax(-1))
    return torch.stack(rows)


def by_hand(model, td, site, kind, target, held=()):
    """Estimates [part, pair]: slope times change; for queries and keys, both of the weights of a softmax taken anew."""
    block, name = int(site.split(".")[1]), site.split(".")[-1]
    near = {n: f"h.{block}.attn.{n}" for n in ("q_proj", "k_proj", "weights")}
    found = []
    for base, source in zip(td["input"], td["source", "input"], strict=True):
        paths = [site, *near.values()]
        after = noted(model, source[None], paths)[0]
        before, out = noted(model, base[None], paths, held)
        of = before[near["weights"]] if name in ("q_proj", "k_proj") else before[site]
        (slope,) = torch.autograd.grad(out[0, target], of, allow_unused=True)
        slope = torch.zeros_like(of) if slope is None else slope
        old, new, row = before[site].detach()[0], after[site].detach()[0], []
        for part in parts_of(kind, old.shape[-1], 2, len(old)):
            value = old.clone()
            value[part] = new[part]
            if name in ("q_proj", "k_proj"):
                other = {n: before[near[n]].detach()[0] for n in ("q_proj", "k_proj")} | {name: value}
                moved = weights_by_hand(model, block, other["q_proj"], other["k_proj"]) - of.detach()[0]
            else:
                moved = value - old
            row.append((slope.detach()[0] * moved).sum())
        found.append(torch.stack(row))
    return torch.stack(found, 1)


SITES = ("h.0.attn.q_proj", "h.0.attn.k_proj", "h.0.attn.v_proj", "h.0.down", "h.1.attn.k_proj")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_queries_and_keys_go_through_the_softmax_anew(kind, causal):
    model, td = curved(HandTransformer(causal=causal)).double(), pairs(3, 3)
    out = measured(AtPStar(SITES, parts=("layer", kind), sample=0, verify=0, **ATTENTION), model, td)
    key = f"{'' if kind == 'layer' else kind + '_'}effect"
    for i, site in enumerate(SITES):
        for target in range(2):
            expected = by_hand(model, td, site, kind, target).abs().mean(1)
            found = out[key][i, ..., target].reshape(-1)[: len(expected)]
            assert_close(found, expected)


def test_without_attention_and_blocks_it_is_attribution_patching():
    model, td = curved(HandTransformer()).double(), pairs(3, 3)
    settings = {"layers": SITES, "parts": ALL, "heads": 2, "sample": 4, "verify": 3}
    plain = measured(AttributionPatching(**settings), model, td)
    attention = measured(AtPStar(**settings | ATTENTION), model, td)
    settings["parts"], settings["heads"] = ("layer", "unit"), None
    for one, key in ((AttributionPatching(**settings), "unit_effect"), (AtPStar(**settings), "unit_effect")):
        out = measured(one, model, td)
        assert_close(out[key], plain[key], equal_nan=True, rtol=0, atol=0)
        assert_close(out["normalised"], plain["normalised"], rtol=0, atol=0)
    # values and the rest of the network are first order with an attention too; queries and keys are not
    for key in KEYS:
        assert_close(attention[key][2:4], plain[key][2:4], equal_nan=True)
        assert (attention[key] - plain[key])[[0, 1, 4]].nan_to_num().abs().amax(0).max() > 1e-3


def saturated():
    """One head that looks at the position whose key is like the query: by so much that the softmax has no slope."""
    model = HandTransformer(width=4, heads=1, blocks=1).double()
    attn = model.h[0].attn
    with torch.no_grad():
        for module in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj):
            module.weight.copy_(torch.eye(4))
            module.bias.zero_()
        attn.q_proj.weight.mul_(60)
        model.embed.weight.copy_(torch.eye(4)[:, :3])
        model.h[0].down.weight.zero_()
    model.h[0].norm = nn.Identity()
    return model


def test_a_saturated_softmax_hides_nothing():
    model = saturated()
    base = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).clone()
    source = base[:, [1, 0, 2]].clone()
    td = TensorDict({"input": base, "source": {"input": source}}, [2])
    layers = ("h.0.attn.q_proj", "h.0.attn.k_proj")
    settings = {"layers": layers, "parts": ("layer", "position")}
    model.head.weight.data[:, :3] = torch.tensor([[1.0, -1, 0], [0, 1, 2]])
    exact = measured(ActivationPatching(**settings), model, td)
    assert (exact["position_effect"][:, :2].amax((1, 2)) > 0.3).all()  # queries and keys matter
    plain = measured(AttributionPatching(**settings), model, td)
    mended = measured(AtPStar(**settings, **ATTENTION | {"heads": 1}), model, td)
    assert plain["position_effect"].abs().max() < 1e-6  # blind
    assert_close(mended["position_effect"], exact["position_effect"])  # all that follows the softmax is linear here
    assert_close(mended["agreement_overall"], torch.ones(2, dtype=torch.float64))
    assert plain["agreement_overall"].isnan().all() or (plain["agreement_overall"] < 0.99).all()


class Cancelling(nn.Module):
    """A direct effect and one by way of the next block, of opposite sign; a third block that does nothing."""

    def __init__(self, share):
        super().__init__()
        self.first, self.second, self.third, self.head = (nn.Linear(2, 2, bias=False) for _ in range(4))
        with torch.no_grad():
            self.second.weight.copy_(-share * torch.eye(2))
            self.third.weight.zero_()

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(x)
        return self.head(x + self.third(x))


def test_effects_that_cancel_are_found_by_leaving_out_blocks():
    model, td = Cancelling(1.0), pairs(2, rows=4).float()
    plain = measured(AttributionPatching("first"), model, td)
    assert plain["effect"].abs().max() < 1e-6
    for blocks in (("second", "third"), ["second", ["third"]]):
        out = measured(AtPStar("first", blocks=blocks), model, td)
        moved = (td["source", "input"] - td["input"]) @ model.first.weight.T
        # without the second block the effect is the direct one; without the third it is 0; L - 1 = 1
        assert_close(out["effect"][0], (moved @ model.head.weight.T).abs().mean(0).detach())


@pytest.mark.parametrize("kind", ALL)
def test_left_out_blocks_equal_the_paper(kind):
    model, td = HandTransformer().double(), pairs(3, 3)
    sites = ("h.0.attn.q_proj", "h.0.attn.k_proj", "h.0.down", "h.1.attn.q_proj")
    blocks = (("h.0.attn.o_proj", "h.0.down"), "h.1.*.o_proj", "**.1.down")
    out = measured(AtPStar(sites, parts=("layer", kind), blocks=blocks, sample=0, verify=0, **ATTENTION), model, td)
    held = [["h.0.attn.o_proj", "h.0.down"], ["h.1.attn.o_proj"], ["h.1.down"]]
    prefix = "" if kind == "layer" else kind + "_"
    gap = (model(td["source", "input"]) - model(td["input"])).detach()
    for i, site in enumerate(sites):
        for target in range(2):
            each = torch.stack([by_hand(model, td, site, kind, target, paths) for paths in held])
            size = each.abs().sum(0) / 2
            own = prefix + "effect", prefix + "normalised"
            found, closed = (out[key][i, ..., target].reshape(-1)[: len(size)] for key in own)
            assert_close(found, size.mean(1))
            signed = size * by_hand(model, td, site, kind, target).sign()
            assert_close(closed, (signed * gap[:, target].sign()).sum(1) / gap[:, target].abs().sum())


def test_what_lies_in_a_block_is_nothing_without_it():
    model, td = Cancelling(0.5), pairs(2, rows=4).float()
    out = measured(AtPStar("second", blocks=("first", "second", "third")), model, td)
    plain = measured(AttributionPatching("second"), model, td)
    assert plain["effect"].min() > 0.01
    # two of three estimates are whole, and there are L - 1 of them
    assert_close(out["effect"], plain["effect"])
    assert_close(out["normalised"], plain["normalised"])
    assert_close(out["agreement"], torch.ones(1, 2, dtype=torch.float64))


def test_padding_and_biases_come_from_the_weights():
    bias = torch.randn(3, 3, dtype=torch.float64)
    bias[:, 2] = -torch.inf
    model, td = HandTransformer(bias=bias).double(), pairs(3, 3)
    settings = {"layers": SITES[:2], "parts": ("layer", "position"), "sample": 0, "verify": 0}
    with pytest.raises(
        NetworkError, match=r"past what 'h.0.attn.o_proj' takes in.*scale 0.707, 2 heads.*site of the we"
    ):
        measured(AtPStar(**settings, **ATTENTION), model, td)
    out = measured(AtPStar(**settings, **ATTENTION, weights="h.*.attn.weights"), model, td)
    for i, site in enumerate(SITES[:2]):
        for kind, key in (("layer", "effect"), ("position", "position_effect")):
            expected = torch.stack([by_hand(model, td, site, kind, t).abs().mean(1) for t in range(2)], 1)
            assert_close(out[key][i].reshape(-1, 2), expected)


def test_weights_that_underflow_are_no_mask():
    model = saturated()
    model.h[0].attn.q_proj.weight.data.mul_(30)  # in the weights of float64 nothing is left of the other keys
    base = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).clone()
    td = TensorDict({"input": base, "source": {"input": base[:, [1, 0, 2]]}}, [2])
    settings = {"layers": "h.0.attn.q_proj", "parts": ("layer", "position")}
    attention = ATTENTION | {"heads": 1, "weights": "h.*.attn.weights"}
    mended = measured(AtPStar(**settings, **attention), model, td)
    exact = measured(ActivationPatching(**settings), model, td)
    assert_close(mended["position_effect"], exact["position_effect"])


def test_another_scale_or_number_of_heads_is_refused():
    model, td = HandTransformer().double(), pairs(3, 3)
    for wrong in ({"scale": 1.0}, {"heads": 1}, {"heads": 4}, {"value": "h.*.attn.k_proj"}):
        with pytest.raises(NetworkError, match=r"past what 'h.0.attn.o_proj' takes in"):
            measured(AtPStar(SITES, **ATTENTION | wrong), model, td)
    assert measured(AtPStar(SITES, **ATTENTION, scale=2**-0.5), model, td)["effect"].isfinite().all()
    with pytest.raises(NetworkError, match=r"3 heads side by side; query='h.0.attn.q_proj' has \(3, 3, 4\)"):
        measured(AtPStar(SITES, **ATTENTION | {"heads": 3}), model, td)
    with pytest.raises(SettingsError, match=r"as many sites of each.*HandTransformer has 2 for query, 1 for key"):
        measured(AtPStar(SITES, **ATTENTION | {"key": "h.0.attn.k_proj"}), model, td)
    with pytest.raises(NetworkError, match="heads of one size, as many for keys as for queries"):
        measured(AtPStar(SITES, **ATTENTION | {"key": "h.*.up"}), model, td)
    with pytest.raises(PathError, match=r"key='h.\*.k' matches no module of HandTransformer"):
        measured(AtPStar(SITES, **ATTENTION | {"key": "h.*.k"}), model, td)


def test_settings_that_do_not_go_together():
    for wrong in (
        {"query": "q"},
        {"scale": 1.0},
        {"weights": "w"},
        ATTENTION | {"heads": None},
        ATTENTION | {"side": "input"},
        ATTENTION | {"scale": 0.0},
        {"blocks": "h.*"},
        {"blocks": ("h.0",)},
    ):
        with pytest.raises(SettingsError, match="needs"):
            AtPStar(**wrong)
    listed = AtPStar(query=["q"], key=["k"], value=["v"], joined=["o"], heads=2, blocks=[["a", "b"], "c"])
    assert hash(listed.blocks) == hash((("a", "b"), "c"))
    assert listed.query == ("q",)


def test_activations_that_are_not_numbers_give_nan():
    model, td = HandTransformer(causal=True).double(), pairs(3, 3)
    method = AtPStar(SITES, parts=ALL, sample=0, verify=0, **ATTENTION)
    td["source", "input"][1] = torch.nan
    assert measured(method, model, td)["effect"].isnan().all()
    td["input"][:] = torch.nan
    assert measured(method, model, td)["effect"].isnan().all()


def test_blocks_that_a_metric_does_not_go_by_and_the_input_side():
    model, td = Cancelling(0.5), pairs(2, rows=4).float()
    constant = {"constant": lambda td: torch.zeros(len(td)), "first": lambda td: td["output"][:, 0]}
    out = measured(AtPStar("first", targets=constant, blocks=("second", "third")), model, td)
    assert_close(out["effect"][0, 0], torch.tensor(0.0))
    assert out["normalised"][0, 0].isnan()
    inputs = measured(AtPStar(["second", "third"], side="input", blocks=("second", "third")), model, td)
    # what the second takes in goes on through it alone: without it 0, without the third as it is
    exact = measured(ActivationPatching(["second", "third"], side="input"), model, td)
    assert_close(inputs["effect"], exact["effect"])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_where_gradients_are_off(mode):
    model, td = HandTransformer(causal=True).double(), pairs(3, 3)
    method = AtPStar(SITES, blocks=("h.*.down", "h.*.attn"), verify=2, **ATTENTION)
    expected = measured(method, model, td)
    with mode():
        found = measured(method, model, td.clone())
    for key in ("effect", "unit_effect", "agreement", "top_exact"):
        assert_close(found[key], expected[key], equal_nan=True)


def test_networks_with_some_of_the_blocks_and_no_attention():
    nets = {"big": HandTransformer(), "small": mlp(3, 5, 2), "line": mlp(3, 4, 2)}
    td = TensorDict(input=torch.randn(6, 3, 3), batch_size=[6])
    attention = {name: f"big.{ATTENTION[name]}" for name in ("query", "key", "value", "joined")}
    blocks = ("big.h.0.down", "big.h.1.down")
    method = AtPStar(("big.h.*.up", "small.0"), **attention, heads=2, blocks=blocks)
    parts = {name: part(name, model, td) for name, model in nets.items()}
    both = method.across(parts)
    assert both.labels["layer"] == ["big.h.0.up", "big.h.1.up", "small.0"]  # the line has none of them
    plain = AttributionPatching("0").across({"": part("", nets["small"], td)})
    assert_close(both.values["unit_effect"][2, :5], plain.values["unit_effect"][0])
    lone = AtPStar("**", blocks=("big.h.0.down", "small.0", "small.2"))
    with pytest.raises(SettingsError, match=r"needs 2 blocks or more of big, which has only \('h.0.down',\)"):
        lone.across(parts)


def part(name, model, td):
    hooked = HookedModel(model, name=name)
    hooked.trace(td)
    return Part(Seen(hooked(td)), hooked)


def test_the_attention_of_torch():
    q, k, v = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        attention = attention_like(z, q, k, v, 5**-0.5)
        assert attention.off(z) < 1e-12
        assert_close(attention.outputs, z)
    assert attention.off(z.roll(1, 0)) > 0.1
    assert attention.off(torch.full_like(z, torch.nan)) == 0
    assert replace(attention, value=v * torch.nan).off(z) == torch.inf
    z = nn.functional.scaled_dot_product_attention(q[:, :, :2], k, v)
    assert attention_like(z, q[:, :, :2], k, v, 5**-0.5).off(z) < 1e-12  # from elsewhere
    assert torch.equal(in_heads(q.transpose(1, 2).flatten(2), 3), q)


def test_a_query_that_looks_nowhere_moves_nothing():
    q, k, v = (torch.randn(1, 1, 2, 3, dtype=torch.float64) for _ in range(3))
    attention = Attention(q, k, v, (q @ k.mT).index_fill(2, torch.tensor(1), -torch.inf), 1.0)
    each = attention.effects("position", "query", torch.randn_like(q), torch.randn(1, 1, 1, 2, 3, dtype=torch.float64))
    assert each[1] == 0
    assert each[0] != 0
