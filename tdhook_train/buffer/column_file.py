"""One key's values on disk: a file that grows in place and is mapped into memory."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdhook_train.buffer.row import Key
from tdhook_train.errors import SchemaError

__all__ = ["ColumnFile", "file_name"]

_FORMATS = {torch.int64: "q", torch.float64: "d"}  # numbers that are stored without a tensor around them


def file_name(generation: int, index: int, key: Key) -> str:
    """Return a column's file name: its number tells it apart, the rest is for people."""
    readable = "".join(c if c.isalnum() or c in "-_." else "_" for c in ".".join(key))
    return f"{generation}.{index:03d}.{readable[:80]}.column"


class ColumnFile:
    """A file of equal records, the first dimension of :attr:`rows`.

    The file never shrinks while it may be mapped: reading beyond the end of a mapped file kills the process.

    Args:
        path: the file.
        shape: shape of one record.
        dtype: dtype of one record.
        writable: False maps a private copy, which needs no right to write and sees what others write.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, writable: bool) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self.writable = writable
        self.row_numel = torch.Size(shape).numel()
        self.row_bytes = self.row_numel * dtype.itemsize
        self.rows: Tensor
        self._format = _FORMATS.get(dtype, "")
        self._numbers: Any  # the same bytes, for struct

    def create(self) -> None:
        """Begin an empty file in place of one that a writer killed before its first row left there.

        The old file is not emptied, since a reader may have mapped it.
        """
        self.path.unlink(missing_ok=True)
        self.path.touch(exist_ok=False)

    def size(self) -> int:
        """Return how many records the file has room for; records of no bytes need none.

        Raises:
            SchemaError: the file is gone.
        """
        try:
            return self.path.stat().st_size // self.row_bytes if self.row_bytes else 2**62
        except FileNotFoundError:
            raise SchemaError(f"{self.path} is missing, though the manifest lists its key") from None

    def reserve(self, capacity: int) -> None:
        """Claim the blocks of ``capacity`` records.

        Raises:
            OSError: the disk is full. Under a mapping without blocks that would be a SIGBUS, which kills the training.
        """
        if capacity <= self.size() or not self.row_bytes:
            return
        start, end = self.path.stat().st_size, capacity * self.row_bytes
        fd = os.open(self.path, os.O_RDWR)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, start, end - start)
            else:  # macOS: written zeros are blocks too
                _write_zeros(fd, start, end)
        finally:
            os.close(fd)

    def give_back(self, capacity: int) -> None:
        """Release what lies beyond ``capacity`` records, which nobody has mapped yet."""
        if self.row_bytes and self.size() > capacity:
            os.truncate(self.path, capacity * self.row_bytes)

    def map(self, capacity: int) -> None:
        """Map the first ``capacity`` records; tensors of an earlier mapping stay valid."""
        # a tensor made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            self.rows = self._flat(capacity).view(capacity, *self.shape)
            if self._format and self.shape == ():
                self._numbers = self.rows.view(torch.uint8).numpy().data

    def _flat(self, capacity: int) -> Tensor:
        if not capacity * self.row_bytes:
            return torch.empty(0, dtype=self.dtype, device="cpu")
        size = capacity * self.row_numel
        # from_file keeps no descriptor open, which counts with tens of artifacts of tens of keys
        return torch.from_file(str(self.path), shared=self.writable, size=size, dtype=self.dtype, device="cpu")

    def put(self, index: int, value: Tensor | float) -> None:
        """Write one record."""
        if isinstance(value, Tensor):
            self.rows[index].copy_(value)
        else:
            struct.pack_into(self._format, self._numbers, index * 8, value)

    def number(self, index: int) -> int:
        """Return one record of whole numbers."""
        return int(struct.unpack_from(self._format, self._numbers, index * 8)[0])

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _write_zeros(fd: int, start: int, end: int, chunk_bytes: int = 2**20) -> None:
    for at in range(start, end, chunk_bytes):
        os.pwrite(fd, bytes(min(chunk_bytes, end - at)), at)
