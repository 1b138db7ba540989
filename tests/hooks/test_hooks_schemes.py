"""Every kind of intervention on every kind of model comes to what the forward pass written by hand comes to."""

import pytest
import torch
from hand_forwards import SMALL, At
from hand_transformers import LANGUAGE
from hooks_models import state
from tensordict import TensorDict
from torch.testing import assert_close

from tdhook_train import HookedModel
from tdhook_train.errors import ResolveError

MODELS = SMALL | LANGUAGE


# ------------------------------------------------------------------ the ends of a place: in a run, and by hand


def method(run, verb, place, what=""):
    into, (path, _, call) = place.startswith(">"), place.lstrip(">").partition("@")
    bound = getattr(run, verb + ("_input" if into else "") + what)
    return lambda *value: bound(path, *value, call=call if call == "all" else int(call or 0))


def calls(place):
    path, _, call = place.partition("@")
    return [path, f"{path}@1", f"{path}@2"] if call == "all" else [place]


def reads(run, places, what=""):
    return {place: method(run, "get", place, what)() for place in places}


def objective(values):
    return values.square().sum()


class Cell:
    """A model, its pass by hand with something changed, and runs in which the same should happen."""

    def __init__(self, name):
        self.case = MODELS[name]
        torch.manual_seed(6)  # one with which no ReLU is shut for all samples, so that every change has a consequence
        # in double precision: in single, rounding alone moves the gradients of the language models by 1e-4
        self.model, self.x = stirred(self.case.make().double()), self.case.x()
        self.hooked = HookedModel(self.model, in_keys=self.case.in_keys, out_keys=self.case.out_keys)
        (key,) = self.case.in_keys
        self.batch, self.found = TensorDict({key: self.x.clone()}, batch_size=[3]), state(self.model)
        self.at = self.clean = At()
        self.output = self.clean_output = self.case.hand(self.model, self.x, self.clean)

    def changed(self, changes):
        self.at = At(changes)
        self.output = self.case.hand(self.model, self.x, self.at)
        return self

    @property
    def floating(self):
        return [place for place, value in self.at.items() if value.is_floating_point()]

    def output_of(self, values):
        return sum(values[key] for key in self.case.outputs)

    def gradients(self, at, output=None, places=None):
        """What is differentiated by hand, with respect to the values of ``at``."""
        target = objective(self.output if output is None else output) + sum(self.at.added)
        places = [place for place in places or at if at[place].is_floating_point()]
        values = [at[place] for place in places]
        found = torch.autograd.grad(target, values, retain_graph=True, materialize_grads=True)
        return dict(zip(places, found, strict=True))

    def agrees(self, proxies, wanted):
        """Compare all places at once, since comparing them one by one takes most of the time."""
        pairs = {place: (proxy.resolve(), wanted[place].detach()) for place, proxy in proxies.items()}
        assert [one.shape for one, _ in pairs.values()] == [other.shape for _, other in pairs.values()]
        found, hoped = (torch.cat([pair[i].flatten().double() for pair in pairs.values()]) for i in (0, 1))
        wrong = (place for place, pair in pairs.items() if not torch.allclose(*pair))
        assert_close(found, hoped, msg=lambda text: f"{list(wrong)}: {text}")

    def agrees_before_and_after(self, was, gradients_was, now, gradients_now):
        self.agrees(was, self.at.before)
        self.agrees(now, self.at)
        self.agrees(gradients_was, self.gradients(self.at.before))
        self.agrees(gradients_now, self.gradients(self.at))

    def runs(self, describe):
        """Run what is described, and once more with every place read before and after it, and differentiated."""
        with self.hooked.run(self.batch) as bare:
            describe(bare)
        with self.hooked.run(self.batch) as run:
            read = [reads(run, self.at), reads(run, self.floating, "_grad")]
            describe(run)
            read += [reads(run, self.at), reads(run, self.floating, "_grad")]
            run.backward(lambda out: objective(self.output_of(out)))
        for one in (bare, run):
            assert_close(self.output_of(one.output), self.output.detach())
        self.leaves_nothing()
        return read

    def leaves_nothing(self):
        assert state(self.model) == self.found
        assert torch.equal(self.batch[next(iter(self.case.in_keys))], self.x)


