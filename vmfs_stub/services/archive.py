"""Backing a VM up, and turning it into placeholders in the same job: copy → verify → commit → placeholder → release.

Order, and what a crash between any two steps leaves:
1. every file of the VM is reserved (nobody has it open), its data synced; the VM is claimed here, if it is not;
2. copied; where placeholders are to be, every frame is read back
   from the store;                                               — crash: the full files, some garbage in the store
3. for each disk: the durable map, *prepared*: from now on the next start knows which pins to remove;
   pins, then the manifest;                                      — crash: map and pin are removed at start-up
   then, with ``min_copies`` of 2, the copy in the replica;      — crash: the same
   whoever decided that placeholders are to be is asked again: a changed mind makes a backup of it;
4. the blocks that stay are entered into the map;                — crash: the same
5. size, times and lease looked at again, then the record set and synced: the commit point of that disk;
                                                                 — crash: a placeholder; start-up finishes it
6. the map *committed*, absent blocks punched, the map *punched*;
7. the claim is set free, so that any host may go on from here, if all that can be placeholders are, and nobody has used
   them since.                                                   — crash: it is held still, or is not known to be
An open before 5 wins: the job gives up, and whatever is not yet a placeholder stays as it was.
Step 1 is in `sources`; what goes to the store is the work of a `mover`, which `disk_parts` tells what to copy; maps and
records are made in `placeholder_maker`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from vmfs_stub.core.changed import Changed
from vmfs_stub.core.errors import (
    Abandoned,
    IntegrityError,
    NotFound,
    ObjectMissing,
    StoreConflict,
    StoreError,
    UnknownFormat,
    VmfsStubError,
)
from vmfs_stub.core.ids import PlaceholderId, PointId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.services.associated import Associated, nothing_associated
from vmfs_stub.services.backup_report import ArchiveSettings, BackupReport
from vmfs_stub.services.bandwidth import Bandwidth
from vmfs_stub.services.claims import Claims, kept_for
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disk_parts import DiskParts
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.last_points import LastPoints
from vmfs_stub.services.mover import CopyOrder, Mover
from vmfs_stub.services.new_point import point_files, point_order
from vmfs_stub.services.placeholder_ender import Ended, PlaceholderEnder
from vmfs_stub.services.placeholder_maker import PlaceholderMaker
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.running_backup import Freezer, Means, NotOneMoment, RunningBackup
from vmfs_stub.services.single_error import single_error
from vmfs_stub.services.sources import Source, Sources
from vmfs_stub.services.stored_files import OtherEntries, other_entries
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.backup_writer import WriterCounts
from vmfs_stub.store.pins import Pin, new_pin
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

Recheck = Callable[[], Awaitable[str]]
"""Asked while the VM is reserved: why it is not to become a placeholder after all; empty when it is."""

MOMENT_TRIES_MAX = 5
"""How often a VM in use is tried whose programs make, rename or remove files just then, as of a database's journal."""
LEFT_OUT_LOGGED = 20
"""Names of what is not backed up that go into the log, for each VM and job; the job's outcome counts them all."""


