"""How a datastore is: what `status` says, and whether an operator has to act."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import trio

from vmfs_stub.config import Config
from vmfs_stub.control.jobs import Jobs
from vmfs_stub.control.messages import (
    BackupStatus,
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
from vmfs_stub.datastore_monitoring import RECALLS, Monitoring
from vmfs_stub.mount.serving import Mount
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.libvirt_hypervisor import LibvirtHypervisor
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.threads import Threads
from vmfs_stub.settings import Settings
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 15.0
"""How often the store is asked whether it is there."""


class Health:
    """Knows what the parts of a daemon say of themselves."""

    def __init__(
        self,
        *,
        settings: Settings,
        threads: Threads,
        store: Store,
        replica: ReplicaService | None,
        services: DiskServices,
        hypervisor: Hypervisor,
        findings: Findings,
        jobs: Jobs,
        mount: Mount,
        listing: Listing,
        monitoring: Monitoring,
        jobs_paused: Callable[[], bool],
    ) -> None:
        self._settings = settings
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
        self._monitoring = monitoring
        self._jobs_paused = jobs_paused
        self.started_s = time.time()
        self._store_error: str | None = None

    async def status(self) -> Status:
        """What the daemon knows about itself; ``healthy`` is false when an operator has to act."""
        space = self._monitoring.space()
        datastore = self._config.datastore
        findings = self.findings()
        mounted = not self._mount.ended.is_set()
        counters = self._recall.counters
        return Status(
            healthy=self.is_healthy(findings),
            daemon=DaemonStatus(
                pid=os.getpid(),
                version=version("vmfs-stub"),
                started=self.started_s,
                held=self._recall.held,
                jobs_paused=self._jobs_paused(),
                recalled_bytes=counters.demand_bytes + counters.background_bytes,
                recalled_on_demand_bytes=counters.demand_bytes,
                waiting_reads=counters.waiting,
            ),
            mount=MountStatus(
                mountpoint=str(datastore.mountpoint),
                backing=str(datastore.backing),
                mounted=mounted,
                open_disks=len(self._disks.open_disks()),
                free_bytes=space.free_bytes,
                size_bytes=space.size_bytes,
                full_in_s=self._monitoring.full_in_s(),
            ),
            backups=BackupStatus(
                last_done=self._monitoring.last_backup_s(),
                vms=len(self._monitoring.vms),
                vms_without_point=self._monitoring.vms_without_point(),
                oldest_point_age_s=self._monitoring.oldest_point_age_s(),
            ),
            store=StoreStatus(
                url=self._config.store.url,
                store_id=self._store.id,
                reachable=self._store_error is None,
                last_error=self._store_error,
            ),
            replica=self._replica_status(),
            libvirt=self._libvirt_status(),
            jobs=[job for job in self._jobs.list() if job.state == "running"],
            recalls=self._recalls(),
            findings=findings,
        )

    def findings(self) -> list[Finding]:
        """All that an operator should know now."""
        found = [
            Finding(
                severity=finding.severity,
                subject=finding.subject,
                message=str(finding.error).removeprefix(f"{finding.subject}: "),  # which is shown before it
            )
            for finding in self._findings.all()
        ]
        found += [
            Finding(severity="warning", subject=f"VM {unread.name}", message=str(unread.error))
            for unread in self._listing.unread
        ]
        if (elsewhere := self._stored_elsewhere()) is not None:
            found.append(Finding(severity="problem", subject="store", message=elsewhere))
        if self._replica is not None:
            found += [
                Finding(severity="problem" if must_act else "warning", subject="replica", message=message)
                for must_act, message in self._replica.problems()
            ]
        libvirt = self._libvirt_status()
        if libvirt is not None and not libvirt.connected:
            message = f"{libvirt.uri} does not answer: {libvirt.last_error}; VMs that run are not told from idle ones"
            found.append(Finding(severity="warning", subject="libvirt", message=message))
        # Where a disk's own finding says why, that recalls fail at all is no news.
        is_told = any(finding.severity == "problem" for finding in found)
        beyond = [each for each in self._monitoring.problems() if each.subject != RECALLS or not is_told]
        return [*found, *beyond]

    def is_healthy(self, findings: Sequence[Finding]) -> bool:
        """Whether nobody has to act, with these findings."""
        return (
            not self._mount.ended.is_set()
            and self._store_error is None
            and all(finding.severity != "problem" for finding in findings)
        )

    def places_up(self) -> dict[tuple[str, ...], float]:
        """Whether the store, and the replica if there is one, answered when last asked: 1 or 0 by name."""
        found: dict[tuple[str, ...], float] = {("store",): self._store_error is None}
        if self._replica is not None:
            found["replica",] = self._replica.away is None
        return found

    def replica_behind(self) -> float | None:
        """How many restore points the replica is known to lack; None without a replica."""
        return None if self._replica is None else sum(self._replica.lag.values())

    @property
    def _config(self) -> Config:
        return self._settings.current

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
