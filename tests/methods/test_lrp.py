"""LRP: each rule against its formula in loops, conservation from layer to layer, and the values of zennit."""

import sys
import types

import pytest
import torch
from method_cases import measured, mlp
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tdhook_train.attribution import LRP, InputXGradient
from tdhook_train.attribution.relevance import (
    AlphaBeta,
    ByName,
    ByType,
    Epsilon,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    Flat,
    Gamma,
    Norm,
    Pass,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
)
from tdhook_train.errors import PathError, SettingsError


def td_of(**values):
    return TensorDict(values, [len(next(iter(values.values())))])


def relevance(model, x, key="input", **settings):
    return measured(LRP(**settings), model, td_of(input=x))["attr", key]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------- every rule by its formula, number by number


def shares_of(rule, x, w, b, z):
    """What of one output's relevance each input gets: straight from the papers."""
    n, c = len(x), [float(a * v) for a, v in zip(x, w, strict=True)]
    up, down = [max(v, 0.0) for v in c], [min(v, 0.0) for v in c]
    match rule:
        case Zero() | Epsilon():
            return [v / z for v in c]
        case ZPlus():
            return [v / (sum(up) + max(b, 0.0)) for v in up]
        case AlphaBeta():
            adds, takes = sum(up) + max(b, 0.0), sum(down) + min(b, 0.0)
            return [rule.alpha * u / adds - rule.beta * d / takes for u, d in zip(up, down, strict=True)]
        case Gamma():
            part, bias = (up, max(b, 0.0)) if z > 0 else (down, min(b, 0.0))
            each = [v + rule.gamma * p for v, p in zip(c, part, strict=True)]
            return [v / (sum(each) + b + rule.gamma * bias) for v in each]
        case Flat():
            return [1 / n] * n
        case WSquare():
            return [float(v) ** 2 / (float((w**2).sum()) + b**2) for v in w]
        case ZBox():
            each = [
                v - rule.low * max(float(a), 0.0) - rule.high * min(float(a), 0.0) for v, a in zip(c, w, strict=True)
            ]
            return [v / sum(each) for v in each]
    raise AssertionError(rule)


def by_formula(rule, layer, x):
    """Relevance of the inputs for every output of a linear map, given as its matrix row by row."""
    out = torch.zeros(len(x), layer.out_features, layer.in_features, dtype=torch.float64)
    for i, row in enumerate(x):
        for j, (w, b) in enumerate(zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)):
            w = torch.tensor(w, dtype=torch.float64)
            z = float(row @ w) + b
            out[i, j] = torch.tensor(shares_of(rule, row, w, b, z), dtype=torch.float64) * z
    return out


RULES = [Zero(), Epsilon(epsilon=1e-12), AlphaBeta(1e-12, 1.0, 0.0)]
RULES += [kind(1e-12) for kind in (ZPlus, AlphaBeta, Gamma, Flat, WSquare, ZBox)]  # the papers have no stabiliser
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


@each_rule
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
def test_a_linear_layer_by_the_formula(rule, signed):
    layer, x = nn.Linear(6, 4).double(), (torch.randn if signed else torch.rand)(5, 6, dtype=torch.float64)
    found = relevance(layer, x, composite=ByType({nn.Linear: rule}))
    assert_close(found, by_formula(rule, layer, x))


@each_rule
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_convolution_is_the_linear_layer_of_its_matrix(rule, padding_mode):
    padded = padding_mode == "circular"
    conv = nn.Conv2d(2, 3, 3, stride=1 if padded else 2, padding=int(padded), padding_mode=padding_mode)
    conv, x = conv.double(), torch.randn(2, 2, *((4, 4) if padded else (5, 5)), dtype=torch.float64)
    inputs = x[0].numel()
    bias = conv(torch.zeros_like(x[:1])).flatten()
    columns = [conv(one.view_as(x[:1])).flatten() - bias for one in torch.eye(inputs, dtype=torch.float64)]
    dense = nn.Linear(inputs, len(bias)).double()
    dense.weight.data, dense.bias.data = torch.stack(columns, 1).detach(), bias.detach()
    found = relevance(nn.Sequential(conv, nn.Flatten()), x, composite=ByType({nn.Conv2d: rule}))
    if isinstance(rule, Flat):  # over the inputs that reach an output alone
        assert_close(found.flatten(2).sum(2), nn.Sequential(conv, nn.Flatten())(x).detach())
        return
    expected = by_formula(rule, dense, x.flatten(1)).unflatten(2, x.shape[1:])
    assert_close(found, expected)


