"""Which metrics a daemon has, and where each is read: everything that /metrics says, but what the API counts itself.

None of it waits for a disk or the store.  The rules in share/vmfs-stub/alerts.yml use these names; a test compares.
"""

from __future__ import annotations

import errno
from collections import Counter
from importlib.metadata import version

from vmfs_stub.control.jobs import Jobs
from vmfs_stub.control.metrics import Labelled, Metrics
from vmfs_stub.core.usage import DAY_S
from vmfs_stub.datastore import Datastore
from vmfs_stub.datastore_monitoring import Monitoring
from vmfs_stub.datastore_status import Health
from vmfs_stub.mount.fuse import Faults
from vmfs_stub.mount.serving import Mount
from vmfs_stub.mover.client import ProcessMover
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.recall import RecallService
from vmfs_stub.store.clients import StoreClients

_SEVERITIES = ("problem", "warning", "note")


def make_metrics(
    datastore: Datastore,
    services: DiskServices,
    mount: Mount,
    jobs: Jobs,
    clients: StoreClients,
    mover: ProcessMover,
) -> Metrics:
    """All metrics of a daemon, except those that its API adds."""
    metrics, disks = Metrics(), services.disks
    metrics.gauges(
        "build_info", "1; the label says which version.", ("version",), lambda: {(version("vmfs-stub"),): 1.0}
    )
    metrics.gauge("start_time_seconds", "When the daemon started.", lambda: datastore.health.started_s)
    metrics.gauge("placeholders", "Placeholders of this datastore.", lambda: len(disks.placeholders))
    metrics.gauge("open_disks", "Disks that guests have open.", lambda: len(disks.open_disks()))
    metrics.total("mover_starts", "Processes of the data mover that were started.", lambda: mover.starts)
    metrics.totals(
        "jobs",
        "Jobs that ended, by how.",
        ("kind", "outcome"),
        lambda: _by_outcome(jobs),
    )
    metrics.gauge("jobs_running", "Jobs that run.", lambda: sum(job.state == "running" for job in jobs.list()))
    _add_health(metrics, datastore.health)
    _add_backups(metrics, datastore.monitoring)
    _add_primary(metrics, datastore.monitoring)
    _add_recalls(metrics, services.recall)
    _add_requests(metrics, mount.faults)
    metrics.totals(
        "store_errors",
        "Calls of the daemon and its data movers that a store did not answer as it should, retries not counted.",
        ("place", "error"),
        lambda: Counter(clients.errors()) + Counter(mover.store_errors()),
    )
    return metrics


def _add_health(metrics: Metrics, health: Health) -> None:
    metrics.gauge("healthy", "1, or 0 while an operator has to act.", lambda: health.is_healthy(health.findings()))
    metrics.gauges("findings", "What `status` finds.", ("severity",), lambda: _by_severity(health))
    metrics.gauges("store_up", "1, or 0 while it does not answer.", ("place",), health.places_up)
    metrics.maybe("replica_behind_points", "Restore points that the replica lacks.", health.replica_behind)


def _add_backups(metrics: Metrics, monitoring: Monitoring) -> None:
    metrics.gauge("vms", "VMs of this datastore.", lambda: len(monitoring.vms))
    metrics.gauge("vms_without_point", "VMs that have no restore point.", monitoring.vms_without_point)
    metrics.gauges(
        "vm_point_age_seconds",
        "Age of the newest restore point of a VM; beyond the limit of VMs, of the oldest of the others.",
        ("vm",),
        lambda: {(name,): age_s for name, age_s in monitoring.point_ages_s()},
    )
    metrics.maybe("oldest_point_age_seconds", "The largest of all VMs.", monitoring.oldest_point_age_s)
    metrics.maybe(
        "last_backup_age_seconds", "Time since the last backup job that was done.", monitoring.last_backup_age_s
    )


def _add_primary(metrics: Metrics, monitoring: Monitoring) -> None:
    metrics.gauge("primary_free_bytes", "Free on the backing filesystem.", lambda: monitoring.space().free_bytes)
    metrics.gauge("primary_size_bytes", "Its size.", lambda: monitoring.space().size_bytes)
    metrics.maybe(
        "primary_full_in_days",
        "When it is full if it goes on filling as in the last days; left out where it is not filling.",
        lambda: None if (left_s := monitoring.full_in_s()) is None else left_s / DAY_S,
    )
    metrics.gauge("saved_bytes", "What placeholders do not take on primary.", lambda: monitoring.saved_bytes)


def _add_recalls(metrics: Metrics, recall: RecallService) -> None:
    counters, waits = recall.counters, recall.waits
    metrics.total("recalled_on_demand_bytes", "Raw bytes recalled for guests.", lambda: counters.demand_bytes)
    metrics.total("recalled_in_background_bytes", "Raw bytes hydrated.", lambda: counters.background_bytes)
    metrics.total("recall_failures", "Fetches that failed, other tries included.", lambda: counters.failures)
    metrics.gauge("recalls_waiting", "Reads that wait for a recall now.", lambda: counters.waiting)
    metrics.gauge("recalls_held", "1 while recalls are held.", lambda: recall.held)
    metrics.histogram("recall_wait_seconds", "How long guests' reads waited for recalls.", waits.all)
    metrics.total("recall_waits_failed", "Of these, those that ended with an error.", lambda: waits.failed)
    metrics.gauge(
        "recalls_failing", "1 while none has worked since the last error.", lambda: waits.failing_for_s() is not None
    )


def _add_requests(metrics: Metrics, faults: Faults) -> None:
    metrics.totals(
        "request_errors",
        "Requests of programs to the mount that were answered with an error, most of them ordinary.",
        ("operation", "error"),
        lambda: {(name, errno.errorcode.get(code, str(code))): count for (name, code), count in faults.errors.items()},
    )
    metrics.total("request_bugs", "Requests that met a programming error.", faults.bugs.total)


def _by_outcome(jobs: Jobs) -> Labelled:
    return {(kind, outcome): count for (kind, outcome), count in jobs.ended.items()}


def _by_severity(health: Health) -> Labelled:
    counts: Counter[str] = Counter(finding.severity for finding in health.findings())
    return {(severity,): counts[severity] for severity in _SEVERITIES}
