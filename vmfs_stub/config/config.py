"""The configuration of one datastore: all sections together, and what follows from several of them."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import model_validator

from vmfs_stub.config.datastore import ControlConfig, DatastoreConfig, MountConfig, PrimaryConfig
from vmfs_stub.config.hypervisor import LibvirtConfig, UsageConfig
from vmfs_stub.config.jobs import ArchiveConfig, HooksConfig, JobsConfig, RetentionConfig
from vmfs_stub.config.monitoring import MonitoringConfig
from vmfs_stub.config.policy import PolicyConfig
from vmfs_stub.config.recall import HydrationConfig, RecallConfig
from vmfs_stub.config.store import ReplicaConfig, ScrubConfig, StoreConfig
from vmfs_stub.config.values import Section
from vmfs_stub.core.names import LOCK_FILE, MAPS_DIR, PRIVATE_DIR
from vmfs_stub.core.policy import Policy

GUEST_TIMEOUT_S = 30
"""SCSI time-out of a Linux guest: a recall that takes longer than this resets the guest's disk."""


class Config(Section):
    """Everything that can be configured; all paths are absolute, all sizes bytes, all times seconds."""

    datastore: DatastoreConfig
    store: StoreConfig
    replica: ReplicaConfig = ReplicaConfig()
    recall: RecallConfig = RecallConfig()
    hydration: HydrationConfig = HydrationConfig()
    archive: ArchiveConfig = ArchiveConfig()
    policy: PolicyConfig = PolicyConfig()
    jobs: JobsConfig = JobsConfig()
    hooks: HooksConfig = HooksConfig()
    retention: RetentionConfig = RetentionConfig()
    usage: UsageConfig = UsageConfig()
    scrub: ScrubConfig = ScrubConfig()
    primary: PrimaryConfig = PrimaryConfig()
    mount: MountConfig = MountConfig()
    control: ControlConfig = ControlConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    libvirt: LibvirtConfig = LibvirtConfig()

    @model_validator(mode="after")
    def _replica_is_another_place(self) -> Config:
        if self.replica.url == self.store.url:
            raise ValueError("replica.url is that of the store: a replica is another place, or there is none")
        if self.archive.min_copies > 1 and not self.replica.url:
            raise ValueError("archive.min_copies is 2, and there is no second place: name one in [replica] url")
        return self

    @property
    def min_copies(self) -> int:
        """How many copies of what is released must have been read back before: that in the store, and the replica's."""
        return self.archive.min_copies or (2 if self.replica.url else 1)

    @property
    def archive_policy(self) -> Policy:
        """Which VMs a backup job makes placeholders of; what is too small for `archive` is too small there, too."""
        return self.policy.policy(size_bytes_min=self.archive.placeholder_bytes_min)

    @property
    def private_dir(self) -> Path:
        """Private state in the backing directory (0700)."""
        return self.datastore.backing / PRIVATE_DIR

    @property
    def lock_path(self) -> Path:
        """The flock that the serving daemon holds."""
        return self.private_dir / LOCK_FILE

    @property
    def mover_lock_path(self) -> Path:
        """The flock that a daemon and its data movers share."""
        return self.private_dir / "mover.lock"

    @property
    def index_path(self) -> Path:
        """Local chunk index; it can be rebuilt from the store."""
        return self.private_dir / "index.sqlite"

    @property
    def reachability_path(self) -> Path:
        """What garbage collection knows of manifests and segments; it can be read from the store again."""
        return self.private_dir / "reachability.sqlite"

    @property
    def scrub_path(self) -> Path:
        """How far the scrub of the store has come; without it, it begins anew."""
        return self.private_dir / "scrub.sqlite"

    @property
    def read_back_path(self) -> Path:
        """Which packs of the replica were read back; without it, they are read again when they are needed again."""
        return self.private_dir / "replica.sqlite"

    @property
    def maps_dir(self) -> Path:
        """Durable residency maps: those of all placeholders that are not over."""
        return self.private_dir / MAPS_DIR

    @property
    def hold_path(self) -> Path:
        """Exists while recalls are held."""
        return self.private_dir / "hold"

    @property
    def jobs_paused_path(self) -> Path:
        """Exists while backup jobs are paused."""
        return self.private_dir / "jobs-paused"

    @property
    def store_copy_path(self) -> Path:
        """The store's description as it was last seen."""
        return self.private_dir / "store.json"

    @property
    def catalog_path(self) -> Path:
        """Local catalog of VMs, jobs, accesses and usage."""
        return self.private_dir / "catalog.sqlite"

    @property
    def log_path(self) -> Path:
        """Log of a daemon that runs in the background."""
        return self.datastore.runtime_dir / "daemon.log"

    @property
    def socket_path(self) -> Path:
        """The control socket."""
        return self.control.socket or self.datastore.runtime_dir / "control.sock"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but most likely not meant, each as one sentence."""
        found = []
        if self.recall.recall_deadline_s >= GUEST_TIMEOUT_S:
            found.append(
                f"recall.recall_deadline_s is {self.recall.recall_deadline_s:g}: guests give up on their disk after "
                f"{GUEST_TIMEOUT_S} s; set it below that"
            )
        if self.recall.store_timeout_s >= self.recall.recall_deadline_s:
            found.append(
                "recall.store_timeout_s is not below recall.recall_deadline_s: a read that the store does not answer "
                "cannot be tried again before the guest's read fails"
            )
        address = self.monitoring.address
        if address is not None and not ipaddress.ip_address(address[0]).is_loopback:
            found.append(
                f"monitoring.listen is {self.monitoring.listen}: whoever reaches that port sees the names of VMs and "
                "when they were backed up; nobody is asked who they are"
            )
        return tuple(found)
