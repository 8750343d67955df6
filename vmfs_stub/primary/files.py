"""Every call on the backing filesystem goes through here, with a *site tag*.

A site says which call of which operation this is ("archive.punch", "recall.fill").  It costs nothing in
production; in tests a subclass makes exactly one site fail, and the outcome that is documented for it is checked.
Calls block: run them in a thread wherever the disk may be waited for.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class FileCalls:
    """Makes file calls; the seam at which tests inject failures."""

    def call(self, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function``; ``site`` names the place for fault injection.  Raises what the function raises."""
        return function(*args, **kwargs)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Release the space of a byte range, which then reads as zeros; the file's size stays.  Raises OSError."""
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def write_fully(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` (bytes).  Raises OSError; a prefix may then have been written."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        if count == 0:
            raise OSError(errno.EIO, "write made no progress")
        view = view[count:]
        offset += count


def sync_filesystem(fd: int) -> None:
    """Make everything of the filesystem that ``fd`` lies on durable.  Raises OSError."""
    if _libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def sync_directory(fd_or_path: int | str | os.PathLike[str]) -> None:
    """Make the entries of a directory durable.  Raises OSError."""
    if isinstance(fd_or_path, int):
        os.fsync(fd_or_path)
        return
    fd = os.open(fd_or_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
