"""Calls on files that Python's os module does not offer, or offers in pieces.

They are made through `FileCalls`, with a *site tag*, as every call on the backing filesystem (core/sites.py).
Calls block: run them in a thread wherever the disk may be waited for.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from vmfs_stub.core.sites import FileCalls as FileCalls
from vmfs_stub.directory_sync import sync_directory as sync_directory
from vmfs_stub.paced_io import write_buffers

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_RENAME_NOREPLACE = 0x1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Release the space of a byte range, which then reads as zeros; the file's size stays.  Raises OSError."""
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def write_fully(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` (bytes).  Raises OSError; a prefix may then have been written."""
    write_buffers(fd, [data], offset, paced=False)


def read_fully(files: FileCalls, site: str, fd: int, length: int, offset: int) -> bytes:
    """Read ``length`` bytes at ``offset``, fewer only at end of file: what is short elsewhere is read on.

    Raises OSError.
    """
    data = files.call(site, os.pread, fd, length, offset)
    while data and len(data) < length:
        more = files.call(site, os.pread, fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def read_ahead(path: Path) -> None:
    """Have the kernel read all of a file into its cache, without waiting for it.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)


def sync_filesystem(directory: Path) -> None:
    """Make everything of the filesystem that ``directory`` lies on durable.  Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(fd)


def rename_new(old_dir_fd: int, old: str, new_dir_fd: int, new: str) -> None:
    """Rename, and replace nothing: FileExistsError when there is such a name.  Raises OSError."""
    old_name, new_name = os.fsencode(old), os.fsencode(new)
    if _libc.renameat2(old_dir_fd, old_name, new_dir_fd, new_name, ctypes.c_uint(_RENAME_NOREPLACE)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), new)
