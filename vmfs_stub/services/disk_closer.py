"""Closing a disk: a placeholder is laid down so that nothing of it is unsynced, or graduates when all of it is back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.placeholder_ender import Ended, PlaceholderEnder
from vmfs_stub.services.placeholder_index import PlaceholderIndex
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.removals import Removals
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)


class DiskCloser:
    """Closes disks that nobody has open any more.

    ``attributes_changed`` is called with an inode number when stat of it changes.
    """

    def __init__(
        self,
        *,
        threads: Threads,
        recall: RecallService,
        ender: PlaceholderEnder,
        removals: Removals,
        placeholders: PlaceholderIndex,
        attributes_changed: Callable[[int], object],
    ) -> None:
        self._threads = threads
        self._recall = recall
        self._ender = ender
        self._removals = removals
        self._placeholders = placeholders
        self._attributes_changed = attributes_changed

    async def close(self, disk: Disk) -> None:
        """Close the descriptor where nothing is unsynced; what fails is logged, and left to the next opening."""
        placeholder = disk.placeholder
        try:
            await self._removals.drop_orphan(disk)
            if placeholder is not None and not placeholder.ended:
                if not placeholder.is_frozen and placeholder.next_absent(0) is None and disk.has_name:
                    await self._graduate_at_end(disk)
                if not placeholder.ended:
                    await self._lay_down(disk, placeholder)
        except (VmfsStubError, OSError):
            # The volatile map stays for the next opening, which refuses it when it is frozen.
            log.exception("%s: could not be closed cleanly", disk.label)
        finally:
            await self._close(disk)

    async def _close(self, disk: Disk) -> None:
        is_gone = not disk.has_name
        try:
            if disk.changes.has_to_close(is_gone=is_gone):
                await self._threads.files(disk.changes.close, is_gone=is_gone)
        finally:
            os.close(disk.fd)

    async def _graduate_at_end(self, disk: Disk) -> None:
        try:
            await self.graduate(disk)
        except (VmfsStubError, OSError):
            log.exception("%s: could not be made an ordinary file; the next opening tries again", disk.label)

    async def _lay_down(self, disk: Disk, placeholder: Placeholder) -> None:
        record, removed = placeholder.maps.record, not disk.has_name
        known = self._placeholders.get(disk.ino)
        if known is not None:
            known.mtime_ns = placeholder.mtime_ns
        try:
            await placeholder.lay_down()
        except OSError:
            if not removed:
                raise
            log.warning("%s: its last sync failed, and it is removed anyway", disk.label, exc_info=True)
        finally:
            self._recall.forget(placeholder)
        if removed:
            await self._removals.closed(disk.ino, record)

    async def graduate(self, disk: Disk) -> None:
        """Turn a wholly resident placeholder into an ordinary file, with nothing left behind.

        Raises MapFrozen, OSError.
        """
        placeholder = disk.placeholder
        if placeholder is None:
            return
        record = placeholder.maps.record
        try:
            if not await placeholder.graduate():
                return
        finally:
            # Whatever went wrong after that: one that has ended answers nobody, and who writes would ask it for ever.
            if placeholder.ended:
                disk.placeholder = None
        self._placeholders.remove(disk.ino)
        self._recall.forget(placeholder)
        self._attributes_changed(disk.ino)
        log.info("%s: is an ordinary file again", disk.label)
        await self._ender.end(Ended.of(record))
