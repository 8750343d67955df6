"""The datastore as the control API sees it: runs jobs, holds recalls, ends.

Purpose: turns requests into calls of services and their results into messages.  It decides nothing about bytes.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.jobs import JobProgress, Jobs, failed_outcome, failure_info, one_by_one
from vmfs_stub.control.messages import (
    DiskRow,
    JobInfo,
    JobKind,
    JobReport,
    Status,
    VmOutcome,
    error_info,
)
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import InUse, PrimaryIOError, RecallsHeld
from vmfs_stub.core.ids import JobId, PointId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.core.times import time_text
from vmfs_stub.datastore_listing import Listing, only_warned
from vmfs_stub.datastore_status import Health
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import UnreadVm, Vm, VmFile
from vmfs_stub.mount.serving import Mount
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services import memory
from vmfs_stub.services.adopt import Missed, Wanted
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.retention import apply_rules, problem_of
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

V = TypeVar("V", Vm, Wanted)

Step = Callable[[V, Callable[[int], None]], Awaitable[VmOutcome]]
"""What a job does with one VM; the function gets the number of bytes dealt with since it was last called."""


class Datastore:
    """Implements what control.target describes; wired together by the daemon.

    Attributes: ``listing`` and ``health`` have work of their own that goes on beside the datastore's.
    """

    def __init__(
        self,
        *,
        config: Config,
        threads: Threads,
        inventory: DirectoryInventory,
        catalog: Catalog,
        store: Store,
        replica: ReplicaService | None,
        services: DiskServices,
        findings: Findings,
        jobs: Jobs,
        mount: Mount,
        reserve: Callable[[], None],
        stop: trio.Event,
    ) -> None:
        self._config = config
        self._threads = threads
        self._store = store
        self._claims = services.claims
        self._replica = replica
        self._disks = services.disks
        self._recall = services.recall
        self._hydration = services.hydration
        self._archiver = services.archiver
        self._adopter = services.adopter
        self._jobs = jobs
        self._mount = mount
        self._fill_reserve = reserve
        self._stop = stop
        self._files = services.files
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._backing_fd = self._files.call("list.backing", os.open, config.datastore.backing, flags)
        self.listing = Listing(
            config=config,
            threads=threads,
            inventory=inventory,
            catalog=catalog,
            store=store,
            services=services,
            backing_fd=self._backing_fd,
        )
        self.health = Health(
            config=config,
            threads=threads,
            store=store,
            replica=replica,
            services=services,
            findings=findings,
            jobs=jobs,
            mount=mount,
            listing=self.listing,
            backing_fd=self._backing_fd,
        )
        self._disks.on_open = self.listing.opened
        self._recall.held = config.hold_path.exists()

    def close(self) -> None:
        """Give back the descriptor of the backing directory."""
        os.close(self._backing_fd)

    async def list_disks(self, vm: str | None) -> list[DiskRow]:
        """One row per disk, of all VMs or of the one named; raises VmNotFound, AmbiguousName."""
        return await self.listing.disks(vm)

    async def status(self) -> Status:
        """What the daemon knows about itself; ``healthy`` is false when an operator has to act."""
        return await self.health.status()

    async def replicate(self) -> None:
        """Bring restore points of this datastore's VMs into the replica, those that were left behind, too."""
        if self._replica is not None:
            with only_warned("VMs could not be listed: what the replica lacks is found with their next backups"):
                self._replica.due(vm.id for vm in (await self.listing.scan()).vms)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._replica.watch)
                nursery.start_soon(self._replica.run)

    async def hold(self, *, peer: Peer) -> None:
        """Refuse new recalls until `unhold`, also after a restart."""
        await self._threads.files(self._config.hold_path.touch)
        self._recall.held = True

    async def unhold(self, *, peer: Peer) -> None:
        """Allow recalls again."""
        await self._threads.files(partial(self._config.hold_path.unlink, missing_ok=True))
        self._recall.held = False

    async def shutdown(self, *, force: bool, peer: Peer) -> None:
        """Flush, unmount and stop; raises InUse, and changes nothing, while disks are open and not ``force``."""
        if disks := self._disks.open_disks():
            names = ", ".join(disk.label for disk in disks[:5])
            if not force:
                raise InUse(f"{len(disks)} disks are open ({names}); shut the VMs down, or use --force")
        await self._mount.unmount(force=force)
        self._stop.set()

    # Jobs

    async def start_backup(self, vms: Sequence[str], *, archive: bool, peer: Peer) -> JobId:
        """Back up the named VMs (none named: all)."""
        # Whether a VM is idle is decided from usage samples, and none are kept yet: none count as idle.
        if vms:
            named = await self._named(vms)
            return self._start("backup", named, self._backing_up(named, archive=False), peer=peer)
        scan = await self.listing.scan()
        step = self._backing_up(scan.vms, archive=False)
        return self._start("backup", scan.vms, step, peer=peer, tolerant=True, unread=scan.unread)

    async def start_archive(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Back up the named VMs and make placeholders of them; raises InUse."""
        found = await self._named(vms)
        for vm in found:
            for file in vm.files:
                disk = self._disks.get(file.ino)
                if disk is not None and disk.open_count:
                    raise InUse(f"VM {vm.name} is in use: {disk.label} is open; shut it down first")
        return self._start("archive", found, self._backing_up(found, archive=True), peer=peer)

    async def start_recall(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Bring the named VMs back in full; raises RecallsHeld."""
        found = await self._named(vms)
        if self._recall.held:
            raise RecallsHeld("recalls are held for this datastore; `vmfs-stub unhold` allows them again")
        return self._start("recall", found, self._bring_back, peer=peer)

    async def start_adopt(self, vms: Sequence[str], *, everything: bool, told: Told, peer: Peer) -> JobId:
        """Make placeholders here of the named VMs of the store, or of all that are not here."""

        async def work(progress: JobProgress) -> JobReport:
            # Which VMs there are takes as long as the store does.
            progress.update(doing="looking for VMs in the store")
            wanted, missed = await self._adopter.find(vms, everything=everything)
            return await self._each("adopt", wanted, partial(self._adopt, told=told), progress, failed=missed)

        return self._jobs.start("adopt", list(vms), work, peer=peer)

    async def job(self, job_id: JobId, *, wait_s: float) -> JobInfo:
        """State of one job when it has ended, or after so many seconds; raises NotFound."""
        return await self._jobs.wait(job_id, wait_s=wait_s)

    async def jobs(self) -> list[JobInfo]:
        """Running and recent jobs, newest first."""
        return self._jobs.list()

    async def _named(self, names: Sequence[str]) -> list[Vm]:
        scan = await self.listing.scan()
        return [scan.find(name) for name in dict.fromkeys(names)]

    def _start(
        self,
        kind: JobKind,
        vms: Sequence[Vm],
        step: Step[Vm],
        *,
        peer: Peer,
        tolerant: bool = False,
        unread: Sequence[UnreadVm] = (),
    ) -> JobId:
        work = partial(self._each, kind, vms, step, tolerant=tolerant, failed=unread)
        return self._jobs.start(kind, [vm.name for vm in vms], work, peer=peer)

    async def _each(
        self,
        kind: JobKind,
        vms: Sequence[V],
        step: Step[V],
        progress: JobProgress,
        *,
        failed: Sequence[UnreadVm | Missed],
        tolerant: bool = False,
    ) -> JobReport:
        """Run ``step`` for one VM after the other; what goes wrong with one, whatever it is, spoils no other's turn."""
        done, total = 0, sum(vm.size_bytes for vm in vms)

        def advance(count: int, doing: str) -> None:
            nonlocal done
            done += count
            progress.update(done_bytes=min(done, total), total_bytes=total, doing=doing)

        def reporting(vm: V) -> Callable[[int], None]:
            advance(0, doing := f"{kind} of {vm.name}")
            return partial(advance, doing=doing)

        outcomes = [failed_outcome(each.name, error_info(each.error)) for each in failed]
        outcomes += await one_by_one(kind, vms, lambda vm: step(vm, reporting(vm)), tolerant=tolerant)
        await self._threads.files(self._fill_reserve)
        await self._threads.files(memory.give_back)
        return JobReport(vms=outcomes)

    def _backing_up(self, vms: Sequence[Vm], *, archive: bool) -> Step[Vm]:
        """The step of a job that backs up these VMs; the claims of many are listed once, not for each."""
        claimed: Mapping[VmId, int] | None = None

        async def step(vm: Vm, progress: Callable[[int], None]) -> VmOutcome:
            nonlocal claimed
            if claimed is None and len(vms) > 1:
                claimed = await self._claims.survey()
            return await self._back_up(vm, progress, archive=archive, claimed=claimed)

        return step

    async def _back_up(
        self, vm: Vm, progress: Callable[[int], None], *, archive: bool, claimed: Mapping[VmId, int] | None
    ) -> VmOutcome:
        for file in vm.files:
            await self._hydration.stop(file.ino)
        try:
            try:
                report = await self._archiver.run(vm, archive=archive, progress=progress, claimed=claimed)
            except InUse:
                if archive:
                    raise
                report = await self._archiver.run_in_use(vm, progress=progress, claimed=claimed)
        finally:
            if self._replica is not None:
                self._replica.due([vm.id])
        outcome = "archived" if report.placeholders else "backed up"
        abandoned, placeholders = printable(report.abandoned), [printable(path) for path in report.placeholders]
        left_out = [printable(path) for path in report.left_out]
        message = abandoned
        in_use = "" if report.consistency == "off" else f"while it was in use ({report.consistency})"
        if left_out and not message:
            message = f"without {len(left_out)} FIFOs, sockets or devices, which no backup holds: {left_out[0]}"
        forgotten, retention = await self._forget(vm)
        shown = {
            "placeholders": placeholders,
            "abandoned": abandoned,
            "left_out": left_out,
            "forgotten": forgotten,
            "message": "; ".join(filter(None, (message, in_use, report.warning, retention))),
            "outcome": outcome,
        }
        return VmOutcome.model_validate({**asdict(report), **shown})

    async def _forget(self, vm: Vm) -> tuple[list[PointId], str]:
        """Apply [retention] to a VM that was backed up: what was forgotten, and what to say of it.

        Whatever goes wrong with that is no failure of the backup.
        """
        rules = self._config.retention.rules
        if rules.keeps_all:
            return [], ""
        try:
            verdicts = await apply_rules(
                self._threads, self._store, vm.id, rules, host=socket.gethostname(), now_s=time.time()
            )
        except Exception as exc:
            return [], _not_forgotten(vm, exc)
        forgotten = [verdict.point.point_id for verdict in verdicts if not verdict.is_kept]
        problem = problem_of(verdicts)
        if problem is not None:
            return forgotten, _not_forgotten(vm, problem)
        return forgotten, f"older restore points forgotten: {len(forgotten)}" if forgotten else ""

    async def _adopt(self, wanted: Wanted, progress: Callable[[int], None], *, told: Told) -> VmOutcome:
        report = await self._adopter.run(wanted, told=told, progress=progress)
        for warning in report.warnings:
            log.warning("VM %s: %s", wanted.name, printable(warning))
        message = f"as it was at {time_text(report.created_s)}, restore point {report.point_id}"
        if report.warnings:
            more = len(report.warnings) - 1
            message += f"; {report.warnings[0]}{f' (and {more} more in the log)' if more else ''}"
        fields = {
            "vm": wanted.name,
            "outcome": "adopted",
            "message": message,
            "vm_id": wanted.vm.vm_id,
            "point_id": report.point_id,
            "placeholders": [printable(path) for path in report.placeholders],
        }
        return VmOutcome.model_validate(fields)

    async def _bring_back(self, vm: Vm, progress: Callable[[int], None]) -> VmOutcome:
        for file in vm.files:
            if self._disks.placeholders.get(file.ino) is not None:
                await self._bring_file_back(file, progress)
        return VmOutcome(vm=vm.name, outcome="recalled")

    async def _bring_file_back(self, file: VmFile, progress: Callable[[int], None]) -> None:
        try:
            opened = partial(self._files.call, "hydrate.open", open_beneath, self._backing_fd, file.path)
            path_fd = await self._threads.files(opened)
        except OSError as exc:
            raise PrimaryIOError(f"{disk_label(file.path)}: cannot be opened: {exc.strerror}") from exc
        try:
            await self._hydration.bring_back(path_fd, progress=progress)
        finally:
            os.close(path_fd)


def _not_forgotten(vm: Vm, error: Exception) -> str:
    failure = failure_info(f"forgetting restore points of VM {vm.name}", error)
    return f"not all restore points that are due could be forgotten: {failure.message}"
