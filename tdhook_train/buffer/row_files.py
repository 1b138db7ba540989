"""Values that no column can hold, since their shape differs from row to row: a file a row and key."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_train.buffer.column_file import sync
from tdhook_train.buffer.row import Key, Value, file_part, show
from tdhook_train.errors import DamagedError, SchemaError

__all__ = ["RowFiles"]

_NAME = re.compile(r"([0-9a-f]{16})\.\d+\..*")


class RowFiles:
    """The files of one artifact's rows, named after the word that commits their row.

    Args:
        folder: the artifact's folder.
        keys: whose values are files.
    """

    def __init__(self, folder: Path, keys: tuple[Key, ...]) -> None:
        self.folder = folder
        self.keys = keys
        self._unsynced: list[Path] = []
        self._bytes = 0

    def dumped(self, row: Mapping[Key, Value]) -> dict[Key, tuple[bytes, bool]]:
        """Return what the files of a row will hold, and whether that is the value itself."""
        values = {key: row[key] for key in self.keys}
        return {
            key: (value, True) if isinstance(value, bytes) else (_dumped(key, value), False)
            for key, value in values.items()
        }

    def write(self, word: int, files: Mapping[Key, tuple[bytes, bool]]) -> list[int]:
        """Write the files of a row, each at once or not at all, and return their checksums in the order of keys."""
        return [self._write(self._path(word, key, raw=files[key][1]), files[key][0]) for key in self.keys]

    def _write(self, path: Path, data: bytes) -> int:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._bytes += len(data)
        self._unsynced.append(path)
        return crc32(data)

    def _path(self, word: int, key: Key, *, raw: bool) -> Path:
        return self.folder / f"{word:016x}.{self.keys.index(key)}.{file_part(key)}{'' if raw else '.pt'}"

    def read(self, word: int, key: Key, checksum: int) -> Value | None:
        """Return a value, None where the row was dropped.

        Raises:
            DamagedError: the file is not what was written.
        """
        path = next((p for raw in (False, True) if (p := self._path(word, key, raw=raw)).exists()), None)
        try:
            data = path.read_bytes() if path is not None else None
        except FileNotFoundError:
            data = None
        if data is None or path is None:
            return None
        if checksum not in (0, crc32(data)):
            raise DamagedError(f"{path} differs from its checksum")
        if path == self._path(word, key, raw=True):
            return data
        return _loaded(data)

    def bytes(self) -> int:
        """Return how much the files take up."""
        return self._bytes

    def drop(self, words: Iterable[int]) -> None:
        """Delete the files of rows that were dropped; who has one open can go on reading it."""
        for word in words:
            for key in self.keys:
                for path in (self._path(word, key, raw=raw) for raw in (False, True)):
                    if path.exists():
                        self._bytes -= path.stat().st_size
                        path.unlink()

    def sweep(self, words: Tensor) -> None:
        """Delete the files of all rows but these: what a killed writer left half-done."""
        if not self.keys:
            return
        known, self._bytes = set(words.tolist()), 0
        for word, file in self._files():
            if word in known:
                self._bytes += file.stat().st_size
            else:
                file.unlink()
        for file in self.folder.glob(".*.tmp"):
            file.unlink()

    def _files(self) -> list[tuple[int, Path]]:
        found = ((_NAME.fullmatch(file.name), file) for file in self.folder.iterdir())
        return [(int(match[1], 16), file) for match, file in found if match]

    def sync(self) -> None:
        """Wait until all files are on the disk."""
        while self._unsynced:
            sync(self._unsynced.pop())


def _dumped(key: Key, value: Tensor | TensorDictBase) -> bytes:
    file = io.BytesIO()
    try:
        if isinstance(value, Tensor):
            plain: Any = _owned(value)
        else:
            plain = {"batch_size": list(value.batch_size), "values": value.apply(_owned).to_dict()}
        torch.save(plain, file)
    except RuntimeError as error:
        raise SchemaError(f"key {show(key)!r} holds what no file can hold: {error}") from None
    return file.getvalue()


def _owned(value: Tensor) -> Tensor:
    # saving a view would save all that it is a view of
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _loaded(data: bytes) -> Tensor | TensorDictBase:
    value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return value if isinstance(value, Tensor) else TensorDict(value["values"], batch_size=value["batch_size"])
