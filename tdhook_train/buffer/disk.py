"""What the file system refuses for want of room, said as such."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tdhook_train.errors import DiskError

__all__ = ["disk_errors"]

_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def disk_errors(what: str, path: Path) -> Iterator[None]:
    """Raise a :class:`DiskError` where there is no room; other errors pass as they are.

    Args:
        what: what there was no room for.
        path: where.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _ROOM or isinstance(error, DiskError):
            raise
        raise DiskError(error.errno, f"{error.strerror}: {what}", str(path)) from error
