"""The logit lens: against loops over the network's own modules, hand-built heads and closed forms."""

from dataclasses import replace

import pytest
import torch
from method_cases import measured
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl import modules as rl
from torchrl.objectives import ClipPPOLoss

from tdhook_train import ArtifactBuffer, At, Observer, ProbeSet
from tdhook_train.errors import NetworkError, PathError, TargetError
from tdhook_train.latent import LogitLens, TunedLens


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.inner(x)


class Residual(nn.Module):
    """Blocks x + f(x) between an embedding and a head behind a normalisation."""

    def __init__(self, out=4, blocks=3, width=6):
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out)

    def stream(self, x):
        found = [self.embed(x)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def forward(self, x):
        return self.head(self.norm(self.stream(x)[-1]))


class Chosen(nn.Module):
    """Layers whose values the test chooses, the last of them read by a linear head."""

    def __init__(self, head, *values):
        super().__init__()
        self.values, self.head = values, head
        self.layers = nn.ModuleList(nn.Identity() for _ in values)

    def forward(self, x):
        rows = x[:, 0].long()
        return self.head([layer(value[rows]) for value, layer in zip(self.values, self.layers, strict=True)][-1])


def inputs(n=20):
    return TensorDict(input=torch.randn(n, 3), batch_size=[n])


def chosen(head, *values, **settings):
    rows = len(values[0])
    td = TensorDict(input=torch.arange(float(rows))[:, None], batch_size=[rows])
    return measured(LogitLens("layers.*", "head", **settings), Chosen(head, *values), td)


STREAM = ("embed", "blocks.*")


def test_each_layer_is_read_by_the_rest_of_the_network():
    model, td = Residual(), inputs()
    out = measured(LogitLens(STREAM, "norm"), model, td)
    expected = torch.stack([model.head(model.norm(value)) for value in model.stream(td["input"])]).detach()
    torch.testing.assert_close(out["lens"], expected)
    final = model(td["input"]).detach()
    assert torch.equal(out["lens"][-1], final)
    for i, early in enumerate(expected):
        p, q = (torch.distributions.Categorical(logits=logits.double()) for logits in (final, early))
        assert out["kl"][i] == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), abs=1e-7)
        same = sum(int(a.argmax() == b.argmax()) for a, b in zip(final, early, strict=True)) / 20
        assert out["agreement"][i] == pytest.approx(same)
    assert out["kl"][-1] == 0
    assert out["kl"][0] > 1e-3
    assert out["agreement"][-1] == 1
    assert out["reason"].tolist() == [0] * 4


def test_values_are_scored_by_their_spread():
    model, td = Residual(out=2), inputs()
    out = measured(LogitLens(STREAM, "norm", output_is="values"), model, td)
    final = model(td["input"]).detach().double()
    for i, value in enumerate(model.stream(td["input"])):
        early = model.head(model.norm(value)).detach().double()
        error = ((final - early) ** 2).sum()
        assert out["mse"][i] == pytest.approx(float(error / 40), abs=1e-9)
        assert out["r2"][i] == pytest.approx(float(1 - error / ((final - final.mean(0)) ** 2).sum()), abs=1e-6)
    assert out["r2"][-1] == 1
    assert "kl" not in out


def test_a_block_that_does_nothing_reads_as_the_one_before():
    model, td = Residual(), inputs()
    with torch.no_grad():
        for parameter in model.blocks[1].parameters():
            parameter.zero_()
    out = measured(LogitLens("blocks.*", "norm"), model, td)
    assert torch.equal(out["lens"][1], out["lens"][0])
    assert not torch.equal(out["lens"][2], out["lens"][1])


def test_a_head_without_the_normalisation_is_another_lens():
    model, td = Residual(), inputs()
    out = measured(LogitLens(STREAM, "head"), model, td)["lens"]
    torch.testing.assert_close(out, torch.stack([model.head(v) for v in model.stream(td["input"])]).detach())


