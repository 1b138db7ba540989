"""Attention as it is and rolled out: against torch's own weights, Hugging Face's, and products written by hand."""

import copy

import pytest
import torch
from method_cases import Attending, measured, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn import functional as F
from torchrl import modules as rl
from torchrl.objectives import ClipPPOLoss

from tdhook_train import ArtifactBuffer, At, Observer, ProbeSet
from tdhook_train.errors import NetworkError, PathError
from tdhook_train.latent import AttentionPatterns, AttentionRollout


def sequences(rows=5, time=6, width=8):
    return TensorDict(input=torch.randn(rows, time, width), batch_size=[rows])


def encoder(layers=2, **settings):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not settings).eval()


def by_hand(heads, x, allowed=None):
    """Softmax of scaled products, head by head, from the layer's weights."""
    q, k, _ = F.linear(x, heads.in_proj_weight, heads.in_proj_bias).chunk(3, -1)
    width = x.shape[-1] // heads.num_heads
    found = []
    for h in range(heads.num_heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[..., part] @ k[..., part].mT / width**0.5
        found.append((scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1))
    return torch.stack(found, 1)


def rollout_by_hand(layers):
    """Abnar and Zuidema 2020, row by row and layer by layer."""
    n = layers[0].shape[-1]
    out = []
    for row in range(len(layers[0])):
        product = torch.eye(n, dtype=torch.float64)
        for a in layers:
            mixed = 0.5 * a[row].double() + 0.5 * torch.eye(n, dtype=torch.float64)
            product = torch.stack([line / line.sum() for line in mixed]) @ product
        out.append(product)
    return torch.stack(out)


class Masked(nn.Module):
    """Attention with masks of both kinds, given by place or by name."""

    def __init__(self, **settings):
        super().__init__()
        self.heads, self.settings = nn.MultiheadAttention(8, 2, batch_first=True), settings

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False, **self.settings)[0]


class Gives(nn.Module):
    """Attention layers whose weights the test chooses, one after another; given out beside an output."""

    class Attention(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = weights

        def forward(self, x):
            return x, self.weights[: len(x)]

    def __init__(self, *weights):
        super().__init__()
        self.layers = nn.ModuleList(self.Attention(one) for one in weights)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)[0]
        return x


def chosen(*weights, method=None, td=None):
    return measured(method or AttentionRollout(), Gives(*weights), sequences(len(weights[0])) if td is None else td)


# ------------------------------------------------------------------------------------------------- as it is


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_attends_as_its_layers_weights_say(norm_first):
    model, td = encoder(norm_first=norm_first), sequences()
    out = measured(AttentionPatterns(), model, td)
    x = td["input"]
    for i, layer in enumerate(model.layers):
        found = out["attention", f"layers.{i}.self_attn"]
        given = layer.norm1(x) if norm_first else x
        torch.testing.assert_close(found, by_hand(layer.self_attn, given))
        torch.testing.assert_close(found.sum(-1), torch.ones(5, 2, 6))
        x = layer(x)


CAUSAL = torch.ones(6, 6).tril().bool()
PADDING = torch.arange(6) >= torch.tensor([6, 4, 6, 1, 5])[:, None]


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"attn_mask": ~CAUSAL}, CAUSAL),
        ({"attn_mask": ~CAUSAL, "is_causal": True}, CAUSAL),
        ({"attn_mask": torch.zeros(6, 6).masked_fill(~CAUSAL, -torch.inf)}, CAUSAL),
        ({"key_padding_mask": PADDING}, ~PADDING[:, None]),
        ({"key_padding_mask": PADDING, "attn_mask": ~CAUSAL, "is_causal": True}, ~PADDING[:, None] & CAUSAL),
    ],
)
def test_masks_count(settings, allowed):
    model, td = Masked(**settings), sequences()
    found = measured(AttentionPatterns(), model, td)["attention", "heads"]
    torch.testing.assert_close(found, by_hand(model.heads, td["input"], allowed))
    asked = model.heads(*[td["input"]] * 3, need_weights=True, average_attn_weights=False, **settings)[1]
    torch.testing.assert_close(found, asked.detach())