def stirred(model):
    """Weights of some size everywhere: as they are made, biases are 0, scales are 1 and blocks are close to nothing."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def differs(one, other):
    return (one - other).abs().max() > 1e-3 * other.abs().max()  # ten thousand times what assert_close lets pass


# ------------------------------------------------------------------ what is done to a value


def constant(value, axis, units, matters):
    new = torch.randn_like(value) if value.is_floating_point() else (value + 7) % 50
    return new, lambda v: new


def scaled_in_place(value, axis, units, matters):
    if not value.is_floating_point():  # tokens
        return lambda v: v.mul_(3).remainder_(50), lambda v: v * 3 % 50
    return lambda v: v.mul_(-1.5), lambda v: v * -1.5


def one_unit_of_one_sample_ablated(value, axis, units, matters):
    unit = matters.movedim((axis, units), (0, 1))[1]
    unit = unit.reshape(len(unit), -1).sum(1).argmax()
    mask = torch.ones_like(value)
    mask.movedim((axis, units), (0, 1))[1, unit] = 0

    def in_place(v):
        v.movedim((axis, units), (0, 1))[1, unit] = 0
        return v

    return in_place, lambda v: v * mask


def two_samples_swapped(value, axis, units, matters):
    def by_hand(v):
        return torch.stack([v.select(axis, i) for i in (1, 0, 2)], axis)

    return lambda v: v.index_select(axis, torch.tensor([1, 0, 2])), by_hand


SCHEMES = {
    f.__name__.replace("_", " "): f
    for f in (constant, scaled_in_place, one_unit_of_one_sample_ablated, two_samples_swapped)
}
OF_SAMPLES = ("one unit of one sample ablated", "two samples swapped")
NO_SAMPLES = ("transformer.wpe", "model.rotary_emb:0")  # one row for the whole batch: no sample to ablate or to swap
TABLE = [
    pytest.param(name, place, scheme, id=f"{name}, {place or 'output'}, {scheme}")
    for name, case in MODELS.items()
    for place in case.edits.split()
    for scheme in SCHEMES
    if not (scheme in OF_SAMPLES and place in NO_SAMPLES)
]


def both_ends(cell, place, scheme):
    """What a scheme does at a place, for a run and by hand."""
    first = calls(place)[0]
    value, gradient = cell.clean[first].detach(), cell.gradients(cell.clean).get(first, 1)
    axis = int(place in ("lstm:1:0", "lstm:1:1"))  # states of an LSTM have the layers in front of the samples
    return SCHEMES[scheme](value, axis, 1 if value.ndim == 4 else -1, (value * gradient).abs())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_captured_is_what_the_forward_pass_by_hand_has(name):
    cell = Cell(name)
    cell.agrees_before_and_after(*cell.runs(lambda run: None))


@pytest.mark.parametrize(("name", "place", "scheme"), TABLE)
def test_a_changed_value_changes_outputs_values_and_gradients_as_by_hand(name, place, scheme):
    cell = Cell(name)
    value, by_hand = both_ends(cell, place, scheme)
    cell.changed({one: lambda v, at: by_hand(v) for one in calls(place)})
    assert differs(cell.output, cell.clean_output)
    read = cell.runs(lambda run: method(run, "set", place)(value))
    cell.agrees_before_and_after(*read)


@pytest.mark.parametrize(("name", "pair"), [(name, pair) for name in MODELS for pair in MODELS[name].pairs.split(", ")])
def test_a_value_of_the_same_pass_in_another_place(name, pair):
    one, other = pair.split(" to ")
    cell = Cell(name).changed({other: lambda v, at: at[one]})
    assert differs(cell.output, cell.clean_output)
    read = cell.runs(lambda run: method(run, "set", other)(method(run, "get", one)()))
    cell.agrees_before_and_after(*read)


DIFFERENTIABLE = [row for row in TABLE if row.values[0] not in LANGUAGE or row.values[1] != ">"]  # tokens are not


@pytest.mark.parametrize(("name", "place", "scheme"), DIFFERENTIABLE)
def test_a_bent_gradient_bends_all_gradients_before_it_as_by_hand(name, place, scheme):
    cell = Cell(name)
    value, by_hand = both_ends(cell, place, scheme)

    def bent(v, at):
        """Goes on as ``v`` with, on the way back, the gradient that the scheme makes of the one that comes."""
        if isinstance(value, torch.Tensor):
            at.added.append((v * value).sum())
            return v.detach()
        return by_hand(v) - (by_hand(v) - v).detach()  # each scheme is linear and its own transpose

    cell.changed(dict.fromkeys(calls(place), bent))
    first = calls(place)[0]
    wanted, clean = cell.gradients(cell.at.before), cell.gradients(cell.clean, cell.clean_output)
    assert differs(wanted[first], clean[first])

    def bend(run):
        method(run, "set", place, "_grad")(value)
        method(run, "get", first, "_grad")()  # a gradient that nobody reads never comes
        run.backward(lambda out: objective(cell.output_of(out)))

    _, gradients_was, now, gradients_now = cell.runs(bend)
    cell.agrees(now, cell.clean)
    cell.agrees(gradients_was, cell.gradients(cell.at))  # as it comes: what bends it is written later
    cell.agrees(gradients_now, wanted)


STOPS = [(name, place) for name, case in MODELS.items() for place in case.stops.split()]


@pytest.mark.parametrize(("name", "place"), STOPS)
def test_a_pass_that_stops_has_what_came_before_as_by_hand_and_nothing_after(name, place):
    cell, ran = Cell(name), []
    for path, module in cell.model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: ran.append((path, "begins")))
        module.register_forward_hook(lambda *_, path=path: ran.append((path, "ends")))
    cell.hooked(cell.batch)
    whole, cell.found = ran.copy(), state(cell.model)
    path, call = module_and_call(cell.model, place)
    last = [i for i, one in enumerate(whole) if one == (path, "ends")][call]
    ran.clear()
    with cell.hooked.run(cell.batch) as run:
        method(run, "stop", place)()  # what is read where the pass stops is read before, wherever it is written
        values, gradients = reads(run, cell.clean), reads(run, cell.floating, "_grad")
        run.backward(run.get(place.partition("@")[0], call=call, reduce=objective))
    assert ran == whole[: last + 1]
    reached = list(cell.clean)[: list(cell.clean).index(place) + 1]
    cell.agrees({one: values.pop(one) for one in reached}, cell.clean)
    wanted = cell.gradients(cell.clean, cell.clean[place], reached)
    cell.agrees({one: gradients.pop(one) for one in wanted}, wanted)
    for proxy in (*values.values(), *gradients.values()):
        with pytest.raises(ResolveError, match=r"never ran in this pass|its module ran|was never asked for"):
            proxy.resolve()
    with pytest.raises(ResolveError, match="stopped before the outputs"):
        _ = run.output
    cell.leaves_nothing()


def module_and_call(model, place):
    """The first name of the module of a place, and which of its calls is meant."""
    path, _, call = place.partition("@")
    module = model.get_submodule(path.partition(":")[0])
    return next(name for name, one in model.named_modules() if one is module), int(call or 0)


def test_all_calls_are_read_at_once_as_by_hand():
    cell = Cell("called three times")
    with cell.hooked.run(cell.batch) as run:
        places = ("cell@all", ">cell@all")
        values, gradients = reads(run, places), reads(run, places, "_grad")
        run.backward(lambda out: objective(out["output"]))
    wanted = cell.gradients(cell.clean)
    for place in places:
        assert_close(values[place].resolve(), [cell.clean[one].detach() for one in calls(place)])
        assert_close(gradients[place].resolve(), [wanted[one] for one in calls(place)])


def test_a_shared_module_is_one_site_under_either_name():
    cell = Cell("tied").changed({"first": lambda v, at: v * 2})
    with cell.hooked.run(cell.batch) as run:
        before = reads(run, ("first", "again"))
        run.set("first", lambda v: v * 2)
        after = reads(run, ("first", "again"))
    assert_close(cell.output_of(run.output), cell.output.detach())
    for name in ("first", "again"):
        assert_close(before[name].resolve(), cell.at.before["first"].detach())
        assert_close(after[name].resolve(), cell.at["first"].detach())