def test_a_transposed_and_grouped_convolution_by_the_gradient():
    for conv in (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.Conv1d(4, 6, 3, groups=2, bias=False)):
        x = torch.randn(2, 4, 5, 5) if isinstance(conv, nn.ConvTranspose2d) else torch.randn(2, 4, 5)
        model = nn.Sequential(conv, nn.Flatten())
        found = relevance(model, x, composite=ByType({type(conv): Zero()}), targets=("output", 3))
        assert_close(found, measured(InputXGradient(targets=("output", 3)), model, td_of(input=x))["attr", "input"])


# ---------------------------------------------------------------------- properties


def cnn(bias=False):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, bias=bias),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3, bias=bias),
    )


def test_lrp_0_is_input_x_gradient_on_a_relu_network_without_biases():
    model, x = cnn(), torch.randn(3, 2, 8, 8)
    kinds = {nn.Linear: Zero(), nn.Conv2d: Zero(), nn.AvgPool2d: Norm(stabiliser=1e-12)}
    found = relevance(model, x, composite=ByType(kinds))
    assert_close(found, measured(InputXGradient(), model, td_of(input=x))["attr", "input"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_plus_flat", "epsilon_gamma_box"])
def test_relevance_is_conserved_at_every_layer_and_layers_come_of_one_pass(composite):
    model, x = cnn(), torch.rand(3, 2, 8, 8)
    passes = []
    model[0].register_forward_hook(lambda *_: passes.append(1))
    found = measured(LRP(layers="**", composite=composite), model, td_of(input=x))
    assert len(passes) == 3  # the trace, the shared pass, and this
    for layer in range(8):
        total = found["attr", str(layer)].reshape(3, 3, -1).sum(2)
        assert_close(total, found["output"], rtol=1e-3, atol=1e-4)
    total = relevance(model, x, composite=composite).flatten(2).sum(2)
    assert_close(total, found["output"], rtol=1e-3, atol=1e-4)


def test_what_a_layer_takes_in_is_what_the_one_before_gives_out():
    model, x = cnn(), torch.rand(3, 2, 8, 8)
    inside = measured(LRP(layers=["3", "7"], side="input"), model, td_of(input=x))
    outside = measured(LRP(layers=["2", "6"]), model, td_of(input=x))
    assert_close(inside["attr", "3"], outside["attr", "2"])
    assert_close(inside["attr", "7"], outside["attr", "6"])


def test_a_target_that_is_a_function_of_the_outputs():
    model, x = nn.Linear(4, 3, bias=False), torch.randn(5, 4)
    found = relevance(model, x, targets=lambda out: out["output"][:, 0] - out["output"][:, 1])
    assert_close(found, x * (model.weight[0] - model.weight[1]).detach(), rtol=1e-3, atol=1e-5)


def test_a_batch_normalisation_is_part_of_the_layer_before_it():
    conv, norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    scale = (norm.weight / (norm.running_var + norm.eps) ** 0.5).detach()
    merged = nn.Conv2d(2, 4, 3)
    merged.weight.data = conv.weight.data * scale[:, None, None, None]
    merged.bias.data = (conv.bias.data - norm.running_mean) * scale + norm.bias.data
    by_hand, x = nn.Sequential(merged, *list(model)[2:]), torch.randn(3, 2, 6, 6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for composite in ("epsilon_plus", "epsilon_plus_flat", "epsilon_gamma_box", ByType({nn.Conv2d: Epsilon()})):
        found, expected = (relevance(one, x, composite=composite) for one in (model, by_hand))
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_layer_that_runs_twice_and_an_addition_in_a_forward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            h = self.layer(x)
            h += x
            return self.layer(h.relu())

    model, x = Twice(), torch.randn(5, 4)
    found = relevance(model, x, composite=ByType({nn.Linear: Zero()}))
    expected = measured(InputXGradient(), model, td_of(input=x))["attr", "input"]
    assert_close(found, expected, rtol=1e-3, atol=1e-4)  # the sum's stabiliser


def test_rows_do_not_mix_and_settings_are_found_by_name():
    model, x = cnn(), torch.randn(4, 2, 8, 8)
    composite = ByName({"0": WSquare(), "3": Gamma()}, EpsilonPlus())
    found = relevance(model, x, composite=composite)
    alone = torch.cat([relevance(model, row[None], composite=composite) for row in x])
    assert_close(found, alone, rtol=1e-4, atol=1e-6)
    assert_close(found, relevance(model, x, composite=composite, max_bytes=1), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, relevance(model, x))
    with pytest.raises(SettingsError, match=r"Flat is a rule for .* '1' of Sequential is ReLU"):
        relevance(model, x, composite=ByType({nn.ReLU: Flat()}))
    with pytest.raises(SettingsError, match="ByName needs rules such as Epsilon"):
        ByName({"0": "flat"})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Epsilon, {"epsilon": 0.0}), (AlphaBeta, {"alpha": 3.0}), (Gamma, {"gamma": -1.0}), (ZBox, {"low": 4.0})],
)
def test_rules_refuse_settings(kind, settings):
    with pytest.raises(SettingsError, match=f"{kind.__name__} needs"):
        kind(**settings)