def test_the_mask_of_an_encoder_counts():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()

        def forward(self, x):
            return self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)

    model, td = Causal(), sequences()
    out = measured(AttentionPatterns(), model, td)
    found = out["attention", "encoder.layers.0.self_attn"]
    torch.testing.assert_close(found, by_hand(model.encoder.layers[0].self_attn, td["input"], CAUSAL))
    assert (found.triu(1) == 0).all()


def test_padding_is_no_nested_tensor_on_the_way():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=PADDING)

    model, td = Padded(), sequences()
    found = measured(AttentionPatterns(), model, td)["attention", "encoder.layers.0.self_attn"]
    heads = model.encoder.layers[0].self_attn
    torch.testing.assert_close(found, by_hand(heads, td["input"], ~PADDING[:, None]).detach())


def test_attention_across_two_sequences_has_its_own_keys():
    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.MultiheadAttention(8, 2, kdim=4, vdim=3, batch_first=False, add_bias_kv=True)

        def forward(self, x, keys, values):
            return self.heads(x.transpose(0, 1), key=keys.transpose(0, 1), value=values.transpose(0, 1))[0].transpose(
                0, 1
            )

    model, td = Across(), sequences()
    td["keys"], td["values"] = torch.randn(5, 4, 4), torch.randn(5, 4, 3)
    found = measured(AttentionPatterns(), model, td, in_keys=["input", "keys", "values"], out_keys=["output"])
    parts = (td[key].transpose(0, 1) for key in ("input", "keys", "values"))
    expected = model.heads(*parts, average_attn_weights=False)[1]
    torch.testing.assert_close(found["attention", "heads"], expected.detach())
    assert expected.shape == (5, 2, 6, 5)
    with pytest.raises(NetworkError, match=r"'heads': \[6, 5\]; name the layers of self-attention"):
        measured(AttentionRollout(), model, td, in_keys=["input", "keys", "values"], out_keys=["output"])


def test_what_a_module_gives_out_beside_its_output_is_taken_as_it_is():
    one, two = torch.rand(5, 2, 6, 6).softmax(-1), torch.rand(5, 6, 6).softmax(-1)
    out = chosen(one, two, method=AttentionPatterns())
    assert torch.equal(out["attention", "layers.0"], one)
    assert torch.equal(out["attention", "layers.1"], two[:, None])  # one head


def test_the_innermost_of_nested_modules_counts():
    class OuterAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x)  # its weights, averaged, go on

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = OuterAttention()

        def forward(self, x):
            return self.attention(x)[0]

    model, td = Outer(), sequences()
    both = measured(AttentionPatterns(), model, td)
    assert list(both["attention"].keys()) == ["attention.inner"]
    alone = measured(AttentionPatterns(layers="attention"), model, td)["attention", "attention"]
    torch.testing.assert_close(alone[:, 0], both["attention", "attention.inner"].mean(1))


def test_each_call_of_a_shared_module_is_a_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            y = self.heads(x, x, x)[0]
            return self.heads(y, y, y)[0]

    model, td = Twice(), sequences()
    out = measured(AttentionPatterns(), model, td)
    y = model.heads(*[td["input"]] * 3)[0]
    torch.testing.assert_close(out["attention", "heads"], by_hand(model.heads, td["input"]).detach())
    torch.testing.assert_close(out["attention", "heads@1"], by_hand(model.heads, y).detach())
    expected = rollout_by_hand([out["attention", name].mean(1) for name in ("heads", "heads@1")])
    torch.testing.assert_close(measured(AttentionRollout(), model, td)["rollout"], expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_of_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    if name == "bert":
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
        config = transformers.BertConfig(vocab_size=11, **sizes, attn_implementation="eager")
    else:
        config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_head=2, n_layer=2, attn_implementation="eager")
    model = transformers.AutoModel.from_config(config).eval()
    td = TensorDict(input=torch.randint(0, 11, (4, 7)), batch_size=[4])
    out = measured(AttentionPatterns(), model, td)
    expected = model(td["input"], output_attentions=True).attentions
    found = list(out["attention"].values())
    assert len(found) == 2
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach())
    fused = [one.mean(1).detach() for one in expected]
    torch.testing.assert_close(measured(AttentionRollout(), model, td)["rollout"], rollout_by_hand(fused))


