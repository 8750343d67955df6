"""What the configuration means to each part of the daemon: its settings, and limits that follow from several keys.

Touches nothing.  What of it can change while the daemon runs, `daemon_reload.follow` gives to each.
"""

from __future__ import annotations

import socket
from dataclasses import replace

from vmfs_stub.config import Config
from vmfs_stub.mount.settings import MountSettings
from vmfs_stub.mover.messages import MoverSettings
from vmfs_stub.services.backup_job import JobSettings
from vmfs_stub.services.backup_report import ArchiveSettings
from vmfs_stub.services.disk_services import ServiceSettings
from vmfs_stub.services.facts import FactsSettings
from vmfs_stub.services.hooks import Hooks
from vmfs_stub.services.hydration import STEPS_AT_ONCE, STEPS_AT_ONCE_FAR
from vmfs_stub.services.libvirt_hypervisor import LibvirtSettings
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.objects_url import StoreAt
from vmfs_stub.store.store import Store

FETCH_BYTES_MAX = 4 << 20
"""Raw bytes of one range read: larger ones do not get faster, and a guest waits for the whole of it."""
TRANSFER_TIMEOUT_FACTOR = 6
"""A pack is some hundred times a chunk; its transfer may take this many times a short call's limit."""


def store_at(config: Config) -> StoreAt:
    """Where the store is, and how long its calls may take."""
    timeout_s = config.recall.store_timeout_s
    transfer_timeout_s = timeout_s * TRANSFER_TIMEOUT_FACTOR
    return replace(StoreAt.of(config.store), timeout_s=timeout_s, transfer_timeout_s=transfer_timeout_s)


def store_places(config: Config) -> tuple[StoreAt, StoreAt | None]:
    """Of the store and its replica."""
    at = store_at(config)
    return at, at.replica(config.replica)


def make_threads(config: Config) -> Threads:
    """The pools of threads for calls that may wait."""
    at = store_at(config)
    return Threads(
        files_max=config.primary.threads,
        store_max=config.store.threads,
        compute_max=config.archive.workers,
        store_timeout_s=at.timeout_s,
        transfer_timeout_s=at.transfer_timeout_s,
    )


def mover_settings(config: Config, store: Store) -> MoverSettings:
    """Of the process that moves data, which asks the same store."""
    return MoverSettings(
        store=store_at(config),
        store_description=store.description,
        store_key=store.key,
        index_path=config.index_path,
        workers=config.archive.workers,
        files_threads=config.primary.threads,
        store_threads=config.store.threads,
        slot_bytes=max(fetch_bytes_max(config), store.chunk_size),
        replica=store_at(config).replica(config.replica),
        read_back_path=config.read_back_path,
    )


def fetch_bytes_max(config: Config) -> int:
    """Raw bytes of one range read, so that all that may be under way have room."""
    recall = config.recall
    return min(FETCH_BYTES_MAX, max(1, recall.recall_bytes_max // recall.recall_concurrency))


def service_settings(config: Config) -> ServiceSettings:
    """Of recall, hydration and archive; all of them can be replaced while the daemon runs."""
    recall, archive = config.recall, config.archive
    return ServiceSettings(
        recall_deadline_s=recall.recall_deadline_s,
        recall_concurrency=recall.recall_concurrency,
        recall_queue_max=recall.recall_queue_max,
        fetch_bytes_max=fetch_bytes_max(config),
        hydration_enabled=config.hydration.enabled,
        hydration_bytes_per_s_max=config.hydration.bytes_per_s_max,
        hydration_steps=STEPS_AT_ONCE_FAR if store_at(config).is_far else STEPS_AT_ONCE,
        free_floor_percent=config.primary.free_floor_percent,
        archive=ArchiveSettings(
            resident_head_bytes=archive.resident_head_bytes,
            resident_tail_bytes=archive.resident_tail_bytes,
            placeholder_bytes_min=archive.placeholder_bytes_min,
            host=socket.gethostname(),
            datastore=config.datastore.name,
            min_copies=config.min_copies,
            set_aside_bytes_max=config.jobs.set_aside_bytes_max,
            free_floor_percent=config.primary.free_floor_percent,
        ),
    )


def mount_settings(config: Config) -> MountSettings:
    """Of the mount and its operations."""
    return MountSettings(
        name=config.datastore.name,
        allow_other=config.mount.allow_other,
        attr_timeout_s=config.mount.attr_timeout_s,
        max_background=config.mount.max_background,
        # At the end, reads that wait for a recall get their answer.
        shutdown_grace_s=config.recall.recall_deadline_s + 1,
    )


def libvirt_settings(config: Config, *, met_before: bool) -> LibvirtSettings:
    """Of the libvirt that is asked, unless `[libvirt] enabled` is false; ``met_before``: see LibvirtSettings."""
    libvirt = config.libvirt
    return LibvirtSettings(
        uri=libvirt.uri,
        timeout_s=libvirt.timeout_s,
        is_optional=libvirt.enabled == "auto",
        met_before=met_before,
    )


def job_settings(config: Config) -> JobSettings:
    """Of backup jobs."""
    return JobSettings(
        parallel=config.jobs.parallel,
        failures_percent_max=config.jobs.failures_percent_max,
        failures_count_min=config.jobs.failures_count_min,
        dry_run=config.archive.dry_run,
    )


def make_hooks(config: Config) -> Hooks:
    """The commands around backups, archives, stops and starts."""
    return Hooks(config.hooks.before, config.hooks.after, limit_s=config.hooks.limit_s)


def facts_settings(config: Config) -> FactsSettings:
    """Of what policy has to know of VMs."""
    archive = config.archive
    return FactsSettings(
        placeholder_bytes_min=archive.placeholder_bytes_min,
        resident_bytes=archive.resident_head_bytes + archive.resident_tail_bytes,
        boot_bytes=config.policy.boot_bytes,
        store_bytes_per_s=config.policy.store_bytes_per_s,
    )
