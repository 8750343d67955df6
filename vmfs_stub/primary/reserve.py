"""Space that is kept back in the private directory, so that a full filesystem can still be archived from.

A placeholder frees its disk's space, but first needs a little for its map and record.  The reserve is a preallocated
file; what finds no room takes a slice of it and tries again, and it is filled up again when there is room.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from vmfs_stub.primary.files import FileCalls

RESERVE_SIZE: Final = 16 << 20
"""Bytes: the map of a disk of 256 GiB, which has two copies of a bit per block."""
_SLICE_SIZE: Final = 2 << 20
_FREE_FACTOR: Final = 4
"""It is filled up only while this many times its size is free."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class Reserve:
    """The reserve of one datastore; blocking, thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def fill(self, files: FileCalls) -> None:
        """Make it as large as it should be if there is ample room; what fails is logged, and tried the next time."""
        try:
            with self._lock:
                self._fill(files)
        except OSError as exc:
            log.warning("no space could be kept back in %s: %s", self._path, exc.strerror)

    def _fill(self, files: FileCalls) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = files.call("reserve.open", os.open, self._path, flags, 0o600)
        try:
            space = os.fstatvfs(fd)
            size = os.fstat(fd).st_size
            ample = space.f_bavail * space.f_frsize >= _FREE_FACTOR * (RESERVE_SIZE - size)
            if size < RESERVE_SIZE and ample:
                files.call("reserve.fill", os.posix_fallocate, fd, 0, RESERVE_SIZE)
        finally:
            os.close(fd)

    def lend(self, files: FileCalls, action: Callable[[], T]) -> T:
        """Do ``action``, which is whole or undone when it fails, again with more room as long as there is too little.

        Raises OSError, and what ``action`` raises.
        """
        while True:
            try:
                return action()
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._give_slice(files):
                    raise

    def _give_slice(self, files: FileCalls) -> bool:
        """Free a part only: whoever filled the filesystem is there to take what is free, too."""
        with self._lock:
            try:
                size = files.call("reserve.look", os.stat, self._path).st_size
            except FileNotFoundError:
                return False
            if size == 0:
                return False
            files.call("reserve.lend", os.truncate, self._path, max(0, size - _SLICE_SIZE))
            log.warning("the backing filesystem is full: archiving uses space that was kept back for it")
            return True
