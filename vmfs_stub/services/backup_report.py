"""What backups of single VMs go by, and what each reports of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmfs_stub.core.ids import PointId


@dataclass(frozen=True, slots=True)
class ArchiveSettings:
    """Sizes in bytes; ``host`` and ``datastore`` go into pins and manifests.

    Nothing is released of which there are not ``min_copies``, 1 or 2, that were read back.  The backup of a VM in use
    may set ``set_aside_bytes_max`` aside on primary, of which ``free_floor_percent`` stay free.
    """

    resident_head_bytes: int
    resident_tail_bytes: int
    placeholder_bytes_min: int
    host: str
    datastore: str
    min_copies: int = 1
    set_aside_bytes_max: int = 16 << 30
    free_floor_percent: float = 0


@dataclass(slots=True)
class BackupReport:
    """What a backup of one VM did: of ``size_bytes`` it read ``read_bytes``, the rest being holes or stored before."""

    vm: str
    point_id: PointId
    size_bytes: int = 0
    read_bytes: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0
    placeholders: list[str] = field(default_factory=list)
    abandoned: str = ""
    left_out: list[str] = field(default_factory=list)
    """Paths of what no backup holds: FIFOs, sockets, devices."""
    warning: str = ""
    kept: str = ""
    """Why no placeholders were made after all."""
    consistency: str = "off"
    """Of what was in use: "crash", or "quiesced" if the guest had brought its filesystems to rest; else "off"."""

    def count_read(self, count: int) -> None:
        """So many bytes more are read."""
        self.read_bytes += count