# ------------------------------------------------------------------------------------------------- rolled out


def test_rollout_is_the_product_of_the_layers():
    model, td = encoder(layers=3), sequences()
    patterns = measured(AttentionPatterns(), model, td)["attention"]
    layers = [patterns[f"layers.{i}.self_attn"].mean(1) for i in range(3)]
    found = measured(AttentionRollout(), model, td)["rollout"]
    torch.testing.assert_close(found, rollout_by_hand(layers))
    torch.testing.assert_close(found.sum(-1), torch.ones(5, 6, dtype=torch.float64))


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_heads_are_fused(fusion):
    weights = torch.randn(3, 4, 6, 6).softmax(-1)
    expected = {"mean": weights.mean(1), "max": weights.max(1).values, "min": weights.min(1).values}[fusion]
    found = chosen(weights, weights, method=AttentionRollout(fusion=fusion))["rollout"]
    torch.testing.assert_close(found, rollout_by_hand([expected, expected]))


def test_attention_to_oneself_stays_with_oneself():
    identity = torch.eye(6).expand(3, 2, 6, 6)
    assert torch.equal(chosen(identity, identity)["rollout"], torch.eye(6, dtype=torch.float64).expand(3, 6, 6))


def test_a_chain_in_closed_form():
    before = torch.zeros(1, 1, 3, 3)  # each position takes all from the one before it, the first from itself
    before[0, 0, [0, 1, 2], [0, 0, 1]] = 1
    expected = torch.tensor([[1, 0, 0], [3 / 4, 1 / 4, 0], [1 / 4, 1 / 2, 1 / 4]], dtype=torch.float64)
    assert torch.equal(chosen(before, before)["rollout"][0], expected)


def test_the_later_layer_stands_on_the_left():
    first, second = torch.randn(2, 3, 1, 6, 6).softmax(-1)
    found = chosen(first, second)["rollout"]
    torch.testing.assert_close(found, rollout_by_hand([first[:, 0], second[:, 0]]))
    assert not torch.allclose(found, rollout_by_hand([second[:, 0], first[:, 0]]))


# ------------------------------------------------------------------------------------------------- rows, bad data


@pytest.mark.parametrize("kind", [AttentionPatterns, AttentionRollout])
def test_rows_are_spread_evenly_and_averaged(kind):
    model, td = encoder(), sequences(rows=10)
    key = "rollout" if kind is AttentionRollout else ("attention", "layers.1.self_attn")
    whole = measured(kind(), model, td)[key]
    torch.testing.assert_close(measured(kind(rows=5), model, td)[key], whole[::2])
    torch.testing.assert_close(measured(kind(reduction="mean"), model, td)[key], whole.mean(0))
    dims = kind(reduction="mean").dims(key, whole.ndim - 1)
    assert len(dims) == whole.ndim - 1
    assert "batch" not in dims


def test_what_is_not_finite_gives_nan_in_its_row_alone():
    td = sequences()
    td["input"][2, 3] = torch.nan
    out = measured(AttentionPatterns(), encoder(), td)["attention", "layers.1.self_attn"]
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()
    rollout = measured(AttentionRollout(), encoder(), td)["rollout"]
    assert rollout[2].isnan().all()
    assert rollout[[0, 1, 3, 4]].isfinite().all()