# ---------------------------------------------------------------------- conditions


@pytest.mark.parametrize("layer", ["0", "1"])
def test_relevance_through_units_adds_up_and_a_direction_along_an_axis_is_a_unit(layer):
    model, x = mlp(3, 4, 2, activation=nn.ReLU), torch.randn(6, 3)
    whole = relevance(model, x)
    each = [relevance(model, x, through={layer: [i]}) for i in range(4)]
    assert_close(sum(each), whole, rtol=1e-4, atol=1e-5)
    assert_close(relevance(model, x, through={layer: (0, 2)}), each[0] + each[2], rtol=1e-4, atol=1e-5)
    assert_close(relevance(model, x, through={layer: [0.0, 2.0, 0.0, 0.0]}), each[1], rtol=1e-4, atol=1e-5)


def test_relevance_through_a_direction_is_that_of_the_projection():
    model, x = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)), torch.randn(6, 3)
    v = torch.tensor([0.5, -1.0, 0.25, 2.0])
    h, w = model[0](x).detach(), model[1].weight.detach()[0]
    unit = v / v.norm()
    carried = (h @ unit) * (unit @ w)
    found = relevance(model, x, through={"0": v.tolist()}, targets="output")
    assert_close(found.sum(1), carried, rtol=1e-3, atol=1e-4)