def test_a_planted_answer_is_seen_from_its_layer_on():
    answer = torch.eye(4)[torch.arange(12) % 4] * 5
    out = chosen(nn.Identity(), torch.zeros(12, 4), answer.roll(1, 0), answer, answer)
    assert out["agreement"].tolist() == [0.25, 0.0, 1.0, 1.0]  # of equal logits the first
    p = (5 * torch.eye(4, dtype=torch.float64)[0]).softmax(0)
    assert float(out["kl"][0]) == pytest.approx(float((p * (p * 4).log()).sum()))
    assert float(out["kl"][1]) == pytest.approx(float(5 * (p[0] - p[1])))
    assert out["kl"][2:].tolist() == [0, 0]


def test_actions_that_are_ruled_out_stay_so():
    logits = torch.randn(10, 3)
    logits[:, 1] = -torch.inf
    out = chosen(nn.Identity(), logits[:, [1, 0, 2]].nan_to_num(neginf=0), logits)
    assert out["reason"].tolist() == [0, 2]  # the head takes in what is not finite
    masking = chosen(Mask(), torch.randn(10, 3), torch.randn(10, 3))
    assert masking["reason"].tolist() == [0, 0]
    assert masking["kl"].isfinite().all()
    assert masking["kl"][1] == 0


class Mask(nn.Module):
    def forward(self, x):
        return x.masked_fill(torch.tensor([False, True, False]), -torch.inf)


def test_rows_are_spread_evenly():
    model, td = Residual(), inputs()
    whole, some = (measured(LogitLens(STREAM, "norm", rows=rows), model, td)["lens"] for rows in (256, 5))
    torch.testing.assert_close(some, whole[:, ::4])


# ------------------------------------------------------------------------------------------------- a transformer


