"""What a run is measured on: the batch in training, the last collected one, or probe sets, kept in its folder."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_train.buffer import ArtifactBuffer
from tdhook_train.buffer.folder import check_name
from tdhook_train.errors import KeyMissingError, SchemaError, SettingsError
from tdhook_train.observer.probe_set import ProbeSet
from tdhook_train.schedule import Clock

__all__ = ["Given", "Live", "On", "Source", "Sources", "stored_names", "stored_versions"]

Live = Literal["batch", "collected"]
Given: TypeAlias = TensorDictBase | Callable[[], TensorDictBase] | None  # a batch, or what makes one when it is wanted
On = Live | ProbeSet | Mapping[str, Live | ProbeSet]

_UNNAMED = "probe_set"
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
    fixed: bool = False  # the same at every tick, until its probe set is refreshed
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
        SettingsError: something else was given, or a name that is none of a folder.
    """

    def __init__(self, on: On) -> None:
        several = isinstance(on, Mapping) and not isinstance(on, TensorDictBase)  # a TensorDict is a Mapping too
        self._named: dict[str, Live | ProbeSet] = dict(on) if several else {"": on}  # type: ignore[arg-type, dict-item]
        for name, source in self._named.items():
            if several:
                check_name(name)
            if not isinstance(source, ProbeSet) and not (isinstance(source, str) and source in _ASKED):
                given = repr(source) if isinstance(source, str) else f"a {type(source).__name__}"
                where = f" ({name!r})" if name else ""
                raise SettingsError(
                    f'on={given}{where} is neither "batch" nor "collected" nor a ProbeSet; see ProbeSet(td)'
                )
        self._refreshed = [source for _, source in self._probe_sets() if source.refresh_when is not None]
        self._kept: dict[str, dict[int, Path]] = {}  # by content hash, what lies in the run's folder of a probe set

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self._named)

    @property
    def fixed(self) -> dict[str, bool]:
        """Whether each source stays the same from tick to tick, by name."""
        return {name: isinstance(source, ProbeSet) for name, source in self._named.items()}

    def wants(self, live: Live) -> bool:
        """Whether one of the sources is the batch in training, or the last collected one."""
        return live in self._named.values()

    def agree_with(self, buffer: ArtifactBuffer) -> None:
        """Go on with the probe sets that a resumed run keeps: rows of different data are never mixed.

        Of one that was refreshed, the version of the last row is taken, until a checkpoint says otherwise.

        Raises:
            SchemaError: another probe set was given than the run was measured on.
        """
        folder = buffer.folder("probe_sets")
        for name, source in self._probe_sets():
            kept = self._kept[name] = stored_versions(folder, name)
            if not kept:
                continue
            if not source.ready:
                last = _last(buffer, name)
                source.take_over(ProbeSet.load(kept[last] if last in kept else _file(folder, name)))
            elif source.fingerprint not in kept:
                stored = ProbeSet.load(_file(folder, name))
                raise SchemaError(
                    f"the rows beside {folder} were measured on {stored!r}, not on {source!r}; "
                    f"go on with ProbeSet.load({str(_file(folder, name))!r}), or choose another folder"
                )

    def refresh(self, clock: Clock) -> None:
        """Let the probe sets whose time has come wait for other states."""
        for source in self._refreshed:
            if source.ready and source.refresh_when is not None and source.refresh_when.due(clock):
                source.refresh()

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Say which version of each probe set is in use, and keep it, so that a resumed run goes on with it."""
        state = {}
        for name, source in self._probe_sets():
            if source.ready and folder.is_dir():
                self._keep(name, source, folder)
            state[name] = {"data": source.fingerprint if source.ready else None, "filling": source.filling}
        return state

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on with these versions.

        Raises:
            KeyMissingError: the folder does not hold one.
        """
        for name, source in self._probe_sets():
            known = state.get(name, {"data": None})
            if known["data"] is None:
                continue
            if (path := stored_versions(folder, name).get(known["data"])) is None:
                raise KeyMissingError(f"{folder} holds no probe set {name!r} of content hash {known['data']:#x}")
            if not source.ready or source.fingerprint != known["data"]:
                source.take_over(ProbeSet.load(path))
            if known["filling"]:
                source.refresh()

    def close(self) -> None:
        """Give up what observing began, and let probe sets that are still filling go of their collectors."""
        for source in self._refreshed:
            source.stay()
        for source in self.unready():
            source.release()

    def ready(
        self, live: Mapping[Live, Given], folder: Path, skip: Callable[[str, str], None]
    ) -> Iterator[tuple[str, Source]]:
        """Yield what can be measured on now; keep every version of a probe set in the run's folder.

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
            self._keep(name, source, folder)
            yield name, Source.of(source)
        for name, kind in [(name, source) for name, source in self._named.items() if not isinstance(source, ProbeSet)]:
            if (batch := live.get(kind)) is None:
                raise KeyMissingError(f'on="{kind}" needs {_ASKED[kind]}')
            now = ProbeSet(batch if isinstance(batch, TensorDictBase) else batch())
            # a minibatch is shuffled: its rows may look like blocks by chance, and are in no order of time
            ordered = kind == "collected" and now.ordered
            yield name, Source(now.td, now.fingerprint, now.groups, ordered=ordered, shape=now.shape)

    def unready(self) -> list[ProbeSet]:
        """Return the probe sets that are not complete."""
        return [source for _, source in self._probe_sets() if not source.ready]

    def _probe_sets(self) -> Iterator[tuple[str, ProbeSet]]:
        return ((name, source) for name, source in self._named.items() if isinstance(source, ProbeSet))

    def _keep(self, name: str, source: ProbeSet, folder: Path) -> None:
        kept = self._kept.setdefault(name, {})
        if source.fingerprint not in kept:
            path = kept[source.fingerprint] = _file(folder, name, source.fingerprint if kept else None)
            source.save(path)


def stored_names(folder: Path) -> list[str]:
    """Return the names of the probe sets that a run keeps; one without a name has the empty one."""
    stems = [path.stem for path in sorted(folder.glob("*.pt"))]
    return ["" if stem == _UNNAMED else stem for stem in stems if not re.search(r"\.[0-9a-f]{16}$", stem)]


def _file(folder: Path, name: str, version: int | None = None) -> Path:
    """Say where a probe set lies: the first one under its name, others under their content hash as well."""
    return folder / (f"{name or _UNNAMED}{'' if version is None else f'.{_hex(version)}'}.pt")


def _hex(version: int) -> str:
    return f"{version % 2**64:016x}"


def stored_versions(folder: Path, name: str) -> dict[int, Path]:
    """Return every version of a probe set that is kept, by content hash, the first one first."""
    first = _file(folder, name)
    if not first.is_file():
        return {}
    others = folder.glob(f"{glob.escape(first.stem)}.{'[0-9a-f]' * 16}.pt")
    found = {_signed(int(path.stem.rsplit(".", 1)[-1], 16)): path for path in sorted(others)}
    return {ProbeSet.load(first).fingerprint: first} | found


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _last(buffer: ArtifactBuffer, name: str) -> int | None:
    """Return the content hash of what the last row of a source was measured on."""
    artifacts = [buffer[row] for row in buffer if row.endswith(f".{name}" if name else "")]
    rows = [(int(artifact.steps[-1]), artifact) for artifact in artifacts if len(artifact.steps)]
    if not rows:
        return None
    _, artifact = max(rows, key=lambda row: row[0])
    return int(artifact.series(("meta", "data"))[-1])
