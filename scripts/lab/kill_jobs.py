"""The jobs of one life, which a kill may end, and what they may end with."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from scripts.lab.failure import LabError
from scripts.lab.kill_disk import KillDisk
from vmfs_stub.control.client import ControlClient
from vmfs_stub.control.messages import JobInfo, JobKind
from vmfs_stub.core.ids import JobId

_CLOSE_DEADLINE_S: Final = 30.0
_FOR_THE_OPENING: Final = ("Abandoned", "InUse")


@dataclass(frozen=True, slots=True)
class Point:
    """A restore point whose contents are known: names of disks, and digests of what was in them."""

    vm: str
    point_id: str
    digests: dict[str, str]


def digests_of(disks: Sequence[KillDisk]) -> dict[str, str]:
    """What a restore point that is made now has to hold."""
    return {disk.path.name: hashlib.sha256(disk.content()).hexdigest() for disk in disks}


def start_job(client: ControlClient, kind: JobKind, vm: str) -> JobId:
    """Start one, of one VM."""
    if kind == "archive":
        return client.start_archive([vm])
    return client.start_recall([vm]) if kind == "recall" else client.start_backup([vm], archive=False)


def run_job(client: ControlClient, kind: JobKind, vm: str) -> JobInfo:
    """Run one to its end; the kernel tells of a closed file a moment later, until then its VM counts as in use.

    Raises LabError when it fails.
    """
    until_s = time.monotonic() + _CLOSE_DEADLINE_S
    while True:
        info = client.wait_job(start_job(client, kind, vm), lambda _: None)
        if info.error is None:
            return info
        if info.error.error != "InUse" or time.monotonic() > until_s:
            raise LabError(f"{kind} of {vm} failed: {info.error}")
        time.sleep(0.02)


def point_of(vm: str, digests: dict[str, str], info: JobInfo) -> Point:
    """The restore point that a job made."""
    (outcome,) = (info.result or {})["vms"]
    return Point(vm, outcome["point_id"], digests)


@dataclass(slots=True)
class LifeJob:
    """A job that runs while other VMs are in use; ``open_vm`` is called once: at ``opened_s`` of it, or at its end.

    A recall's VM is open from the beginning.
    """

    client: ControlClient
    vm: str
    kind: JobKind
    disks: Sequence[KillDisk]
    open_vm: Callable[[], None]
    opened_s: float | None
    id: JobId = field(init=False)
    point: Point | None = field(init=False, default=None)
    outcome: str = field(init=False, default="")
    _digests: dict[str, str] = field(init=False)
    _started_s: float = field(init=False)
    _is_open: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._digests = digests_of(self.disks)
        self._is_open = self.kind == "recall"
        self.id = start_job(self.client, self.kind, self.vm)
        self._started_s = time.monotonic()

    def look(self, *, may_lose_mover: bool) -> bool:
        """Open the VM when it is time; whether the job is over.  Raises LabError when it failed for no good reason."""
        if self.outcome:
            return True
        if self.opened_s is not None and time.monotonic() > self._started_s + self.opened_s:
            self._open()
        info = self.client.job(self.id)
        if info.state == "running":
            return False
        error = "" if info.error is None else info.error.error
        if error == "InUse" and not self._is_open:  # by whoever had it open in the life before
            self.id = start_job(self.client, self.kind, self.vm)
            return False
        if error and not self._may_fail(error, may_lose_mover=may_lose_mover):
            raise LabError(f"{self.kind} of {self.vm} failed: {info.error}")
        if not error and self.kind != "recall":
            self.point = point_of(self.vm, self._digests, info)
        self.outcome = error or "done"
        self._open()
        return True

    def _may_fail(self, error: str, *, may_lose_mover: bool) -> bool:
        if error == "MoverLost":
            return may_lose_mover
        return self._is_open and self.kind != "recall" and error in _FOR_THE_OPENING

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            self.open_vm()
