"""Backup jobs of a datastore, as the control API starts them: with archives by policy, or of the VMs that are named."""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import trio

from vmfs_stub.config import Config
from vmfs_stub.control.jobs import JobProgress, Jobs, failed_outcome
from vmfs_stub.control.messages import JobKind, JobReport, VmOutcome, error_info
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import HypervisorAway, Refused
from vmfs_stub.core.ids import JobId, PointId, VmId
from vmfs_stub.daemon_settings import job_settings, make_hooks
from vmfs_stub.datastore_listing import Listing
from vmfs_stub.datastore_reports import names_of, not_forgotten, outcome_of, watch_of
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import Scan, Vm
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.services.backup_job import BackupJobs, Placeholders
from vmfs_stub.services.backup_turn import Decide, TurnMeans
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.frozen_guests import FrozenGuests
from vmfs_stub.services.gathering import Gathering
from vmfs_stub.services.hypervisor import WatchedHypervisor
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.retention import apply_rules, problem_of
from vmfs_stub.services.running_backup import Freezer
from vmfs_stub.services.situation import Situation
from vmfs_stub.services.stopped_guests import NotStopped, StoppedGuests
from vmfs_stub.services.threads import Threads
from vmfs_stub.settings import Settings
from vmfs_stub.store.store import Store


class Backups:
    """Backup jobs of one datastore.

    ``look`` sees what is so now, ``decide`` says what policy wants archived; ``clean_up`` is called at the end of each
    job.  Attributes: ``paused`` is whether backup jobs are; ``guests`` are those that jobs have stopped, ``frozen``
    those that backups have frozen.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        threads: Threads,
        private: PrivateState,
        inventory: DirectoryInventory,
        store: Store,
        replica: ReplicaService | None,
        services: DiskServices,
        jobs: Jobs,
        listing: Listing,
        hypervisor: WatchedHypervisor,
        managed_save: ManagedSave,
        findings: Findings,
        look: Callable[[], Awaitable[Situation]],
        decide: Decide,
        clean_up: Callable[[], Awaitable[None]],
    ) -> None:
        config = settings.current
        self._settings = settings
        self._look = look
        self._gathering = Gathering(
            hypervisor=hypervisor, threads=threads, inventory=inventory, groups=services.groups, look=look
        )
        self._threads = threads
        self._store = store
        self._jobs = jobs
        self._listing = listing
        self._clean_up = clean_up
        self.paused = config.jobs_paused_path.exists()
        self.guests = StoppedGuests(
            hypervisor=hypervisor,
            threads=threads,
            private=private,
            placeholders=services.disks.placeholders,
            managed_save=managed_save,
            link=services.link,
            limit_s=config.jobs.shutdown_limit_s,
            placeholder_bytes_min=config.archive.placeholder_bytes_min,
        )
        self.frozen = FrozenGuests(hypervisor=hypervisor, threads=threads, notes=private.thaws, findings=findings)
        means = TurnMeans(
            archiver=services.archiver,
            hydration=services.hydration,
            guests=self.guests,
            hooks=make_hooks(config),
            decide=decide,
            look=look,
            freezer_of=self._freezer_of,
            found_again=self._found_again,
            backed_up=lambda vm_id: None if replica is None else replica.due([vm_id]),
            made=listing.backed_up,
            forget=self._forget,
        )
        self._backups = BackupJobs(
            settings=job_settings(config), means=means, claims=services.claims, is_paused=lambda: self.paused
        )

    @property
    def _config(self) -> Config:
        return self._settings.current

    def apply(self, config: Config) -> None:
        """Go by another configuration: jobs that run go on by the one before."""
        self._backups.settings = job_settings(config)
        self._backups.means = replace(self._backups.means, hooks=make_hooks(config))
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
        """Back up the named VMs (none named: all), and archive those that policy says if that is allowed.

        Raises VmNotFound, AmbiguousName, Refused, PrimaryIOError.
        """
        if self.paused and not rehearsal:
            raise Refused("backup jobs are paused; `vmfs-stub jobs --unpause` allows them again")
        await self._gathering.run()
        scan = await self._listing.scan()
        if vms:
            scan = scan.named(vms)
        if rehearsal:

            async def rehearse(progress: JobProgress) -> JobReport:
                results = await self._backups.rehearse(scan.vms)
                return JobReport(vms=[*_unread(scan), *map(outcome_of, results)])

            return self._jobs.start("rehearsal", names_of(scan), rehearse, peer=peer)
        by_policy = archive and self._config.archive.enabled
        placeholders = Placeholders.BY_POLICY if by_policy else Placeholders.NONE
        return self._start("backup", scan, placeholders, tolerant=not vms, peer=peer)

    async def start_archive(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Back up the named VMs and make placeholders of them; what stands against one of them is told in the report.

        Raises VmNotFound, AmbiguousName, and HypervisorAway, PrimaryIOError where it cannot be told of any.
        """
        await self._gathering.run()
        situation = await self._look()
        scan, chains = situation.scan.named(vms), situation.chains
        # Images before those that they are based on, which may be archived only then.
        scan = replace(scan, vms=tuple(chains.in_order(scan.vms)))
        alone = chains.are_linked(scan.vms)
        return self._start("archive", scan, Placeholders.OF_ALL, tolerant=False, peer=peer, alone=alone)

    async def pause(self, *, paused: bool) -> None:
        """Pause backup jobs, also after a restart, or let them go on."""
        path = self._config.jobs_paused_path
        await self._threads.files(path.touch if paused else partial(path.unlink, missing_ok=True))
        self.paused = paused

    async def _freezer_of(self, vm: Vm) -> Freezer | None:
        """What brings the filesystems of its guest to rest; None when no guest of one domain runs it."""
        with suppress(HypervisorAway, NotStopped):
            domain = await self.guests.running(vm)
            return None if domain is None else partial(self.frozen.at_rest, vm, domain)
        return None

    async def _found_again(self, vm: Vm) -> Vm:
        await self._gathering.run()
        return (await self._listing.scan()).find(vm.id)

    def _start(
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
            unread = _unread(scan)
            for outcome in unread:
                progress.add(outcome)
            ended: dict[VmId, VmOutcome] = {}
            watch = watch_of(kind, scan.vms, progress, ended)
            await self._backups.run(scan.vms, placeholders=placeholders, tolerant=tolerant, watch=watch, alone=alone)
            await self._clean_up()
            return JobReport(vms=unread + [ended[vm.id] for vm in scan.vms])

        return self._jobs.start(kind, names_of(scan), work, peer=peer)

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


def _unread(scan: Scan) -> list[VmOutcome]:
    return [failed_outcome(each.name, error_info(each.error)) for each in scan.unread]
