"""One tick: one shared pass for all that only read, then each method, then the rows, none of them half."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_train.buffer.folder import check_name
from tdhook_train.edit import Edit
from tdhook_train.errors import GroupsError, SettingsError
from tdhook_train.hooks import HookedModel
from tdhook_train.method import Method, Part, Seen, look
from tdhook_train.observer.sources import Source
from tdhook_train.observer.subject import Subject
from tdhook_train.ops.join import Measured, merge, overlaid
from tdhook_train.schedule import Times

__all__ = ["Row", "Tick", "measure", "rows_of", "see"]

Rows = Mapping[str, Sequence[Method]]


@dataclass(frozen=True)
class Tick:
    """The moment of a measurement, what its randomness follows from, and what is carried from tick to tick.

    Args:
        clock: the moment.
        seed: of the observer.
        previous: each row of the tick before.
        memo: what stays the same between ticks on this batch, by method.
    """

    clock: Times
    seed: int = 0
    previous: Mapping[str, TensorDictBase | None] = field(default_factory=dict)
    memo: dict[str, dict[Any, Any]] = field(default_factory=dict)

    def generator(self, name: str) -> torch.Generator:
        """Make a generator that depends on seed, step and name alone."""
        digest = hashlib.blake2b(f"{self.seed}/{self.clock.step}/{name}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def told(self, row: str, place: int) -> dict[str, Any]:
        """Return what a method of a row knows beyond the batch."""
        return {
            "generator": self.generator(f"{row}/{place}"),
            "previous": self.previous.get(row),
            "memo": self.memo.setdefault(f"{row}/{place}", {}),
        }


@dataclass(frozen=True)
class Row:
    """What one method measured, and the seconds it took, its share of the shared pass included."""

    name: str
    measured: Measured
    cost_s: float


def rows_of(methods: Mapping[str, Method | Sequence[Method]], *, none: bool = False) -> dict[str, tuple[Method, ...]]:
    """Bring what a user asks for to one form: the methods of each row.

    Args:
        methods: as the user gave them.
        none: whether there may be none, since there is something else to do.

    Raises:
        SettingsError: nothing to measure, something that is no method, or a name that is none of a folder.
    """
    if not isinstance(methods, Mapping) or not (methods or none):
        raise SettingsError('an observer needs methods, e.g. {"probe": RidgeProbe(target="action")}')
    grouped: dict[str, tuple[Method, ...]] = {}
    for name, given in methods.items():
        check_name(name)
        grouped[name] = tuple(given) if isinstance(given, list | tuple) else (cast(Method, given),)
        for method in grouped[name]:
            if not isinstance(method, Method):
                made = (
                    f"; make one: {method.__name__}(...)" if _is_kind(method) else ", e.g. RidgeProbe(target='action')"
                )
                raise SettingsError(f"methods[{name!r}] holds {method!r}, which is no Method{made}")
            if isinstance(method, Edit):
                raise SettingsError(
                    f"methods[{name!r}] edits a model and measures nothing; use it by hand: "
                    f"with {type(method).__name__}(...).prepare(model) as hooked"
                )
        if not grouped[name]:
            raise SettingsError(f"methods[{name!r}] is empty")
    return grouped


def _is_kind(given: Any) -> bool:
    return isinstance(given, type) and issubclass(given, Method)


def measure(
    subject: Subject, rows: Rows, source: Source, tick: Tick, failed: Callable[[str, Exception], None]
) -> list[Row]:
    """Measure every method on one batch, inside ``subject.view.open``.

    Args:
        subject: whose networks.
        rows: the methods of each row.
        source: on what.
        tick: when.
        failed: told the row and the error of a method; where it does not raise, that row is left out.
    """
    began = time.perf_counter()
    try:
        parts = see(subject, rows, source, tick)
    except Exception as error:  # whatever the user's network or a method raises; see below
        failed("the shared pass", error)
        return []
    shared_s = (time.perf_counter() - began) / len(rows)
    out = []
    for name, methods in rows.items():
        began = time.perf_counter()
        try:
            for method in methods:
                _refuse_unknown_groups(subject, method, source)
            told = [{n: part.told(**tick.told(name, i)) for n, part in parts.items()} for i in range(len(methods))]
            measured = merge([method.across(known) for method, known in zip(methods, told, strict=True)])
        except Exception as error:  # whatever a method raises is its own; what follows is the observer's to say
            failed(name, error)
            continue
        out.append(Row(name, measured, time.perf_counter() - began + shared_s))
    return out


def _refuse_unknown_groups(subject: Subject, method: Method, source: Source) -> None:
    if subject.is_loss and method.by_trajectory and source.groups is None and not source.independent:
        raise GroupsError(
            f"{type(method).__name__} splits rows by trajectory, but the batch has neither ('collector', 'traj_ids') "
            "nor done flags; give ProbeSet(td, groups=...), or groups='rows' to take frames as independent, which "
            "makes scores of time-correlated frames too good"
        )


def see(subject: Subject, rows: Rows, source: Source, tick: Tick) -> dict[str, Part]:
    """Run every network once, reading the union of what the methods want."""
    methods = [method for group in rows.values() for method in group]
    wanted = {name for method in methods for name in method.chosen(subject.networks)}
    networks = {name: hooked for name, hooked in subject.networks.items() if name in wanted}
    subject.convert_initial()
    values: dict[str, dict[str, Tensor]] = {}
    outputs: dict[str, TensorDictBase] = {}
    for name, hooked in networks.items():
        batch = source.batch.to(hooked.device())
        subject.arrange(name, batch, source.shape)
        for initial in (hooked, subject.initial.get(name)):
            if initial is not None:
                initial.trace(batch)
        here = [method for method in methods if name in method.chosen(subject.networks)]
        values[name], outputs[name] = look(hooked, batch, _union(hooked, here))
    read = {key for hooked in networks.values() for key in hooked.in_keys}
    return {
        name: Part(
            Seen(
                overlaid(source.batch.to(hooked.device()), outputs, name, read),
                values[name],
                groups=source.groups,
                ordered=source.ordered,
                initial=subject.initial.get(name),
                clock=tick.clock,
                names=source.names,
            ),
            hooked,
        )
        for name, hooked in networks.items()
    }


def _union(hooked: HookedModel, methods: Sequence[Method]) -> list[str]:
    wanted: set[str] = set()
    for method in methods:
        wanted |= set(hooked.sites(method.taps(hooked)))
    return list(hooked.sites(sorted(wanted)))
