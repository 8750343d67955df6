"""All open disks of a datastore: who has them open, and who may archive them.

Invariants:
* one Disk, one descriptor per inode, however many handles guests have;
* a reservation (archive, backup) and an open exclude each other: an open before the commit point makes the reservation
  give up, waits until it is gone, and then finds the file as it was;
* a reservation also holds a write lease on the file, which the kernel grants only while nobody at all has it open, a
  program outside the mount and one left over from an earlier mount included.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vmfs_stub.core.chunking import BLOCK_SIZE
from vmfs_stub.core.errors import InUse, VmfsStubError
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PlaceholderMaps, PrivateState
from vmfs_stub.primary.tree import reopen
from vmfs_stub.services.changes import Changes
from vmfs_stub.services.disk import Caller, Disk
from vmfs_stub.services.disk_closer import DiskCloser
from vmfs_stub.services.disk_name import DiskName
from vmfs_stub.services.disk_opener import DiskOpener
from vmfs_stub.services.file_reads import FileReads
from vmfs_stub.services.placeholder_ender import PlaceholderEnder
from vmfs_stub.services.placeholder_index import PlaceholderIndex, StatOverride
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.removals import Removals
from vmfs_stub.services.reservation import Reservation, give_up_lease, take_lease
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

_DESCRIPTORS_PER_DISK = 6
"""The file, both maps of a placeholder, and that of what changed; what is mapped into memory takes two."""
_DISKS_SHARE = 0.25
"""Of the descriptors that this process may have, how many open disks may hold; the mount's nodes take a half."""


