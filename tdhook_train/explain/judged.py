"""What every metric of attributions shares: whose shares are judged, on which problem, and the mean over rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.errors import SettingsError
from tdhook_train.explain.attribution import Attribution, one_of
from tdhook_train.explain.compared import Compared
from tdhook_train.explain.of_another import OfAnother
from tdhook_train.explain.problem import Found, Point, Problem, seeds_of
from tdhook_train.hooks import HookedModel
from tdhook_train.keys import path_of
from tdhook_train.method import Method, Seen
from tdhook_train.ops.join import Labels

__all__ = ["Baseline", "Judged", "JudgedByRow", "compared", "counted", "in_one", "repeatable"]

Baseline = Literal["zero", "mean", "blur", "rows"]


@dataclass(frozen=True)
class Judged(OfAnother):
    """A metric of an attribution: the attribution is made of the same rows, then judged row by row, target by target.

    Args:
        of: the attribution, such as ``IntegratedGradients(targets=("output", 1))``; it says which targets, rows and
            layers there are. Shares of all inputs are judged together, those of each layer alone.
        reduction: of the rows: their mean, or none. Rows of which nothing can be said are left out of the mean.
    """

    of: Attribution
    reduction: Literal["mean", "none"] = "mean"

    looks_back: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.of, Attribution):
            raise SettingsError(f"{name} needs an attribution to judge, of=Saliency() say; got of={self.of!r}")
        super().__post_init__()
        if self.of.reduction != "none":
            raise SettingsError(f"{name} needs the shares of each row; got reduction={self.of.reduction!r} in of=")
        one_of(self, reduction=("mean", "none"))

    def weights(self, found: Found) -> Mapping[NestedKey, Tensor]:  # noqa: ARG002 - subclasses use it
        """Say how much each row counts in the mean of an artifact, ``[row, target]``; alike by default."""
        return {}

    # ------------------------------------------------------------------ the contract of a method

    def labels(self, seen: Seen, model: HookedModel) -> Labels:
        """The attribution's targets and rows."""
        kept = ("target",) if self.reduction == "mean" else ("target", "batch")
        return {dim: names for dim, names in self.of.labels(seen, model).items() if dim in kept}

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """One target alone has no dimension of its own, and a mean over rows none of rows."""
        first = key if isinstance(key, str) else key[0]
        gone = [name for name in self._gone() if name in self.writes.get(first, "").split()]
        return tuple(name for name in super().dims(key, ndim + len(gone)) if name not in gone)

    def shares(self, seen: Seen, model: HookedModel) -> Point:
        """Return what the attribution gives each feature at each site, ``[row, target, *feature]``."""
        shares: Point = {}
        for problem in self.of.problems(seen, model):
            found = self.of.found(problem)
            for site, value in problem.point.items():
                share = found.get(("attr", *path_of(site)))
                wanted = (len(problem), len(problem.names), *value.shape[1:])
                if share is None or share.shape != wanted:
                    given = "nothing" if share is None else list(share.shape)
                    raise SettingsError(
                        f"{type(self).__name__} needs a share of each feature of {site!r}, {list(wanted)}; "
                        f"{type(self.of).__name__} gives {given}"
                    )
                shares[site] = share
        return shares

    def places(self, shares: Point) -> Iterator[tuple[NestedKey, list[NestedKey]]]:
        """Yield which sites are judged together, the first of them before: all inputs, or each layer alone."""
        for sites in [list(shares)] if self.of.layers is None else [[site] for site in shares]:
            yield sites[0], sites

    def finished(self, found: Found, site: NestedKey) -> Found:
        """Take the mean over rows, leave out the dimension of a single target, and put a layer's name behind keys."""
        weights, out = self.weights(found), dict[NestedKey, Tensor]()
        for key, value in found.items():
            names, weight = self.writes[str(key)].split(), weights.get(key)
            if self.reduction == "mean":
                value, names = _mean(value, names.index("batch"), weight), [n for n in names if n != "batch"]
            if not self.of._many:
                value = value.select(names.index("target"), 0)
            out[key if self.of.layers is None else (str(key), str(site))] = value
        return out

    def _gone(self) -> list[str]:
        return (["batch"] if self.reduction == "mean" else []) + ([] if self.of._many else ["target"])


