"""Similarity of layers: against the papers' own formulas, written slowly, and through a training."""

import copy

import pytest
import torch
from method_cases import batch, measured, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl import modules as rl
from torchrl.objectives import ClipPPOLoss

from tdhook_train import ArtifactBuffer, At, Every, HookedModel, Observer, ProbeSet
from tdhook_train.errors import SettingsError
from tdhook_train.latent import Cka


def unbiased_hsic(k, m):
    """Song et al. 2012, eq. 5, sum by sum over the kernels."""
    n = len(k)
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    one = torch.ones(n, dtype=k.dtype)
    trace = sum(k[i] @ m[:, i] for i in range(n))
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (trace + sums - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def biased_hsic(k, m):
    """Gretton et al. 2005: tr(KHLH) / (n - 1)²."""
    n = len(k)
    h = torch.eye(n, dtype=k.dtype) - 1 / n
    return torch.trace(k @ h @ m @ h) / (n - 1) ** 2


def cka(x, y, hsic=unbiased_hsic):
    """Kornblith et al. 2019, eq. 4, with linear kernels."""
    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


class Gives(nn.Module):
    """Layers whose activations the test chooses."""

    def __init__(self, *values):
        super().__init__()
        self.values = values
        self.layers = nn.ModuleList(nn.Identity() for _ in values)

    def forward(self, x):
        for value, layer in zip(self.values, self.layers, strict=True):
            layer(value)
        return x


def between(x, y, **settings):
    """The method on a layer that gives out ``x`` now, and gave ``y`` at initialisation."""
    td = TensorDict({"input": torch.zeros(len(x), 1)}, [len(x)])
    return measured(Cka(layers="layers.0", **settings), Gives(x), td, initial=HookedModel(Gives(y)))


def random(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("n", "d"), [(60, 5), (60, 1), (30, 30), (20, 50), (4, 3), (4, 9)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_it_is_the_index_of_the_unbiased_hsic(n, d, offset):
    x, noise = random(n, d), random(n, d, 1)
    y = 0.7 * x + 0.5 * noise @ torch.diag(torch.linspace(0.1, 2, d, dtype=torch.float64)) + offset
    out = between(x + offset, y)
    assert out["cka_initial"].tolist() == [pytest.approx(cka(x, y), rel=1e-7, abs=1e-9)]
    assert out["reason_initial"].tolist() == [0]
    assert out["few_rows"].tolist() == [int(n < 8 * d)]


def test_rotation_shift_and_scale_do_not_matter_but_other_linear_maps_do():
    x, y = random(50, 8), random(50, 8) * torch.linspace(0.1, 3, 8, dtype=torch.float64) + random(50, 8, 1)
    rotation, _ = torch.linalg.qr(random(8, 8, 2))
    plain = float(between(x, y)["cka_initial"])
    assert 0.1 < plain < 0.95
    assert float(between(x, y @ rotation * 1e-30 + 3e-29)["cka_initial"]) == pytest.approx(plain, abs=1e-9)
    assert float(between(x @ rotation * 1e30, y)["cka_initial"]) == pytest.approx(plain, abs=1e-9)
    assert float(between(x, x @ rotation)["cka_initial"]) == pytest.approx(1, abs=1e-9)
    stretched = x * torch.tensor([1e3] + [1.0] * 7, dtype=torch.float64)
    assert float(between(x, stretched)["cka_initial"]) == pytest.approx(cka(x, stretched), abs=1e-9)
    assert float(between(x, stretched)["cka_initial"]) < 0.6


def test_layers_with_nothing_in_common_give_about_0_where_the_biased_estimate_does_not():
    found, biased = [], []
    for seed in range(30):
        x, y = random(64, 256, 2 * seed), random(64, 256, 2 * seed + 1)
        found.append(float(between(x, y)["cka_initial"]))
        biased.append(cka(x, y, biased_hsic))
    values = torch.tensor(found)
    assert float(values.mean()) == pytest.approx(0, abs=3.5 * float(values.std()) / 30**0.5)
    assert float(values.std()) < 0.05
    assert float(torch.tensor(biased).mean()) == pytest.approx(256 / (256 + 64), abs=0.01)
    assert min(found) < 0 < max(found)


def now_and_then(seed=0):
    """A network, and another one of the same shape."""
    torch.manual_seed(seed)
    return mlp(3, 9, 4, 9, 2), mlp(3, 9, 4, 9, 2)


def activations(model, x):
    found = []
    for layer in model:
        x = layer(x).detach()
        found.append(x)
    return found


def test_layers_of_many_widths_each_with_itself_in_its_order():
    now, then = now_and_then()
    td = batch(70)
    expected = [cka(x, y) for x, y in zip(*(activations(m, td["input"]) for m in (now, then)), strict=True)]
    out = measured(Cka(reference=then.state_dict()), now, td, initial=HookedModel(then))
    for key in ("cka_initial", "cka_reference"):
        torch.testing.assert_close(out[key], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert out["few_rows"].tolist() == [1, 1, 0, 0, 1, 1, 0]
    alone = measured(Cka(layers="4"), now, td, initial=HookedModel(then))
    assert alone["cka_initial"].tolist() == pytest.approx(expected[4:5], rel=1e-5)


def test_every_pair_of_layers():
    now, _ = now_and_then()
    td = batch(70)
    given = activations(now, td["input"])
    out = measured(Cka(to="layers"), now, td)
    expected = torch.tensor([[cka(x, y) for y in given] for x in given], dtype=torch.float64)
    torch.testing.assert_close(out["cka_layers"], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(out["cka_layers"], out["cka_layers"].T)
    assert (out["reason_layers"] == 0).all()


def test_at_most_so_many_rows_spread_evenly():
    x, y = random(100, 4), random(100, 4) + random(100, 4, 1)
    chosen = [i * 100 // 33 for i in range(33)]
    out = between(x, y, rows=33)
    assert float(out["cka_initial"]) == pytest.approx(cka(x[chosen], y[chosen]), abs=1e-9)
    assert float(out["cka_initial"]) != pytest.approx(cka(x, y), abs=1e-4)


def test_channels_of_an_image_are_units_and_its_positions_rows():
    image = torch.randn(3, 5, 4, 4)
    other = image + torch.randn(3, 5, 4, 4)
    x, y = ([value[i, :, h, w] for i in range(3) for h in range(4) for w in range(4)] for value in (image, other))
    flat = [torch.stack(rows) for rows in (x, y)]
    assert float(between(image, other)["cka_initial"]) == pytest.approx(cka(*flat), rel=1e-6)
    model = Gives(image, torch.randn(3, 5), torch.randn(48, 5))
    out = measured(Cka(layers=nn.Identity, to="layers"), model, TensorDict({"input": torch.zeros(3, 1)}, [3]))
    assert out["reason_layers"].tolist() == [[0, 7, 0], [7, 1, 7], [0, 7, 0]]
    assert float(out["cka_layers"][0, 2]) == pytest.approx(cka(flat[0], model.values[2]), rel=1e-6)
    assert out["cka_layers"].isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    model.values = (image, random(30, 5, dtype=torch.float32), model.values[2])
    out = measured(Cka(layers=nn.Identity, to="layers", rows=20), model, TensorDict({"input": torch.zeros(3, 1)}, [3]))
    assert out["cka_layers"].isnan().tolist() == [[False, True, False], [True, False, True], [False, True, False]]


def spoilt(which):
    value = random(20, 3, dtype=torch.float32)
    if which == "nan":
        value[4, 1] = torch.nan
    elif which == "infinite":
        value[4], value[5] = torch.inf, -torch.inf
    elif which == "one row":
        value[1:] = value[1].clone()
    else:
        value = torch.full_like(value, 0.1 if which == "constant" else 0.0)
    return value


@pytest.mark.parametrize(("which", "code"), [("nan", 3), ("infinite", 3), ("constant", 2), ("zero", 2), ("one row", 2)])
def test_layers_that_cannot_be_compared_say_why_and_leave_the_others_alone(which, code):
    good, bad, model = random(20, 3, 1), spoilt(which), Gives
    td = TensorDict({"input": torch.zeros(20, 1)}, [20])
    method = Cka(layers=nn.Identity, to=("initial", "layers"))
    other = random(20, 3, 2, torch.float32)
    out = measured(method, model(good, bad, other), td, initial=HookedModel(model(other, other, bad)))
    assert out["cka_initial"].tolist() == pytest.approx([cka(good, other), torch.nan, torch.nan], nan_ok=True)
    assert out["reason_initial"].tolist() == [0, code, code + 2]
    assert out["reason_layers"].tolist() == [[0, code + 2, 0], [code] * 3, [0, code + 2, 0]]
    assert float(out["cka_layers"][0, 2]) == pytest.approx(cka(good, other))
    assert out["cka_layers"][1].isnan().all()


def test_what_is_not_known_or_too_little_says_so():
    td = batch()
    out = measured(Cka(to=("initial", "previous")), mlp(3, 5, 2), td)
    assert out["reason_initial"].tolist() == out["reason_previous"].tolist() == [6, 6, 6]
    assert out["cka_initial"].isnan().all()
    few = measured(Cka(to="layers"), mlp(3, 5, 2), batch(3))
    assert (few["reason_layers"] == 1).all()
    assert few["cka_layers"].isnan().all()


def test_the_tick_before_by_hand():
    now, then = now_and_then()
    td, other = batch(70), batch(70, seed=1)
    method = Cka(to="previous")
    before = measured(method, then, td)
    expected = [cka(x, y) for x, y in zip(*(activations(m, td["input"]) for m in (now, then)), strict=True)]
    out = measured(method, now, td, previous=before)
    assert out["cka_previous"].tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(before["activation", "2"], activations(then, td["input"])[2])
    assert (measured(method, now, other, previous=before)["reason_previous"] == 6).all()
    assert (measured(Cka(to="previous", rows=50), now, td, previous=before)["reason_previous"] == 6).all()
    assert (measured(Cka(to="previous"), now, td, previous=TensorDict({}))["reason_previous"] == 6).all()


# ------------------------------------------------------------------ a reference


def test_a_reference_may_lie_in_a_file_or_be_one_of_several_networks(tmp_path):
    now, then = now_and_then()
    td = batch(70)
    expected = [cka(x, y) for x, y in zip(*(activations(m, td["input"]) for m in (now, then)), strict=True)]
    torch.save(then.state_dict(), tmp_path / "then.pt")
    nested = TensorDict.from_module(then).data.to_dict()  # as an observer stores initial weights
    torch.save(nested, tmp_path / "nested.pt")
    for reference in (tmp_path / "then.pt", str(tmp_path / "nested.pt"), nested, TensorDict(nested)):
        out = measured(Cka(to=(), reference=reference), now, td)
        assert out["cka_reference"].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_reference_is_what_it_was_when_given_and_equal_where_its_content_is():
    now, then = now_and_then()
    method, again = (Cka(reference=then.state_dict()) for _ in range(2))
    assert method == again
    assert hash(method) == hash(again)
    assert method != Cka(reference=now.state_dict())
    before = measured(method, then, batch(30))["cka_reference"]
    with torch.no_grad():
        then[0].weight[0].mul_(-3)
    assert before.tolist() == pytest.approx([1.0] * 7)
    assert measured(method, then, batch(30))["cka_reference"][0] < 0.999
    assert method.settings()["reference"].startswith("8 tensors, ")
    assert copy.deepcopy(method) == method


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("0.weight"), "needs '0.weight' of Sequential, which it has not; did you mean"),
        (lambda state: state.update({"9.weight": torch.zeros(1)}), "holds '9.weight', which is none of Sequential"),
        (lambda state: state.update({"0.bias": torch.zeros(4)}), r"'0.bias' of shape \(4,\), needs \(9,\)"),
    ],
)
def test_a_reference_of_another_architecture_is_refused_before_anything_runs(change, said):
    now, then = now_and_then()
    state = dict(then.state_dict())
    change(state)
    with pytest.raises(SettingsError, match=said):
        Cka(reference=state).check({"": HookedModel(now)})
    with pytest.raises(SettingsError, match=r"reference='no.pt' needs to be a file"):
        Cka(reference="no.pt").check({"": HookedModel(now)})


# ------------------------------------------------------------------ through a training


def train(observer, model, first, last):
    """Plain steps on one probe set, told before each; returns the activations behind every step."""
    data = batch(40)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    seen = []
    for step in range(first, last):
        seen.append(activations(model, data["input"]))
        observer.step(model, data, step=step)
        optimizer.zero_grad()
        model(data["input"]).square().mean().backward()
        optimizer.step()
    return seen


METHOD = Cka(to=("initial", "previous"))
EACH = At(0) | Every(optim_steps=1)


KEYS = ("cka_initial", "cka_previous")


def same(rows, whole):
    for key, value in whole.items():
        torch.testing.assert_close(rows.series(key), value, rtol=0, atol=0, equal_nan=True)


def test_through_a_training_and_as_well_where_it_is_resumed(tmp_path):
    on, model = ProbeSet(batch(40), groups="rows"), mlp(3, 5, 2)
    resumed = copy.deepcopy(model)
    with Observer({"cka": METHOD}, when=EACH, into=tmp_path / "whole", on=on) as observer:
        seen = train(observer, model, 0, 5)
        whole = {key: observer.buffer["cka"].series(key) for key in KEYS}
    torch.testing.assert_close(whole["cka_initial"][0], torch.ones(3, dtype=torch.float64))
    assert whole["cka_previous"][0].isnan().all()
    for step in range(1, 5):
        for to, other in (("initial", seen[0]), ("previous", seen[step - 1])):
            expected = [cka(x, y) for x, y in zip(seen[step], other, strict=True)]
            assert whole[f"cka_{to}"][step].tolist() == pytest.approx(expected, rel=1e-5)
    assert whole["cka_initial"][4, 0] < 0.9999
    into = tmp_path / "resumed"
    with Observer({"cka": METHOD}, when=EACH, into=into, on=on) as observer:
        train(observer, resumed, 0, 3)
        state, weights = observer.state_dict(), copy.deepcopy(resumed.state_dict())
        train(observer, resumed, 3, 4)  # goes on past the checkpoint, then dies
    resumed.load_state_dict(weights)
    with Observer({"cka": METHOD}, when=EACH, into=into, on=on, resume=True) as observer:
        observer.attach(resumed)
        observer.load_state_dict(state)
        train(observer, resumed, 3, 5)
    same(ArtifactBuffer.open(into)["cka"], whole)


def test_in_the_background_as_well_where_it_goes_back_to_a_checkpoint(tmp_path):
    on, model = ProbeSet(batch(40), groups="rows"), mlp(3, 5, 2)
    with Observer({"cka": METHOD}, when=EACH, into=tmp_path, on=on, background=True) as observer:
        train(observer, model, 0, 3)
        state, weights = observer.state_dict(), copy.deepcopy(model.state_dict())
        train(observer, model, 3, 5)
        observer.state_dict()  # waits for the rows
        whole = {key: observer.buffer["cka"].series(key) for key in KEYS}
        assert len(whole["cka_initial"]) == 5
        model.load_state_dict(weights)
        observer.load_state_dict(state)
        train(observer, model, 3, 5)
    same(ArtifactBuffer.open(tmp_path)["cka"], whole)


def ppo():
    actor = TensorDictModule(nn.Sequential(mlp(3, 6, 2), rl.NormalParamExtractor()), ["observation"], ["loc", "scale"])
    actor = rl.ProbabilisticActor(actor, ["loc", "scale"], distribution_class=rl.TanhNormal)
    return ClipPPOLoss(actor, rl.ValueOperator(mlp(3, 5, 1), in_keys=["observation"]))


def test_networks_of_a_loss_are_compared_each_with_its_own_also_in_another_run(tmp_path):
    one, two, x = ppo(), ppo(), batch(50)["input"]
    on = ProbeSet(TensorDict({"observation": x}, [50]), groups="rows")
    with Observer({"cka": Cka()}, when=At(0), into=tmp_path / "one", on=on) as observer:
        observer.step(one, step=0)
        of_one = observer.buffer["cka"].coords["layer"]
    method = Cka(to=("previous", "layers"), reference=tmp_path / "one" / "initial" / "weights.pt")
    with Observer({"cka": method}, when=EACH, into=tmp_path / "two", on=on) as observer:
        observer.step(two, step=0)
        critics = [one.critic_network.module, two.critic_network.module]
        first = activations(critics[1], x)
        with torch.no_grad():
            critics[1][0].weight += torch.randn(5, 3)
        observer.step(two, step=1)
        row, coords = observer.buffer["cka"].last()[0], observer.buffer["cka"].coords
    own = [i for i, layer in enumerate(coords["layer"]) if layer.startswith("critic_network.module.")]
    assert len(own) == 3
    assert coords["layer"] == of_one
    then, now = activations(critics[0], x), activations(critics[1], x)
    for key, others in (("cka_reference", then), ("cka_previous", first)):
        expected = [cka(a, b) for a, b in zip(now, others, strict=True)]
        assert row[key][own].tolist() == pytest.approx(expected, rel=1e-5)
    columns = [coords["other"].index(coords["layer"][i].removeprefix("critic_network.")) for i in own]
    expected = torch.tensor([[cka(a, b) for b in now] for a in now], dtype=torch.float64)
    torch.testing.assert_close(row["cka_layers"][own][:, columns], expected, rtol=1e-5, atol=1e-7)
    assert row["cka_layers"][own].isnan().sum() == 3 * (len(coords["other"]) - 3)


def test_on_batches_of_training_there_is_no_tick_before_on_the_same_rows(tmp_path):
    model = mlp(3, 5, 2)
    with Observer({"cka": METHOD}, when=EACH, into=tmp_path) as observer:
        for step in range(3):
            observer.step(model, batch(20, seed=step // 2), step=step)
        rows = observer.buffer["cka"]
        assert rows.series("reason_previous").tolist() == [[6] * 3, [0] * 3, [6] * 3]  # the second came again
        assert rows.series("cka_previous")[1].tolist() == pytest.approx([1.0] * 3)
        assert rows.legend["reason_previous"][6].startswith("there is nothing to compare with")
