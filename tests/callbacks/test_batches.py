"""Batches of every make: what is found in them, and what is refused."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small import Net, data, left, loader, same, trainer_for
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import DataLoader

from tdhook_train import ArtifactBuffer
from tdhook_train.attribution import IntegratedGradients, Saliency
from tdhook_train.callbacks import AttributionCallback, HealthCallback, ObserverCallback, ProbeCallback
from tdhook_train.callbacks.batches import as_tensordict, in_keys
from tdhook_train.errors import KeyMissingError, SettingsError
from tdhook_train.health import EffectiveRank
from tdhook_train.keys import by_name

X, Y = torch.randn(6, 4), torch.randn(6, 1)


@dataclass
class Sample:
    x: Tensor
    y: Tensor
    name: str = "s"


Named = namedtuple("Named", ["x", "y"])

MAKES: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "bare": (X, {"input": X}),
    "pair": ((X, Y), {"input": X, "target": Y}),
    "strings": ((["a"] * 6, X, Y), {"target": X, "2": Y}),
    "mapping": ({"ids": ["a"] * 6, "x": X, "n": torch.tensor(3)}, {"x": X}),
    "nested": ({"in": {"x": X, "deep": {"y": Y}}, "meta": {"id": ["a"]}}, {"in.x": X, "in.deep.y": Y}),
    "dataclass": (Sample(X, Y), {"x": X, "y": Y}),
    "namedtuple": (Named(X, Y), {"x": X, "y": Y}),
    "loaders": ({"a": [X, Y], "b": (Y, X)}, {"a.input": X, "a.target": Y, "b.input": Y, "b.target": X}),
    "of another length": ({"a": [X, Y], "b": [X[:2], Y[:2]]}, {"a.input": X, "a.target": Y}),
    "of dataclasses": ((Sample(X, Y), Y), {"input.x": X, "input.y": Y, "target": Y}),
    "one tensor an item, in a mapping": ({"boxes": [X[:2], X[:3]], "x": X}, {"x": X}),
    "one tensor an item, in a tuple": (([X[:2], X[:3]], Y), {"target": Y}),
    "a loader that is at its end": ({"a": None, "b": [X, Y]}, {"b.input": X, "b.target": Y}),
    "TensorDict": (TensorDict(x=X, batch_size=[6]), {"x": X}),
}


@pytest.mark.parametrize("make", MAKES)
def test_the_parts_of_a_batch_have_names(make):
    batch, expected = MAKES[make]
    td = as_tensordict(batch)
    assert td.batch_size == (6,)
    found = by_name(td)
    assert list(found) == list(expected)
    assert all(td[found[name]] is value for name, value in expected.items())
    assert in_keys(td, None) == [found[next(iter(expected))]]


@pytest.mark.parametrize("batch", [object(), "text", None, {"a": 3}, [[X, X], [Y, Y]], torch.tensor(1.0), {}])
def test_a_batch_without_rows_is_refused(batch):
    with pytest.raises(SettingsError, match="no tensor with one row an item"):
        as_tensordict(batch)


def test_inputs_are_named_with_dots():
    td = as_tensordict({"a": (X, Y), "b": (X, Y)})
    assert in_keys(td, ("b.input", "a.target")) == [("b", "input"), ("a", "target")]
    assert in_keys(td, {"b.input": "x"}) == {("b", "input"): "x"}
    with pytest.raises(KeyMissingError, match=r"did you mean 'b\.input'"):
        in_keys(td, "b.inputs")


class OfTwo(Net):
    """Trained on two loaders at once."""

    def training_step(self, batch: Any, index: int) -> Any:
        return super().training_step(batch["b"], index) + 0 * batch["a"][0].sum()


def test_a_fit_on_several_loaders_is_measured_on_the_one_that_is_named(tmp_path):
    def fit(callbacks: list[Any]) -> Any:
        pl.seed_everything(0, verbose=False)
        model, trainer = OfTwo(), trainer_for(tmp_path, callbacks)
        trainer.fit(model, {"a": loader(), "b": loader(shuffle=False)})
        return left(model, trainer)

    callbacks = [
        ProbeCallback("net.*", "b.target", inputs="b.input", every_n_train_steps=6, dirpath=tmp_path / "probe"),
        AttributionCallback(
            IntegratedGradients(points=3), inputs="b.input", every_n_train_steps=6, dirpath=tmp_path / "ig"
        ),
        HealthCallback(every_n_train_steps=6, dirpath=tmp_path / "health"),
    ]
    bare, watched = fit([]), fit(callbacks)
    assert all(same(value, watched[part]) for part, value in bare.items())
    pl.seed_everything(0, verbose=False)
    first = TensorDict(input=data().tensors[0][:10], batch_size=[10])  # of the loader that does not shuffle
    with IntegratedGradients(points=3).prepare(Net().eval()) as hooked, ArtifactBuffer.open(tmp_path / "ig") as buffer:
        assert torch.equal(buffer["attribution"].at(0)["attr", "b", "input"], hooked(first)["attr", "input"])
    with ArtifactBuffer.open(tmp_path / "probe") as buffer:
        assert buffer["probe"].steps.tolist() == [0, 6, 12]
    with ArtifactBuffer.open(tmp_path / "health") as buffer:
        assert buffer["health"].steps.tolist() == [0, 6, 12]


class Odd:
    """A batch of a kind that nobody knows."""

    def __init__(self, items: list[Any]) -> None:
        self.x, self.y = (torch.stack(part) for part in zip(*items, strict=True))


def test_a_fit_on_batches_of_a_kind_nobody_knows_is_measured_on_a_given_one(tmp_path):
    class OnOdd(Net):
        def training_step(self, batch: Any, index: int) -> Any:
            return super().training_step((batch.x, batch.y), index)

    def fit(**on: Any) -> None:
        methods = {"rank": EffectiveRank("net.*"), "saliency": Saliency()}
        callback = ObserverCallback(methods, every_n_train_steps=6, dirpath=tmp_path / str(len(on)), **on)
        trainer_for(tmp_path, [callback]).fit(OnOdd(), DataLoader(data(), batch_size=10, collate_fn=Odd))

    with pytest.raises(SettingsError, match=r"a batch of type Odd .* give the callback a batch="):
        fit()
    fit(batch=list(data()[:20]))
    with ArtifactBuffer.open(tmp_path / "1") as buffer:
        assert buffer["rank"].steps.tolist() == buffer["saliency"].steps.tolist() == [0, 6, 12]
