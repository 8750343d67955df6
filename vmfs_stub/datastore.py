"""The datastore as the control API sees it: lists disks, runs jobs, holds recalls, ends.

Purpose: turns requests into calls of services and their results into messages.  It decides nothing about bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.jobs import Jobs
from vmfs_stub.control.messages import DiskRow, JobInfo, PolicyRow, Status, VmUsage
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import InUse, PrimaryIOError
from vmfs_stub.core.ids import JobId, VmId
from vmfs_stub.core.policy import Decision
from vmfs_stub.datastore_backups import Backups
from vmfs_stub.datastore_jobs import KnownJobs
from vmfs_stub.datastore_listing import Listing, only_warned
from vmfs_stub.datastore_monitoring import Monitoring
from vmfs_stub.datastore_policy import DatastorePolicy, policy_row
from vmfs_stub.datastore_recalls import Recalls
from vmfs_stub.datastore_status import Health
from vmfs_stub.datastore_usage import Usage
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.mount.serving import Mount
from vmfs_stub.primary.files import sync_filesystem
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.services import memory
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.archive_notes import ArchiveNotes
from vmfs_stub.services.backup_turn import Decide
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.hypervisor import WatchedHypervisor
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.mount_usage import MountUsage
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.situation import Lookout, Situation
from vmfs_stub.services.threads import Threads
from vmfs_stub.settings import Settings
from vmfs_stub.store.store import Store


class Datastore:
    """Implements what control.target describes; wired together by the daemon.

    ``decide`` says what jobs archive; by default that is the configured policy.

    Attributes: ``listing``, ``usage``, ``health``, ``monitoring``, ``notes`` and ``backups`` have work of their own
    that goes on beside the datastore's.
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
        hypervisor: WatchedHypervisor,
        mount_usage: MountUsage,
        managed_save: ManagedSave,
        findings: Findings,
        jobs: Jobs,
        mount: Mount,
        reserve: Callable[[], None],
        stop: trio.Event,
        decide: Decide | None = None,
    ) -> None:
        self._settings = settings
        config = settings.current
        self._threads = threads
        self._files = services.files
        self._inventory = inventory
        self._replica = replica
        self._disks = services.disks
        self._recall = services.recall
        self._mount = mount
        self._stop = stop
        self._fill_reserve = reserve
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
        self.usage = Usage(
            config=settings.current,
            threads=threads,
            catalog=catalog,
            hypervisor=hypervisor,
            mount_usage=mount_usage,
            link=services.link,
            scan=self.listing.scan,
        )
        self.lookout = Lookout(
            hypervisor=hypervisor,
            threads=threads,
            chains=services.chains,
            link=services.link,
            scan=self.listing.scan,
            require_stop_on_error=config.libvirt.require_stop_on_error,
        )
        self.archive_policy = DatastorePolicy(
            config=config,
            threads=threads,
            services=services,
            store=store,
            findings=findings,
            samples=catalog,
            last_use=self.usage.sampler.last_use,
            look=self.lookout.look,
            backing_fd=self._backing_fd,
        )
        self.backups = Backups(
            settings=settings,
            threads=threads,
            private=private,
            inventory=inventory,
            store=store,
            replica=replica,
            services=services,
            jobs=jobs,
            listing=self.listing,
            hypervisor=hypervisor,
            managed_save=managed_save,
            findings=findings,
            look=self.lookout.look,
            decide=decide or self._decide,
            clean_up=self._clean_up,
        )
        self.recalls = Recalls(
            threads=threads,
            services=services,
            jobs=jobs,
            listing=self.listing,
            backing_fd=self._backing_fd,
            clean_up=self._clean_up,
        )
        self.known_jobs = KnownJobs(threads=threads, catalog=catalog, jobs=jobs)
        self.monitoring = Monitoring(
            settings=settings,
            catalog=catalog,
            threads=threads,
            listing=self.listing,
            jobs=jobs,
            waits=services.recall.waits,
            backing_fd=self._backing_fd,
        )
        self.health = Health(
            settings=settings,
            threads=threads,
            store=store,
            replica=replica,
            services=services,
            hypervisor=hypervisor,
            findings=findings,
            jobs=jobs,
            mount=mount,
            listing=self.listing,
            monitoring=self.monitoring,
            jobs_paused=lambda: self.backups.paused,
        )
        self.notes = ArchiveNotes(
            hypervisor=hypervisor,
            scan=self.listing.scan,
            placeholders=self._disks.placeholders,
            link=services.link,
            threads=threads,
            datastore=config.datastore.name,
            expected_s=self.archive_policy.expected_s,
        )
        self._disks.on_open = self.listing.opened
        self._recall.held = config.hold_path.exists()

    @property
    def _config(self) -> Config:
        return self._settings.current

    def apply(self, config: Config) -> None:
        """Go by another configuration, in what is not read from it when it is needed."""
        self.archive_policy.apply(config)
        self.backups.apply(config)
        self.lookout.require_stop_on_error = config.libvirt.require_stop_on_error

    def close(self) -> None:
        """Give back the descriptor of the backing directory."""
        os.close(self._backing_fd)

    async def list_disks(self, vm: str | None) -> list[DiskRow]:
        """One row per disk, of all VMs or of the one named; raises VmNotFound, AmbiguousName."""
        return await self.listing.disks(vm)

    async def vm_usage(self, vm: str, *, days: int) -> VmUsage:
        """How one VM was used in the last ``days``; raises VmNotFound, AmbiguousName, PrimaryIOError."""
        return await self.usage.of_vm((await self.listing.scan()).find(vm), days=days)

    async def status(self) -> Status:
        """What the daemon knows about itself; ``healthy`` is false when an operator has to act."""
        return await self.health.status()

    async def policy(self) -> list[PolicyRow]:
        """What a backup job's policy would do now, one row per VM; changes nothing."""
        return [policy_row(each) for each in await self.archive_policy.decide((await self.listing.scan()).vms)]

    async def protect(self, vms: Sequence[str], *, protected: bool, peer: Peer) -> None:
        """Never archive the named VMs, or allow it again.  Raises VmNotFound, AmbiguousName, PrimaryIOError."""
        scan = await self.listing.scan()
        for vm in [scan.find(name) for name in vms]:
            await self._threads.files(self._inventory.protect, vm, protected)
        backing = self._config.datastore.backing
        try:
            await self._threads.files(self._files.call, "protect.sync", sync_filesystem, backing)
        except OSError as exc:
            raise PrimaryIOError(
                f"that may not outlast a power cut: {backing} cannot be synced: {exc.strerror}"
            ) from exc

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

    async def reload(self, *, peer: Peer) -> list[str]:
        """Read the configuration again; returns the keys that changed.  Raises ConfigError, Refused."""
        return await self._settings.reload()

    async def shutdown(self, *, force: bool, peer: Peer) -> None:
        """Flush, unmount and stop; raises InUse, and changes nothing, while disks are open and not ``force``."""
        if disks := self._disks.open_disks():
            names = ", ".join(disk.label for disk in disks[:5])
            if not force:
                raise InUse(f"disks are open ({names}); shut the VMs down, or `vmfs-stub unmount --force`")
        await self._mount.unmount(force=force)
        self._stop.set()

    # Jobs

    async def start_backup(self, vms: Sequence[str], *, archive: bool, rehearsal: bool = False, peer: Peer) -> JobId:
        """Back up the named VMs (none named: all)."""
        return await self.backups.start_backup(vms, archive=archive, rehearsal=rehearsal, peer=peer)

    async def start_archive(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Back up the named VMs and make placeholders of them; raises VmNotFound, AmbiguousName, HypervisorAway."""
        return await self.backups.start_archive(vms, peer=peer)

    async def start_recall(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Bring the named VMs back in full; raises RecallsHeld."""
        return await self.recalls.start_recall(vms, peer=peer)

    async def start_adopt(self, vms: Sequence[str], *, everything: bool, told: Told, peer: Peer) -> JobId:
        """Make placeholders here of the named VMs of the store, or of all that are not here."""
        return await self.recalls.start_adopt(vms, everything=everything, told=told, peer=peer)

    async def job(self, job_id: JobId, *, wait_s: float) -> JobInfo:
        """State of one job when it has ended, or after so many seconds; raises NotFound."""
        return await self.known_jobs.job(job_id, wait_s=wait_s)

    async def jobs(self) -> list[JobInfo]:
        """Running and recent jobs, those of earlier daemons included, newest first."""
        return await self.known_jobs.all()

    async def cancel_job(self, job_id: JobId, *, peer: Peer) -> None:
        """Tell a running job to end where it is; raises NotFound, Refused."""
        await self.known_jobs.cancel(job_id)

    async def pause_jobs(self, *, paused: bool, peer: Peer) -> None:
        """Pause backup jobs until they are let go on, also after a restart."""
        await self.backups.pause(paused=paused)

    async def _decide(self, vms: Sequence[Vm], situation: Situation | None = None) -> Mapping[VmId, Decision]:
        return {each.vm.id: each.decision for each in await self.archive_policy.decide(vms, situation)}

    async def _clean_up(self) -> None:
        await self._threads.files(self._fill_reserve)
        await self._threads.files(memory.give_back)
