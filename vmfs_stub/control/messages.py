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
JobKind = Literal["backup", "archive", "recall", "adopt", "rehearsal"]
JobState = Literal["running", "done", "failed", "cancelled", "interrupted"]

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
    protected: bool = False


class PolicyRow(_Message):
    """What the policy would do now with one VM, as `policy` shows it; ``reason`` is one line with the numbers.

    ``rule`` is the name of the rule that decided, None if none did; ``when_running`` what a job does first with a VM
    that runs.  ``frees_bytes`` are what primary gets back, ``usable_s`` the predicted seconds from start to usable.
    """

    vm: Shown
    vm_id: str
    path: Shown
    state: Shown
    archives: bool
    rule: Shown | None
    reason: Shown
    when_running: Shown
    frees_bytes: int
    usable_s: float
    protected: bool = False
    numbers: dict[str, float] = {}


class UsageSpan(_Message):
    """How a VM was used from ``start`` to ``end``; ``is_gap``: nobody looked, and none of the rest is known.

    ``unknown_s`` is what is neither known as off nor as running; rates of None are unknown, CPU in percent of one
    processor, ``cpu_percent`` of the time that it ran.
    """

    start: float
    end: float
    is_gap: bool = False
    off_s: float = 0.0
    running_s: float = 0.0
    unknown_s: float = 0.0
    cpu_percent: float | None = None
    cpu_percent_max: float | None = None
    disk_bytes_per_s_max: float | None = None
    network_bytes_per_s_max: float | None = None
    read_bytes: int = 0
    written_bytes: int = 0
    requests: int = 0
    network_bytes: int = 0


class VmUsage(_Message):
    """`usage VM --json`: what the VM does now, when a hypervisor last used it, and how it was used, oldest first."""

    vm: Shown
    vm_id: str
    state: str
    state_since: float | None = None
    last_open: float | None = None
    last_io: float | None = None
    domains: list[Shown] = []
    spans: list[UsageSpan] = []


class DaemonStatus(_Message):
    """The daemon's process; ``recalled_*`` count raw bytes since it started, of whole chunks.

    ``waiting_reads`` are those of all disks that wait for a recall now.
    """

    pid: int
    version: str
    started: float
    held: bool = False
    jobs_paused: bool = False
    recalled_bytes: int = 0
    recalled_on_demand_bytes: int = 0
    waiting_reads: int = 0


class MountStatus(_Message):
    """The mount and the filesystem under it; ``full_in_s`` is None while it is not filling, or nobody can tell."""

    mountpoint: Shown
    backing: Shown
    mounted: bool
    open_disks: int = 0
    free_bytes: int = 0
    size_bytes: int = 0
    full_in_s: float | None = None


class BackupStatus(_Message):
    """How recent backups are; None where none is known.  ``last_done`` is when the last job that was done ended."""

    last_done: float | None = None
    vms: int = 0
    vms_without_point: int = 0
    oldest_point_age_s: float | None = None


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
    """What a job did to one VM; ``outcome`` is a word or two, ``message`` a detail; more fields may come.

    Of a backup job: ``reason`` and ``rule`` of policy's decision, ``seconds``, and the fields of BackupReport.
    """

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
    backups: BackupStatus = BackupStatus()
    jobs: list[JobInfo] = []
    recalls: list[RecallStatus] = []
    findings: list[Finding] = []


class JobRequest(_Message):
    """Start a job on these VMs; no VM means all where the job allows that.

    With ``rehearsal`` a backup job only says what it would do.
    """

    vms: list[str] = Field(default=[], max_length=100_000)
    archive: bool = True
    rehearsal: bool = False


class ProtectRequest(_Message):
    """Protect these VMs, or with ``protected`` false no longer."""

    vms: list[str] = Field(default=[], max_length=100_000)
    protected: bool = True


class AdoptRequest(_Message):
    """Adopt these VMs, or ``everything`` that is not here; ``force`` and ``accept_loss`` are as on the command line."""

    vms: list[str] = Field(default=[], max_length=100_000)
    everything: bool = False
    force: bool = False
    accept_loss: bool = False


class ShutdownRequest(_Message):
    """Unmount and stop."""

    force: bool = False


class Reloaded(_Message):
    """Reply to `reload`: each ``section.key`` that has another value now."""

    changed: list[str]


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
