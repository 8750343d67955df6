"""A libvirt domain, as far as backups and archives have to know it.  Must not know how libvirt is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmfs_stub.core.usage import GuestState


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """One disk of a domain: ``target`` is what the guest sees (vda), ``device`` disk, cdrom or floppy.

    ``path`` is where the hypervisor finds it (absolute, as the domain says it); None when it is no file of this host:
    ``kind`` then says what it is (block, network, volume, …).  ``backing`` are the images that it is based on, nearest
    first, as far as the domain's XML tells.
    """

    target: str
    device: str
    kind: str
    path: Path | None
    format: str
    is_read_only: bool = False
    is_shared: bool = False
    stops_on_error: bool = False
    """Whether both error policies are ``stop``: a guest whose recall fails waits then, instead of seeing an error."""
    backing: tuple[Path, ...] = ()

    @property
    def lacks_stop(self) -> bool:
        """Whether a guest that can write it would see a recall that fails as an error of it."""
        return not (self.is_read_only or self.stops_on_error)


@dataclass(frozen=True, slots=True)
class ArchiveNote:
    """What a domain's metadata says of it while its VM is archived; ``expected_s`` is how long it may take to start.

    ``datastore`` is the name of the one that wrote it; no other changes it.
    """

    archived_s: float
    size_bytes: int
    expected_s: float
    datastore: str = ""


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain; ``uuid`` is 32 lower-case hex digits, ``xml`` the inactive definition.

    ``problems`` say why it cannot be archived whatever its usage: passed-through or shared disks, a TPM that is
    not emulated, no persistent definition, a running block job or migration; each names the domain's part.
    """

    uuid: str
    name: str
    state: GuestState
    state_since_s: float | None
    is_persistent: bool
    autostarts: bool
    disks: tuple[DomainDisk, ...]
    nvram: Path | None
    xml: str
    metadata: dict[str, str]
    """Our own elements of the domain's metadata by name (``protected``, ``group``, …), for policy."""
    note: ArchiveNote | None = None
    problems: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that is the domain's: disks and NVRAM, without the images they are based on."""
        found = [disk.path for disk in self.disks if disk.path is not None]
        return tuple(found if self.nvram is None else [*found, self.nvram])

    @property
    def is_protected(self) -> bool:
        """Whether its metadata says that it must not be archived."""
        return self.metadata.get("protected", "no").lower() not in ("no", "false", "0")
