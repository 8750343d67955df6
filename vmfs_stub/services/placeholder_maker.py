"""Making one placeholder of one reserved file, in the steps that `archive` lists: prepared, record, map committed.

The commit point is one extended attribute, the record: before it the file is as it was, after it a placeholder.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

from vmfs_stub.core.chunking import BLOCK_SIZE
from vmfs_stub.core.errors import Abandoned, NoSpace, PrimaryIOError, VmfsStubError
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.core.residency import block_count
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.durable_map import DurableMap, MapHeader, MapState, pages_of
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import inode_identity
from vmfs_stub.primary.placeholder import PrivateState, take_up
from vmfs_stub.primary.record import PlaceholderRecord, encode_record, read_record
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.placeholder_ender import Ended, PlaceholderEnder
from vmfs_stub.services.placeholder_index import KnownPlaceholder
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.sources import Source
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)


class PlaceholderMaker:
    """Makes placeholders; the ends of a disk (``resident_head_bytes``, ``resident_tail_bytes``) stay where they are."""

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        recall: RecallService,
        ender: PlaceholderEnder,
        disks: Disks,
        store: Store,
        private: PrivateState,
        resident_head_bytes: int,
        resident_tail_bytes: int,
    ) -> None:
        self._files = files
        self._threads = threads
        self._recall = recall
        self._ender = ender
        self._disks = disks
        self._store = store
        self._private = private
        self.resident_head_bytes = resident_head_bytes
        self.resident_tail_bytes = resident_tail_bytes

    def prepare(self, vm: Vm, source: Source, point_id: PointId) -> None:
        """Step 3: note durably that a pin of this placeholder is about to be made.  Blocking; raises PrimaryError."""
        assert source.placeholder_id is not None
        header = prepared_header(
            source.disk.fd,
            placeholder_id=source.placeholder_id,
            vm_id=vm.id,
            point_id=point_id,
            chunk_size=self._store.chunk_size,
        )
        path = self._private.durable_path(source.placeholder_id)
        try:
            self._private.reserve.lend(self._files, lambda: DurableMap.create(self._files, path, header).close())
        except OSError as exc:
            raise _primary_error(source.disk, "preparing its placeholder", exc) from exc

    def may_be_placeholder(self, source: Source) -> bool:
        """Whether the record was set, or may have been: its pin and map must then stay."""
        known = self._disks.placeholders.get(source.disk.ino)
        return known is not None and known.record is not None and known.record.placeholder_id == source.placeholder_id

    async def make(self, vm: Vm, source: Source, file_index: int, point_id: PointId) -> Disk:
        """Steps 4 and 5: the placeholder is open then, with absent blocks to punch and one `let_go` owed.

        Raises Abandoned when somebody opened or changed the file: it stays as it is; IntegrityError, PrimaryError.
        """
        disk, before = source.disk, source.disk.placeholder
        assert source.placeholder_id is not None
        identity = inode_identity(disk.fd)
        record = PlaceholderRecord(
            placeholder_id=source.placeholder_id,
            store_id=self._store.id,
            vm_id=vm.id,
            point_id=point_id,
            file_index=file_index,
            size=source.st.st_size,
            mtime_ns=source.mtime_ns,
            archived_ns=time.time_ns(),
            filesystem=identity.filesystem,
            ino=identity.ino,
            generation=identity.generation,
            replaces=None if before is None else before.maps.record.placeholder_id,
        )
        async with AsyncExitStack() as stack:
            if before is not None:
                # A fill that is under way ends first: it would write over what a guest writes to the new placeholder.
                is_superseded = partial(self.may_be_placeholder, source)
                await stack.enter_async_context(before.superseding(is_superseded=is_superseded))
            resident = self._resident(disk, record.size)
            try:
                await self._threads.files(self._commit, source, record, resident)
                maps = await self._threads.files(take_up, self._files, disk.fd, self._private, label=disk.label)
            except OSError as exc:
                raise _primary_error(disk, "making its placeholder", exc) from exc
        assert maps is not None
        self._disks.attach(disk, maps)
        if before is not None:
            self._recall.forget(before)
            await self._ender.end(Ended.of(before.maps.record))
        log.info("%s: is a placeholder of restore point %s now", disk.label, point_id)
        return self._disks.open_reserved(source.reservation)

    def _resident(self, disk: Disk, size: int) -> list[Extent]:
        """Which blocks stay: the ends of the disk, as far as they are here, and on the disk.

        What a failed sync has left in the page cache alone is in the copy, and after a power loss only there.
        """
        if disk.changes.is_doubtful:
            return []
        count = block_count(size)
        head = Extent(0, min(count, -(-self.resident_head_bytes // BLOCK_SIZE)))
        tail = Extent(max(0, count - -(-self.resident_tail_bytes // BLOCK_SIZE)), count)
        before = disk.placeholder
        return [
            run
            for run in (head, tail)
            if before is None or before.is_resident(run.start * BLOCK_SIZE, run.length * BLOCK_SIZE)
        ]

    def _commit(self, source: Source, record: PlaceholderRecord, resident: Sequence[Extent]) -> None:
        """Steps 4 and 5, and the map *committed*; what fails before the record is set is undone by the caller.

        Raises OSError, Abandoned, CorruptMap.
        """
        disk = source.disk
        if disk.placeholder is not None:
            # What the copy has recalled is not durable yet, and the new map is about to say that it is here.
            try:
                self._files.call("archive.sync", os.fdatasync, disk.fd)
            except OSError as exc:
                raise disk.placeholder.freeze(exc) from exc
        path = self._private.durable_path(record.placeholder_id)
        durable = DurableMap.open(self._files, path, label=disk.label)
        try:
            if pages := pages_of(resident):
                durable.update(pages, durable.header)
            st = disk.fstat()
            same = (st.st_size, st.st_mtime_ns) == (source.st.st_size, source.st.st_mtime_ns)
            if not source.reservation.is_intact or not (same or disk.placeholder is not None):
                raise Abandoned(f"{disk.label}: was opened or changed during the backup; it stays as it is")
            self._set_record(disk, record)
            self._files.call("archive.record_sync", os.fsync, disk.fd)
            durable.set_state(MapState.COMMITTED)
        finally:
            durable.close()

    def _set_record(self, disk: Disk, record: PlaceholderRecord) -> None:
        """The commit point.  From here on the file is a placeholder, whatever happens next: stat and open must know."""
        known = KnownPlaceholder(record, disk.label, record.mtime_ns)
        try:
            set_it = partial(
                self._files.call, "archive.record", os.setxattr, disk.fd, PLACEHOLDER_XATTR, encode_record(record)
            )
            self._private.reserve.lend(self._files, set_it)
        except OSError:
            # A call that failed may have taken effect; what cannot be told counts as done, and the next start decides.
            try:
                found = read_record(self._files, "archive.record_check", disk.fd, label=disk.label)
            except (OSError, VmfsStubError):
                found = record
            if found == record:
                self._disks.placeholders.add(disk.ino, known)
            raise
        self._disks.placeholders.add(disk.ino, known)


def prepared_header(
    fd: int, *, placeholder_id: PlaceholderId, vm_id: VmId, point_id: PointId, chunk_size: int
) -> MapHeader:
    """The header of the map of a placeholder that the open file ``fd`` is to become, as large as it is now."""
    size = os.fstat(fd).st_size
    return MapHeader(
        placeholder_id=placeholder_id,
        vm_id=vm_id,
        point_id=point_id,
        identity=inode_identity(fd),
        state=MapState.PREPARED,
        size=size,
        chunk_size=chunk_size,
        archived_limit=size,
    )


def _primary_error(disk: Disk, doing: str, exc: OSError) -> VmfsStubError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{disk.label}: {doing} failed: the backing filesystem is full")
    return PrimaryIOError(f"{disk.label}: {doing} failed: {exc.strerror}")
