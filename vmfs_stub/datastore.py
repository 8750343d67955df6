"""The datastore as the control API sees it: lists disks, runs jobs, holds recalls, ends.

Purpose: turns requests into calls of services and their results into messages.  It decides nothing about bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.jobs import Jobs
from vmfs_stub.control.messages import DiskRow, JobInfo, Status
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import InUse
from vmfs_stub.core.ids import JobId
from vmfs_stub.datastore_jobs import DatastoreJobs
from vmfs_stub.datastore_listing import Listing, only_warned
from vmfs_stub.datastore_status import Health
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.mount.serving import Mount
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.backup_job import Decide, nothing_is_idle
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.hypervisor import Hypervisor, NoHypervisor
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store


class Datastore:
    """Implements what control.target describes; wired together by the daemon.

    Attributes: ``listing``, ``health`` and ``work`` (jobs) have work of their own that goes on beside the datastore's.
    """

    def __init__(
        self,
        *,
        config: Config,
        threads: Threads,
        private: PrivateState,
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
        hypervisor: Hypervisor | None = None,
        decide: Decide = nothing_is_idle,
    ) -> None:
        self._config = config
        self._threads = threads
        self._replica = replica
        self._disks = services.disks
        self._recall = services.recall
        self._mount = mount
        self._stop = stop
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._backing_fd = services.files.call("list.backing", os.open, config.datastore.backing, flags)
        self.listing = Listing(
            config=config,
            threads=threads,
            inventory=inventory,
            catalog=catalog,
            store=store,
            services=services,
            backing_fd=self._backing_fd,
        )
        self.work = DatastoreJobs(
            config=config,
            threads=threads,
            private=private,
            catalog=catalog,
            store=store,
            replica=replica,
            services=services,
            jobs=jobs,
            listing=self.listing,
            backing_fd=self._backing_fd,
            reserve=reserve,
            hypervisor=hypervisor or NoHypervisor(),
            decide=decide,
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
            jobs_paused=lambda: self.work.paused,
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

    async def start_backup(self, vms: Sequence[str], *, archive: bool, rehearsal: bool = False, peer: Peer) -> JobId:
        """Back up the named VMs (none named: all)."""
        return await self.work.start_backup(vms, archive=archive, rehearsal=rehearsal, peer=peer)

    async def start_archive(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Back up the named VMs and make placeholders of them; raises InUse."""
        return await self.work.start_archive(vms, peer=peer)

    async def start_recall(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Bring the named VMs back in full; raises RecallsHeld."""
        return await self.work.start_recall(vms, peer=peer)

    async def start_adopt(self, vms: Sequence[str], *, everything: bool, told: Told, peer: Peer) -> JobId:
        """Make placeholders here of the named VMs of the store, or of all that are not here."""
        return await self.work.start_adopt(vms, everything=everything, told=told, peer=peer)

    async def job(self, job_id: JobId, *, wait_s: float) -> JobInfo:
        """State of one job when it has ended, or after so many seconds; raises NotFound."""
        return await self.work.job(job_id, wait_s=wait_s)

    async def jobs(self) -> list[JobInfo]:
        """Running and recent jobs, those of earlier daemons included, newest first."""
        return await self.work.jobs()

    async def cancel_job(self, job_id: JobId, *, peer: Peer) -> None:
        """Tell a running job to end where it is; raises NotFound, Refused."""
        await self.work.cancel(job_id)

    async def pause_jobs(self, *, paused: bool, peer: Peer) -> None:
        """Pause backup jobs until they are let go on, also after a restart."""
        await self.work.pause(paused=paused)