def test_channels_and_a_layer_that_is_not_there():
    model, x = cnn(), torch.rand(3, 2, 8, 8)
    each = [relevance(model, x, through={"3": i}) for i in range(4)]
    assert_close(sum(each), relevance(model, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(PathError, match="'9'"):
        relevance(model, x, through={"9": 1})


# ---------------------------------------------------------------------- attention


class Tiny(nn.Module):
    """One block of a transformer without biases, its attention written in one of four ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.norm, self.after = nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, elementwise_affine=False)
        self.heads = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((8, 12), (8, 12), (12, 8)))
        self.head = nn.Linear(8, 3, bias=False)

    def attend(self, x):
        if self.how == "module":
            return self.heads(x, x, x, need_weights=False)[0]
        weights = self.heads.in_proj_weight.chunk(3)
        q, k, v = (F.linear(x, w).unflatten(-1, (2, 4)).transpose(1, 2) for w in weights)
        if self.how == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "einsum":
            weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 2, dim=-1)
            mixed = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        else:
            mixed = F.softmax(torch.matmul(q, k.transpose(-2, -1)) / 2, dim=-1) @ v
        return F.linear(mixed.transpose(1, 2).flatten(2), self.heads.out_proj.weight)

    def forward(self, x):
        x = x + self.attend(self.norm(x))
        h = self.after(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(x.mean(1))


def slow_block(model, x, target):  # noqa: PLR0915 - one line an equation
    """Relevance of one row's tokens by AttnLRP's equations, one after another, in float64."""

    def share(parts, total, r):
        return [p / total * r for p in parts]

    def through(w, h, z, r):  # epsilon rule: h_i sum_j w_ji r_j / z_j
        return h * ((r / z) @ w)

    wq, wk, wv = (w.view(2, 4, 8) for w in model.heads.in_proj_weight.detach().double().chunk(3))
    wo, gate, up, down, head = (
        m.weight.detach().double() for m in (model.heads.out_proj, model.gate, model.up, model.down, model.head)
    )
    x = x.double()
    n = F.layer_norm(x, (8,))
    q, k, v = (torch.einsum("hde,te->htd", w, n) for w in (wq, wk, wv))
    a = torch.einsum("hqd,hkd->hqk", q, k) / 2
    s = a.softmax(-1)
    o = torch.einsum("hqk,hkd->hqd", s, v)
    flat = o.transpose(0, 1).reshape(-1, 8)
    y = flat @ wo.T
    x1 = x + y
    h = F.layer_norm(x1, (8,))
    g, u = h @ gate.T, h @ up.T
    m = F.silu(g) * u
    d = m @ down.T
    x2 = x1 + d
    pooled = x2.mean(0)

    z = head @ pooled
    r = pooled * head[target]  # z_target (sum_i pooled_i head_i / z_target)
    r2 = x2 / len(x2) / pooled * r
    r1, rd = share((x1, d), x2, r2)
    rm = through(down, m, d, rd)
    r1 = r1 + through(gate, h, g, rm / 2) + through(up, h, u, rm / 2)
    r0, ry = share((x, y), x1, r1)
    ro = through(wo, flat, y, ry).view(-1, 2, 4).transpose(0, 1)
    rs = s * torch.einsum("hqd,hkd->hqk", ro / (2 * o), v)
    rv = v * torch.einsum("hqd,hqk->hkd", ro / (2 * o), s)
    ra = a * (rs - s * rs.sum(-1, keepdim=True))
    b = 2 * a  # before it is scaled
    rq = q * torch.einsum("hqk,hkd->hqd", ra / (2 * b), k)
    rk = k * torch.einsum("hqk,hqd->hkd", ra / (2 * b), q)
    for w, value, got in ((wq, q, rq), (wk, k, rk), (wv, v, rv)):
        r0 = r0 + sum(through(w[i], n, value[i], got[i]) for i in range(2))
    assert torch.isfinite(z).all()
    return r0


@pytest.mark.parametrize("how", ["module", "fused", "einsum", "written"])
def test_a_transformer_by_the_equations_of_attnlrp(how):
    model, x = Tiny(how).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    found = relevance(model, x, composite=ByType({nn.Linear: Epsilon(epsilon=1e-9)}))
    for row in range(2):
        for target in range(3):
            expected = slow_block(model, x[row], target)
            assert_close(found[row, target], expected, rtol=1e-3, atol=1e-4)  # stabilisers of 1e-6


def test_relevance_of_tokens_at_an_embedding_and_of_positions_that_are_parameters():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 8), nn.Linear(8, 3, bias=False)
            self.position = nn.Parameter(torch.randn(3, 8))

        def forward(self, tokens):
            return self.head((self.table(tokens) + self.position.expand(len(tokens), 3, 8)).mean(1))

    model, tokens = Tokens(), torch.tensor([[0, 1, 4], [2, 2, 3]])
    found = relevance(model, tokens, key="table", layers="table")
    expected = model.table(tokens)[:, None] * model.head.weight[:, None] / 3  # what positions add is theirs
    assert_close(found, expected.detach(), rtol=1e-3, atol=1e-4)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_products_halve_sums_share_and_constants_scale():
    class Mixed(nn.Module):
        def forward(self, x, y):
            return torch.stack([(x * y)[:, 0], (x + y)[:, 0], (3 * x / 4 - y)[:, 0], torch.relu(x)[:, 0] + 1], 1)

    x, y = torch.tensor([[2.0]]), torch.tensor([[-0.5]])
    with LRP().prepare(Mixed(), ["x", "y"], ["o"]) as hooked:
        out = hooked(td_of(x=x, y=y))
    assert_close(out["attr", "x"][0, :, 0], torch.tensor([-0.5, 2.0, 1.5, 2.0]), rtol=1e-4, atol=1e-5)
    assert_close(out["attr", "y"][0, :, 0], torch.tensor([-0.5, -0.5, 0.5, 0.0]), rtol=1e-4, atol=1e-5)


def test_masked_attention_gives_padding_nothing():
    model = Tiny("module")
    mask = torch.tensor([[False, False, True]])
    model.attend = lambda x: model.heads(x, x, x, key_padding_mask=mask)[0]
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        model.head.weight.normal_()
    found = relevance(nn.Sequential(_First(model)), x)
    assert torch.isfinite(found).all()
    assert_close(found[0, :, 2], torch.zeros(8).expand(3, 8)[:, :], atol=1e-6, rtol=0)


class _First(nn.Module):
    """Reads the first token alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner.head((x + self.inner.attend(self.inner.norm(x)))[:, 0])


# ---------------------------------------------------------------------- zennit


def zennit():
    for name, classes in (
        ("torchvision", ()),
        ("torchvision.models", ()),
        ("torchvision.models.resnet", ("Bottleneck", "BasicBlock")),
    ):
        if name not in sys.modules:
            module = types.ModuleType(name)
            for one in classes:
                setattr(module, one, type(one, (nn.Module,), {}))
            sys.modules[name] = module
    return pytest.importorskip("zennit.rules", reason="zennit is not installed; `make peers` runs this where it is")


class Block(nn.Module):
    def __init__(self, summed=None):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.summed = summed

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out + x if self.summed is None else self.summed(torch.stack([out, x], -1))
        return torch.relu(out) if self.summed is None else self.relu(out)


def network(kind, summed=None):
    torch.manual_seed(3)
    vgg = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    vgg += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    middle = (
        [Block(summed() if summed else None) for _ in range(2)] if kind == "resnet" else [nn.Conv2d(4, 4, 3), nn.ReLU()]
    )
    ending = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)]
    model = nn.Sequential(*vgg, *middle, *ending).double().eval()
    for norm in (one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 2), norm.bias.data.normal_()
    return model


