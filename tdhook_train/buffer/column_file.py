"""One key's values on disk: a file that grows in place and is mapped into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor

from tdhook_train.buffer.row import Key, file_part

__all__ = ["ColumnFile", "file_name", "sync"]


def file_name(index: int, key: Key) -> str:
    """Return a column's file name: its number tells it apart, the rest is for people."""
    return f"{index:03d}.{file_part(key)}.column"


class ColumnFile:
    """A file of equal records, the first dimension of :attr:`rows`.

    The file never shrinks while it may be mapped: reading beyond the end of a mapped file kills the process.

    Args:
        path: the file.
        shape: shape of one record.
        dtype: dtype of one record.
        writable: False maps a private copy, which needs no right to write and sees what others write.
    """

    lead: ClassVar[int] = 0  # records before that of the first row

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, writable: bool) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self.writable = writable
        self.row_numel = torch.Size(shape).numel()
        self.row_bytes = self.row_numel * dtype.itemsize
        self.rows: Tensor
        self._inode = -1  # of the file that is mapped
        self.bytes: memoryview  # of `rows`
        self.front: memoryview  # of the records before them

    def create(self) -> None:
        """Begin an empty file in place of one that a writer killed before its first row left there.

        The old file is not emptied, since a reader may have mapped it.
        """
        self.path.unlink(missing_ok=True)
        self.path.touch(exist_ok=False)

    def size(self) -> int:
        """Return how many whole records the file has room for, none if it is gone; records of no bytes need none."""
        if not self.row_bytes:
            return 2**62
        try:
            return max(0, self.path.stat().st_size // self.row_bytes - self.lead)
        except FileNotFoundError:
            return 0

    def replaced(self) -> bool:
        """Return whether the file that is mapped has been deleted since."""
        try:
            return self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            return True

    def reserve(self, capacity: int) -> None:
        """Claim the blocks of ``capacity`` records.

        Raises:
            OSError: the disk is full. Under a mapping without blocks that would be a SIGBUS, which kills the training.
        """
        if capacity <= self.size() or not self.row_bytes:
            return
        start, end = self.path.stat().st_size, (self.lead + capacity) * self.row_bytes
        fd = os.open(self.path, os.O_RDWR)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, start, end - start)
            else:  # macOS: written zeros are blocks too
                _write_zeros(fd, start, end)
        finally:
            os.close(fd)

    def fill_holes(self) -> None:
        """Claim the blocks that a copy left out: writing into such a hole is as deadly as writing behind the end.

        Raises:
            OSError: the disk is full.
        """
        size = self.path.stat().st_size
        if size and hasattr(os, "posix_fallocate"):
            with self.path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def used_behind(self, records: int) -> bool:
        """Return whether anything but zeros lies behind so many records."""
        if self.size() <= records or not self.row_bytes:
            return False
        with self.path.open("rb") as file:
            file.seek((self.lead + records) * self.row_bytes)
            return any(any(part) for part in iter(lambda: file.read(2**20), b""))

    def give_back(self, capacity: int) -> None:
        """Release what lies beyond ``capacity`` records, which nobody has mapped yet."""
        if self.row_bytes and self.size() > capacity:
            os.truncate(self.path, (self.lead + capacity) * self.row_bytes)

    def map(self, capacity: int) -> None:
        """Map the first ``capacity`` records; tensors of an earlier mapping stay valid."""
        # a tensor made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            self._inode = self.path.stat().st_ino if self.path.exists() else -1
            flat = self._flat(self.lead + capacity)
            self.rows = flat.view(self.lead + capacity, *self.shape)[self.lead :]
            everything, lead_bytes = flat.view(torch.uint8).numpy().data, self.lead * self.row_bytes
            self.front, self.bytes = everything[:lead_bytes], everything[lead_bytes:]

    def _flat(self, capacity: int) -> Tensor:
        if not capacity * self.row_bytes:
            return torch.empty(0, dtype=self.dtype, device="cpu")
        with self.path.open("r+b" if self.writable else "rb"):
            pass  # says what is wrong with the path better than torch does
        size = capacity * self.row_numel
        # from_file keeps no descriptor open, which counts with tens of artifacts of tens of keys
        return torch.from_file(str(self.path), shared=self.writable, size=size, dtype=self.dtype, device="cpu")

    def checksum(self, index: int) -> int:
        """Return the CRC-32 of one record."""
        return crc32(self.bytes[index * self.row_bytes : (index + 1) * self.row_bytes])

    def checksums(self, indices: Tensor) -> Tensor:
        """Return the CRC-32 of several records, int64."""
        return torch.tensor([self.checksum(i) for i in indices.tolist()], dtype=torch.int64, device="cpu")


def sync(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk; one that is gone needs nothing."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_zeros(fd: int, start: int, end: int, chunk_bytes: int = 2**20) -> None:
    for at in range(start, end, chunk_bytes):
        os.pwrite(fd, bytes(min(chunk_bytes, end - at)), at)
