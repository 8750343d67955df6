"""What the control API asks of the daemon, and all that it knows of it.

Every method may raise a VmfsStubError; it reaches the client as the same class.  Methods that start a job return as
soon as the job is known, and refuse at once what can be refused at once (unknown VM, VM in use).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vmfs_stub.control.messages import DiskRow, JobInfo, PolicyRow, Status, VmUsage
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.ids import JobId
from vmfs_stub.services.adoption_choice import Told


class DatastoreTarget(Protocol):
    """The datastore as a whole."""

    async def list_disks(self, vm: str | None) -> list[DiskRow]:
        """One row per disk, of all VMs or of the one named; raises VmNotFound, AmbiguousName."""
        ...

    async def status(self) -> Status:
        """What the daemon knows about itself; ``healthy`` is false when an operator has to act."""
        ...

    async def hold(self, *, peer: Peer) -> None:
        """Refuse new recalls until `unhold`."""
        ...

    async def unhold(self, *, peer: Peer) -> None:
        """Allow recalls again."""
        ...

    async def reload(self, *, peer: Peer) -> list[str]:
        """Read the configuration file again, and take all of it or nothing; returns the keys that changed.

        Raises ConfigError, which names what is wrong or cannot change now.
        """
        ...

    async def policy(self) -> list[PolicyRow]:
        """What a backup job's policy would do now, one row per VM; changes nothing."""
        ...

    async def protect(self, vms: Sequence[str], *, protected: bool, peer: Peer) -> None:
        """Never archive the named VMs, or allow it again.  Raises VmNotFound, AmbiguousName, PrimaryIOError."""
        ...

    async def shutdown(self, *, force: bool, peer: Peer) -> None:
        """Flush, unmount and stop; returns when the unmount is certain, before the process ends.

        Raises InUse, and changes nothing, while disks are open and ``force`` is false.
        """
        ...


class UsageTarget(Protocol):
    """How VMs are used."""

    async def vm_usage(self, vm: str, *, days: int) -> VmUsage:
        """Of one VM, for so many days until now; raises VmNotFound, AmbiguousName, PrimaryIOError."""
        ...


class JobTarget(Protocol):
    """Work that takes long."""

    async def start_backup(self, vms: Sequence[str], *, archive: bool, rehearsal: bool = False, peer: Peer) -> JobId:
        """Back up the named VMs (none named: all); ``archive`` allows placeholders where policy says so.

        With ``rehearsal`` the job only says what it would do.  Raises Refused while backup jobs are paused.
        """
        ...

    async def start_archive(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Back up the named VMs and make placeholders of them; what stands against one of them is told in the report.

        Raises VmNotFound, AmbiguousName, HypervisorAway.
        """
        ...

    async def start_recall(self, vms: Sequence[str], *, peer: Peer) -> JobId:
        """Bring the named VMs back in full."""
        ...

    async def start_adopt(self, vms: Sequence[str], *, everything: bool, told: Told, peer: Peer) -> JobId:
        """Make placeholders here of the named VMs of the store, or with ``everything`` of all that are not here.

        What is wrong with one of them, an unknown name included, is in the job's report.
        """
        ...

    async def job(self, job_id: JobId, *, wait_s: float) -> JobInfo:
        """State of one job when it has ended, or after so many seconds; raises NotFound."""
        ...

    async def jobs(self) -> list[JobInfo]:
        """Running and recent jobs, those of earlier daemons included, newest first."""
        ...

    async def cancel_job(self, job_id: JobId, *, peer: Peer) -> None:
        """Tell a running job to end where it is; raises NotFound, Refused when it is over."""
        ...

    async def pause_jobs(self, *, paused: bool, peer: Peer) -> None:
        """Whether backup jobs are paused: none starts, and one that runs begins no further VM."""
        ...


class ControlTarget(DatastoreTarget, UsageTarget, JobTarget, Protocol):
    """All: what the daemon implements."""
