"""Backing up a VM that is in use: all its files as they were at one moment, and nobody is stopped.

Order:
1. every file is opened here, so that whoever opens it from now on writes through the same disk, under a lease that
   tells of others; what changes since is followed in maps of its own (`changes`);
2. if a guest agent answers, it brings the guest's filesystems to rest;
3. the moment: the gates of all disks are shut until no change is under way, a short while at most, and what keeps the
   disks as they are is put in place (`frozen_disk`); then the gates open, and the guest goes on;
4. all is copied as it was (`disk_parts`), and committed;
5. what changed since the moment takes the place of what changed since the last restore point.
A crash before the commit leaves no restore point, and what is known of changes is that since the last one; after it,
the same, which says more than it must.  Whatever goes wrong ends the backup, never a guest's write.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from vmfs_stub.core.changed import Changed
from vmfs_stub.core.errors import (
    Abandoned,
    IntegrityError,
    NotFound,
    ObjectMissing,
    PrimaryIOError,
)
from vmfs_stub.core.ids import StoreId, VmId
from vmfs_stub.core.origin import Origin
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.primary.aside_file import can_clone, make_nameless
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.services.backup_report import ArchiveSettings, BackupReport
from vmfs_stub.services.claims import Claims
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disk_parts import DiskParts
from vmfs_stub.services.frozen_disk import FrozenDisk
from vmfs_stub.services.last_points import LastPoints
from vmfs_stub.services.mover import CopyOrder, Mover
from vmfs_stub.services.new_point import point_files, point_order
from vmfs_stub.services.reservation import has_lease
from vmfs_stub.services.set_aside import Room, SetAside
from vmfs_stub.services.single_error import single_error
from vmfs_stub.services.sources import KeptSource, Sources
from vmfs_stub.services.stored_files import OtherEntries, other_entries
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.backup_writer import WriterCounts

log = logging.getLogger(__name__)

AT_REST_S_MAX: Final = 2.0
"""How long guests' writes may wait for the moment; a guest's own time limit is 30 s."""


class NotOneMoment(Abandoned):
    """The files of the VM were others at the moment than those that are kept: another try keeps those."""


Freezer = Callable[[], AbstractAsyncContextManager[bool]]
"""Brings the filesystems of one guest to rest for the time of a block, if it can: the block is told whether it has."""


@dataclass(frozen=True, slots=True)
class Means:
    """What every such backup of a datastore is made with."""

    files: FileCalls
    threads: Threads
    claims: Claims
    mover: Mover
    private: PrivateState
    backing: Path
    sources: Sources
    parts: DiskParts
    last_points: LastPoints
    store_id: StoreId
    chunk_size: int
    settings: ArchiveSettings


class RunningBackup:
    """The backup of one VM; ``metadata`` goes into the restore point, too.

    ``check_images`` raises Abandoned when that is not what its domain says any more.
    """

    def __init__(
        self,
        means: Means,
        vm: Vm,
        report: BackupReport,
        metadata: Mapping[str, str],
        progress: Callable[[int], None],
        check_images: Callable[[], Awaitable[None]],
    ) -> None:
        self._means = means
        self._vm = vm
        self._report = report
        self._metadata = metadata
        self._progress = progress
        self._check_images = check_images
        self._room = Room(means.settings.set_aside_bytes_max, means.settings.free_floor_percent)
        self._scope = trio.CancelScope()
        self._has_used_last = False

    async def run(self, claimed: Mapping[VmId, int] | None, freezer: Freezer | None) -> None:
        """Make a restore point of the VM as it is at one moment.

        Raises InUse (somebody has it open, but not through the mount), Abandoned (with the reason), ClaimedElsewhere,
        StoreError, IntegrityError, PrimaryError; NotOneMoment.
        """
        try:
            await self._try(claimed, freezer, uses_last=True)
        except (IntegrityError, NotFound, ObjectMissing) as exc:
            if not self._has_used_last:
                raise
            log.warning("VM %s: its last restore point cannot be used, everything is read: %s", self._vm.name, exc)
            # What was copied before is not set aside any more: it takes another moment.
            await self._try(claimed, freezer, uses_last=False)

    async def _try(self, claimed: Mapping[VmId, int] | None, freezer: Freezer | None, *, uses_last: bool) -> None:
        self._scope, reasons = trio.CancelScope(), list[str]()
        self._room.used_bytes = self._report.read_bytes = 0
        try:
            with self._scope, single_error():
                async with AsyncExitStack() as stack:
                    kept = await self._means.sources.keep(self._vm, stack)
                    await self._means.claims.begin(self._vm.id, self._means.sources.points(self._vm, kept), claimed)
                    others = await self._others()
                    disks = await self._make_ready(kept, stack, first_file=len(others.stored))
                    stack.callback(lambda: reasons.extend(_reasons(disks)))
                    await self._take_moment(disks, freezer)
                    others = await self._others_at_moment(others)
                    await self._check_images()
                    counts = await self._copy(disks, others, uses_last=uses_last)
                    for disk in disks:
                        await disk.disk.changes.replace()
        except OSError as exc:
            raise PrimaryIOError(f"VM {self._vm.name}: keeping it as it was failed: {exc.strerror}") from exc
        if self._scope.cancelled_caught:
            reason = reasons[0] if reasons else "it could not be kept as it was"
            raise Abandoned(f"VM {self._vm.name} is in use, and its backup was given up: {reason}")
        self._note(others, counts)

    async def _others(self) -> OtherEntries:
        means = self._means
        return await means.threads.files(other_entries, means.backing, self._vm, files=means.files)

    async def _others_at_moment(self, before: OtherEntries) -> OtherEntries:
        """What else the VM has, after the moment.  Raises NotOneMoment when other files are its than are kept."""
        now = await self._others()
        if not (now.has_files(self._vm) and now.has_same_names(before)):
            raise NotOneMoment(
                f"VM {self._vm.name} is in use, and files of it were made, renamed or removed before all of it was as "
                "at one moment; try again"
            )
        return now

    def _note(self, others: OtherEntries, counts: WriterCounts) -> None:
        report = self._report
        report.left_out = others.left_out
        report.new_bytes, report.stored_bytes = counts.new_bytes, counts.stored_bytes
        log.info(
            "VM %s: restore point %s of it in use (%s): of %d bytes %d were read, %d are new, %d were set aside",
            self._vm.name,
            report.point_id,
            report.consistency,
            report.size_bytes,
            report.read_bytes,
            report.new_bytes,
            self._room.used_bytes,
        )

    # The moment

    async def _make_ready(
        self, kept: Sequence[KeptSource], stack: AsyncExitStack, *, first_file: int
    ) -> list[FrozenDisk]:
        """All that takes long, before anybody has to wait."""
        means, disks = self._means, list[FrozenDisk]()
        clones = bool(kept) and await means.threads.files(can_clone, means.files, kept[0].disk.fd, means.private.frozen)
        for number, source in enumerate(kept, start=first_file):
            disk = source.disk
            fd = await means.threads.files(make_nameless, means.files, means.private.frozen)
            aside = None if clones and disk.placeholder is None else self._aside(disk, fd)
            origin = Origin(means.store_id, self._vm.id, self._report.point_id, number, 0, means.chunk_size)
            frozen = FrozenDisk(source, fd, aside, origin, means.files, means.threads)
            stack.push_async_callback(_close, frozen)
            disks.append(frozen)
            await frozen.expect(disk.fstat().st_size)
            if aside is None:
                # A clone writes out what is not on the disk yet: guests need not wait for that.
                await means.sources.sync(disk)
        return disks

    def _aside(self, disk: Disk, fd: int) -> SetAside:
        return SetAside(
            files=self._means.files,
            threads=self._means.threads,
            disk_fd=disk.fd,
            fd=fd,
            chunk_size=self._means.chunk_size,
            room=self._room,
            label=disk.label,
            on_end=self._scope.cancel,
        )

    async def _take_moment(self, disks: Sequence[FrozenDisk], freezer: Freezer | None) -> None:
        async with nullcontext(False) if freezer is None else freezer() as is_quiesced:
            await self._shut_gates(disks)
        self._report.consistency = "quiesced" if is_quiesced else "crash"

    async def _shut_gates(self, disks: Sequence[FrozenDisk]) -> None:
        """Raises Abandoned when guests' writes do not come to rest in time, or the filesystem hangs."""
        is_taken = False
        # Whatever hangs in a thread is waited for, but not by guests.
        async with trio.open_nursery() as nursery:
            try:
                with trio.move_on_after(AT_REST_S_MAX):
                    for frozen in disks:
                        frozen.disk.gate.shut()
                    for frozen in disks:
                        await frozen.disk.gate.wait_at_rest()
                    caught = trio.Event()
                    nursery.start_soon(_catch, disks, caught)
                    await caught.wait()
                    for frozen in disks:
                        frozen.begin()
                    is_taken = True
            finally:
                for frozen in disks:
                    frozen.disk.gate.open()
        if not is_taken:
            raise Abandoned(
                f"VM {self._vm.name} is in use, and its writes did not come to rest in {AT_REST_S_MAX:g} s; try again"
            )

    # The copy

    async def _copy(self, disks: Sequence[FrozenDisk], others: OtherEntries, *, uses_last: bool) -> WriterCounts:
        means, changed = self._means, list[Changed | None]([None] * len(disks))
        if uses_last:
            changed = await means.last_points.changed_in_use([each.disk for each in disks])
            self._has_used_last = any(changed)
        else:
            for each in disks:
                await means.last_points.forget_disk(each.disk)
        parts_of, read = means.parts.metered, self._report.count_read
        async with means.mover.backup() as backup:
            async with backup.copying(verify=False) as copying:
                for frozen, since in zip(disks, changed, strict=True):
                    order = CopyOrder(frozen.st.st_size, frozen.disk.label)
                    async with aclosing(parts_of(frozen.copied, since, read=read, aside=frozen.aside)) as parts:
                        aside_fd = None if frozen.aside is None else frozen.aside.fd
                        await copying.copy(frozen.copied.fd, order, parts, self._progress_of(frozen), aside_fd=aside_fd)
            for frozen in disks:
                frozen.end()
            await self._check(disks)
            point = point_order(self._vm, self._report, means.settings, metadata=self._metadata, top=others.top)
            return await backup.commit(point, point_files(others, disks))

    def _progress_of(self, frozen: FrozenDisk) -> Callable[[int], None]:
        def progress(count: int) -> None:
            if frozen.aside is not None:
                frozen.aside.dealt_with(count)
            else:
                # What guests overwrite stays for the clone, however much that is.
                self._room.check_free(frozen.fd)
            self._progress(count)

        return progress

    async def _check(self, disks: Sequence[FrozenDisk]) -> None:
        """Raises Abandoned when what was copied need not be the VM as it was."""
        for reason in _reasons(disks):
            raise Abandoned(f"VM {self._vm.name} is in use, and its backup was given up: {reason}")
        for frozen in disks:
            if not has_lease(frozen.disk):
                raise Abandoned(
                    f"VM {self._vm.name}: {frozen.disk.label} was opened outside the mount during the backup, where "
                    "what is written is not seen"
                )
        await self._means.sources.check_still_same_vm(self._vm)


async def _catch(disks: Sequence[FrozenDisk], caught: trio.Event) -> None:
    for frozen in disks:
        await frozen.catch()
    caught.set()


async def _close(frozen: FrozenDisk) -> None:
    with trio.CancelScope(shield=True):
        await frozen.close()


def _reasons(disks: Sequence[FrozenDisk]) -> list[str]:
    return [f"{each.disk.label}: {each.aside.reason}" for each in disks if each.aside is not None and each.aside.reason]