def of_zennit(composite, model, x):
    from zennit.canonizers import SequentialMergeBatchNorm

    rows = []
    for target in range(3):
        leaf = x.clone().requires_grad_()
        made = composite([SequentialMergeBatchNorm()])
        with made.context(model) as changed:
            out = changed(leaf)
            start = torch.zeros_like(out)
            start[:, target] = out[:, target].detach()
            rows.append(torch.autograd.grad(out, leaf, start)[0])
    return torch.stack(rows, 1)


def zennits(name, rules):
    import zennit.composites as c
    from zennit.composites import layer_map_base
    from zennit.types import Linear

    low, high = torch.full((1, 3, 8, 8), -3.0, dtype=torch.float64), torch.full((1, 3, 8, 8), 3.0, dtype=torch.float64)
    boxed = {"low": low, "high": high}
    known = {
        "EpsilonPlus": lambda k: c.EpsilonPlus(canonizers=k),
        "EpsilonPlusFlat": lambda k: c.EpsilonPlusFlat(canonizers=k),
        "EpsilonGammaBox": lambda k: c.EpsilonGammaBox(**boxed, canonizers=k),
    }
    if name in known:
        return known[name]
    if name == "ZBox":
        return lambda k: c.SpecialFirstLayerMapComposite(
            layer_map=[*layer_map_base(), (Linear, rules.Epsilon())],
            first_map=[(Linear, rules.ZBox(**boxed))],
            canonizers=k,
        )
    rule = rules.Epsilon if name == "Zero" else getattr(rules, name)
    return lambda k: c.LayerMapComposite(layer_map=[*layer_map_base(), (Linear, rule())], canonizers=k)


@pytest.mark.parametrize("kind", ["vgg", "resnet"])
@pytest.mark.parametrize(
    "given",
    [
        *(Zero(), Epsilon(), ZPlus(), AlphaBeta(), Gamma(), Flat(), WSquare(), ZBox()),
        *(EpsilonPlus(), EpsilonPlusFlat(), EpsilonGammaBox()),
    ],
    ids=lambda given: type(given).__name__,
)
def test_the_values_of_zennit(kind, given):
    rules = zennit()
    from zennit.layer import Sum

    name, every = type(given).__name__, (nn.Linear, nn.Conv2d)
    composite = given
    if isinstance(given, ZBox):
        composite = ByType(dict.fromkeys(every, Epsilon()), dict.fromkeys(every, given))
    elif not isinstance(given, EpsilonPlus | EpsilonGammaBox):
        composite = ByType(dict.fromkeys(every, Epsilon(epsilon=1e-6) if name == "Zero" else given))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = relevance(network(kind), x, composite=composite)
    expected = of_zennit(zennits(name, rules), network(kind, Sum), x)
    assert expected.any()
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pass_and_norm_of_zennit():
    rules = zennit()
    from zennit.composites import LayerMapComposite

    model, x = nn.Sequential(nn.Tanh(), nn.AvgPool1d(2)), torch.randn(4, 6)
    found = relevance(model, x, composite=ByType({nn.Tanh: Pass(), nn.AvgPool1d: Norm()}))
    made = lambda k: LayerMapComposite(layer_map=[(nn.Tanh, rules.Pass()), (nn.AvgPool1d, rules.Norm())], canonizers=k)  # noqa: E731
    assert_close(found, of_zennit(made, model, x), rtol=1e-5, atol=1e-5)