@dataclass(frozen=True)
class JudgedByRow(Judged):
    """A metric that asks the network about some rows after others."""

    @abstractmethod
    def judge(self, problem: Problem, shares: Point) -> Found:
        """Return what is to be said of some rows, ``[row, target, ...]`` each.

        Args:
            problem: of all inputs, or of one layer.
            shares: of each feature, ``[row, target, *feature]``, by site.
        """

    def posed(self, seen: Seen, model: HookedModel) -> Iterator[Problem]:
        """Yield the problems that are judged, each of all inputs or of one layer; the attribution's own by default."""
        yield from self.of.problems(seen, model)

    def versions(self, problem: Problem) -> int:  # noqa: ARG002 - subclasses use it
        """Say how many versions of a row go through the network at once."""
        return 1

    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Explain, judge, and take the mean over rows."""
        again = repeatable(seen)
        shares, found = self.shares(again(), model), TensorDict()
        for whole in self.posed(again(), model):
            for problem in by_place(whole):
                at_once = max(1, problem.at_once // self.versions(problem))
                parts = [
                    self.judge(problem.rows(index), {site: shares[site][index] for site in problem.sites})
                    for index in torch.arange(len(problem), device=problem.device).split(at_once)
                ]
                every: Found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                found.update(self.finished(every, problem.sites[0]))
        return found


def repeatable(seen: Seen) -> Callable[[], Seen]:
    """Return what gives the same to see again and again, with the same to draw: an attribution twice is the same."""
    seed = int(seeds_of(seen.generator, 1))
    return lambda: replace(seen, generator=torch.Generator().manual_seed(seed))


def by_place(problem: Problem) -> Iterator[Problem]:
    """Yield a problem of all inputs as it is, one of several layers layer by layer, which can then be moved."""
    if problem.place == "model" or len(problem.sites) == 1:
        yield problem
        return
    for site in problem.sites:
        parts: dict[str, Point] = {
            name: {key: value for key, value in getattr(problem, name).items() if key == site}
            for name in ("point", "baseline", "mask", "groups")
        }
        yield replace(problem, **parts)  # type: ignore[arg-type]


def in_one(point: Point, sites: Sequence[NestedKey]) -> Tensor:
    """Lay the features of some sites end to end: ``[row, target, feature]``, in double precision."""
    return torch.cat([point[site].reshape(*point[site].shape[:2], -1) for site in sites], -1).double()


def compared(of: Attribution, baseline: Baseline | None) -> Compared:
    """Return the attribution that poses an attribution's problems with a baseline.

    Args:
        of: what is judged.
        baseline: instead of its own; zeros where it has none.
    """
    if isinstance(of, Compared):
        return of if baseline is None else replace(of, baseline=baseline)
    known = {f.name: getattr(of, f.name) for f in fields(Attribution) if f.init}
    return (_PosedWhole if of.discrete else _Posed)(**known, baseline=baseline or "zero")


def counted(method: Method, **numbers: float) -> None:
    """Refuse settings below 1.

    Raises:
        SettingsError: names the first.
    """
    for name, given in numbers.items():
        if given < 1:
            raise SettingsError(f"{type(method).__name__} needs {name} of 1 or more, got {given}")


@dataclass(frozen=True)
class _Posed(Compared):
    """Poses problems, explains nothing."""

    def explain(self, problem: Problem) -> Found:  # noqa: ARG002
        return {}


@dataclass(frozen=True)
class _PosedWhole(_Posed):
    discrete: ClassVar[bool] = True


def _mean(value: Tensor, dim: int, weight: Tensor | None) -> Tensor:
    """Return the mean over rows that have a value; of codes, the least."""
    if not value.is_floating_point():
        return value.amin(dim)
    if weight is None:
        return value.nanmean(dim)
    weight = torch.where(value.isnan(), 0, weight)
    return (value.nan_to_num(0) * weight).sum(dim) / weight.sum(dim)