def test_a_network_without_attention_is_refused():
    with pytest.raises(PathError, match="layers=attends matches no module of Sequential"):
        measured(AttentionPatterns(), mlp(3, 4, 2), TensorDict(input=torch.randn(4, 3), batch_size=[4]))


def test_modules_that_keep_their_weights_to_themselves_are_named():
    class FlashAttention(nn.Linear):
        pass

    model = nn.Sequential(FlashAttention(3, 3))
    with pytest.raises(NetworkError, match="none of '0' in Sequential gives out attention weights"):
        measured(AttentionPatterns(), model, TensorDict(input=torch.randn(4, 3), batch_size=[4]))


def test_probabilities_that_are_the_output_are_no_weights():
    class PooledAttention(nn.Module):
        def forward(self, x):
            return x.softmax(-1)

    with pytest.raises(NetworkError, match="gives out attention weights"):
        measured(AttentionPatterns(), nn.Sequential(PooledAttention()), sequences())


def test_weights_without_rows_are_refused():
    with pytest.raises(NetworkError, match=r"'layers.0' weighs \[2, 1, 6, 6\], which is not"):
        chosen(torch.eye(6).expand(2, 1, 6, 6), td=sequences(rows=4))


# ------------------------------------------------------------------------------------------------- as elsewhere


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_fast_path_and_the_modes_change_nothing(mode):
    model, td = encoder(), sequences()
    expected = by_hand(model.layers[0].self_attn, td["input"]).detach()
    before = copy.deepcopy(model.state_dict())
    with mode():
        found = measured(AttentionPatterns(), model, td)["attention", "layers.0.self_attn"]
    torch.testing.assert_close(found, expected)
    assert not found.is_inference()
    assert not found.requires_grad
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_sequences_of_a_batch_are_attended_as_wholes():
    td = TensorDict(input=torch.randn(4, 6, 8), batch_size=[4, 6])
    model = TensorDictModule(encoder(), ["input"], ["output"])
    with AttentionPatterns(rows=2).prepare(model) as hooked:
        found = hooked(td)["attention", "module.layers.0.self_attn"]
    torch.testing.assert_close(found, by_hand(model.module.layers[0].self_attn, td["input"][[0, 2]]).detach())


def test_live_beside_a_network_without_attention(tmp_path):
    actor = nn.Sequential(mlp(3, 5, 4, activation=Attending), rl.NormalParamExtractor())
    actor = TensorDictModule(actor, ["observation"], ["loc", "scale"])
    actor = rl.ProbabilisticActor(actor, ["loc", "scale"], distribution_class=rl.TanhNormal)
    loss = ClipPPOLoss(actor, rl.ValueOperator(mlp(3, 5, 1), in_keys=["observation"]))
    td = TensorDict(observation=torch.randn(8, 3), batch_size=[8])
    methods = {"patterns": AttentionPatterns(rows=4), "rollout": AttentionRollout(rows=4)}
    with Observer(methods, when=At(0), on=ProbeSet(td, groups="rows"), into=tmp_path) as observer:
        observer.step(loss, step=0)
    buffer = ArtifactBuffer.open(tmp_path)
    assert buffer["patterns"].coords["batch"] == [0, 2, 4, 6]
    (path,) = (path for path, module in loss.actor_network.named_modules() if isinstance(module, Attending))
    attending = loss.actor_network.get_submodule(path)
    before = loss.actor_network.get_submodule(path[:-1] + "0")
    expected = by_hand(attending.heads, before(td["observation"][::2])[..., None]).detach()
    found = {key: value for key, value in buffer["patterns"].last()[0].items(True, True) if "attention" in key}
    (value,) = found.values()
    torch.testing.assert_close(value, expected)
    rollout = buffer["rollout"].last()[0]["actor_network", "rollout"]
    torch.testing.assert_close(rollout, rollout_by_hand([expected[:, 0]]))
