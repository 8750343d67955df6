"""The exclusive use of one disk for an archive or a backup, until somebody opens it.

It rests on a write lease (F_SETLEASE): the kernel grants one only while nobody else has the file open, a program
outside the mount and one left over from an earlier mount included, and tells when somebody wants to open it.
"""

from __future__ import annotations

import errno
import fcntl

import trio

from vmfs_stub.core.errors import InUse, PrimaryIOError
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.paced_io import resume_read_ahead, stop_read_ahead
from vmfs_stub.services.disk import Disk


class Reservation:
    """The exclusive use of one disk for an archive or a backup, until somebody opens it.

    ``disk`` is not known to anyone else; ``scope`` is cancelled when an open wins.
    """

    def __init__(self, disk: Disk, scope: trio.CancelScope) -> None:
        self.disk = disk
        self.scope = scope
        self.lost = False
        self.ended = trio.Event()

    @property
    def is_intact(self) -> bool:
        """Whether still nobody else has opened the file; asks the kernel, does not block."""
        return not self.lost and has_lease(self.disk)


def take_lease(files: FileCalls, disk: Disk) -> None:
    """Take the write lease on a disk that nobody has open, which is read by the job alone.

    Raises InUse, PrimaryIOError.
    """
    watch_lease(files, disk)
    try:
        files.call("archive.advise", stop_read_ahead, disk.fd)
    except OSError as exc:
        raise PrimaryIOError(f"{disk.label}: the kernel takes no advice: {exc.strerror}") from exc


def watch_lease(files: FileCalls, disk: Disk) -> None:
    """Take the write lease on a disk that guests may have open through the mount, which is through this descriptor.

    Raises InUse when anybody else has it open, whose writes would not be seen here; PrimaryIOError.
    """
    try:
        files.call("archive.lease", fcntl.fcntl, disk.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as exc:
        if exc.errno == errno.EAGAIN:
            raise InUse(
                f"{disk.label} is open in some program, perhaps one left from an earlier mount or outside the mount; "
                "`fuser -v` on the file in the backing directory finds it"
            ) from exc
        if exc.errno == errno.EACCES:
            raise PrimaryIOError(
                f"{disk.label}: this process may not take a lease on another user's file: run as root with CAP_LEASE"
            ) from exc
        raise PrimaryIOError(f"{disk.label}: the backing filesystem grants no lease: {exc.strerror}") from exc


def has_lease(disk: Disk) -> bool:
    """Whether still nobody opened the file but through the mount; asks the kernel, does not block."""
    return fcntl.fcntl(disk.fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK


def end_watch(disk: Disk) -> None:
    """The end of `watch_lease`: let those in who wait."""
    fcntl.fcntl(disk.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def give_up_lease(disk: Disk) -> None:
    """Let those in who wait for the lease."""
    resume_read_ahead(disk.fd)
    fcntl.fcntl(disk.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
