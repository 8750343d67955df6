"""What the mount needs from the services below it, as Protocols.

The real ones are services.disks.Disks and services.threads.Threads; tests bring plain files.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

from vmfs_stub.services.disk import Caller

P = ParamSpec("P")
T = TypeVar("T")


class StatOverride(Protocol):
    """What a placeholder reports instead of what the backing file says."""

    @property
    def blocks(self) -> int:
        """st_blocks, in units of 512 bytes."""

    @property
    def mtime_ns(self) -> int:
        """st_mtime in ns."""


class Disk(Protocol):
    """An open regular file; one for all handles of an inode."""

    @property
    def ino(self) -> int:
        """The backing inode number."""

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Read; short only at end of file."""

    async def write(self, offset: int, data: bytes) -> int:
        """Write all of ``data``; returns its length."""

    async def truncate(self, size: int) -> None:
        """Set the size in bytes."""

    async def sync(self, *, data_only: bool) -> None:
        """Make durable what was written before the call."""


DiskT = TypeVar("DiskT", bound=Disk)


class PathDisks(Protocol):
    """Operations on regular files that nobody needs to have open."""

    def stat_override(self, st: os.stat_result) -> StatOverride | None:
        """What a placeholder reports; None for a plain file; never blocks."""

    async def truncate(self, path_fd: int, size: int) -> None:
        """Truncate by O_PATH descriptor."""

    async def set_times(self, path_fd: int, *, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Set times; None leaves one as it is."""

    async def removing(self, path_fd: int) -> bool:
        """Called before a link is removed or replaced; whether it is the last."""

    async def removed(self, path_fd: int) -> None:
        """Called after it, also when it failed, once for each `removing` that returned."""


class Disks(PathDisks, Protocol[DiskT]):
    """Opens regular files."""

    async def open(self, path_fd: int, *, writable: bool, caller: Caller) -> DiskT:
        """Open by O_PATH descriptor; counts references."""

    async def release(self, disk: DiskT) -> None:
        """Give back one open."""


class OpenedDisk(NamedTuple):
    """A disk and how to give it back."""

    disk: Disk
    release: Callable[[], Awaitable[None]]


Opener = Callable[[int, bool, Caller], Awaitable[OpenedDisk]]


def opener(disks: Disks[DiskT]) -> Opener:
    """``disks.open`` with its ``release`` bound, so that the kind of disk matters to nobody else."""

    async def open_disk(path_fd: int, writable: bool, caller: Caller) -> OpenedDisk:
        disk = await disks.open(path_fd, writable=writable, caller=caller)
        return OpenedDisk(disk, partial(disks.release, disk))

    return open_disk


class FileThreads(Protocol):
    """Runs blocking file calls off the event loop."""

    async def files(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` in a worker thread of the file limiter."""


class FileCalls(Protocol):
    """Makes one file call under a site tag, so that a test can make exactly that call fail."""

    def call(self, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function``."""