class Archiver:
    """Runs backups of single VMs; see the module for the order of steps."""

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        claims: Claims,
        recall: RecallService,
        ender: PlaceholderEnder,
        disks: Disks,
        store: Store,
        mover: Mover,
        private: PrivateState,
        backing: Path,
        settings: ArchiveSettings,
        bandwidth: Bandwidth,
    ) -> None:
        self._files = files
        self._threads = threads
        self._claims = claims
        self._ender = ender
        self._disks = disks
        self._mover = mover
        self._last_points = LastPoints(threads=threads, store=store)
        self._parts = DiskParts(
            files=files,
            threads=threads,
            recall=recall,
            chunk_size=store.chunk_size,
            bandwidth=bandwidth,
        )
        self._backing = backing
        self.settings = settings
        self.associated: Callable[[Vm], Awaitable[Associated]] = nothing_associated
        """What belongs to a VM beside its files; whoever knows the hypervisor sets it."""
        self._sources = Sources(
            files=files,
            threads=threads,
            disks=disks,
            backing=backing,
            placeholder_bytes_min=settings.placeholder_bytes_min,
        )
        self._maker = PlaceholderMaker(
            files=files,
            threads=threads,
            recall=recall,
            ender=ender,
            disks=disks,
            store=store,
            private=private,
            resident_head_bytes=settings.resident_head_bytes,
            resident_tail_bytes=settings.resident_tail_bytes,
        )

        self._running = Means(
            files=files,
            threads=threads,
            claims=claims,
            mover=mover,
            private=private,
            backing=backing,
            sources=self._sources,
            parts=self._parts,
            last_points=self._last_points,
            store_id=store.id,
            chunk_size=store.chunk_size,
            settings=settings,
        )

    def apply(self, settings: ArchiveSettings) -> None:
        """From now on these count, also for what a job that runs has not come to."""
        self.settings = settings
        self._running = replace(self._running, settings=settings)
        self._sources.placeholder_bytes_min = settings.placeholder_bytes_min
        self._maker.resident_head_bytes = settings.resident_head_bytes
        self._maker.resident_tail_bytes = settings.resident_tail_bytes

    async def run(
        self,
        vm: Vm,
        *,
        archive: bool,
        progress: Callable[[int], None],
        claimed: Mapping[VmId, int] | None = None,
        recheck: Recheck | None = None,
    ) -> BackupReport:
        """Make a restore point of ``vm``; with ``archive`` its disks become placeholders.

        ``progress`` gets the number of bytes that were dealt with since it was last called.  ``claimed`` is what
        `Claims.survey` returned, for a job of many VMs.  ``recheck`` has the last word on placeholders.
        Raises InUse, Abandoned (an open won before any disk was a placeholder), ClaimedElsewhere, StoreError,
        IntegrityError, PrimaryError; the VM is then as it was.
        """
        report = BackupReport(vm.name, PointId(secrets.token_hex(16)), vm.size_bytes)
        committed: list[Disk] = []
        sources: list[Source] = []
        free_at: PointId | None = None
        still_held = ""
        if not archive:
            # Whether placeholders may be made was asked about the files that were known: these stay, or it is given up.
            vm = await self._sources.as_it_is(vm)
            report.size_bytes = vm.size_bytes
        # Before the files are reserved: what is asked for it may look into them.
        associated = await self.associated(vm)
        try:
            with trio.CancelScope() as scope:
                async with AsyncExitStack() as stack:
                    sources = await self._sources.reserve(vm, scope, stack, archive=archive)
                    free_at = await self._claims.begin(vm.id, self._sources.points(vm, sources), claimed)
                    first_file = await self._back_up(vm, sources, report, associated.metadata, progress)
                    if archive:
                        await self._make_second_copy(vm, report)
                        report.kept = "" if recheck is None else await recheck()
                    if archive and not report.kept:
                        await self._make_placeholders(vm, sources, report, committed, first_file=first_file)
            if scope.cancelled_caught:
                report.abandoned = f"VM {vm.name} was opened while it was being backed up; it goes first"
                if not committed:
                    raise Abandoned(report.abandoned)
            elif (archive and not report.kept) or free_at is not None:
                free_at = report.point_id
        finally:
            with trio.CancelScope(shield=True):
                for disk in committed:
                    await self._release_space(disk, report)
                # Whoever opened the VM does not wait for this: the reservations have ended.
                await self._end_unmade(vm, sources, report.point_id)
                if free_at is not None and self._are_all_placeholders(vm, sources):
                    inos = {source.disk.ino for source in sources}
                    moved = self._disks.placeholders.moved_out(vm.id, inos, free_at)
                    still_held = kept_for(moved) or await self._claims.set_free(vm.id, free_at)
        report.warning = "; ".join(filter(None, (*associated.warnings, still_held)))
        if report.warning:
            log.warning("VM %s: %s", vm.name, report.warning)
        return report

    def _are_all_placeholders(self, vm: Vm, sources: Sequence[Source]) -> bool:
        """Whether all are that can be: what is none is not kept from use by the VM's claim."""
        points = self._sources.points(vm, [source for source in sources if source.is_apt])
        return bool(points) and None not in points

    async def _end_unmade(self, vm: Vm, sources: Sequence[Source], point_id: PointId) -> None:
        """Remove pin and map of every placeholder that was prepared and did not come to be."""
        for source in sources:
            if source.placeholder_id is not None and not self._maker.may_be_placeholder(source):
                await self._ender.end(Ended(source.placeholder_id, vm.id, point_id, was_made=False))

    async def run_in_use(
        self,
        vm: Vm,
        *,
        progress: Callable[[int], None],
        claimed: Mapping[VmId, int] | None = None,
        freezer: Freezer | None = None,
    ) -> BackupReport:
        """Make a restore point of ``vm``, which guests may have open, as it is at one moment.

        ``freezer`` brings the guest's filesystems to rest for that moment, if it can; else as `run`.
        Raises InUse when somebody has it open who does not write through the mount, or another job backs it up;
        Abandoned, with the reason, when it could not be kept as it was; and as `run`.
        """
        for _ in range(MOMENT_TRIES_MAX - 1):
            with suppress(NotOneMoment):
                return await self._run_in_use(vm, progress, claimed, freezer)
        return await self._run_in_use(vm, progress, claimed, freezer)

    async def _run_in_use(
        self,
        vm: Vm,
        progress: Callable[[int], None],
        claimed: Mapping[VmId, int] | None,
        freezer: Freezer | None,
    ) -> BackupReport:
        vm = await self._sources.as_it_is(vm)
        report = BackupReport(vm.name, PointId(secrets.token_hex(16)), vm.size_bytes)
        associated = await self.associated(vm)

        async def check_images() -> None:
            if associated.has_other_images(await self.associated(vm)):
                raise Abandoned(
                    f"VM {vm.name} is in use, and has other images than when its backup began: a snapshot was made, or "
                    "folded back; try again"
                )

        backup = RunningBackup(self._running, vm, report, associated.metadata, progress, check_images)
        await backup.run(claimed, freezer)
        report.warning = "; ".join(associated.warnings)
        return report

    # Copy, verify, commit to the store

    async def _back_up(
        self,
        vm: Vm,
        sources: Sequence[Source],
        report: BackupReport,
        metadata: Mapping[str, str],
        progress: Callable[[int], None],
    ) -> int:
        """Returns where in the restore point's list of files the regular ones begin."""
        others = await self._threads.files(other_entries, self._backing, vm, files=self._files)
        for path in others.left_out[:LEFT_OUT_LOGGED]:
            log.warning("VM %s: %s is a FIFO, socket or device: it is not backed up", vm.name, printable(path))
        report.left_out = others.left_out
        changed = await self._last_points.changed(sources)
        copy = partial(self._copy, vm, sources, report, others, metadata, progress)
        try:
            counts = await copy(changed)
        except (IntegrityError, NotFound, ObjectMissing, StoreConflict) as exc:
            if not any(changed):
                raise
            log.warning("VM %s: its last restore point cannot be used, everything is read: %s", vm.name, exc)
            await self._last_points.forget(sources)
            if isinstance(exc, StoreConflict):
                raise  # pins and map of this try may be there
            counts = await copy([None] * len(sources))
        report.new_bytes, report.stored_bytes = counts.new_bytes, counts.stored_bytes
        await self._last_points.replace(vm, sources, report.point_id, first_file=len(others.stored))
        log.info(
            "VM %s: restore point %s: of %d bytes %d were read, %d are new",
            vm.name,
            report.point_id,
            report.size_bytes,
            report.read_bytes,
            report.new_bytes,
        )
        return len(others.stored)

    async def _copy(
        self,
        vm: Vm,
        sources: Sequence[Source],
        report: BackupReport,
        others: OtherEntries,
        metadata: Mapping[str, str],
        progress: Callable[[int], None],
        changed: Sequence[Changed | None],
    ) -> WriterCounts:
        """Copy what ``changed`` does not say to be in the store already, and make the restore point."""
        report.read_bytes = 0
        with single_error():
            async with self._mover.backup() as backup:
                async with backup.copying(verify=any(source.placeholder_id for source in sources)) as copying:
                    for source, since in zip(sources, changed, strict=True):
                        disk = source.disk
                        async with aclosing(self._parts.metered(disk, since, read=report.count_read)) as parts:
                            await copying.copy(disk.fd, CopyOrder(disk.fstat().st_size, disk.label), parts, progress)
                await self._sources.check_unchanged(vm, sources)
                for source in sources:
                    if source.placeholder_id is not None:
                        await self._threads.files(self._maker.prepare, vm, source, report.point_id)
                pins = [self._pin(source.placeholder_id) for source in sources if source.placeholder_id is not None]
                point = point_order(vm, report, self.settings, metadata=metadata, top=others.top, pins=pins)
                return await backup.commit(point, point_files(others, sources))

    def _pin(self, placeholder_id: PlaceholderId) -> Pin:
        return new_pin(placeholder_id, host=self.settings.host, datastore=self.settings.datastore)

    async def _make_second_copy(self, vm: Vm, report: BackupReport) -> None:
        if self.settings.min_copies < 2:
            return
        try:
            await self._mover.replicate(vm.id, [report.point_id], lambda count: None)
        except (StoreError, IntegrityError, UnknownFormat, NotFound) as exc:
            raise type(exc)(
                f"VM {vm.name}: restore point {report.point_id} was made, and nothing released: the second copy that "
                f"[archive] min_copies asks for could not be made in the replica: {exc}"
            ) from exc

    # Placeholders

    async def _make_placeholders(
        self, vm: Vm, sources: Sequence[Source], report: BackupReport, committed: list[Disk], *, first_file: int
    ) -> None:
        for number, source in enumerate(sources, start=first_file):
            if source.placeholder_id is not None:
                # Short, and not to be cut in two by an open that arrives now: it waits, or comes next.
                with trio.CancelScope(shield=True):
                    disk = await self._maker.make(vm, source, number, report.point_id)
                committed.append(disk)
                report.placeholders.append(source.file.path)
                await trio.lowlevel.checkpoint_if_cancelled()

    async def _release_space(self, disk: Disk, report: BackupReport) -> None:
        try:
            if disk.placeholder is not None:
                await disk.placeholder.punch_absent()
        except (OSError, VmfsStubError) as exc:
            log.exception("%s: releasing its space failed; the next start goes on", disk.label)
            report.abandoned = report.abandoned or f"{disk.label}: releasing its space failed: {exc}"
        finally:
            await self._disks.let_go(disk)
