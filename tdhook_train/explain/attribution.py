"""What every attribution shares: which outputs are explained, at which sites, on which rows, within which memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import KeyMissingError, NetworkError, SettingsError, TargetError, did_you_mean
from tdhook_train.explain.problem import Found, Point, Problem, seeds_of
from tdhook_train.hooks import HookedModel, Selection
from tdhook_train.keys import path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels
from tdhook_train.ops.targets import beside, explained, named
from tdhook_train.ops.units import evenly_spaced

__all__ = ["Attribution", "one_of"]

_IMAGE = ("channel", "height", "width")
_LEAST_ROWS, _MOST_ROWS = 32, 4096
_IN_CACHE = 2**20  # numbers


@dataclass(frozen=True)
class Attribution(Method):
    """A method that says what a network's outputs rest on: its inputs, or what some layers give out.

    Args:
        targets: what is explained: an output key, ``("output", 340)`` for one feature of it, a function of the
            TensorDict of outputs, inputs and the batch's other keys (such as the true class) that gives one number a
            row, a list of these or a mapping of names to these (the artifact then has a target dimension after the
            batch). By default every feature of the first output.
        init_attr_targets: TDHook's form instead of ``targets``: a function of (outputs, inputs) that returns a
            TensorDict whose leaves are explained.
        rows: explain at most this many rows, spread evenly over the batch; all by default.
        layers: explain by what these layers give out instead of by the model's inputs: paths, patterns, module classes
            or predicates. Integer inputs have no gradient: explain by their embedding.
        side: of the layers, what they give out or what they take in (their first argument).
        reduction: of the rows: none, their mean, or the mean of absolute values; then without a batch dimension.
        max_bytes: bound on the memory of one pass, in bytes: activations of all layers and their gradients. By default
            as many rows go at once as keep the largest activation in a core's cache, which was measured fastest.

    A boolean ``("mask", key)`` in the batch says which parts of an input (or of a layer, by its path) may be changed:
    the others stay as they are and have a share of 0, padding say.
    """

    targets: Any = None
    init_attr_targets: Callable[[TensorDictBase, TensorDictBase], TensorDictBase] | None = None
    rows: int | None = None
    layers: Selection | None = None
    side: Literal["output", "input"] = "output"
    reduction: Literal["none", "mean", "mean_abs"] = "none"
    max_bytes: int | None = None

    looks_back: ClassVar[bool] = False
    writes: ClassVar[Mapping[str, str]] = {"attr": "batch target *feature"}

    moves: ClassVar[bool] = True
    """Whether values are moved, which makes each layer a problem of its own; where not, all are explained at once."""

    discrete: ClassVar[bool] = False
    """Whether integer inputs are explained as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.targets is not None and self.init_attr_targets is not None:
            raise SettingsError(f"{name} takes targets or init_attr_targets, not both")
        for setting in ("rows", "max_bytes"):
            given = getattr(self, setting)
            if given is not None and given < 1:
                raise SettingsError(f"{name} needs {setting} of 1 or more, got {given}")
        one_of(self, side=("output", "input"), reduction=("none", "mean", "mean_abs"))
        if self.targets is not None:
            named(self.targets)

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def explain(self, problem: Problem) -> Found:
        """Return what was found of the problem's rows, ``[row, target, ...]`` each."""

    def rows_at_once(self, problem: Problem) -> int:
        """Say how many rows of the batch are handed to :meth:`explain` at once."""
        return problem.at_once

    # ------------------------------------------------------------------ the contract of a method

    def taps(self, model: HookedModel) -> Sequence[str]:
        """Read what the layers give out, where it is that which is explained."""
        return model.sites(self.layers) if self.layers is not None and self.side == "output" else ()

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Explain every target."""
        found: Found = {}
        rows = len(evenly_spaced(len(seen.batch), self.rows))
        for problem in self.problems(seen, model):
            for key, value in self.found(problem).items():
                where = key if self.layers is None or not isinstance(key, str) else (key, str(problem.sites[0]))
                found[where] = self._reduced(value if self._apart else value[:, 0], key)
        return TensorDict(found, batch_size=[rows] if self.reduction == "none" else [])

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """One target alone has no dimension of its own; features in three dimensions are those of an image."""
        spare = (not self._apart) + (self.reduction != "none")
        names = super().dims(key, ndim + spare)
        if names[-3:] == tuple(f"feature_{i}" for i in range(3)):
            names = (*names[:-3], *_IMAGE)
        gone = {"target"} if not self._apart else set()
        return tuple(name for name in names if name not in (gone if self.reduction == "none" else gone | {"batch"}))

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """Targets, the rows of the batch, and the features of the input."""
        out: Labels = {}
        if self.rows is not None and self.reduction == "none":
            out["batch"] = evenly_spaced(len(seen.batch), self.rows).tolist()
        if self._apart:
            out["target"] = list(self._explained(seen.batch, seen.batch, model))
        if self.layers is None:
            inputs = list(self._inputs(seen, model))
            if len(inputs) == 1 and inputs[0] in seen.names:
                out["feature"] = list(seen.names[inputs[0]])
        return out

    # ------------------------------------------------------------------ what is explained

    def problems(self, seen: Seen, model: HookedModel) -> Iterator[Problem]:
        """Yield what is explained: a problem for all inputs, or one for each layer."""
        index = evenly_spaced(len(seen.batch), self.rows).to(model.device())
        known = {key: seen.batch.get(key)[index] for key in model.in_keys if isinstance(seen.batch.get(key), Tensor)}
        still = known | {key: value[index] for key, value in self._beside(seen, model).items()}
        whole = Problem(
            model,
            partial(self._explained, model=model),
            tuple(self._explained(seen.batch, seen.batch, model)),
            "model" if self.layers is None else self.side,
            {},
            still,
            seeds_of(seen.generator, len(index)),
            self.at_once(model),
        )
        points = [self._moving(seen, model)] if self.layers is None else self._at_layers(seen, model)
        for point in points:
            explained_rows = {site: value[index] for site, value in point.items()}
            yield self.posed(whole, explained_rows, point, seen, index)

    def found(self, problem: Problem) -> Found:
        """Explain a problem in parts: ``[row, target, ...]`` each, one target or many; 0 where a mask is False."""
        parts = [self._shares(chunk) for chunk in problem.chunks(self.rows_at_once(problem))]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def posed(self, whole: Problem, point: Point, every: Point, seen: Seen, index: Tensor) -> Problem:  # noqa: ARG002
        """Complete a problem.

        Args:
            whole: all but its point.
            point: the values that are explained, ``[row, *feature]``.
            every: the values of the whole batch at the same sites.
            seen: what is known of the network.
            index: which rows of the batch are explained.
        """
        still = {key: value for key, value in whole.still.items() if key not in point}
        return replace(whole, point=point, still=still, mask=_masks(point, seen, index))

    def at_once(self, model: HookedModel) -> int:
        """Say how many rows go through a network in one pass."""
        if self.max_bytes is not None:
            numbers = 2 * sum(site.size for site in model.traced)  # activations, and their gradients
            return max(1, self.max_bytes // max(1, numbers * torch.get_default_dtype().itemsize))
        largest = max((site.size for site in model.traced), default=1)
        return min(_MOST_ROWS, max(_LEAST_ROWS, _IN_CACHE // max(largest, 1)))

    @property
    def joint(self) -> bool:
        """Whether all targets together have one share, without a target dimension."""
        return False

    @property
    def _apart(self) -> bool:
        return self._many and not self.joint

    @property
    def _many(self) -> bool:
        return self.init_attr_targets is None and (self.targets is None or isinstance(self.targets, list | Mapping))

    def _shares(self, problem: Problem) -> Found:
        found = self.explain(problem)
        for site, mask in problem.mask.items():
            key = ("attr", *path_of(site))
            found[key] = found[key] * mask[:, None]
        return found

    def _reduced(self, value: Tensor, key: NestedKey) -> Tensor:
        if self.reduction == "none":
            return value
        return (value.abs() if self.reduction == "mean_abs" and key[0] == "attr" else value).mean(0)

    def _inputs(self, seen: Seen, model: HookedModel) -> Point:
        inputs = {key: _as_numbers(seen.batch.get(key)) for key in model.in_keys}
        found = {key: value for key, value in inputs.items() if self.discrete or value.is_floating_point()}
        if not found:
            kinds = {key: value.dtype for key, value in inputs.items()}
            tables = [path for path, part in model.module.named_modules() if isinstance(part, nn.Embedding)]
            way = f"; explain by an embedding: layers={tables[0]!r}" if tables else ""
            raise KeyMissingError(f"{type(self).__name__} needs a floating-point input, the model reads {kinds}{way}")
        return found

    def _at_layers(self, seen: Seen, model: HookedModel) -> list[Point]:
        """Return the values at the layers, of every row: one point a layer, or all in one where they stay in place."""
        assert self.layers is not None
        sites = model.sites(self.layers)
        values = dict(seen.values)
        if not set(sites) <= set(values) or self.side == "input":
            with model.run(seen.batch) as run:
                read = run.get if self.side == "output" else run.get_input
                proxies = {site: read(site) for site in sites}
            values = {site: proxy.resolve() for site, proxy in proxies.items()}
        for site in sites:
            if len(values[site]) != len(seen.batch) or not values[site].is_floating_point():
                given = f"{values[site].dtype}, {list(values[site].shape)}"
                raise NetworkError(
                    f"{type(self).__name__} explains by floating-point numbers of each of {len(seen.batch)} rows; the "
                    f"{self.side} of {site!r} is {given}"
                )
        return [{site: values[site]} for site in sites] if self.moves else [{site: values[site] for site in sites}]

    def _beside(self, seen: Seen, model: HookedModel) -> Point:
        """Return what functions among the targets may read that the network neither reads nor gives out."""
        targets = self.init_attr_targets or self.targets
        return beside(seen.batch, targets, [*model.in_keys, *model.out_keys])

    def _moving(self, seen: Seen, model: HookedModel) -> Point:
        """Return the inputs as numbers that can be differentiated.

        Raises:
            NetworkError: the network gives something else for pixels as floating-point numbers than as bytes.
        """
        inputs = self._inputs(seen, model)
        changed = [key for key, value in inputs.items() if value.dtype != seen.batch.get(key).dtype]
        if not changed:
            return inputs
        rest = {key: seen.batch.get(key) for key in model.in_keys}
        batch = TensorDict(rest | inputs | self._beside(seen, model), batch_size=seen.batch.batch_size)
        with torch.no_grad():
            found = self._explained(model(batch), batch, model)
        for name, expected in self._explained(seen.batch, seen.batch, model).items():
            if not torch.allclose(found[name], expected, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise NetworkError(
                    f"{type(self).__name__}: {model.title} gives another {name!r} for {changed[0]!r} as floating-point "
                    "numbers than as bytes, which have no gradient; convert the pixels before the network"
                )
        return inputs

    def _explained(self, outputs: TensorDictBase, inputs: TensorDictBase, model: HookedModel) -> dict[str, Tensor]:
        """Read the targets from the outputs, ``[rows]`` each."""
        rows = len(outputs)
        if self.init_attr_targets is not None:
            leaves = self.init_attr_targets(outputs, inputs).flatten_keys(".")
            return {"+".join(leaves.keys()): sum(leaf.reshape(rows, -1).sum(1) for leaf in leaves.values())}
        found = dict(explained(outputs, self.targets, model.out_keys, rows, inputs))
        if not self._many and not self.joint and len(found) != 1:
            raise TargetError(f"target {self.targets!r} has {len(found)} features; explain one, or give a list")
        return found


def one_of(method: Method, **choices: Sequence[Any]) -> None:
    """Refuse settings that are none of their choices.

    Raises:
        SettingsError: names the choices.
    """
    for name, known in choices.items():
        given = getattr(method, name)
        if given not in known:
            raise SettingsError(
                f"{type(method).__name__}: {name}={given!r} is none of {', '.join(map(repr, known))}"
                f"{did_you_mean(given, known) if isinstance(given, str) else ''}"
            )


def _masks(point: Point, seen: Seen, index: Tensor) -> Point:
    """Return what may be changed of each value, where the batch says it."""
    masks: Point = {}
    for site, value in point.items():
        mask = seen.batch.get(("mask", *path_of(site)), None)
        if mask is not None:
            mask = mask[index].to(device=value.device, dtype=torch.bool)
            masks[site] = mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim)).expand_as(value)
    return masks


def _as_numbers(value: Tensor) -> Tensor:
    """Bring the bytes of images to floating-point numbers of the same size, which the network then scales."""
    return value.to(torch.get_default_dtype()) if value.dtype == torch.uint8 and value.ndim > 3 else value
