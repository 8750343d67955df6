"""The jobs that the control API starts: which there are, and what each does with VMs."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.jobs import JobProgress, Jobs, failed_outcome, one_by_one
from vmfs_stub.control.messages import JobInfo, JobKind, JobReport, VmOutcome, error_info
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import (
    HypervisorAway,
    InUse,
    NotFound,
    PrimaryIOError,
    RecallsHeld,
    Refused,
    VmNotFound,
)
from vmfs_stub.core.ids import JobId, PointId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.daemon_settings import job_settings, make_hooks
from vmfs_stub.datastore_listing import Listing, only_warned
from vmfs_stub.datastore_reports import adopted, job_of, not_forgotten, outcome_of, watch_of
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import Scan, UnreadVm, Vm, VmFile
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services import memory
from vmfs_stub.services.adopt import Missed, Wanted
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.backup_job import BackupJobs, Decide, Placeholders
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.domains import LinkDomains
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.frozen_guests import FrozenGuests
from vmfs_stub.services.gathering import Gathering
from vmfs_stub.services.hypervisor import WatchedHypervisor
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.obstacles import ObstacleSight, protected
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.retention import apply_rules, problem_of
from vmfs_stub.services.running_backup import Freezer
from vmfs_stub.services.stopped_guests import NotStopped, StoppedGuests
from vmfs_stub.services.threads import Threads
from vmfs_stub.settings import Settings
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

LISTED_MAX = 200
"""Jobs that are listed, each with its report; older ones have to be named."""

V = TypeVar("V", Vm, Wanted)

Step = Callable[[V, Callable[[int], None]], Awaitable[VmOutcome]]
"""What a job does with one VM; the function gets the number of bytes dealt with since it was last called."""


class DatastoreJobs:
    """Jobs of one datastore.

    ``paused`` is whether backup jobs are; ``backing_fd`` is the backing directory, and stays the caller's.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        threads: Threads,
        private: PrivateState,
        inventory: DirectoryInventory,
        catalog: Catalog,
        store: Store,
        replica: ReplicaService | None,
        services: DiskServices,
        jobs: Jobs,
        listing: Listing,
        backing_fd: int,
        reserve: Callable[[], None],
        hypervisor: WatchedHypervisor,
        obstacles: ObstacleSight,
        managed_save: ManagedSave,
        findings: Findings,
        link: LinkDomains,
        decide: Decide,
    ) -> None:
        config = settings.current
        self._settings = settings
        self._inventory = inventory
        self._obstacles = obstacles
        self._gathering = Gathering(
            hypervisor=hypervisor,
            threads=threads,
            inventory=inventory,
            groups=services.groups,
            chains=services.chains,
            link=link,
            scan=listing.scan,
        )
        self._threads = threads
        self._catalog = catalog
        self._store = store
        self._services = services
        self._jobs = jobs
        self._listing = listing
        self._backing_fd = backing_fd
        self._fill_reserve = reserve
        self.paused = config.jobs_paused_path.exists()
        self.guests = StoppedGuests(
            hypervisor=hypervisor,
            threads=threads,
            private=private,
            placeholders=services.disks.placeholders,
            managed_save=managed_save,
            link=link,
            limit_s=config.jobs.shutdown_limit_s,
            placeholder_bytes_min=config.archive.placeholder_bytes_min,
        )
        self.frozen = FrozenGuests(hypervisor=hypervisor, threads=threads, notes=private.thaws, findings=findings)
        self._backups = BackupJobs(
            settings=job_settings(config),
            archiver=services.archiver,
            claims=services.claims,
            hydration=services.hydration,
            guests=self.guests,
            hooks=make_hooks(config),
            decide=decide,
            refuse=self._refuse,
            freezer_of=self._freezer_of,
            made=listing.backed_up,
            forget=self._forget,
            backed_up=lambda vm_id: None if replica is None else replica.due([vm_id]),
            found_again=self._found_again,
            is_paused=lambda: self.paused,
        )

    @property
    def _config(self) -> Config:
        return self._settings.current

    def apply(self, config: Config) -> None:
        """Go by another configuration: jobs that run go on by the one before."""
        self._backups.settings, self._backups.hooks = job_settings(config), make_hooks(config)
        self.guests.limit_s = config.jobs.shutdown_limit_s
        self.guests.placeholder_bytes_min = config.archive.placeholder_bytes_min

    async def watch_guests(self) -> None:
        """See to guests that jobs, also of an earlier daemon, have left: start those that are off, thaw the others."""

        async def vms() -> Sequence[Vm]:
            return (await self._listing.scan()).vms

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.guests.run, vms)
            nursery.start_soon(self.frozen.run)

    async def start_backup(self, vms: Sequence[str], *, archive: bool, rehearsal: bool = False, peer: Peer) -> JobId:
        """Back up the named VMs (none named: all), and archive those that policy says if that is allowed."""
        if self.paused and not rehearsal:
            raise Refused("backup jobs are paused; `vmfs-stub jobs --unpause` allows them again")
        await self._gathering.run()
        scan = Scan(tuple(await self.named(vms))) if vms else await self._listing.scan()
        if rehearsal:

            async def rehearse(progress: JobProgress) -> JobReport:
                return JobReport(vms=[outcome_of(each) for each in await self._backups.rehearse(scan.vms)])

            return self._jobs.start("rehearsal", [vm.name for vm in scan.vms], rehearse, peer=peer)
        by_policy = archive and self._config.archive.enabled
        placeholders = Placeholders.BY_POLICY if by_policy else Placeholders.NONE
        return self._start_backing_up("backup", scan, placeholders, tolerant=not vms, peer=peer)

    async def start_archive(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Back up the named VMs and make placeholders of them; raises Refused kinds, HypervisorAway."""
        await self._gathering.run()
        found = await self.named(vms)
        for vm in found:
            if vm.is_protected:
                raise protected(vm)
            for file in vm.files:
                disk = self._services.disks.get(file.ino)
                if disk is not None and disk.open_count:
                    raise InUse(f"VM {vm.name} is in use: {disk.label} is open; shut it down first")
        obstacles = await self._obstacles.look()
        # Images before those that they are based on, which may be archived only then.
        found = obstacles.chains.in_order(found)
        for vm in found:
            obstacles.refuse_by_domains(vm)
        one_by_one = obstacles.chains.are_linked(found)
        scan = Scan(tuple(found))
        return self._start_backing_up("archive", scan, Placeholders.OF_ALL, tolerant=False, peer=peer, alone=one_by_one)

    async def start_recall(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Bring the named VMs back in full; raises RecallsHeld."""
        found = await self.named(vms)
        if self._services.recall.held:
            raise RecallsHeld("recalls are held for this datastore; `vmfs-stub unhold` allows them again")
        work = partial(self._each, "recall", found, self._bring_back, failed=())
        return self._jobs.start("recall", [vm.name for vm in found], work, peer=peer)

    async def start_adopt(self, vms: Sequence[str], *, everything: bool, told: Told, peer: Peer) -> JobId:
        """Make placeholders here of the named VMs of the store, or of all that are not here."""

        async def work(progress: JobProgress) -> JobReport:
            # Which VMs there are takes as long as the store does.
            progress.update(doing="looking for VMs in the store")
            wanted, missed = await self._services.adopter.find(vms, everything=everything)
            return await self._each("adopt", wanted, partial(self._adopt, told=told), progress, failed=missed)

        return self._jobs.start("adopt", list(vms), work, peer=peer)

    async def job(self, job_id: JobId, *, wait_s: float) -> JobInfo:
        """State of one job when it has ended, or after so many seconds; raises NotFound."""
        try:
            return await self._jobs.wait(job_id, wait_s=wait_s)
        except NotFound:
            record = await self._threads.files(self._catalog.job, job_id)
            if record is None or (info := job_of(record)) is None:
                raise
            return info

    async def jobs(self) -> list[JobInfo]:
        """Running and recent jobs, those of earlier daemons included, newest first."""
        found = self._jobs.list()
        known = {job.id for job in found}
        with only_warned("the jobs of earlier daemons could not be read"):
            kept = await self._threads.files(self._catalog.jobs, count_max=LISTED_MAX)
            found += [info for record in kept if record.id not in known and (info := job_of(record)) is not None]
        return sorted(found, key=lambda job: job.started, reverse=True)[:LISTED_MAX]

    async def cancel(self, job_id: JobId) -> None:
        """Tell a running job to end; raises NotFound, Refused."""
        self._jobs.cancel(job_id)

    async def pause(self, *, paused: bool) -> None:
        """Pause backup jobs, also after a restart, or let them go on."""
        path = self._config.jobs_paused_path
        await self._threads.files(path.touch if paused else partial(path.unlink, missing_ok=True))
        self.paused = paused

    async def named(self, names: Sequence[str]) -> list[Vm]:
        """The VMs of these names, each once; raises VmNotFound, AmbiguousName, PrimaryIOError."""
        scan = await self._listing.scan()
        return [scan.find(name) for name in dict.fromkeys(names)]

    async def _refuse(self, vm: Vm) -> None:
        """Raises what stands against archiving this VM now: Protected, InUse, Refused, HypervisorAway."""
        with suppress(VmNotFound):  # whoever archives it says what became of it
            if await self._threads.files(self._inventory.is_protected, vm):
                raise protected(vm)
        (await self._obstacles.look()).refuse(vm)

    async def _freezer_of(self, vm: Vm) -> Freezer | None:
        """What brings the filesystems of its guest to rest; None when no guest of one domain runs it."""
        with suppress(HypervisorAway, NotStopped):
            domain = await self.guests.running(vm)
            return None if domain is None else partial(self.frozen.at_rest, vm, domain)
        return None

    async def _found_again(self, vm: Vm) -> Vm:
        await self._gathering.run()
        return (await self._listing.scan()).find(vm.id)

    # Backups

    def _start_backing_up(
        self,
        kind: JobKind,
        scan: Scan,
        placeholders: Placeholders,
        *,
        tolerant: bool,
        peer: Peer,
        alone: bool = False,
    ) -> JobId:
        async def work(progress: JobProgress) -> JobReport:
            outcomes = [failed_outcome(each.name, error_info(each.error)) for each in scan.unread]
            for outcome in outcomes:
                progress.add(outcome)
            ended: dict[VmId, VmOutcome] = {}
            watch = watch_of(kind, scan.vms, progress, ended)
            await self._backups.run(scan.vms, placeholders=placeholders, tolerant=tolerant, watch=watch, alone=alone)
            await self._clean_up()
            return JobReport(vms=outcomes + [ended[vm.id] for vm in scan.vms])

        return self._jobs.start(kind, [vm.name for vm in scan.vms], work, peer=peer)

    async def _clean_up(self) -> None:
        await self._threads.files(self._fill_reserve)
        await self._threads.files(memory.give_back)

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
            return [], not_forgotten(vm, exc)
        forgotten = [verdict.point.point_id for verdict in verdicts if not verdict.is_kept]
        problem = problem_of(verdicts)
        if problem is not None:
            return forgotten, not_forgotten(vm, problem)
        return forgotten, f"older restore points forgotten: {len(forgotten)}" if forgotten else ""

    # One VM after the other

    async def _each(
        self,
        kind: JobKind,
        vms: Sequence[V],
        step: Step[V],
        progress: JobProgress,
        *,
        failed: Sequence[UnreadVm | Missed],
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
        outcomes += await one_by_one(kind, vms, lambda vm: step(vm, reporting(vm)), tolerant=False)
        await self._clean_up()
        return JobReport(vms=outcomes)

    async def _adopt(self, wanted: Wanted, progress: Callable[[int], None], *, told: Told) -> VmOutcome:
        report = await self._services.adopter.run(wanted, told=told, progress=progress)
        for warning in report.warnings:
            log.warning("VM %s: %s", wanted.name, printable(warning))
        await self._listing.adopted(wanted.vm.vm_id, wanted.name, created_s=report.created_s)
        return adopted(wanted, report)

    async def _bring_back(self, vm: Vm, progress: Callable[[int], None]) -> VmOutcome:
        for file in vm.files:
            if self._services.disks.placeholders.get(file.ino) is not None:
                await self._bring_file_back(file, progress)
        return VmOutcome(vm=vm.name, outcome="recalled")

    async def _bring_file_back(self, file: VmFile, progress: Callable[[int], None]) -> None:
        try:
            opened = partial(self._services.files.call, "hydrate.open", open_beneath, self._backing_fd, file.path)
            path_fd = await self._threads.files(opened)
        except OSError as exc:
            raise PrimaryIOError(f"{disk_label(file.path)}: cannot be opened: {exc.strerror}") from exc
        try:
            await self._services.hydration.bring_back(path_fd, progress=progress)
        finally:
            os.close(path_fd)
