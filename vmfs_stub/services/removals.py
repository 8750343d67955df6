"""The removal of a file's last name: noted durably before, ended or undone after; a crash leaves no doubt.

A file that somebody has open becomes an orphan: it stays what it is, a placeholder included, until its last release.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from vmfs_stub.core.errors import IntegrityError, UnknownFormat
from vmfs_stub.primary.durable_map import MapState
from vmfs_stub.primary.files import FileCalls, sync_filesystem
from vmfs_stub.primary.placeholder import (
    KEPT_WHEN_REMOVED,
    PrivateState,
    mark_removed,
    open_durable,
    open_replaced,
)
from vmfs_stub.primary.record import PlaceholderRecord
from vmfs_stub.services.changes import Changes
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.placeholder_ender import Ended, PlaceholderEnder
from vmfs_stub.services.placeholder_index import KnownPlaceholder, PlaceholderIndex
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)


class Removals:
    """Removals under way, and the state that each placeholder's map had before.

    ``opened`` finds the open disk of an inode, which stays as it is while ``ino_lock`` of that inode is held; taking
    that ends what an archive or a backup does with it.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        ender: PlaceholderEnder,
        private: PrivateState,
        placeholders: PlaceholderIndex,
        changes: Changes,
        opened: Callable[[int], Disk | None],
        ino_lock: Callable[[int], AbstractAsyncContextManager[None]],
    ) -> None:
        self._files = files
        self._threads = threads
        self._ender = ender
        self._private = private
        self._placeholders = placeholders
        self._changes = changes
        self._opened = opened
        self._ino_lock = ino_lock
        self._states_before: dict[int, MapState] = {}
        self._under_way: Counter[int] = Counter()
        """By inode number, how many names are about to go: of several at once, none may leave it to the others."""
        self._last: set[int] = set()
        """Inodes of which no name would be left."""

    async def removing(self, path_fd: int) -> bool:
        """Before a name of that file goes; returns whether it is the last, so that none is left.

        Then what is open is kept, and it is noted durably that a placeholder ends.  Raises OSError.
        """
        ino = os.fstat(path_fd).st_ino
        self._under_way[ino] += 1
        try:
            async with self._ino_lock(ino):
                disk = self._opened(ino)
                name_count = os.fstat(path_fd).st_nlink - (disk is not None and disk.is_orphan)
                if name_count > self._under_way[ino]:
                    return False
                self._last.add(ino)
                if disk is not None:
                    await self.opened_meanwhile(disk)
                if ino not in self._states_before:
                    await self._mark_removed(ino, disk)
                return True
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.removed(path_fd)
            raise

    def is_last(self, ino: int) -> bool:
        """Whether no name of that file would be left when what is under way is over."""
        return ino in self._last

    def _end_one(self, ino: int) -> None:
        self._under_way[ino] -= 1
        if not self._under_way[ino]:
            del self._under_way[ino]
            self._last.discard(ino)

    async def _mark_removed(self, ino: int, disk: Disk | None) -> None:
        known = self._placeholders.get(ino)
        if known is None or known.record is None or known.problem is not None:
            return
        if disk is not None and disk.placeholder is not None:
            before = disk.placeholder.maps.durable.header.state
            await disk.placeholder.set_state(MapState.REMOVED, only_from=set(MapState) - KEPT_WHEN_REMOVED)
            self._states_before[ino] = before
        elif disk is None:
            try:
                self._states_before[ino] = await self._threads.files(
                    mark_removed, self._files, self._private, known.record, label=known.label
                )
            except (IntegrityError, UnknownFormat) as exc:
                log.warning("%s; it is removed all the same, its restore point stays", exc)

    async def opened_meanwhile(self, disk: Disk) -> None:
        """If the last name of this open file is about to go, make it an orphan; the inode's lock is held."""
        if disk.ino not in self._last or disk.is_orphan or not disk.open_count:
            return
        try:
            await self._threads.files(self._private.orphans.keep, self._files, disk.fd)
        except OSError as exc:
            log.warning("%s: is removed while open, and will not outlive this daemon: %s", disk.label, exc.strerror)
        else:
            disk.is_orphan = True

    async def removed(self, path_fd: int) -> None:
        """After the attempt: if the file is gone and closed, its placeholder ends; if not, it is as before."""
        ino = os.fstat(path_fd).st_ino
        self._end_one(ino)
        with trio.CancelScope(shield=True):  # what was noted for this inode is not for the next one of its number
            async with self._ino_lock(ino):
                if ino in self._under_way:
                    return  # others of its names are about to go: whichever is over last, when each is done
                record = await self._settle(ino, nlink=os.fstat(path_fd).st_nlink)
        if record is not None:
            await self._end(record)

    async def _settle(self, ino: int, *, nlink: int) -> PlaceholderRecord | None:
        """No name is about to go any more: returns the record of a placeholder that has ended."""
        disk, known = self._opened(ino), self._placeholders.get(ino)
        before = self._states_before.pop(ino, None)
        if disk.has_name if disk is not None else nlink > 0:
            if disk is not None:
                await self.drop_orphan(disk)
            if known is not None and before is not None:
                await self._unmark(disk, known, before)
        elif disk is None:
            if self._changes.has(ino):
                await self._threads.files(self._changes.removed, ino)
            if known is not None:
                self._placeholders.remove(ino)  # a new file may have this number next
                return None if before is None else known.record
        return None

    async def drop_orphan(self, disk: Disk) -> None:
        """At its last release, or because it keeps its name: take the orphan's link away; what fails is swept later."""
        if not disk.is_orphan:
            return
        try:
            await self._threads.files(self._private.orphans.drop, self._files, disk.ino)
        except OSError as exc:
            log.warning("%s: its space is free at the next start only: %s", disk.label, exc.strerror)
        else:
            disk.is_orphan = False

    async def closed(self, ino: int, record: PlaceholderRecord) -> None:
        """A placeholder without a name is closed: it ends, or does when the removal of each name is over.

        Raises OSError.
        """
        if ino not in self._under_way:
            self._placeholders.remove(ino)
            await self._end(record)

    async def _end(self, record: PlaceholderRecord) -> None:
        """The placeholder's file is gone: make that durable, then let its pin and maps go."""
        with trio.CancelScope(shield=True):  # however long the disk takes; only the store is not waited for
            # Descriptors of files without a name cannot be synced for that: the maps lie on the same filesystem.
            await self._threads.files(self._files.call, "remove.sync", sync_filesystem, self._private.maps)
            replaced = await self._threads.files(self._replaced, record)
        await self._ender.end(*([] if replaced is None else [replaced]), Ended.of(record))

    def _replaced(self, record: PlaceholderRecord) -> Ended | None:
        """What the placeholder was before, where an archive that failed has left it."""
        durable = open_replaced(self._files, self._private, record, label=f"placeholder {record.placeholder_id}")
        if durable is None:
            return None
        durable.close()
        return Ended(durable.header.placeholder_id, durable.header.vm_id, durable.header.point_id)

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
