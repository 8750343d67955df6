"""How a datastore is: what `status` says, and whether an operator has to act."""

from __future__ import annotations

import logging
import os
import time
from importlib.metadata import version

import trio

from vmfs_stub.config import Config
from vmfs_stub.control.jobs import Jobs
from vmfs_stub.control.messages import (
    DaemonStatus,
    Finding,
    LibvirtStatus,
    MountStatus,
    RecallStatus,
    ReplicaStatus,
    Status,
    StoreStatus,
)
from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.datastore_listing import Listing
from vmfs_stub.mount.serving import Mount
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.libvirt_hypervisor import LibvirtHypervisor
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 15.0
"""How often the store is asked whether it is there."""


class Health:
    """Knows what the parts of a daemon say of themselves; ``backing_fd`` stays the caller's."""

    def __init__(
        self,
        *,
        config: Config,
        threads: Threads,
        store: Store,
        replica: ReplicaService | None,
        services: DiskServices,
        hypervisor: Hypervisor,
        findings: Findings,
        jobs: Jobs,
        mount: Mount,
        listing: Listing,
        backing_fd: int,
    ) -> None:
        self._config = config
        self._threads = threads
        self._store = store
        self._replica = replica
        self._disks = services.disks
        self._recall = services.recall
        self._hypervisor = hypervisor
        self._findings = findings
        self._jobs = jobs
        self._mount = mount
        self._listing = listing
        self._backing_fd = backing_fd
        self._started_s = time.time()
        self._store_error: str | None = None

    async def status(self) -> Status:
        """What the daemon knows about itself; ``healthy`` is false when an operator has to act."""
        vfs = os.fstatvfs(self._backing_fd)
        datastore = self._config.datastore
        findings = [
            Finding(
                severity="problem" if finding.is_problem else "warning",
                subject=finding.subject,
                message=str(finding.error).removeprefix(f"{finding.subject}: "),  # which is shown before it
            )
            for finding in self._findings.all()
        ]
        findings += [
            Finding(severity="warning", subject=f"VM {unread.name}", message=str(unread.error))
            for unread in self._listing.unread
        ]
        if (elsewhere := self._stored_elsewhere()) is not None:
            findings.append(Finding(severity="problem", subject="store", message=elsewhere))
        if self._replica is not None:
            findings += [
                Finding(severity="problem" if must_act else "warning", subject="replica", message=message)
                for must_act, message in self._replica.problems()
            ]
        libvirt = self._libvirt_status()
        if libvirt is not None and not libvirt.connected:
            message = f"{libvirt.uri} does not answer: {libvirt.last_error}; VMs that run are not told from idle ones"
            findings.append(Finding(severity="warning", subject="libvirt", message=message))
        mounted = not self._mount.ended.is_set()
        healthy = mounted and self._store_error is None and all(f.severity != "problem" for f in findings)
        counters = self._recall.counters
        return Status(
            healthy=healthy,
            daemon=DaemonStatus(
                pid=os.getpid(),
                version=version("vmfs-stub"),
                started=self._started_s,
                held=self._recall.held,
                recalled_bytes=counters.demand_bytes + counters.background_bytes,
                recalled_on_demand_bytes=counters.demand_bytes,
                waiting_reads=counters.waiting,
            ),
            mount=MountStatus(
                mountpoint=str(datastore.mountpoint),
                backing=str(datastore.backing),
                mounted=mounted,
                open_disks=len(self._disks.open_disks()),
                free_bytes=vfs.f_bavail * vfs.f_frsize,
                size_bytes=vfs.f_blocks * vfs.f_frsize,
            ),
            store=StoreStatus(
                url=self._config.store.url,
                store_id=self._store.id,
                reachable=self._store_error is None,
                last_error=self._store_error,
            ),
            replica=self._replica_status(),
            libvirt=libvirt,
            jobs=[job for job in self._jobs.list() if job.state == "running"],
            recalls=self._recalls(),
            findings=findings,
        )

    def _replica_status(self) -> ReplicaStatus | None:
        if self._replica is None:
            return None
        away = self._replica.away
        return ReplicaStatus(
            url=self._config.replica.url,
            reachable=away is None,
            last_error=None if away is None else str(away),
            behind=sum(self._replica.lag.values()),
            reads=self._replica.reads,
        )

    def _libvirt_status(self) -> LibvirtStatus | None:
        libvirt = self._hypervisor
        if not isinstance(libvirt, LibvirtHypervisor) or not libvirt.is_used:
            return None
        return LibvirtStatus(
            uri=libvirt.uri,
            connected=not libvirt.is_away,
            away_since=libvirt.away_since_s,
            last_error=libvirt.away_reason,
        )

    def _stored_elsewhere(self) -> str | None:
        """What is wrong when [store] url leads to another store than the one that placeholders depend on."""
        found = self._disks.placeholders.stored_elsewhere(self._store.id)
        if not found:
            return None
        stores = ", ".join(sorted({each.record.store_id for each in found if each.record is not None}))
        return (
            f"{len(found)} placeholders have their bytes in store {stores} and cannot be recalled from "
            f"{self._store.id}, where [store] url leads ({found[0].label} for one); correct the url, or write them out "
            "with `vmfs-stub restore`; then start the daemon again"
        )

    def _recalls(self) -> list[RecallStatus]:
        rows = []
        for ino, _known in self._disks.placeholders.items():
            disk = self._disks.get(ino)
            if disk is None or disk.placeholder is None or self._listing.state(ino) != "recalling":
                continue
            total, absent = disk.placeholder.maps.record.size, disk.placeholder.absent_bytes()
            rows.append(
                RecallStatus(
                    vm=disk.name.vm,
                    disk=disk.name.path,
                    done_bytes=max(0, total - absent),
                    total_bytes=total,
                )
            )
        return rows

    async def watch_store(self) -> None:
        """Ask the store now and then whether it is there, for `status`."""
        if (elsewhere := self._stored_elsewhere()) is not None:
            log.error("%s", elsewhere)
        while True:
            try:
                await self._threads.store(self._store.check)
                self._store_error = None
            except VmfsStubError as exc:
                self._store_error = str(exc)
            await trio.sleep(PROBE_INTERVAL_S)
