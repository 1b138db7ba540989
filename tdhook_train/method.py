"""The contract of a method: written once, it serves by hand, in TorchRL, in Lightning and over checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_train.errors import NetworkError, PathError, SettingsError, did_you_mean
from tdhook_train.hooks import HookedModel
from tdhook_train.hooks.paths import Selector, selectors, shown
from tdhook_train.hooks.sequences import handles_time
from tdhook_train.isolation import LiveView
from tdhook_train.ops.join import Labels, Measured, join, overlaid
from tdhook_train.ops.targets import given_by, named, refuse_unknown
from tdhook_train.seen import Part, Parts, Seen, inputs_below, look

__all__ = ["Method", "Part", "Parts", "Prepared", "Seen", "inputs_below", "look"]


_T = TypeVar("_T")


@dataclass(frozen=True)
class Method(ABC):
    """Settings of one measurement: frozen, validated when made, picklable; equal settings are equal.

    A subclass is a frozen dataclass that declares what it writes and implements :meth:`measure` for one network.

    Args:
        networks: of several networks, the ones to measure; all by default.
    """

    _: KW_ONLY
    networks: str | tuple[str, ...] | None = None

    writes: ClassVar[Mapping[str, str]] = {}
    """Dimensions of every artifact by the first name of its key: ``{"attr": "batch *feature"}``."""

    shown: ClassVar[tuple[str, ...] | None] = None
    """First names of the artifacts that loggers are told; all that make a line, if None."""

    legend: ClassVar[Mapping[str, Mapping[int, str]]] = {}
    """What the int8 codes of an artifact mean."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the inputs that it runs on instead of the batch's own: ``("positive", key)`` and so on."""

    by_trajectory: ClassVar[bool] = False
    """Whether a result is wrong unless rows are told apart by trajectory, as in reinforcement learning."""

    looks_back: ClassVar[bool] = True
    """Whether a row may go by the one before, ``seen.previous``; where not, a sweep measures in any order."""

    selections: ClassVar[tuple[str, ...]] = ("layers",)
    """Names of the settings that name modules; patterns in them that match nothing in any network are refused."""

    def __post_init__(self) -> None:
        for name in (*self.selections, "networks"):  # lists are welcome, but settings compare and hash as tuples
            if isinstance(given := getattr(self, name, None), list):
                object.__setattr__(self, name, tuple(given))

    def taps(self, model: HookedModel) -> Sequence[str]:  # noqa: ARG002 - subclasses use it
        """Name the sites this method reads from the shared pass."""
        return ()

    @abstractmethod
    def measure(self, seen: Seen, model: HookedModel) -> TensorDictBase:
        """Return the artifacts of one network."""

    def edits(self, model: HookedModel) -> Mapping[Selector, Any]:  # noqa: ARG002 - subclasses use it
        """Say what stays set on a model that the method is prepared on: see :meth:`HookedModel.edited`."""
        return {}

    def labels(self, seen: Seen, model: HookedModel) -> Labels:  # noqa: ARG002 - subclasses use it
        """Label the dimensions of one network's artifacts; a dimension without labels is numbered."""
        sites = list(self.taps(model))
        return {"layer": sites, "layer_type": [model.kind(site) for site in sites]} if sites else {}

    def dims(self, key: NestedKey, ndim: int) -> tuple[str, ...]:
        """Name the dimensions of one artifact by :attr:`writes`; a starred name stands for as many as are left."""
        declared = self.writes.get(key if isinstance(key, str) else key[0])
        if declared is None:
            raise SettingsError(f"{type(self).__name__} gave {key!r}, which its `writes` does not name")
        names = declared.split()
        for i, name in enumerate(names):
            if name.startswith("*"):
                spare = ndim - len(names) + 1
                many = [name[1:]] if spare == 1 else [f"{name[1:]}_{j}" for j in range(spare)]
                names = [*names[:i], *many, *names[i + 1 :]]
                break
        if len(names) != ndim:
            raise SettingsError(f"{type(self).__name__} gave {key!r} in {ndim} dimensions, declared as {declared!r}")
        return tuple(names)

    def concerns(self, model: HookedModel) -> bool:
        """Whether this network has a layer and gives out a target that the method names, where it names any."""
        layers, targets = getattr(self, "layers", None), getattr(self, "targets", None)
        if targets is not None and not given_by(named(targets), model.out_keys):
            return False
        return layers is None or bool(model.sites(layers))

    def check(self, models: Mapping[str, HookedModel]) -> None:
        """Refuse, before anything has run, what can never be measured.

        Raises:
            PathError: a layer pattern that names no module of any network.
            TargetError: a target that no network gives out.
            NetworkError: ``networks`` names none.
        """
        chosen = self.chosen(models)
        if (targets := getattr(self, "targets", None)) is not None:
            refuse_unknown(targets, {name: model.out_keys for name, model in chosen.items()})
        for setting in self.selections:
            selection = getattr(self, setting, None)
            for pattern in () if selection is None else selectors(selection):
                _refuse_absent(setting, pattern, chosen)

    def across(self, parts: Parts) -> Measured:
        """Measure several networks and join what they gave: see :func:`tdhook_train.ops.join.join`."""
        return join({name: self.measured(part) for name, part in self.applies_to(parts).items()})

    def measured(self, part: Part) -> Measured:
        """Measure one network and name the dimensions of what it gave."""
        return self.named(self.measure(part.seen, part.model), part)

    def named(self, row: TensorDictBase, part: Part) -> Measured:
        """Name the dimensions of what was measured on one network."""
        values = dict(row.items(include_nested=True, leaves_only=True))
        dims = {key: self.dims(key, value.ndim) for key, value in values.items()}
        return Measured(values, dims, self.labels(part.seen, part.model))

    def applies_to(self, parts: Parts) -> dict[str, Part]:
        """Keep the networks that :attr:`networks` names and that the method has something to say about.

        Raises:
            NetworkError: a name that is no network, or no network is left.
        """
        kept = {name: part for name, part in self.chosen(parts).items() if self.concerns(part.model)}
        if not kept:
            raise NetworkError(f"{self} has nothing to measure on {', '.join(map(repr, parts))}")
        return kept

    def chosen(self, among: Mapping[str, _T]) -> dict[str, _T]:
        """Return those of some networks that ``networks=`` asks for.

        Raises:
            NetworkError: it names none of them.
        """
        wanted = tuple(among) if self.networks is None else self.networks
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        for name in wanted:
            if name not in among:
                raise NetworkError(f"networks={name!r} names no network{did_you_mean(name, among)}")
        return {name: among[name] for name in among if name in wanted}

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; functions by their qualified name."""
        return {"method": type(self).__name__} | {
            f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "networks" or self.networks
        }

    @contextmanager
    def prepare(
        self,
        model: nn.Module,
        in_keys: Sequence[NestedKey] | Mapping[NestedKey, str] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> Iterator[Prepared]:
        """Put the method on a model by hand: ``with method.prepare(model) as hooked: td = hooked(td)``.

        The call adds the method's artifacts and the model's outputs to a copy of the TensorDict. What an observer
        would know beyond the batch (trajectories, the network at initialisation) is absent. A method that edits keeps
        the model changed as long as the block lasts, for whoever calls it.
        """
        hooked = HookedModel(model, in_keys, out_keys)
        self.check({"": hooked})
        with hooked.edited(self.edits(hooked)):
            yield Prepared(self, hooked)


class Prepared:
    """A method on a model: call it with a TensorDict.

    Measured as an observer does: in evaluation mode, policies by their mode, memories step by step; what the model
    was and held is put back.
    """

    def __init__(self, method: Method, model: HookedModel) -> None:
        self.method = method
        self.model = model
        self._over_time: dict[tuple[int, ...], bool] = {}  # whether the model handles time in batches of a shape

    def __call__(self, td: TensorDictBase, **known: Any) -> TensorDictBase:
        """Return a copy of ``td`` with outputs and artifacts; ``known`` fills further fields of :class:`Seen`.

        A batch of several dimensions (``[environments, time]``) is measured row by row, as an observer does, whole
        sequences where the network handles time; what has a value for each row comes back in the batch's shape.

        Raises:
            SettingsError: no rows.
        """
        self.model.refuse_bare(td)
        if 0 in td.batch_size or (self._by_row and not td.batch_dims):
            name, given = type(self.method).__name__, list(td.batch_size)
            raise SettingsError(f"{name} measures rows, but the TensorDict has batch_size={given}")
        rows = td.reshape(-1) if self._by_row else td
        with LiveView(self.model.module).open(seed=0):
            self._arrange(rows, tuple(td.batch_size))
            self.model.trace(inputs_below(td, self.method.reads[0], self.model) if self.method.reads else rows)
            values, outputs = self._look(rows)
            seen = replace(Seen(overlaid(rows, {"": outputs}, "", self.model.in_keys), values), **known)
            artifacts = self.method.measure(seen, self.model)
        shared = dict(artifacts.items(include_nested=True, leaves_only=True))
        if td.batch_dims > 1 and self._by_row:
            of_rows = [key for key, value in shared.items() if self._has_rows(key, value, rows)]
            shared |= {key: shared[key].unflatten(0, td.batch_size) for key in of_rows}
        batched = all(v.shape[: td.batch_dims] == td.batch_size for v in shared.values())
        whole = seen.batch.reshape(td.batch_size)
        out = whole if batched else TensorDict(dict(whole.items()), batch_size=[])
        return out.update(outputs.reshape(td.batch_size)).update(TensorDict(shared, batch_size=out.batch_size))

    @property
    def _by_row(self) -> bool:
        return bool(self.method.writes) and not self.method.reads

    def _arrange(self, rows: TensorDictBase, shape: tuple[int, ...]) -> None:
        if self._by_row and len(shape) > 1 and shape not in self._over_time:
            self._over_time[shape] = handles_time(self.model, rows, shape)
        self.model.sequences = shape if self._over_time.get(shape) else None

    def _has_rows(self, key: NestedKey, value: Tensor, rows: TensorDictBase) -> bool:
        return self.method.dims(key, value.ndim)[:1] == ("batch",) and len(value) == len(rows)

    def _look(self, td: TensorDictBase) -> tuple[Mapping[str, Tensor], TensorDictBase]:
        if self.method.reads and not all(key in td.keys(include_nested=True) for key in self.model.in_keys):
            return {}, TensorDict({}, batch_size=td.batch_size)
        return look(self.model, td, self.model.sites(self.method.taps(self.model)))


def _refuse_absent(setting: str, pattern: Selector, models: Mapping[str, HookedModel]) -> None:
    if not any(model.has(pattern) for model in models.values()):
        known = [f"{name}.{path}" if name else path for name, model in models.items() for path in model.modules]
        titles = " or ".join(model.title for model in models.values())
        near = did_you_mean(pattern, known) if isinstance(pattern, str) else ""
        raise PathError(f"{setting}={shown(pattern)} matches no module of {titles}{near}")


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.settings()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if callable(value) and is_dataclass(value) and not isinstance(value, type):
        return {"objective": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if callable(value):
        return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value