class Language(nn.Module):
    """A small encoder, read at every position."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.norm, self.unembed = nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(self, ids):
        return self.unembed(self.norm(self.encoder(self.embed(ids))))


def test_an_encoder_is_read_at_every_position():
    model = Language().eval()
    td = TensorDict(input=torch.randint(0, 11, (6, 5)), batch_size=[6])
    out = measured(LogitLens(("embed", "encoder.layers.*"), "norm"), model, td)
    assert out["lens"].shape == (4, 6, 5, 11)
    x = model.embed(td["input"])
    for i in range(4):
        torch.testing.assert_close(out["lens"][i], model.unembed(model.norm(x)).detach(), rtol=1e-4, atol=1e-5)
        x = model.encoder.layers[i](x) if i < 3 else x
    assert out["kl"][-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("output", [None, ("output", "logits")])
def test_a_language_model_of_hugging_face(output, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "n_embd": 8, "n_head": 2, "n_layer": 3, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    td, x = TensorDict(input=torch.randint(0, 11, (6, 5)), batch_size=[6]), {}
    handles = [model.transformer.h[i].register_forward_hook(lambda _m, _a, y, i=i: x.update({i: y})) for i in range(3)]
    final = model(td["input"]).logits
    for handle in handles:
        handle.remove()
    method = LogitLens("transformer.h.*", "transformer.ln_f", output=output)
    with Observer({"lens": method}, when=At(0), on=ProbeSet(td, groups="rows"), into=tmp_path) as observer:
        observer.step(model, step=0)
    lens = ArtifactBuffer.open(tmp_path)["lens"].last()[0]["lens"]
    expected = torch.stack([model.lm_head(model.transformer.ln_f(x[i])) for i in range(3)])
    torch.testing.assert_close(lens, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lens[-1], final.detach())


# ------------------------------------------------------------------------------------------------- bad data


def test_a_layer_of_another_width_has_a_reason():
    model, td = Residual(), inputs()
    out = measured(LogitLens(("blocks.0.inner.0", "blocks.0"), "norm"), model, td)
    assert out["reason"].tolist() == [1, 0]
    assert out["lens"][0].isnan().all()
    assert out["kl"][0].isnan()
    assert out["lens"][1].isfinite().all()


@pytest.mark.parametrize("kind", [LogitLens, TunedLens])
def test_streams_with_time_in_front_have_a_reason(kind):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block, self.head = nn.Linear(3, 6), Block(6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.block(self.embed(x.transpose(0, 1)))).transpose(0, 1)

    td = TensorDict(input=torch.randn(8, 5, 3), batch_size=[8])
    out = measured(kind(("embed", "block"), "head"), Turned(), td)
    assert out["reason"].tolist() == [1, 1]


def test_an_output_of_whole_numbers_is_refused():
    class Acts(Residual):
        def forward(self, x):
            logits = super().forward(x)
            return logits, logits.argmax(-1)

    with pytest.raises(TargetError, match=r"'action' is torch\.int64"):
        measured(LogitLens(STREAM, "norm", output="action"), Acts(), inputs(), out_keys=["logits", "action"])


def test_layers_of_the_head_and_after_it_are_not_read():
    class Late(Residual):
        def __init__(self):
            super().__init__()
            self.norm, self.after = nn.Sequential(nn.LayerNorm(6), nn.Tanh()), nn.Linear(6, 6)

        def forward(self, x):
            return self.head(self.after(self.norm(self.stream(x)[-1])))

    layers = ("blocks.2", "norm.0", "norm.1", "norm", "after")
    out = measured(LogitLens(layers, "norm"), Late(), inputs())
    assert out["reason"].tolist() == [0, 5, 5, 5, 5]
    assert out["lens"][1:].isnan().all()


def test_layers_and_outputs_that_are_not_finite_have_a_reason():
    good, bad = torch.randn(8, 3), torch.randn(8, 3)
    bad[2, 1] = torch.nan
    out = chosen(nn.Linear(3, 2), bad, good)
    assert out["reason"].tolist() == [2, 0]
    assert out["kl"][0].isnan()
    lost = chosen(nn.Linear(3, 2), good, bad)
    assert lost["reason"].tolist() == [3, 3]
    assert lost["kl"].isnan().all()
    assert lost["agreement"].isnan().all()


def test_a_constant_output_has_no_r2():
    out = chosen(nn.Linear(3, 1), torch.randn(8, 3), torch.ones(8, 3), output_is="values")
    assert out["reason"].tolist() == [4, 4]
    assert out["r2"].isnan().all()
    assert out["mse"][1] == 0
    assert out["mse"][0] > 0


def test_a_single_number_is_no_logits():
    with pytest.raises(TargetError, match=r"reads 'output' as logits, and it has \[20, 1\].*output_is='values'"):
        measured(LogitLens(STREAM, "norm"), Residual(out=1), inputs())


def test_heads_and_outputs_that_are_not_there_are_refused():
    with pytest.raises(PathError, match="head='nrm' matches no module of Residual; did you mean 'norm'"):
        measured(LogitLens(STREAM, "nrm"), Residual(), inputs())
    with pytest.raises(NetworkError, match=r"reads by one head; head='blocks.\*' names \['blocks.0'"):
        measured(LogitLens(STREAM, "blocks.*"), Residual(), inputs())
    with pytest.raises(TargetError, match="'logits' is given out by no network"):
        measured(LogitLens(STREAM, "norm", output="logits"), Residual(), inputs())


# ------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_every_mode(mode):
    model, td = Residual(), inputs()
    with mode():
        out = measured(LogitLens(STREAM, "norm"), model, td)
    assert not out["lens"].is_inference()
    assert not out["lens"].requires_grad
    assert torch.equal(out["lens"][-1], model(td["input"]).detach())


def test_policy_and_value_live(tmp_path):
    actor = rl.ProbabilisticActor(
        TensorDictModule(Residual(out=4), ["observation"], ["logits"]),
        ["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    loss = ClipPPOLoss(actor, rl.ValueOperator(Residual(out=1, blocks=2), in_keys=["observation"]))
    rows = TensorDict(observation=torch.randn(24, 3), batch_size=[24])
    policy = LogitLens("**.blocks.*", "**.norm", output="logits")
    value = replace(policy, output="state_value", output_is="values")
    probes = {"policy": policy, "value": value}
    with Observer(probes, when=At(0), on=ProbeSet(rows, groups="rows"), into=tmp_path) as observer:
        observer.step(loss, step=0)
    buffer = ArtifactBuffer.open(tmp_path)
    for name, net, key in (("policy", loss.actor_network, "logits"), ("value", loss.critic_network, "state_value")):
        row, coords = buffer[name].last()[0], buffer[name].coords
        assert all(layer.startswith("actor" if name == "policy" else "critic") for layer in coords["layer"])
        torch.testing.assert_close(row["lens"][-1], net(rows.clone())[key].detach())
        assert row["reason"].tolist() == [0] * len(coords["layer"])
