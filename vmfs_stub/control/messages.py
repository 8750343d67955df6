"""What crosses the control socket: requests, replies, and errors.

The fields of DiskRow and Status are what `ls --json` and `status --json` print: scripts depend on them.  Sizes are
bytes, times are seconds since the epoch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vmfs_stub.core import errors
from vmfs_stub.core.ids import JobId
from vmfs_stub.core.names import printable

BACKING_HEADER = "vmfs-stub-backing"
"""The request header that names the backing directory that a request is for, as `backing_name` writes it."""

DiskState = Literal["resident", "placeholder", "recalling"]
JobKind = Literal["backup", "archive", "recall", "adopt"]
JobState = Literal["running", "done", "failed", "interrupted"]

Shown = Annotated[str, BeforeValidator(lambda text: printable(text) if isinstance(text, str) else text)]
"""Text that may hold names which users chose: JSON takes only Unicode, and a terminal obeys control characters."""


def backing_name(backing: Path) -> str:
    """The directory itself, whatever symlinks lead to it, in characters that a header may have."""
    return quote(os.fsencode(os.path.realpath(backing)))


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DiskRow(_Message):
    """One disk, as `ls` shows it; ``path`` is where the hypervisor sees it, ``last_access`` is None when unknown."""

    vm: Shown
    disk: Shown
    path: Shown
    state: DiskState
    size_bytes: int
    resident_bytes: int
    restore_points: int
    last_access: float | None


class DaemonStatus(_Message):
    """The daemon's process; ``recalled_*`` count raw bytes since it started, of whole chunks.

    ``waiting_reads`` are those of all disks that wait for a recall now.
    """

    pid: int
    version: str
    started: float
    held: bool = False
    recalled_bytes: int = 0
    recalled_on_demand_bytes: int = 0
    waiting_reads: int = 0


class MountStatus(_Message):
    """The mount and the filesystem under it."""

    mountpoint: Shown
    backing: Shown
    mounted: bool
    open_disks: int = 0
    free_bytes: int = 0
    size_bytes: int = 0


class StoreStatus(_Message):
    """Secondary storage, as the daemon last met it; ``url`` carries no credentials."""

    url: Shown
    store_id: str | None
    reachable: bool
    last_error: Shown | None = None


class ReplicaStatus(_Message):
    """The second store: ``behind`` is how many restore points of this datastore's VMs it is known to lack.

    ``reads`` are those that it has answered for the store since the daemon started.
    """

    url: Shown
    reachable: bool
    last_error: Shown | None = None
    behind: int = 0
    reads: int = 0


class RecallStatus(_Message):
    """One disk that is coming back."""

    vm: Shown
    disk: Shown
    done_bytes: int = 0
    total_bytes: int = 0


class Finding(_Message):
    """Something an operator should know, and in ``message`` what to do; ``problem`` makes the command exit non-zero."""

    severity: Literal["problem", "warning", "note"]
    subject: Shown
    message: Shown


class Progress(_Message):
    """How far a job is; ``total_bytes`` is 0 while unknown, ``doing`` names the step and VM."""

    done_bytes: int = 0
    total_bytes: int = 0
    doing: Shown = ""


class ErrorInfo(_Message):
    """An error of core/errors.py, by class name."""

    error: str
    message: Shown


class VmOutcome(BaseModel):
    """What a job did to one VM; ``outcome`` is a word or two, ``message`` a detail; more fields may come."""

    model_config = ConfigDict(frozen=True, extra="allow")

    vm: Shown
    outcome: str
    message: Shown = ""
    error: ErrorInfo | None = None


class JobReport(BaseModel):
    """The report that a job's work returns (``model_dump()`` of it); more fields may come."""

    model_config = ConfigDict(frozen=True, extra="allow")

    vms: list[VmOutcome] = []


class JobInfo(_Message):
    """One job; ``result`` is a JobReport when its work came to an end.

    ``error`` is why it failed: what the work raised, or the first error in its report.
    """

    id: str
    kind: JobKind
    state: JobState
    vms: list[Shown]
    caller_uid: int
    started: float
    ended: float | None = None
    progress: Progress = Progress()
    result: dict[str, Any] | None = None
    error: ErrorInfo | None = None


class LibvirtStatus(_Message):
    """libvirt, where it is used; ``away_since`` is None while it answers."""

    uri: str
    connected: bool
    away_since: float | None = None
    last_error: str = ""


class Status(_Message):
    """`status --json`."""

    healthy: bool
    daemon: DaemonStatus
    mount: MountStatus
    store: StoreStatus
    replica: ReplicaStatus | None = None
    libvirt: LibvirtStatus | None = None
    jobs: list[JobInfo] = []
    recalls: list[RecallStatus] = []
    findings: list[Finding] = []


class JobRequest(_Message):
    """Start a job on these VMs; no VM means all where the job allows that."""

    vms: list[str] = Field(default=[], max_length=100_000)
    archive: bool = True


class AdoptRequest(_Message):
    """Adopt these VMs, or ``everything`` that is not here; ``force`` and ``accept_loss`` are as on the command line."""

    vms: list[str] = Field(default=[], max_length=100_000)
    everything: bool = False
    force: bool = False
    accept_loss: bool = False


class ShutdownRequest(_Message):
    """Unmount and stop."""

    force: bool = False


class JobStarted(_Message):
    """Reply to whatever starts a job."""

    job_id: str

    def typed(self) -> JobId:
        """The id, as what it is."""
        return JobId(self.job_id)


def error_info(error: errors.VmfsStubError) -> ErrorInfo:
    """What to send of ``error``: its class, or the nearest above it that every client knows."""
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return ErrorInfo(error=known.__name__, message=str(error))


def error_of(info: ErrorInfo) -> errors.VmfsStubError:
    """The exception to raise for what was received; a class this version does not know becomes the base class."""
    found = getattr(errors, info.error, None)
    if isinstance(found, type) and issubclass(found, errors.VmfsStubError):
        return found(info.message)
    return errors.VmfsStubError(f"{info.error}: {info.message}")
