"""Opening a backing file as a disk: its descriptor, its placeholder if it is one, and a refusal of what does not fit.

Who has it open, and whether it may be opened now, is the business of `disks`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from vmfs_stub.core.errors import IntegrityError, PrimaryIOError, RecordMissing, UnknownFormat, VmfsStubError
from vmfs_stub.primary.durable_map import MapState
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PlaceholderMaps, PrivateState, open_durable, take_up
from vmfs_stub.primary.record import PlaceholderRecord
from vmfs_stub.primary.tree import proc_path
from vmfs_stub.services.changes import Changes, DiskChanges
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disk_name import DiskName
from vmfs_stub.services.file_reads import FileReads
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.placeholder_ender import Ended, PlaceholderEnder
from vmfs_stub.services.placeholder_index import KnownPlaceholder, PlaceholderIndex
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)


class DiskOpener:
    """Makes a Disk of a backing file.

    ``on_recall`` is what every disk calls after a guest's read had to recall something; ``on_damage`` is as in Disks.
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
        on_recall: Callable[[Disk], None],
        changes: Changes,
        on_damage: Callable[[str, VmfsStubError], None],
    ) -> None:
        self._files = files
        self._threads = threads
        self._reads = reads
        self._recall = recall
        self._ender = ender
        self._private = private
        self._backing = backing
        self._placeholders = placeholders
        self._on_recall = on_recall
        self._on_damage = on_damage
        self._changes = changes

    def name(self, path_fd: int) -> DiskName:
        """The name of a file, from where it lies below the backing directory now."""
        try:
            path = str(Path(proc_path(path_fd)).readlink())
        except OSError:
            # Longer than a path may be; a guest's user can nest directories so.
            return DiskName("", f"inode {os.fstat(path_fd).st_ino}, at a path that cannot be told")
        return DiskName.of(path.removeprefix(f"{self._backing}/"))

    async def open(self, path_fd: int) -> Disk:
        """Open the regular file of an O_PATH descriptor.

        Raises IntegrityError kinds, PrimaryIOError, OSError (ESTALE for one that was removed, and has ended).
        """
        name = self.name(path_fd)
        try:
            return await self._open_intact(path_fd, name)
        except (IntegrityError, UnknownFormat) as exc:
            if not os.fstat(path_fd).st_nlink:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from exc
            log.error("%s", exc)  # noqa: TRY400 - the message says all that an operator can use
            self._on_damage(str(name), exc)
            raise

    async def _open_intact(self, path_fd: int, name: DiskName) -> Disk:
        fd, writable, maps, changes = await self._threads.files(self._open_backing, path_fd, str(name))
        try:
            disk = Disk(
                files=self._files,
                threads=self._threads,
                reads=self._reads,
                recall=self._recall,
                fd=fd,
                name=name,
                writable=writable,
                changes=changes,
            )
            if maps is None:
                await self._forget_graduated(disk)
            self._compare_with_index(disk, maps)
        except BaseException:
            if maps is not None:
                maps.live.close(discard=False)
                maps.durable.close()
            changes.drop()
            os.close(fd)
            raise
        if maps is not None:
            self.attach(disk, maps)
        return disk

    def _open_backing(self, path_fd: int, label: str) -> tuple[int, bool, PlaceholderMaps | None, DiskChanges]:
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
            maps = take_up(self._files, fd, self._private, label=label)
            return fd, writable, maps, self._changes.open(fd, label=label)
        except BaseException:
            os.close(fd)
            raise

    async def _forget_graduated(self, disk: Disk) -> None:
        """A graduation that failed after the record went is finished by the next opening."""
        known = self._placeholders.get(disk.ino)
        if known is None or known.record is None or known.problem is not None:
            return
        record = known.record
        if await self._threads.files(self._is_graduated, disk, record):
            self._placeholders.remove(disk.ino)
            await self._ender.end(Ended.of(record))

    def _is_graduated(self, disk: Disk, record: PlaceholderRecord) -> bool:
        durable = open_durable(self._files, self._private, record, label=disk.label)
        durable.close()
        if durable.header.state != MapState.GRADUATING:
            return False
        self._files.call("graduate.sync", os.fsync, disk.fd)
        return True

    def _compare_with_index(self, disk: Disk, maps: PlaceholderMaps | None) -> None:
        known = self._placeholders.get(disk.ino)
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
        disk.on_recall = self._on_recall
        disk.changes.moves_times = True
        mtime_ns = maps.live.guest_mtime_ns or maps.record.mtime_ns
        self._placeholders.add(disk.ino, KnownPlaceholder(maps.record, disk.label, mtime_ns))
