"""What a run is measured on: the batch in training, the last collected one, or probe sets, kept in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_train.errors import KeyMissingError, SchemaError, SettingsError
from tdhook_train.observer.probe_set import ProbeSet

__all__ = ["Live", "On", "Source", "Sources"]

Live = Literal["batch", "collected"]
On = Live | ProbeSet | Mapping[str, Live | ProbeSet]

_ASKED = {
    "batch": "the batch: observer.step(model, batch, step=...)",
    "collected": "what was collected: observer.collected(batch) for each batch of the collector",
}


@dataclass(frozen=True)
class Source:
    """A batch to measure on, with what is known of its rows."""

    batch: TensorDictBase
    fingerprint: int
    groups: Tensor | None = None
    ordered: bool = False
    independent: bool = False
    names: Mapping[NestedKey, list[str]] = field(default_factory=dict)
    fixed: bool = False  # the same at every tick
    shape: tuple[int, ...] = ()  # of the batch, before its rows were laid end to end

    @classmethod
    def of(cls, probe_set: ProbeSet) -> Source:
        """Take a complete probe set."""
        return cls(
            probe_set.td,
            probe_set.fingerprint,
            probe_set.groups,
            probe_set.ordered,
            probe_set.independent,
            probe_set.feature_names,
            fixed=True,
            shape=probe_set.shape,
        )


class Sources:
    """The batches an observer measures on, by name; one without a name has the empty one.

    Args:
        on: ``"batch"``, ``"collected"``, a probe set, or several of these by name.

    Raises:
        SettingsError: something else was given.
    """

    def __init__(self, on: On) -> None:
        several = isinstance(on, Mapping) and not isinstance(on, TensorDictBase)  # a TensorDict is a Mapping too
        self._named: dict[str, Live | ProbeSet] = dict(on) if several else {"": on}  # type: ignore[arg-type, dict-item]
        for name, source in self._named.items():
            if not isinstance(source, ProbeSet) and not (isinstance(source, str) and source in _ASKED):
                given = repr(source) if isinstance(source, str) else f"a {type(source).__name__}"
                where = f" ({name!r})" if name else ""
                raise SettingsError(
                    f'on={given}{where} is neither "batch" nor "collected" nor a ProbeSet; see ProbeSet(td)'
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self._named)

    def wants(self, live: Live) -> bool:
        """Whether one of the sources is the batch in training, or the last collected one."""
        return live in self._named.values()

    def agree_with(self, folder: Path) -> None:
        """Go on with the probe sets that a resumed run keeps: rows of different data are never mixed.

        Raises:
            SchemaError: another probe set was given than the run was measured on.
        """
        for name, source in self._probe_sets():
            path = _file(folder, name)
            if not path.is_file():
                continue
            stored = ProbeSet.load(path)
            if not source.ready:
                source.take_over(stored)
            elif source.fingerprint != stored.fingerprint:
                raise SchemaError(
                    f"the rows beside {folder} were measured on {stored!r}, not on {source!r}; "
                    f"go on with ProbeSet.load({str(path)!r}), or choose another folder"
                )

    def ready(
        self, live: Mapping[Live, TensorDictBase | None], folder: Path, skip: Callable[[str, str], None]
    ) -> Iterator[tuple[str, Source]]:
        """Yield what can be measured on now; keep a probe set in the run's folder the first time.

        Args:
            live: the batch in training, and the last collected one.
            folder: where probe sets are kept.
            skip: told why and what is not ready.

        Raises:
            KeyMissingError: one of these is wanted, but was not given.
        """
        for name, source in self._probe_sets():
            if not source.ready:
                skip("not ready", f"{source!r}")
                continue
            if not _file(folder, name).is_file():
                source.save(_file(folder, name))
            yield name, Source.of(source)
        for name, kind in [(name, source) for name, source in self._named.items() if not isinstance(source, ProbeSet)]:
            if (batch := live.get(kind)) is None:
                raise KeyMissingError(f'on="{kind}" needs {_ASKED[kind]}')
            now = ProbeSet(batch)
            # a minibatch is shuffled: its rows may look like blocks by chance, and are in no order of time
            ordered = kind == "collected" and now.ordered
            yield name, Source(now.td, now.fingerprint, now.groups, ordered=ordered, shape=now.shape)

    def unready(self) -> list[ProbeSet]:
        """Return the probe sets that are not complete."""
        return [source for _, source in self._probe_sets() if not source.ready]

    def close(self) -> None:
        """Let probe sets that are still filling go of their collectors."""
        for source in self.unready():
            source.release()

    def _probe_sets(self) -> Iterator[tuple[str, ProbeSet]]:
        return ((name, source) for name, source in self._named.items() if isinstance(source, ProbeSet))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name or 'probe_set'}.pt"
