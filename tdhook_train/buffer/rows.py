"""Rows on disk, as they are read: which there are, what they hold, and whether that is what was written."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, Literal, NoReturn

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.buffer.checks import Checks
from tdhook_train.buffer.column_file import ColumnFile, file_name
from tdhook_train.buffer.commit_file import BUSY, COMMITS, CommitFile
from tdhook_train.buffer.entry import Entry
from tdhook_train.buffer.places import Places
from tdhook_train.buffer.row import META, Key, key_name, show
from tdhook_train.buffer.row_files import RowFiles
from tdhook_train.errors import DamagedError, DamagedWarning, KeyMissingError, did_you_mean

__all__ = ["Damaged", "Rows", "nested"]

Damaged = Literal["raise", "skip"]


class Rows:
    """The rows of an artifact, in one file a key beside one of commit records.

    What counts as a row is what its record says, whatever killed the writer. Several processes may read while one
    writes: a row that is replaced while it is read is left out, which a second look at its record tells.

    Args:
        folder: where the files lie.
        entry: what a row looks like, and how many are kept.
        damaged: ``"raise"`` where something damaged is read, or ``"skip"`` such rows, with a warning at opening.
    """

    writable = False
    own = False  # whether every row was written here, so that nothing needs a second look

    def __init__(self, folder: Path, entry: Entry, *, damaged: Damaged = "raise") -> None:
        self.folder = folder
        self.entry = entry
        self.name = folder.name
        schema = entry.schema
        self._keys = [key for key in schema.columns if key not in META]
        self._columns = [
            ColumnFile(folder / file_name(i, c.key), c.shape, c.dtype, writable=self.writable)
            for i, c in enumerate(schema.columns[key] for key in self._keys)
        ]
        self._commits = CommitFile(folder / COMMITS, len(self._columns) + len(schema.files), writable=self.writable)
        self._files = RowFiles(folder, schema.files)
        self._checks = Checks(self._commits, self._columns)
        self._places = Places()
        self._skip = damaged == "skip"
        self.lock = RLock()  # held by who reads or writes, since threads may share an artifact
        self._left_out: set[int] = set()  # damaged places, each named in a warning
        self._prepare()
        self._map()
        self._count()
        if self._commits.cut:
            self._lose(f"{self._commits.path} was cut: of the rows behind place {self.capacity} no record is left")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.folder} is read where it lies: pass its path on, and open it there")

    def _prepare(self) -> None:
        """Make the files, where this begins them."""

    def _all_files(self) -> list[ColumnFile]:
        # the records come last: readers take the capacity from them, so the values have to be there already
        return [*self._columns, self._commits]

    @property
    def row_bytes(self) -> int:
        """What a row takes up, without its files."""
        return sum(file.row_bytes for file in self._all_files())

    # --- which rows there are

    def _lose(self, what: str) -> None:
        warnings.warn(what, DamagedWarning, stacklevel=3)

    def _map(self) -> None:
        room = self._commits.size()
        if not room:
            raise DamagedError(f"{self._commits.path} is missing or was cut: no row of {self.name!r} can be told")
        self._commits.map(room)
        for column in self._columns:
            column.map(min(room, column.size()))
        self.capacity = min([room, *(len(column.rows) for column in self._columns)])

    def _count(self) -> None:
        self._changes = self._commits.changes  # before the words: what is dropped from now on is seen next time
        words = self._commits.words.clone()
        places = ((words != 0) & (words != BUSY)).nonzero()[:, 0]
        held, bad = self._checks.records(places, words[places])
        # before the last row there is no place that was never used; a writer may have come between two looks
        unused = (words[: int(places[-1])] == 0).nonzero()[:, 0] if len(places) else places
        unused = unused[self._commits.words[unused] == 0]
        places = places[held]
        self._leave_out([*bad.tolist(), *unused.tolist(), *self._unreadable(places, words[places])])
        self._places.read(places, words[places], self._left_out)

    def refresh(self) -> bool:
        """Take in what another process has written since, and return whether there was anything."""
        if self._commits.replaced():
            return False  # of a run that was deleted, what is mapped can still be read
        if self._commits.size() > len(self._commits.words):
            self._map()
        if self._changes != self._commits.changes or not self._places.dense:
            self._count()
            return True
        return self._take_more()

    def _take_more(self) -> bool:
        start, room = len(self), len(self._commits.words)
        if start == room or self._commits.word(start) <= 0:
            return False
        words = self._commits.words[start:].clone()
        empty = (words <= 0).nonzero()[:1, 0]
        words = words[: int(empty) if len(empty) else None]
        places = torch.arange(start, start + len(words), device="cpu")
        held, bad = self._checks.records(places, words)
        if len(bad) or not bool(held.all()) or self._unreadable(places, words):
            self._count()
        else:
            self._places.extend(places.tolist())
        return True

    def _unreadable(self, places: Tensor, words: Tensor) -> list[int]:
        if not self._skip:
            return []
        found = self._checks.values(tuple(range(len(self._columns))), places, words)
        bad = {place for each in found.values() for place in each.tolist()}
        return [*bad, *(place for place, _ in self._broken_files(places, words))]

    def _leave_out(self, places: Iterable[int]) -> None:
        if new := set(places) - self._left_out:
            self._left_out |= new
            warnings.warn(f"{self.folder}: {_several('row', new)} damaged and left out", DamagedWarning, stacklevel=2)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def dense(self) -> bool:
        """Whether row ``i`` lies in place ``i``."""
        return self._places.dense

    def places(self, numbers: Tensor) -> Tensor:
        """Return where rows lie, by number."""
        return self._places.of(numbers)

    def index(self) -> tuple[Tensor, Tensor]:
        """Return the place and the word of every row, in the order in which they were written."""
        places = self._places.all()
        return places, self._commits.words[: len(places)].clone() if self.dense else self.words(places)

    def words(self, places: Tensor) -> Tensor:
        """Return what tells the rows in these places from all that ever were there."""
        return self._commits.words[places]

    @property
    def last_attempt(self) -> int:
        """The highest attempt that wrote a row, 0 where there is none."""
        attempts = self._commits.meta["meta", "attempt"][self.index()[0]]
        return int(attempts.max()) if len(attempts) else 0

    # --- what they hold

    def views(self) -> TensorDict:
        """Return everything as views of the files, place by place, whether or not a row is there."""
        values = {key: column.rows[: self.capacity] for key, column in zip(self._keys, self._columns, strict=True)}
        values |= {key: value[: self.capacity] for key, value in self._commits.meta.items()}
        return nested(values, [self.capacity])

    def column(self, key: Key, places: Tensor, words: Tensor) -> tuple[Any, Tensor]:
        """Return one key of the rows, and which of them were still there after reading.

        Raises:
            KeyMissingError: there is no such key.
            DamagedError: something of that is damaged.
        """
        value: Any
        if key in META:
            value = self._commits.meta[key][places]
        elif key in self._files.keys:
            value = [self._file(key, place, word) for place, word in zip(places.tolist(), words.tolist(), strict=True)]
        else:
            i = self._column_of(key)
            self._check((i,), places, words)
            value = self._columns[i].rows[places]
        return value, self._still(places, words)

    def table(self, places: Tensor, words: Tensor, keys: Sequence[Key] | None = None) -> TensorDictBase:
        """Return copies of the rows, batch first, as far as they were still there after reading.

        Args:
            places: of the rows.
            words: what told these rows from others when they were looked up.
            keys: what to read; None reads all.

        Raises:
            KeyMissingError: there is no such key.
            DamagedError: something of that is damaged.
        """
        wanted = [*self._keys, *self._files.keys, *META] if keys is None else list(keys)
        columns = {key: self._column_of(key) for key in wanted if key not in META and key not in self._files.keys}
        self._check(tuple(columns.values()), places, words)
        values = {key: self._columns[i].rows[places] for key, i in columns.items()}
        values |= {key: self._commits.meta[key][places] for key in wanted if key in META}
        files = {key: self.column(key, places, words)[0] for key in wanted if key in self._files.keys}
        still = self._still(places, words)
        rows: TensorDictBase = nested(values, [len(places)])
        if files:
            rows = _ragged(rows, files) if len(places) else rows
        return rows if bool(still.all()) else rows[still]

    def _still(self, places: Tensor, words: Tensor) -> Tensor:
        return (words > 0) & (self._commits.words[places] == words)

    def _column_of(self, key: Key) -> int:
        if key not in self._keys:
            hint = did_you_mean(key_name(key), map(key_name, (*self._keys, *META)))
            raise KeyMissingError(f"{self.name!r} has no key {key_name(key)!r}{hint}")
        return self._keys.index(key)

    def _check(self, columns: tuple[int, ...], places: Tensor, words: Tensor) -> None:
        if self.own or not columns:
            return
        for i, bad in self._checks.values(columns, places, words).items():
            raise DamagedError(self._damage(i, bad))

    def _damage(self, column: int, places: Tensor) -> str:
        file, steps = self._columns[column], self._commits.meta["meta", "step"][places].unique().tolist()
        key, cut = show(self._keys[column]), bool((places >= len(file.rows)).any())
        what = f"{file.path} was cut and" if cut else f"{file.path}"
        return (
            f"{what} does not hold what was written: key {key!r} of {_several('row', places.tolist())} damaged "
            f"({_several('step', steps, verb=False)}); the rest can be read, with open(path, damaged='skip') without "
            "these rows"
        )

    def _file(self, key: Key, place: int, word: int) -> Any:
        column = len(self._columns) + self._files.keys.index(key)
        value = self._files.read(word, key, int(self._commits.expected(column, torch.tensor([place]))))
        if value is None and self._commits.word(place) == word:
            raise DamagedError(f"{self.folder}: the file of key {show(key)!r} of row {place} is missing")
        return value

    def _broken_files(self, places: Tensor, words: Tensor) -> Iterator[tuple[int, str]]:
        for key in self._files.keys:
            for place, word in zip(places.tolist(), words.tolist(), strict=True):
                try:
                    self._file(key, place, word)
                except DamagedError as error:
                    yield place, str(error)

    def verify(self) -> list[str]:
        """Return what is damaged, in words, having read everything."""
        places, words = self.index()
        found = [f"{self.folder}: {_several('row', self._left_out)} damaged"] if self._left_out else []
        checks = Checks(self._commits, self._columns)
        for i in range(len(self._columns)):
            found += [self._damage(i, bad) for bad in checks.values((i,), places, words).values()]
        return found + [text for _, text in self._broken_files(places, words)]


def _several(what: str, numbers: Iterable[int], *, verb: bool = True) -> str:
    ordered = sorted(numbers)
    shown = ", ".join(map(str, ordered[:8])) + (", …" if len(ordered) > 8 else "")
    one = len(ordered) == 1
    return f"{what}{'' if one else 's'} {shown}" + (f" {'is' if one else 'are'}" if verb else "")


def _ragged(rows: TensorDict, files: dict[Key, list[Any]]) -> TensorDictBase:
    each = []
    for i, row in enumerate(rows.unbind(0)):
        one = row.clone(recurse=False)
        for key, values in files.items():
            one[key] = NonTensorData(values[i]) if isinstance(values[i], (bytes, type(None))) else values[i]
        each.append(one)
    return TensorDict.lazy_stack(each)


def nested(values: dict[Key, Tensor], batch_size: list[int]) -> TensorDict:
    """Return a TensorDict of values given by whole keys."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        branch = tree
        for part in key[:-1]:
            branch = branch.setdefault(part, {})
        branch[key[-1]] = value
    return TensorDict(tree, batch_size=batch_size, device=torch.device("cpu"))
