"""What serves the disks of one datastore, connected to each other: the daemon and the tests do it alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.services.adopt import Adopter
from vmfs_stub.services.archive import Archiver
from vmfs_stub.services.associated import AssociatedFiles
from vmfs_stub.services.backup_report import ArchiveSettings
from vmfs_stub.services.bandwidth import Bandwidth
from vmfs_stub.services.changes import Changes
from vmfs_stub.services.changes_left import ChangesLeft
from vmfs_stub.services.claims import Claims
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.domains import LinkDomains, link
from vmfs_stub.services.file_reads import FileReads
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.guest_activity import GuestActivity
from vmfs_stub.services.hydration import HydrationService
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.image_chains import ImageChains
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.mover import Mover
from vmfs_stub.services.placeholder_ender import PlaceholderEnder
from vmfs_stub.services.placeholder_index import PlaceholderIndex
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.recall_failures import RecallFailures
from vmfs_stub.services.threads import Threads
from vmfs_stub.services.vm_groups import VmGroups
from vmfs_stub.store.store import Store


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Limits; times in seconds, sizes in bytes.  ``fetch_bytes_max`` is of one range read.

    ``hydration_steps`` is how many steps of a hydration are under way at once; all of the datastore's are one more.
    """

    recall_deadline_s: float
    recall_concurrency: int
    recall_queue_max: int
    fetch_bytes_max: int
    hydration_enabled: bool
    hydration_bytes_per_s_max: int
    hydration_steps: int
    free_floor_percent: float
    archive: ArchiveSettings


@dataclass(frozen=True, slots=True)
class DiskServices:
    """The services of one datastore."""

    files: FileCalls
    claims: Claims
    recall: RecallService
    ender: PlaceholderEnder
    disks: Disks
    hydration: HydrationService
    archiver: Archiver
    adopter: Adopter
    changes: Changes
    link: LinkDomains
    chains: ImageChains
    groups: VmGroups

    def apply(self, settings: ServiceSettings) -> None:
        """From now on these limits count; steps of a hydration under way at once stay as they were at the start."""
        self.recall.deadline_s = settings.recall_deadline_s
        self.recall.waiting_max = settings.recall_queue_max
        self.recall.fetch_bytes_max = settings.fetch_bytes_max
        self.recall.set_concurrency(settings.recall_concurrency)
        self.hydration.enabled = settings.hydration_enabled
        self.hydration.bytes_per_s_max = settings.hydration_bytes_per_s_max
        self.hydration.free_floor_percent = settings.free_floor_percent
        self.archiver.apply(settings.archive)
        self.adopter.settings = settings.archive
        self.changes.tracked_bytes_min = settings.archive.placeholder_bytes_min


def connect_services(
    nursery: trio.Nursery,
    settings: ServiceSettings,
    *,
    backing: Path,
    files: FileCalls,
    threads: Threads,
    reads: FileReads,
    private: PrivateState,
    store: Store,
    reading: Store,
    mover: Mover,
    guests: GuestActivity,
    placeholders: PlaceholderIndex,
    changes_left: ChangesLeft,
    findings: Findings,
    bandwidth: Bandwidth,
    managed_save: ManagedSave,
    mountpoint: Path | None = None,
    hypervisor: Hypervisor | None = None,
) -> DiskServices:
    """Make the services; their background work runs in ``nursery``, and ends when that is cancelled.

    What guests read, and what is adopted, comes from ``reading``: the store, or the store with its replica.  With a
    ``hypervisor``, what it knows of a VM goes into its restore points; it names files below the ``mountpoint``.
    """
    failures = RecallFailures(findings)
    claims = Claims(
        nursery=nursery,
        threads=threads,
        store=store,
        private=private,
        findings=findings,
        host=settings.archive.host,
        datastore=settings.archive.datastore,
    )
    recall = RecallService(
        nursery=nursery,
        store=reading,
        threads=threads,
        mover=mover,
        deadline_s=settings.recall_deadline_s,
        concurrency_max=settings.recall_concurrency,
        waiting_max=settings.recall_queue_max,
        background_max=settings.hydration_steps + 1,
        fetch_bytes_max=settings.fetch_bytes_max,
        failures=failures,
        guests=guests,
        claims=claims,
    )
    ender = PlaceholderEnder(files=files, threads=threads, store=store, mover=mover, private=private, failures=failures)
    changes = Changes(
        files=files,
        threads=threads,
        private=private,
        left=changes_left,
        tracked_bytes_min=settings.archive.placeholder_bytes_min,
    )
    disks = Disks(
        files=files,
        threads=threads,
        reads=reads,
        recall=recall,
        ender=ender,
        private=private,
        backing=backing,
        placeholders=placeholders,
        changes=changes,
        on_damage=findings.add,
    )
    hydration = HydrationService(
        nursery=nursery,
        files=files,
        disks=disks,
        recall=recall,
        backing=backing,
        enabled=settings.hydration_enabled,
        bytes_per_s_max=settings.hydration_bytes_per_s_max,
        free_floor_percent=settings.free_floor_percent,
        steps_at_once=settings.hydration_steps,
    )
    disks.on_recall = hydration.after_use
    archiver = Archiver(
        files=files,
        threads=threads,
        claims=claims,
        recall=recall,
        ender=ender,
        disks=disks,
        store=store,
        mover=mover,
        private=private,
        backing=backing,
        settings=settings.archive,
        bandwidth=bandwidth,
    )
    adopter = Adopter(
        files=files,
        threads=threads,
        ender=ender,
        disks=disks,
        store=store,
        reading=reading,
        claims=claims,
        private=private,
        backing=backing,
        settings=settings.archive,
        memory_dir=managed_save.memory_dir,
    )
    paths = DatastorePaths(files=files, backing=backing, mountpoint=mountpoint or backing)
    link_domains = partial(link, paths=paths)
    chains = ImageChains(
        files=files,
        threads=threads,
        disks=disks,
        reading=reading,
        backing=backing,
        paths=paths,
    )
    groups = VmGroups(files=files, threads=threads, disks=disks, backing=backing)
    if hypervisor is not None:
        archiver.associated = AssociatedFiles(
            files=files,
            threads=threads,
            hypervisor=hypervisor,
            chains=chains,
            link=link_domains,
            managed_save=managed_save,
        ).of
    return DiskServices(
        files=files,
        claims=claims,
        recall=recall,
        ender=ender,
        disks=disks,
        hydration=hydration,
        archiver=archiver,
        adopter=adopter,
        changes=changes,
        link=link_domains,
        chains=chains,
        groups=groups,
    )