class Disks:
    """The registry of open disks.

    ``on_damage`` is called with a disk's label when what belongs to it is damaged, so that it cannot be opened.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        reads: FileReads,
        recall: RecallService,
        ender: PlaceholderEnder,
        private: PrivateState,
        backing: Path,
        placeholders: PlaceholderIndex,
        changes: Changes,
        on_damage: Callable[[str, VmfsStubError], None],
    ) -> None:
        self._files = files
        self._threads = threads
        self._guests = recall.guests
        self.placeholders = placeholders
        self._changes = changes
        self._open: dict[int, Disk] = {}
        self._reservations: dict[int, Reservation] = {}
        self._ino_locks: dict[int, trio.Lock] = {}
        self.on_recall: Callable[[Disk], None] = lambda disk: None
        """Called with a disk of which a guest's read had to recall something, or nothing is absent any more.

        Hydration sets it.
        """
        self.on_open: Callable[[Disk, Caller], None] | None = None
        """Called when somebody opened a disk through the mount."""
        self.attributes_changed: Callable[[int], object] = lambda ino: None
        """Called with an inode number when stat of it changes without a request that changes it; the mount sets it."""
        self._opener = DiskOpener(
            files=files,
            threads=threads,
            reads=reads,
            recall=recall,
            ender=ender,
            private=private,
            backing=backing,
            placeholders=placeholders,
            on_recall=self._recalled,
            changes=changes,
            on_damage=on_damage,
        )
        self._removals = Removals(
            files=files,
            threads=threads,
            ender=ender,
            private=private,
            placeholders=placeholders,
            changes=changes,
            opened=self.get,
            ino_lock=self._unreserved,
        )
        self._closer = DiskCloser(
            threads=threads,
            recall=recall,
            ender=ender,
            removals=self._removals,
            placeholders=placeholders,
            attributes_changed=self._changed,
        )

    def _recalled(self, disk: Disk) -> None:
        self.on_recall(disk)

    def _changed(self, ino: int) -> None:
        self.attributes_changed(ino)

    # Opening and closing

    async def open(self, path_fd: int, *, writable: bool, caller: Caller) -> Disk:
        """Open the regular file of an O_PATH descriptor for a guest; each `open` owes one `release`.

        Wins over an archive that has not committed.  Raises IntegrityError kinds, PrimaryIOError, OSError (ENFILE when
        too many disks are open).
        """
        if os.fstat(path_fd).st_ino not in self._open:
            self._check_room()
        disk = await self._acquire(path_fd, guests=1, kept=0)
        if writable and not disk.writable:
            await self.release(disk)
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if self.on_open is not None:
            self.on_open(disk, caller)
        return disk

    def _check_room(self) -> None:
        """One user can open any number of files: that must not take the descriptors that others' I/O needs."""
        if len(self._open) * _DESCRIPTORS_PER_DISK >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] * _DISKS_SHARE:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    async def keep(self, path_fd: int) -> Disk:
        """Open a file for our own work; each `keep` owes one `let_go`.  Raises as `open`."""
        return await self._acquire(path_fd, guests=0, kept=1)

    async def release(self, disk: Disk) -> None:
        """A guest's handle is closed; the last one closes the disk, at a point where nothing is unsynced."""
        await self._give_back(disk, guests=1, kept=0)

    async def let_go(self, disk: Disk) -> None:
        """The end of a `keep`, or of what `open_reserved` gave."""
        await self._give_back(disk, guests=0, kept=1)

    async def keep_beside(self, path_fd: int) -> Disk:
        """As `keep`, but not against a job that has the file for itself.  Raises InUse, and as `open`."""
        ino = os.fstat(path_fd).st_ino
        async with self._ino_lock(ino):
            if ino in self._reservations:
                raise InUse(f"{self._opener.name(path_fd)} is being backed up or archived")
            return await self._acquire_locked(path_fd, guests=0, kept=1)

    async def _acquire(self, path_fd: int, *, guests: int, kept: int) -> Disk:
        async with self._unreserved(os.fstat(path_fd).st_ino):
            return await self._acquire_locked(path_fd, guests=guests, kept=kept)

    async def _acquire_locked(self, path_fd: int, *, guests: int, kept: int) -> Disk:
        ino = os.fstat(path_fd).st_ino
        disk = self._open.get(ino)
        if disk is None:
            disk = self._open[ino] = await self._opener.open(path_fd)
        disk.open_count += guests
        disk.kept += kept
        await self._removals.opened_meanwhile(disk)
        return disk

    async def _give_back(self, disk: Disk, *, guests: int, kept: int) -> None:
        with trio.CancelScope(shield=True):
            async with self._ino_lock(disk.ino):
                disk.open_count -= guests
                disk.kept -= kept
                if guests and not self.open_disks():
                    self._guests.left()
                if disk.open_count + disk.kept == 0 and self._open.pop(disk.ino, None) is not None:
                    await self._closer.close(disk)

    @asynccontextmanager
    async def _unreserved(self, ino: int) -> AsyncIterator[None]:
        """The inode's lock, with no reservation of it: who has one loses it."""
        while True:
            async with self._ino_lock(ino):
                reservation = self._reservations.get(ino)
                if reservation is None:
                    yield
                    return
            reservation.lost = True
            reservation.scope.cancel()
            await reservation.ended.wait()

    @asynccontextmanager
    async def _ino_lock(self, ino: int) -> AsyncIterator[None]:
        lock = self._ino_locks.setdefault(ino, trio.Lock())
        async with lock:
            yield
        if not lock.locked() and ino not in self._open:
            self._ino_locks.pop(ino, None)

    async def graduate(self, disk: Disk) -> None:
        """Turn a wholly resident placeholder into an ordinary file, with nothing left behind.

        Raises MapFrozen, OSError.
        """
        await self._closer.graduate(disk)

    def attach(self, disk: Disk, maps: PlaceholderMaps) -> None:
        """Make ``disk`` the placeholder whose maps these are."""
        self._opener.attach(disk, maps)

    # Reservations

    @asynccontextmanager
    async def reserve(self, path_fd: int, scope: trio.CancelScope) -> AsyncIterator[Reservation]:
        """Have a closed disk for oneself within the block; ``scope`` is cancelled when an open wins.

        Raises InUse when anybody has it open, or is about to remove its last name.
        """
        ino = os.fstat(path_fd).st_ino
        async with self._ino_lock(ino):
            if self._removals.is_last(ino):
                raise InUse(f"{self._opener.name(path_fd)} is being removed")
            if ino in self._open or ino in self._reservations:
                raise InUse(f"{self._opener.name(path_fd)} is open; shut the VM down first")
            disk = await self._opener.open(path_fd)
            try:
                take_lease(self._files, disk)
            except BaseException:
                await self._closer.close(disk)
                raise
            reservation = self._reservations[ino] = Reservation(disk, scope)
        try:
            yield reservation
        finally:
            with trio.CancelScope(shield=True):
                await self._end(reservation)

    async def _end(self, reservation: Reservation) -> None:
        ino = reservation.disk.ino
        async with self._ino_lock(ino):
            if self._reservations.pop(ino, None) is not None:
                give_up_lease(reservation.disk)
                await self._closer.close(reservation.disk)
            reservation.ended.set()

    def open_reserved(self, reservation: Reservation) -> Disk:
        """The commit point is passed: from now on the disk is an open one, with one `let_go` owed."""
        disk = reservation.disk
        del self._reservations[disk.ino]
        disk.kept += 1
        self._open[disk.ino] = disk
        give_up_lease(disk)
        reservation.ended.set()
        self.attributes_changed(disk.ino)
        return disk

    async def head(self, path_fd: int, size: int) -> bytes | None:
        """Up to ``size`` bytes at the start of a file; None when they are absent: nothing is recalled for this.

        Not a use of the file: no job that has reserved it gives up, and none finds it open.  Raises as `open`.
        """
        ino = os.fstat(path_fd).st_ino
        async with self._ino_lock(ino):
            reservation = self._reservations.get(ino)
            disk = self._open.get(ino) if reservation is None else reservation.disk
            if disk is not None:
                return await self._head_of(disk, size)
            if self.placeholders.get(ino) is None:
                return await self._threads.files(self._plain_head, path_fd, size)
            disk = await self._opener.open(path_fd)
            try:
                return await self._head_of(disk, size)
            finally:
                with trio.CancelScope(shield=True):
                    await self._closer.close(disk)

    async def _head_of(self, disk: Disk, size: int) -> bytes | None:
        head = await self._threads.files(self._files.call, "chain.read", os.pread, disk.fd, size, 0)
        # Now, not before: an archive may have made it a placeholder meanwhile, and given the space back.
        placeholder = disk.placeholder
        for length in (len(head), min(len(head), BLOCK_SIZE)):
            if placeholder is None or not length or placeholder.is_resident(0, length):
                return head[:length]
        return None

    def _plain_head(self, path_fd: int, size: int) -> bytes:
        fd = self._files.call("chain.open", reopen, path_fd, os.O_RDONLY)
        try:
            return self._files.call("chain.read", os.pread, fd, size, 0)
        finally:
            os.close(fd)

    # Operations by path

    def stat_override(self, st: os.stat_result) -> StatOverride | None:
        """What stat reports for a placeholder; None for an ordinary file.  Does not block."""
        disk = self._open.get(st.st_ino)
        if disk is not None and disk.placeholder is not None and not disk.placeholder.ended:
            known = self.placeholders.get(st.st_ino)
            if known is not None:
                known.mtime_ns = disk.placeholder.mtime_ns
        return self.placeholders.stat_override(st)

    async def truncate(self, path_fd: int, size: int) -> None:
        """Truncate by path.  Raises as `open`, MapFrozen."""
        disk = await self.keep(path_fd)
        try:
            await disk.truncate(size)
        finally:
            await self.let_go(disk)

    async def set_times(self, path_fd: int, *, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Set times of a regular file by path (nanoseconds since the epoch, None leaves one).  Raises as `open`."""
        st = os.fstat(path_fd)
        if self.placeholders.get(st.st_ino) is None:
            ns = (st.st_atime_ns if atime_ns is None else atime_ns, st.st_mtime_ns if mtime_ns is None else mtime_ns)
            await self._threads.files(self._files.call, "write.times", os.utime, f"/proc/self/fd/{path_fd}", ns=ns)
            return
        disk = await self.keep(path_fd)
        try:
            await disk.set_times(atime_ns=atime_ns, mtime_ns=mtime_ns)
        finally:
            await self.let_go(disk)

    async def removing(self, path_fd: int) -> bool:
        """Before a name of a regular file goes; returns whether it is the last.

        What is open stays usable until its last release; a damaged placeholder can be removed, too, but its pin stays.
        Raises OSError.
        """
        return await self._removals.removing(path_fd)

    async def removed(self, path_fd: int) -> None:
        """After the attempt, once for each `removing`.

        If the file is gone and closed, its placeholder ends; if it is not gone, it is as before.
        """
        await self._removals.removed(path_fd)

    # Looking around

    def name(self, path_fd: int) -> DiskName:
        """How messages name the file of a descriptor."""
        return self._opener.name(path_fd)

    def get(self, ino: int) -> Disk | None:
        """The open disk of that inode, if it is open."""
        return self._open.get(ino)

    def is_reserved(self, ino: int) -> bool:
        """Whether a job has the disk of that inode for itself."""
        return ino in self._reservations

    def open_disks(self) -> list[Disk]:
        """Disks that guests have open."""
        return [disk for disk in self._open.values() if disk.open_count]

    async def sync_dirty(self) -> None:
        """Make durable what changed in the maps; called every few seconds.  A disk whose sync fails is frozen.

        What guests have cut or replaced as a whole, without a read that had to recall anything, is seen here.
        """
        for disk in list(self._open.values()):
            placeholder = disk.placeholder
            if placeholder is not None and placeholder.is_dirty:
                try:
                    await placeholder.sync()
                except (VmfsStubError, OSError):
                    log.exception("%s: the periodic sync failed", disk.label)
            is_open = self._open.get(disk.ino) is disk
            if is_open and placeholder is not None and not placeholder.is_frozen and placeholder.is_whole():
                self.on_recall(disk)

    async def close_all(self) -> None:
        """At the daemon's end: lay every disk down, so that the next start finds nothing unsynced."""
        for disk in list(self._open.values()):
            async with self._ino_lock(disk.ino):
                if self._open.pop(disk.ino, None) is not None:
                    await self._closer.close(disk)
        await self._threads.files(self._changes.stop)
