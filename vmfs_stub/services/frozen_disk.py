"""One file of a VM in use as it is at one moment, and for as long as it is copied.

An ordinary file on a filesystem that lets files share their bytes is cloned: that takes a moment, and the filesystem
keeps what guests overwrite.  Everywhere else what guests are about to change is set aside (`set_aside`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from vmfs_stub.core.origin import Origin
from vmfs_stub.primary.aside_file import clone
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.set_aside import SetAside
from vmfs_stub.services.sources import KeptSource
from vmfs_stub.services.threads import Threads


@dataclass(frozen=True, slots=True)
class Clone:
    """What a disk had at the moment, as a file of its own."""

    fd: int
    label: str
    placeholder: None = None

    def fstat(self) -> os.stat_result:
        """stat of the clone; does not block."""
        return os.fstat(self.fd)


@dataclass(slots=True)
class FrozenDisk:
    """A kept source; ``st`` and ``mtime_ns`` are those of the moment, after `begin`; ``fd`` is of its private file.

    ``origin`` is the stored file that is to be.
    """

    source: KeptSource
    fd: int
    aside: SetAside | None
    origin: Origin
    files: FileCalls
    threads: Threads
    st: os.stat_result = field(init=False)
    mtime_ns: int = 0

    @property
    def disk(self) -> Disk:
        """The disk, which goes on."""
        return self.source.disk

    @property
    def copied(self) -> Disk | Clone:
        """What is copied."""
        return self.disk if self.aside is not None else Clone(self.fd, self.disk.label)

    @property
    def names(self) -> tuple[str, ...]:
        """Its names, relative to the VM."""
        return self.source.names

    @property
    def xattrs(self) -> dict[str, bytes]:
        """What users have put on it."""
        return self.source.xattrs

    async def catch(self) -> None:
        """No change of the disk is under way: clone it, or see that what was made ready is of its size.

        Raises OSError.
        """
        size = self.disk.fstat().st_size
        if size != self.origin.size:
            await self.expect(size)
        if self.aside is None:
            await self.threads.files(clone, self.files, self.disk.fd, self.fd)

    async def expect(self, size: int) -> None:
        """Make ready for a disk of ``size`` bytes.  Raises OSError."""
        self.origin = replace(self.origin, size=size)
        if self.aside is not None:
            await self.threads.files(self.aside.lay_out, size)
        await self.disk.changes.follow(self.origin)

    def begin(self) -> None:
        """The moment: nothing of the VM is being changed."""
        placeholder = self.disk.placeholder
        self.st = self.disk.fstat()
        self.mtime_ns = self.st.st_mtime_ns if placeholder is None else placeholder.mtime_ns
        if self.aside is not None:
            self.aside.begin(placeholder)
            self.disk.aside = self.aside

    def end(self) -> None:
        """The disk is copied, or is not to be: guests go on as if it had never been."""
        self.disk.aside = None

    async def close(self) -> None:
        """Give the private file back; nobody copies from it any more, nor knows that the disk was followed."""
        self.end()
        self.disk.changes.unfollow()
        if self.aside is None:
            os.close(self.fd)
        else:
            await self.aside.close()
