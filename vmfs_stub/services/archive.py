"""Backing a VM up, and turning it into placeholders in the same job: copy → verify → commit → placeholder → release.

Order, and what a crash between any two steps leaves:
1. every file of the VM is reserved (nobody has it open), its data synced;
2. copied, every frame read back from the store;                 — crash: the full files, some garbage in the store
3. for each disk: the durable map, *prepared*: from now on the next start knows which pins to remove;
   pins, then the manifest;                                      — crash: map and pin are removed at start-up
4. the blocks that stay are entered into the map;                — crash: the same
5. size, times and lease looked at again, then the record set and synced: the commit point of that disk;
                                                                 — crash: a placeholder; start-up finishes it
6. the map *committed*, absent blocks punched, the map *punched*.
An open before 5 wins: the job gives up, and whatever is not yet a placeholder stays as it was.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from vmfs_stub.core.chunking import BLOCK_SIZE
from vmfs_stub.core.errors import Abandoned, NoSpace, PrimaryIOError, VmfsStubError
from vmfs_stub.core.ids import PlaceholderId, PointId, SegmentId
from vmfs_stub.core.names import PLACEHOLDER_XATTR, printable
from vmfs_stub.core.residency import block_count, set_range
from vmfs_stub.inventory.identity import read_vm_id
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.primary.durable_map import DurableMap, MapHeader, MapState, map_bytes, pages_of
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import inode_identity
from vmfs_stub.primary.placeholder import PrivateState, take_up
from vmfs_stub.primary.record import PlaceholderRecord, encode_record, read_record
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.copying import open_copier
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.groups import single_error
from vmfs_stub.services.placeholder_index import KnownPlaceholder
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.reservation import Reservation
from vmfs_stub.services.retirement import Ended, Retirement
from vmfs_stub.services.stored_files import other_entries, public_xattrs, stored_file
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.pins import Pin
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

MAP_BYTES_CHEAP = 1 << 20
"""A map of this size (of a disk of 15 GiB) is never a reason against a placeholder."""


@dataclass(frozen=True, slots=True)
class ArchiveSettings:
    """Sizes in bytes; ``host`` and ``datastore`` go into pins and manifests."""

    resident_head_bytes: int
    resident_tail_bytes: int
    placeholder_bytes_min: int
    workers: int
    host: str
    datastore: str


@dataclass(slots=True)
class BackupReport:
    """What a backup of one VM did."""

    vm: str
    point_id: PointId
    size_bytes: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0
    placeholders: list[str] = field(default_factory=list)
    released_bytes: int = 0
    abandoned: str = ""


@dataclass(frozen=True, slots=True)
class _Source:
    """One reserved file, and what it looked like when it was reserved; ``names`` are relative to the VM."""

    file: VmFile
    names: tuple[str, ...]
    reservation: Reservation
    st: os.stat_result
    mtime_ns: int
    xattrs: dict[str, bytes]
    placeholder_id: PlaceholderId | None

    @property
    def disk(self) -> Disk:
        return self.reservation.disk


class Archiver:
    """Runs backups of single VMs."""

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        recall: RecallService,
        retirement: Retirement,
        disks: Disks,
        store: Store,
        chunk_index: ChunkIndex,
        private: PrivateState,
        backing: Path,
        settings: ArchiveSettings,
    ) -> None:
        self._files = files
        self._threads = threads
        self._recall = recall
        self._retirement = retirement
        self._disks = disks
        self._store = store
        self._chunk_index = chunk_index
        self._private = private
        self._backing = backing
        self._settings = settings

    async def run(self, vm: Vm, *, archive: bool, progress: Callable[[int], None]) -> BackupReport:
        """Make a restore point of ``vm``; with ``archive`` its disks become placeholders.

        ``progress`` gets the number of bytes that were dealt with since it was last called.
        Raises InUse, Abandoned (an open won before any disk was a placeholder), StoreError, IntegrityError,
        PrimaryError; the VM is then as it was.
        """
        report = BackupReport(vm.name, PointId(secrets.token_hex(16)), sum(file.size for file in vm.files))
        committed: list[Disk] = []
        sources: list[_Source] = []
        try:
            with trio.CancelScope() as scope:
                async with AsyncExitStack() as stack:
                    sources = await self._reserve(vm, scope, stack, archive=archive)
                    first_file = await self._back_up(vm, sources, report, progress)
                    if archive:
                        await self._make_placeholders(vm, sources, report, committed, first_file=first_file)
            if scope.cancelled_caught:
                report.abandoned = f"VM {vm.name} was opened while it was being backed up; it goes first"
                if not committed:
                    raise Abandoned(report.abandoned)
        finally:
            with trio.CancelScope(shield=True):
                for disk in committed:
                    await self._release_space(disk, report)
                # Whoever opened the VM does not wait for this: the reservations have ended.
                await self._retire_unmade(vm, sources, report.point_id)
        return report

    async def _retire_unmade(self, vm: Vm, sources: Sequence[_Source], point_id: PointId) -> None:
        """Remove pin and map of every placeholder that was prepared and did not come to be."""
        for source in sources:
            if source.placeholder_id is not None and not self._may_be_placeholder(source):
                await self._retirement.retire(Ended(source.placeholder_id, vm.id, point_id))

    # Reserve

    async def _reserve(self, vm: Vm, scope: trio.CancelScope, stack: AsyncExitStack, *, archive: bool) -> list[_Source]:
        sources = []
        backing_fd = os.open(self._backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await self._threads.files(_check_same_vm, vm, backing_fd)
            for files in _by_inode(vm.files):
                file = files[0]
                path_fd = await self._threads.files(open_beneath, backing_fd, file.path)
                try:
                    if os.fstat(path_fd).st_ino != file.ino:
                        raise Abandoned(
                            f"VM {vm.name}: {printable(file.path)} was replaced since the job began; run it again"
                        )
                    reservation = await stack.enter_async_context(self._disks.reserve(path_fd, scope))
                finally:
                    os.close(path_fd)
                placeholder = reservation.disk.placeholder
                if placeholder is not None:
                    await placeholder.sync()
                sources.append(await self._threads.files(self._source, files, reservation, archive))
        except OSError as exc:
            raise PrimaryIOError(f"VM {vm.name}: cannot open its files: {exc}") from exc
        finally:
            os.close(backing_fd)
        return sources

    def _source(self, files: Sequence[VmFile], reservation: Reservation, archive: bool) -> _Source:
        disk = reservation.disk
        if disk.placeholder is None:
            self._files.call("archive.sync", os.fdatasync, disk.fd)
        st = disk.fstat()
        mtime_ns = st.st_mtime_ns if disk.placeholder is None else disk.placeholder.mtime_ns
        becomes_placeholder = archive and (disk.placeholder is not None or self._is_worth_it(st))
        placeholder_id = PlaceholderId(secrets.token_hex(16)) if becomes_placeholder else None
        names = tuple(file.relative for file in files)
        return _Source(files[0], names, reservation, st, mtime_ns, public_xattrs(disk.fd), placeholder_id)

    def _is_worth_it(self, st: os.stat_result) -> bool:
        """Whether a placeholder frees more than it costs: a huge file of holes needs a map and has nothing to give."""
        cost_bytes = map_bytes(st.st_size)
        costs_more = cost_bytes > MAP_BYTES_CHEAP and cost_bytes > st.st_blocks * 512
        return st.st_size >= self._settings.placeholder_bytes_min and not costs_more

    # Copy, verify, commit to the store

    async def _back_up(
        self, vm: Vm, sources: Sequence[_Source], report: BackupReport, progress: Callable[[int], None]
    ) -> int:
        """Returns where in the restore point's list of files the regular ones begin."""
        writer = await self._threads.transfer(self._store.begin_backup, index=self._chunk_index)
        stored = await self._threads.files(other_entries, self._backing, vm)
        segments: list[tuple[SegmentId | None, ...]] = []
        try:
            with single_error():
                async with open_copier(
                    files=self._files,
                    threads=self._threads,
                    recall=self._recall,
                    writer=writer,
                    workers=self._settings.workers,
                    verify=any(source.placeholder_id for source in sources),
                    progress=progress,
                ) as copier:
                    for source in sources:
                        segments.append(await copier.copy(source.disk))
            first_file = len(stored)
            # The first names come first, so that a placeholder's number is that of its source; other names of the
            # same file are files of their own in the restore point.
            for position in range(max((len(source.names) for source in sources), default=0)):
                stored += [
                    stored_file(s.names[position], s.st, mtime_ns=s.mtime_ns, xattrs=s.xattrs, segments=ids)
                    for s, ids in zip(sources, segments, strict=True)
                    if position < len(s.names)
                ]
            pins = [self._pin(s.placeholder_id) for s in sources if s.placeholder_id is not None]
            self._check_intact(vm, sources)
            await self._threads.files(self._check_still_same_vm, vm)
            for source in sources:
                if source.placeholder_id is not None:
                    await self._threads.files(self._prepare, vm, source, report.point_id)
            await self._threads.transfer(
                writer.commit,
                vm_id=vm.id,
                point_id=report.point_id,
                vm_name=vm.name,
                host=self._settings.host,
                files=stored,
                metadata={"inventory": "directory", "path": vm.entry},
                pins=pins,
            )
        except BaseException:
            writer.abandon()
            raise
        report.new_bytes, report.stored_bytes = writer.counts.new_bytes, writer.counts.stored_bytes
        return first_file

    def _pin(self, placeholder_id: PlaceholderId) -> Pin:
        return Pin(placeholder_id, self._settings.host, self._settings.datastore, time.time(), secrets.token_hex(8))

    @staticmethod
    def _check_intact(vm: Vm, sources: Sequence[_Source]) -> None:
        for source in sources:
            if not source.reservation.is_intact:
                raise Abandoned(f"VM {vm.name}: {source.file.path} was opened during the backup; nothing was changed")

    def _check_still_same_vm(self, vm: Vm) -> None:
        backing_fd = os.open(self._backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _check_same_vm(vm, backing_fd)
        finally:
            os.close(backing_fd)

    # Placeholders

    async def _make_placeholders(
        self, vm: Vm, sources: Sequence[_Source], report: BackupReport, committed: list[Disk], *, first_file: int
    ) -> None:
        for number, source in enumerate(sources, start=first_file):
            if source.placeholder_id is not None:
                # Short, and not to be cut in two by an open that arrives now: it waits, or comes next.
                with trio.CancelScope(shield=True):
                    disk = await self._make_placeholder(vm, source, number, report.point_id)
                committed.append(disk)
                report.placeholders.append(source.file.path)
                await trio.lowlevel.checkpoint_if_cancelled()

    def _prepare(self, vm: Vm, source: _Source, point_id: PointId) -> None:
        """Step 3: note durably that a pin of this placeholder is about to be made.  Raises PrimaryError."""
        assert source.placeholder_id is not None
        header = MapHeader(
            placeholder_id=source.placeholder_id,
            vm_id=vm.id,
            point_id=point_id,
            identity=inode_identity(source.disk.fd),
            state=MapState.PREPARED,
            size=source.st.st_size,
            chunk_size=self._store.chunk_size,
            archived_limit=source.st.st_size,
        )
        path = self._private.durable_path(source.placeholder_id)
        nothing = bytes(-(-block_count(source.st.st_size) // 8))
        try:
            self._private.reserve.lend(
                self._files, lambda: DurableMap.create(self._files, path, header, nothing).close()
            )
        except OSError as exc:
            raise _primary_error(source.disk, "preparing its placeholder", exc) from exc

    def _may_be_placeholder(self, source: _Source) -> bool:
        """Whether the record was set, or may have been: its pin and map must then stay."""
        known = self._disks.placeholders.get(source.disk.ino)
        return known is not None and known.record is not None and known.record.placeholder_id == source.placeholder_id

    async def _make_placeholder(self, vm: Vm, source: _Source, file_index: int, point_id: PointId) -> Disk:
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
                is_superseded = partial(self._may_be_placeholder, source)
                await stack.enter_async_context(before.superseding(is_superseded=is_superseded))
            bits = self._resident_bits(disk, record.size)
            try:
                await self._threads.files(self._commit, source, record, bits)
                maps = await self._threads.files(take_up, self._files, disk.fd, self._private, label=disk.label)
            except OSError as exc:
                raise _primary_error(disk, "making its placeholder", exc) from exc
        assert maps is not None
        self._disks.attach(disk, maps)
        if before is not None:
            old = before.maps.record
            self._recall.forget(before)
            await self._retirement.retire(Ended(old.placeholder_id, old.vm_id, old.point_id))
        log.info("%s: is a placeholder of restore point %s now", disk.label, point_id)
        return self._disks.open_reserved(source.reservation)

    def _resident_bits(self, disk: Disk, size: int) -> bytes:
        """Which blocks stay: the ends of the disk, as far as they are here."""
        count = block_count(size)
        bits = bytearray(-(-count // 8))
        head = min(count, -(-self._settings.resident_head_bytes // BLOCK_SIZE))
        tail = max(0, count - -(-self._settings.resident_tail_bytes // BLOCK_SIZE))
        for first, end in ((0, head), (tail, count)):
            if disk.placeholder is None or disk.placeholder.is_resident(first * BLOCK_SIZE, (end - first) * BLOCK_SIZE):
                set_range(bits, first, end)
        return bytes(bits)

    def _commit(self, source: _Source, record: PlaceholderRecord, bits: bytes) -> None:
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
            if any(bits):
                durable.update(pages_of(bits), durable.header)
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
            set_it = partial(os.setxattr, disk.fd, PLACEHOLDER_XATTR, encode_record(record))
            self._private.reserve.lend(self._files, lambda: self._files.call("archive.record", set_it))
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

    async def _release_space(self, disk: Disk, report: BackupReport) -> None:
        try:
            if disk.placeholder is not None:
                before = disk.fstat().st_blocks
                await disk.placeholder.punch_absent()
                report.released_bytes += max(0, before - disk.fstat().st_blocks) * 512
        except (OSError, VmfsStubError) as exc:
            log.exception("%s: releasing its space failed; the next start goes on", disk.label)
            report.abandoned = report.abandoned or f"{disk.label}: releasing its space failed: {exc}"
        finally:
            await self._disks.let_go(disk)


def _primary_error(disk: Disk, doing: str, exc: OSError) -> VmfsStubError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{disk.label}: {doing} failed: the backing filesystem is full")
    return PrimaryIOError(f"{disk.label}: {doing} failed: {exc.strerror}")


def _check_same_vm(vm: Vm, backing_fd: int) -> None:
    """See that the VM is where it was found: its users can rename it, and put another one in its place.

    Raises Abandoned.
    """
    try:
        path_fd = open_beneath(backing_fd, vm.path)
    except OSError as exc:
        raise Abandoned(f"VM {vm.name} was renamed or removed since the job began; run it again") from exc
    try:
        if read_vm_id(path_fd) != vm.id:
            raise Abandoned(f"VM {vm.name}: another VM has its name since the job began; run it again")
    finally:
        os.close(path_fd)


def _by_inode(files: Sequence[VmFile]) -> list[list[VmFile]]:
    """The files of a VM, those that are names of one inode together."""
    found: dict[int, list[VmFile]] = {}
    for file in files:
        found.setdefault(file.ino, []).append(file)
    return list(found.values())
