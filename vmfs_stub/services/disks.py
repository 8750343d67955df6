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
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vmfs_stub.core.errors import IntegrityError, InUse, PrimaryIOError, RecordMissing, UnknownFormat, VmfsStubError
from vmfs_stub.primary.durable_map import MapState
from vmfs_stub.primary.files import FileCalls, sync_filesystem
from vmfs_stub.primary.placeholder import PlaceholderMaps, PrivateState, mark_removed, open_durable, take_up
from vmfs_stub.primary.record import PlaceholderRecord
from vmfs_stub.primary.tree import proc_path
from vmfs_stub.services.disk import Caller, Disk
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.placeholder_index import KnownPlaceholder, PlaceholderIndex, StatOverride, disk_label
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.reservation import Reservation, give_up_lease, take_lease
from vmfs_stub.services.retirement import Ended, Retirement
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

_DAMAGE = (IntegrityError, UnknownFormat)


class Disks:
    """The registry of open disks."""

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        recall: RecallService,
        retirement: Retirement,
        private: PrivateState,
        backing: Path,
        placeholders: PlaceholderIndex,
    ) -> None:
        self._files = files
        self._threads = threads
        self._recall = recall
        self._retirement = retirement
        self._private = private
        self._backing = backing
        self.placeholders = placeholders
        self._open: dict[int, Disk] = {}
        self._reservations: dict[int, Reservation] = {}
        self._ino_locks: dict[int, trio.Lock] = {}
        self._states_before: dict[int, MapState] = {}
        self.on_recall: Callable[[Disk], None] | None = None
        """What every disk calls after a guest's read had to recall something; hydration sets it."""
        self.on_damage: Callable[[str, VmfsStubError], None] | None = None
        """Called with a disk's label when what belongs to it is damaged, so that it cannot be opened."""
        self.on_open: Callable[[Disk, Caller], None] | None = None
        """Called when somebody opened a disk through the mount."""
        self.attributes_changed: Callable[[int], object] = lambda ino: None
        """Called with an inode number when stat of it changes without a request that changes it; the mount sets it."""

    # Opening and closing

    async def open(self, path_fd: int, *, writable: bool, caller: Caller) -> Disk:
        """Open the regular file of an O_PATH descriptor for a guest; each `open` owes one `release`.

        Wins over an archive that has not committed.  Raises IntegrityError kinds, PrimaryIOError, OSError.
        """
        disk = await self._acquire(path_fd, guests=1, kept=0)
        if writable and not disk.writable:
            await self.release(disk)
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if self.on_open is not None:
            self.on_open(disk, caller)
        return disk

    async def keep(self, path_fd: int) -> Disk:
        """Open a file for our own work; each `keep` owes one `let_go`.  Raises as `open`."""
        return await self._acquire(path_fd, guests=0, kept=1)

    async def release(self, disk: Disk) -> None:
        """A guest's handle is closed; the last one closes the disk, at a point where nothing is unsynced."""
        await self._give_back(disk, guests=1, kept=0)

    async def let_go(self, disk: Disk) -> None:
        """The end of a `keep`, or of what `open_reserved` gave."""
        await self._give_back(disk, guests=0, kept=1)

    async def _acquire(self, path_fd: int, *, guests: int, kept: int) -> Disk:
        ino = os.fstat(path_fd).st_ino
        while True:
            await self._win_over_reservation(ino)
            async with self._ino_lock(ino):
                if ino in self._reservations:
                    continue
                disk = self._open.get(ino)
                if disk is None:
                    disk = self._open[ino] = await self._load(path_fd)
                disk.open_count += guests
                disk.kept += kept
            return disk

    async def _give_back(self, disk: Disk, *, guests: int, kept: int) -> None:
        with trio.CancelScope(shield=True):
            async with self._ino_lock(disk.ino):
                disk.open_count -= guests
                disk.kept -= kept
                if disk.open_count + disk.kept == 0 and self._open.pop(disk.ino, None) is not None:
                    await self._close(disk)

    async def _win_over_reservation(self, ino: int) -> None:
        reservation = self._reservations.get(ino)
        if reservation is not None:
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

    async def _load(self, path_fd: int) -> Disk:
        label = self.label(path_fd)
        try:
            return await self._load_intact(path_fd, label)
        except _DAMAGE as exc:
            log.error("%s", exc)  # noqa: TRY400 - the message says all that an operator can use
            if self.on_damage is not None:
                self.on_damage(label, exc)
            raise

    async def _load_intact(self, path_fd: int, label: str) -> Disk:
        fd, writable, maps = await self._threads.files(self._open_backing, path_fd, label)
        try:
            disk = Disk(
                files=self._files, threads=self._threads, recall=self._recall, fd=fd, label=label, writable=writable
            )
            if maps is None:
                await self._forget_graduated(disk)
            self._compare_with_index(disk, maps)
        except BaseException:
            if maps is not None:
                maps.live.close(discard=False)
                maps.durable.close()
            os.close(fd)
            raise
        if maps is not None:
            self.attach(disk, maps)
        return disk

    def _open_backing(self, path_fd: int, label: str) -> tuple[int, bool, PlaceholderMaps | None]:
        path, writable = f"/proc/self/fd/{path_fd}", True
        try:
            fd = self._files.call("open.file", os.open, path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as exc:
            if exc.errno not in (errno.EROFS, errno.EPERM, errno.ETXTBSY, errno.EACCES):
                raise
            # An immutable file or one that is being executed: it can still be read.
            writable = False
            fd = self._files.call("open.file", os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            return fd, writable, take_up(self._files, fd, self._private, label=label)
        except BaseException:
            os.close(fd)
            raise

    async def _forget_graduated(self, disk: Disk) -> None:
        """A graduation that failed after the record went is finished by the next opening."""
        known = self.placeholders.get(disk.ino)
        if known is None or known.record is None or known.problem is not None:
            return
        record = known.record
        if await self._threads.files(self._is_graduated, disk, record):
            self.placeholders.remove(disk.ino)
            await self._retirement.retire(Ended(record.placeholder_id, record.vm_id, record.point_id))

    def _is_graduated(self, disk: Disk, record: PlaceholderRecord) -> bool:
        durable = open_durable(self._files, self._private, record, label=disk.label)
        durable.close()
        if durable.header.state != MapState.GRADUATING:
            return False
        self._files.call("graduate.sync", os.fsync, disk.fd)
        return True

    def _compare_with_index(self, disk: Disk, maps: PlaceholderMaps | None) -> None:
        known = self.placeholders.get(disk.ino)
        if known is not None and maps is None:
            raise known.problem or RecordMissing(
                f"{disk.label}: its placeholder record is gone, so that its absent blocks would read as zeros; "
                "the restore point is untouched (`vmfs-stub restore`)"
            )
        if maps is not None and not disk.writable:
            raise PrimaryIOError(f"{disk.label}: is a placeholder, but its backing file cannot be opened for writing")

    def attach(self, disk: Disk, maps: PlaceholderMaps) -> None:
        """Make ``disk`` the placeholder whose maps these are."""
        disk.placeholder = Placeholder(
            files=self._files, threads=self._threads, fd=disk.fd, maps=maps, label=disk.label
        )
        if self.on_recall is not None:
            disk.on_recall = self.on_recall
        mtime_ns = maps.live.guest_mtime_ns or maps.record.mtime_ns
        self.placeholders.add(disk.ino, KnownPlaceholder(maps.record, disk.label, mtime_ns))

    async def _close(self, disk: Disk) -> None:
        placeholder = disk.placeholder
        try:
            if placeholder is not None and not placeholder.ended:
                if not placeholder.is_frozen and placeholder.next_absent(0) is None and disk.fstat().st_nlink:
                    await self._graduate_at_end(disk)
                if not placeholder.ended:
                    await self._lay_down(disk, placeholder)
        except (VmfsStubError, OSError):
            # The volatile map stays for the next opening, which refuses it when it is frozen.
            log.exception("%s: could not be closed cleanly", disk.label)
        finally:
            os.close(disk.fd)

    async def _graduate_at_end(self, disk: Disk) -> None:
        try:
            await self.graduate(disk)
        except (VmfsStubError, OSError):
            log.exception("%s: could not be made an ordinary file; the next opening tries again", disk.label)

    async def _lay_down(self, disk: Disk, placeholder: Placeholder) -> None:
        record, removed = placeholder.maps.record, disk.fstat().st_nlink == 0
        self._recall.forget(placeholder)
        known = self.placeholders.get(disk.ino)
        if known is not None:
            known.mtime_ns = placeholder.mtime_ns
        await placeholder.lay_down()
        if removed:
            self.placeholders.remove(disk.ino)
            await self._retirement.retire(Ended(record.placeholder_id, record.vm_id, record.point_id))

    async def graduate(self, disk: Disk) -> None:
        """Turn a wholly resident placeholder into an ordinary file, with nothing left behind.

        Raises MapFrozen, OSError.
        """
        placeholder = disk.placeholder
        if placeholder is None:
            return
        record = placeholder.maps.record
        if not await placeholder.graduate():
            return
        disk.placeholder = None
        self.placeholders.remove(disk.ino)
        self._recall.forget(placeholder)
        self.attributes_changed(disk.ino)
        log.info("%s: is an ordinary file again", disk.label)
        await self._retirement.retire(Ended(record.placeholder_id, record.vm_id, record.point_id))

    # Reservations

    @asynccontextmanager
    async def reserve(self, path_fd: int, scope: trio.CancelScope) -> AsyncIterator[Reservation]:
        """Have a closed disk for oneself within the block; ``scope`` is cancelled when an open wins.

        Raises InUse when anybody has it open.
        """
        ino = os.fstat(path_fd).st_ino
        async with self._ino_lock(ino):
            if ino in self._open or ino in self._reservations:
                raise InUse(f"{self.label(path_fd)} is open; shut the VM down first")
            disk = await self._load(path_fd)
            try:
                take_lease(disk)
            except BaseException:
                await self._close(disk)
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
                await self._close(reservation.disk)
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

    async def removing(self, path_fd: int) -> None:
        """Before a link of a regular file goes: if it is the last of a placeholder, note that durably.

        An open-unlinked placeholder stays usable until its last release; a damaged one can be removed, too, but its
        pin stays.  Raises OSError.
        """
        st = os.fstat(path_fd)
        await self._win_over_reservation(st.st_ino)
        known = self.placeholders.get(st.st_ino)
        if known is None or known.record is None or known.problem is not None or st.st_nlink > 1:
            return
        async with self._ino_lock(st.st_ino):
            disk = self._open.get(st.st_ino)
            if disk is not None and disk.placeholder is not None:
                self._states_before[st.st_ino] = disk.placeholder.maps.durable.header.state
                await disk.placeholder.set_state(MapState.REMOVED)
            elif disk is None:
                try:
                    self._states_before[st.st_ino] = await self._threads.files(
                        mark_removed, self._files, self._private, known.record, label=known.label
                    )
                except _DAMAGE as exc:
                    log.warning("%s; it is removed all the same, its restore point stays", exc)

    async def removed(self, path_fd: int) -> None:
        """After the attempt: if the file is gone and closed, its placeholder ends; if not, it is as before."""
        st = os.fstat(path_fd)
        before = self._states_before.pop(st.st_ino, None)
        known = self.placeholders.get(st.st_ino)
        if before is None or known is None or known.record is None:
            if known is not None and st.st_nlink == 0 and st.st_ino not in self._open:
                self.placeholders.remove(st.st_ino)  # a new file may have this number next
            return
        record = known.record
        async with self._ino_lock(st.st_ino):
            disk = self._open.get(st.st_ino)
            if st.st_nlink:
                await self._unmark(disk, known, before)
            elif disk is None:
                self.placeholders.remove(st.st_ino)
                # O_PATH descriptors cannot be synced: the maps lie on the same filesystem.
                await self._threads.files(self._sync_filesystem)
                await self._retirement.retire(Ended(record.placeholder_id, record.vm_id, record.point_id))

    def _sync_filesystem(self) -> None:
        fd = os.open(self._private.maps, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._files.call("remove.sync", sync_filesystem, fd)
        finally:
            os.close(fd)

    async def _unmark(self, disk: Disk | None, known: KnownPlaceholder, before: MapState) -> None:
        if disk is not None and disk.placeholder is not None:
            await disk.placeholder.set_state(before)
        elif known.record is not None:
            durable = await self._threads.files(
                open_durable, self._files, self._private, known.record, label=known.label
            )
            try:
                await self._threads.files(durable.set_state, before)
            finally:
                durable.close()

    # Looking around

    def label(self, path_fd: int) -> str:
        """How messages name a file: its path below the backing directory, and so its VM."""
        try:
            path = str(Path(proc_path(path_fd)).readlink())
        except OSError:
            # Longer than a path may be; a guest's user can nest directories so.
            return f"inode {os.fstat(path_fd).st_ino}, at a path that cannot be told"
        return disk_label(path.removeprefix(f"{self._backing}/"))

    def get(self, ino: int) -> Disk | None:
        """The open disk of that inode, if it is open."""
        return self._open.get(ino)

    def open_disks(self) -> list[Disk]:
        """Disks that guests have open."""
        return [disk for disk in self._open.values() if disk.open_count]

    async def sync_dirty(self) -> None:
        """Make durable what changed in the maps; called every few seconds.  A disk whose sync fails is frozen."""
        for disk in list(self._open.values()):
            placeholder = disk.placeholder
            if placeholder is not None and placeholder.is_dirty:
                try:
                    await placeholder.sync()
                except (VmfsStubError, OSError):
                    log.exception("%s: the periodic sync failed", disk.label)

    async def close_all(self) -> None:
        """At the daemon's end: lay every disk down, so that the next start finds nothing unsynced."""
        for disk in list(self._open.values()):
            async with self._ino_lock(disk.ino):
                if self._open.pop(disk.ino, None) is not None:
                    await self._close(disk)
