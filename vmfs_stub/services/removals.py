"""The removal of a placeholder's last link: noted durably before, ended or undone after; a crash leaves no doubt."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from vmfs_stub.core.errors import IntegrityError, UnknownFormat
from vmfs_stub.primary.durable_map import MapState
from vmfs_stub.primary.files import FileCalls, sync_filesystem
from vmfs_stub.primary.placeholder import PrivateState, mark_removed, open_durable
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.placeholder_index import KnownPlaceholder, PlaceholderIndex
from vmfs_stub.services.retirement import Ended, Retirement
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)


class Removals:
    """Removals under way, and the state that each placeholder's map had before.

    ``opened`` finds the open disk of an inode, which stays as it is while ``ino_lock`` of that inode is held.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        retirement: Retirement,
        private: PrivateState,
        placeholders: PlaceholderIndex,
        opened: Callable[[int], Disk | None],
        ino_lock: Callable[[int], AbstractAsyncContextManager[None]],
    ) -> None:
        self._files = files
        self._threads = threads
        self._retirement = retirement
        self._private = private
        self._placeholders = placeholders
        self._opened = opened
        self._ino_lock = ino_lock
        self._states_before: dict[int, MapState] = {}

    async def removing(self, st: os.stat_result) -> None:
        """Before a link of that file goes: if it is the last of a placeholder, note that durably.  Raises OSError."""
        known = self._placeholders.get(st.st_ino)
        if known is None or known.record is None or known.problem is not None or st.st_nlink > 1:
            return
        async with self._ino_lock(st.st_ino):
            disk = self._opened(st.st_ino)
            if disk is not None and disk.placeholder is not None:
                self._states_before[st.st_ino] = disk.placeholder.maps.durable.header.state
                await disk.placeholder.set_state(MapState.REMOVED)
            elif disk is None:
                try:
                    self._states_before[st.st_ino] = await self._threads.files(
                        mark_removed, self._files, self._private, known.record, label=known.label
                    )
                except (IntegrityError, UnknownFormat) as exc:
                    log.warning("%s; it is removed all the same, its restore point stays", exc)

    async def removed(self, st: os.stat_result) -> None:
        """After the attempt: if the file is gone and closed, its placeholder ends; if not, it is as before."""
        before = self._states_before.pop(st.st_ino, None)
        known = self._placeholders.get(st.st_ino)
        if before is None or known is None or known.record is None:
            if known is not None and st.st_nlink == 0 and self._opened(st.st_ino) is None:
                self._placeholders.remove(st.st_ino)  # a new file may have this number next
            return
        record = known.record
        async with self._ino_lock(st.st_ino):
            disk = self._opened(st.st_ino)
            if st.st_nlink:
                await self._unmark(disk, known, before)
            elif disk is None:
                self._placeholders.remove(st.st_ino)
                # O_PATH descriptors cannot be synced: the maps lie on the same filesystem.
                await self._threads.files(self._sync_filesystem)
                await self._retirement.retire(Ended.of(record))

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
