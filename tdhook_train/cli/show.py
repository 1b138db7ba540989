"""``tdhook-train show``: one key over the steps, as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tdhook_train.cli.printing import Table, clean, columns_wide, on_terminal, say
from tdhook_train.cli.runs import Run, opened
from tdhook_train.errors import KeyMissingError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from tdhook_train.buffer import Artifact, ArtifactBuffer

__all__ = ["EXAMPLES", "show"]

EXAMPLES = (
    "tdhook-train show runs/demo                                     what there is",
    "tdhook-train show runs/demo probe/r2 --target action            steps x layers",
    "tdhook-train show runs/demo probe/r2 --layer module.3 --last 5  steps x targets",
    "tdhook-train show runs/demo attribution/actor_network.attr.observation",
    "tdhook-train show runs/demo probe/meta.cost | tail -1",
)
_MOST_STEPS = 24  # on a terminal
_CELL = 8  # characters of a column that takes its name in several lines
_ACROSS = ("layer", "feature", "target")  # which dimension the columns are, where there are several


def show(  # noqa: PLR0913 - what can be chosen
    run: Run,
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="ARTIFACT/KEY, e.g. probe/r2; all by default.", show_default=False),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Only of this target; the first by default.")] = None,
    layer: Annotated[str | None, typer.Option(help="Only of this layer, by its path or the end of it.")] = None,
    at: Annotated[
        list[str] | None, typer.Option(metavar="DIM=LABEL", help="Only at this label of any other dimension.")
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only the last so many rows.", show_default=False)] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Every column, also where the terminal is narrow.")] = False,
) -> None:
    """Show one key as a table, or which keys there are.

    A line is a step. Columns are the layers (else features, targets, or the last dimension). Values are averaged
    over the batch. A terminal is shown what fits, a pipe everything.
    """
    with opened(run) as buffer:
        if key is None:
            _index(buffer, list(buffer))
            return
        artifact, name = _found(buffer, key)
        if name is None:
            _index(buffer, [key.strip("/")])
            return
        wanted = _wanted(target, layer, at or ())
        _series(artifact, name, key, last).at(wanted).print(wide=wide or not on_terminal(), last=last)


def _index(buffer: ArtifactBuffer, names: Sequence[str]) -> None:
    rows = []
    for name in names:
        schema = buffer[name].schema
        for key, column in schema.columns.items():
            if key[0] != "meta":
                sizes = " ".join(f"{d}={n}" for d, n in zip(column.dims, column.shape, strict=True))
                rows.append([f"{name}/{'.'.join(key)}", str(column.dtype).removeprefix("torch."), sizes])
        rows += [[f"{name}/{'.'.join(key)}", "in files", ""] for key in schema.files]
    Table(["key", "dtype", "dims"], rows, text=("key", "dtype", "dims")).print()


def _found(buffer: ArtifactBuffer, given: str) -> tuple[Artifact, str | None]:
    """Return the artifact that a KEY names, and the dotted name of its key."""
    name, _, key = given.strip("/").partition("/")
    if name not in buffer:
        every = [f"{one}/{'.'.join(known)}" for one in buffer for known in buffer[one].schema.columns]
        ends = [one for one in every if one.endswith(f"/{given}")]
        hint = f"; did you mean {' or '.join(map(repr, ends[:3]))}?" if ends else did_you_mean(name, buffer)
        raise KeyMissingError(f"{buffer.path} has no artifact {name!r}{hint}")
    return buffer[name], key.replace("/", ".") or None


def _wanted(target: str | None, layer: str | None, at: Sequence[str]) -> dict[str, str]:
    wanted = {dim: label for dim, label in (("target", target), ("layer", layer)) if label is not None}
    for one in at:
        dim, equals, label = one.partition("=")
        if not equals:
            raise SettingsError(f"--at {one!r} is not of the form DIM=LABEL, such as feature=3")
        wanted[dim] = label
    return wanted


def _series(artifact: Artifact, name: str, shown: str, last: int | None) -> _Series:
    artifact.dims(name)  # refuses a key that is not known
    rows = artifact.last(len(artifact) if last is None else last, keys=[name, ("meta", "step"), ("meta", "run")])
    known = next((key for key in artifact.schema.columns if ".".join(key) == name), None)
    if known is None:
        raise SettingsError(f"{shown} is kept in files, which have no fixed shape; read it by buffer[...].series(...)")
    column, coords = artifact.schema.columns[known], artifact.coords
    values = rows[known]
    axes = {d: [str(label) for label in coords[d][:n]] for d, n in zip(column.dims, column.shape, strict=True)}
    runs = [artifact.runs[i] for i in rows["meta", "run"].tolist()] if artifact.runs else None
    return _Series(shown, rows["meta", "step"].tolist(), runs, values, axes, artifact.legend.get(_plain(known), {}), [])


def _plain(key: tuple[str, ...]) -> Any:
    return key[0] if len(key) == 1 else key


@dataclass
class _Series:
    """A key over steps, ``[steps, *axes]``, and what was done to it so far, in words."""

    name: str
    steps: list[int]
    runs: list[str] | None
    values: Tensor
    axes: dict[str, list[str]]
    legend: dict[int, str]
    said: list[str]

    def at(self, wanted: dict[str, str]) -> _Series:
        """Keep only some labels, average over the batch, and leave one dimension at most."""
        for dim, label in wanted.items():
            own = [name for name in self.axes if dim in (name, _short(name))]
            if not own:
                there = ", ".join(self.axes) or "none"
                raise SettingsError(f"{self.name} has no dimension {dim!r} to take {label!r} of; it has {there}")
            for name in own:
                self._take(name, _place(self.name, name, label, self.axes[name]))
        for name in [name for name in self.axes if _short(name) == "batch"]:
            self.values, count = self._averaged(name), len(self.axes.pop(name))
            self.said.append(f"mean over {count} rows of the batch")
        across = self._across()
        for name in [name for name in self.axes if name != across]:
            labels = self.axes[name]
            rest = f" (of {len(labels)}; {_option(name)} takes {', '.join(labels[1:4])}{', …' * (len(labels) > 4)})"
            self._take(name, 0, rest if len(labels) > 1 else "")
        return self

    def _across(self) -> str | None:
        short = {_short(name): name for name in reversed(self.axes)}
        return next((short[dim] for dim in _ACROSS if dim in short), next(reversed(self.axes), None))

    def _axis(self, name: str) -> int:
        return 1 + list(self.axes).index(name)

    def _averaged(self, name: str) -> Tensor:
        values = self.values.abs() if self.values.is_complex() else self.values
        return values.double().nanmean(self._axis(name))

    def _take(self, name: str, place: int, note: str = "") -> None:
        self.values = self.values.select(self._axis(name), place)
        self.said.append(f"{name} {self.axes.pop(name)[place]}{note}")

    def print(self, *, wide: bool, last: int | None) -> None:
        """Print it."""
        labels = next(iter(self.axes.values()), ["value"])
        values = self.values.reshape(len(self.steps), -1)
        room = (columns_wide() - 10) // (_CELL + 2)
        columns = list(range(len(labels) if wide else min(len(labels), max(1, room))))
        places = range(len(self.steps))
        if not wide and last is None and len(places) > _MOST_STEPS:
            places_kept = [round(i * (len(places) - 1) / (_MOST_STEPS - 1)) for i in range(_MOST_STEPS)]
        else:
            places_kept = list(places)
        say(clean(" · ".join([self.name, *self.said])))
        shape = _shape(values)
        cells = [[shape.format(values[i, j].item()) for j in columns] for i in places_kept]
        before = [[*([self.runs[i]] if self.runs else []), str(self.steps[i])] for i in places_kept]
        head = [*(["run"] if self.runs else []), "step"]
        rows = [[*own, *more] for own, more in zip(before, cells, strict=True)]
        Table([*head, *(labels[j] for j in columns)], rows, text=("run",)).print()
        if len(columns) < len(labels):
            say(f"{len(columns)} of {len(labels)} columns; --wide shows all")
        if len(places_kept) < len(places):
            say(f"{len(places_kept)} of {len(places)} rows; --last {len(places)} shows all")
        for code, meaning in self.legend.items():
            say(clean(f"{code}: {meaning}"))


def _short(dim: str) -> str:
    return dim.rsplit(".", 1)[-1]


def _option(dim: str) -> str:
    return f"--{_short(dim)}" if _short(dim) in ("target", "layer") else f"--at {_short(dim)}="


def _place(shown: str, dim: str, label: str, labels: Sequence[str]) -> int:
    if label in labels:
        return labels.index(label)
    ends = [i for i, known in enumerate(labels) if known.endswith(f".{label}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise SettingsError(f"{label!r} ends several {dim}s of {shown}: {', '.join(labels[i] for i in ends)}")
    raise SettingsError(f"{shown} has no {dim} {label!r}{did_you_mean(label, labels)}")


def _shape(values: Tensor) -> str:
    """Return the format of all numbers of a table."""
    if not values.is_floating_point():
        return "{}"
    finite = values[values.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    return "{:.3f}" if 0.01 <= largest < 1e5 or largest == 0 else "{:.3g}"
