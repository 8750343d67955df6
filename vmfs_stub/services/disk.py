"""One open disk: reads and writes of guests on a backing file that may be a placeholder.

A read makes its range resident first; a write of whole blocks needs nothing but that the VM is claimed here, a write
that covers a block partly makes that block resident first.  Every handle of an inode shares this object and its one
descriptor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from vmfs_stub.core.chunking import BLOCK_SIZE
from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.residency import blocks_merged
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.services.changes import TO_THE_END, DiskChanges
from vmfs_stub.services.disk_name import DiskName
from vmfs_stub.services.file_reads import FileReads
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.set_aside import SetAside
from vmfs_stub.services.threads import Threads
from vmfs_stub.services.write_gate import WriteGate


def _nothing(disk: Disk) -> None:
    """No hydration: nobody asked for it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who opened a disk: process id, user id, executable and control group (None where they cannot be told)."""

    pid: int
    uid: int
    executable: str | None
    cgroup: str | None


class Disk:
    """An open regular file of the backing directory.

    ``fd`` is its only descriptor here; ``changes`` is what changed since the last backup; ``placeholder`` is None once
    everything is back; ``open_count`` counts guests'
    handles, ``kept`` our own reasons to keep it open; ``writable`` is false where the file can only be read;
    ``label`` is what messages call it; ``is_orphan`` is true once its last name is gone, or about to go, and a link in
    the private directory keeps it.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        reads: FileReads,
        recall: RecallService,
        fd: int,
        name: DiskName,
        writable: bool,
        changes: DiskChanges,
    ) -> None:
        self._files = files
        self._threads = threads
        self._reads = reads
        self._recall = recall
        self.fd = fd
        self.ino = os.fstat(fd).st_ino
        self.name = name
        self.label = str(name)
        self.writable = writable
        self.changes = changes
        self.placeholder: Placeholder | None = None
        self.gate = WriteGate()
        self.aside: SetAside | None = None
        """Where what is about to be changed goes first, while a backup copies the disk as it was."""
        self.is_backed_up = False
        """Whether a backup of it runs while it may be used."""
        self.open_count = 0
        self.kept = 0
        self.is_orphan = False
        self.on_recall: Callable[[Disk], None] = _nothing
        """Called after a guest's read had to recall something."""

    def fstat(self) -> os.stat_result:
        """stat of the backing file; an open file's inode is in memory, so this does not block."""
        return os.fstat(self.fd)

    @property
    def has_name(self) -> bool:
        """Whether the file has a name that programs can see.  Does not block."""
        return self.fstat().st_nlink > self.is_orphan

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Up to ``size`` bytes at ``offset``, fewer only at end of file.

        Raises RecallError, RecallsHeld, StoreError, IntegrityError, PrimaryError.
        """
        self._recall.guests.note()
        placeholder = self.placeholder
        if placeholder is not None:
            placeholder.check()
            length = min(size, self.fstat().st_size - offset)
            if length <= 0:
                return b""
            if not placeholder.is_resident(offset, length):
                await self._recall.make_resident(placeholder, offset, length)
                self.on_recall(self)
        try:
            return await self._reads.read(self.fd, size, offset)
        except OSError as exc:
            raise PrimaryIOError(f"{self.label}: reading the backing file failed: {exc.strerror}") from exc

    async def write(self, offset: int, data: bytes) -> int:
        """Write ``data`` at ``offset``; the number of bytes written.

        Raises ClaimedElsewhere, RecallError, StoreError, IntegrityError, OSError.
        """
        self._recall.guests.note()
        await self._claimed()
        while (placeholder := self.placeholder) is not None:
            placeholder.check()
            await self._recall_merged(placeholder, offset, len(data))
            if self.placeholder is not placeholder:
                continue
            await self.gate.enter()
            try:
                await self._will_change(offset, len(data))
                written = await placeholder.write(offset, data)
            finally:
                self.gate.leave()
            if written is not None:
                return written
        await self.gate.enter()
        try:
            await self._will_change(offset, len(data))
            return await self._threads.files(self._files.call, "write.data", os.pwrite, self.fd, data, offset)
        finally:
            self.gate.leave()

    async def _will_change(self, offset: int, length: int) -> None:
        """Within the gate: these bytes are about to be changed.  Raises OSError."""
        while not self.changes.changing(offset, length):
            await self.changes.begin()
        await self._set_aside(offset, length)

    async def _set_aside(self, offset: int, length: int) -> None:
        if self.aside is not None:
            await self.aside.keep(offset, length, self.placeholder)

    async def _claimed(self) -> None:
        """Return when nobody else can run the VM, if this is a placeholder: it is about to be changed."""
        placeholder = self.placeholder
        if placeholder is not None and not self._recall.claims.use(placeholder.maps.record.vm_id):
            await self._recall.claim(placeholder)

    async def _recall_merged(self, placeholder: Placeholder, offset: int, length: int) -> None:
        """Make the blocks resident that a write covers only partly; whole blocks do not need the store."""
        size = self.fstat().st_size
        for block in blocks_merged(offset, length, size=size):
            if not placeholder.is_resident(block * BLOCK_SIZE, 1):
                await self._recall.make_resident(placeholder, block * BLOCK_SIZE, 1)

    async def truncate(self, size: int) -> None:
        """Cut or extend the file to ``size`` bytes.  Raises as `write`, and MapFrozen."""
        await self._claimed()
        await self.gate.enter()
        try:
            while not self.changes.changing_from(size):
                await self.changes.begin()
            await self._set_aside(size, TO_THE_END)
            if self.placeholder is None or not await self.placeholder.truncate(size):
                await self._threads.files(self._files.call, "write.truncate", os.ftruncate, self.fd, size)
        finally:
            self.gate.leave()

    async def sync(self, *, data_only: bool) -> None:
        """Make all that was written durable.  Raises MapFrozen, OSError."""
        placeholder = self.placeholder
        if placeholder is not None:
            await placeholder.sync()
            if data_only and self.placeholder is placeholder:
                return
        try:
            await self._threads.files(self._files.call, "sync.file", os.fdatasync if data_only else os.fsync, self.fd)
        except OSError as exc:
            # The kernel tells of lost data once: the next sync would believe that all is well.
            if placeholder is not None and not placeholder.ended:
                raise placeholder.freeze(exc) from exc
            await self.changes.doubt()
            raise

    async def set_times(self, *, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Set the given times (nanoseconds since the epoch), leave the others.  Raises OSError."""
        now = self.fstat()
        atime_ns = now.st_atime_ns if atime_ns is None else atime_ns
        placeholder = self.placeholder
        if placeholder and mtime_ns is not None and await placeholder.set_times(atime_ns=atime_ns, mtime_ns=mtime_ns):
            return
        mtime_ns = now.st_mtime_ns if mtime_ns is None else mtime_ns
        await self._threads.files(self._files.call, "write.times", os.utime, self.fd, ns=(atime_ns, mtime_ns))
