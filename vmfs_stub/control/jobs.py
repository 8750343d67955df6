"""Jobs: work that outlives the request that started it.

A job belongs to `open_jobs`, not to the connection: a client that goes away stops nothing.  How many run and how
many are remembered is bounded.  Must not know what a job does; it runs an async function and keeps its report.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import trio

from vmfs_stub.control.messages import ErrorInfo, JobInfo, JobKind, JobReport, Progress, VmOutcome, error_info
from vmfs_stub.control.peer import Peer
from vmfs_stub.core.errors import InUse, NotFound, Refused, VmfsStubError
from vmfs_stub.core.ids import JobId
from vmfs_stub.core.wrapped_errors import unwrapped

log = logging.getLogger(__name__)


class JobHistory(Protocol):
    """Where jobs are recorded; blocking.  The catalog is one."""

    def start_job(self, job_id: JobId, *, kind: str, vms: Sequence[str], caller_uid: int, now: float) -> None:
        """Record a job that begins."""
        ...

    def end_job(
        self,
        job_id: JobId,
        *,
        state: str,
        report: Mapping[str, Any] | None,
        error: Mapping[str, str] | None,
        now: float,
    ) -> None:
        """Record how it ended."""
        ...

    def forget_jobs(self, *, keep: int) -> None:
        """Remove all but the newest."""
        ...


class JobProgress:
    """What a running job says of itself; may be called from the event loop and from threads."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._outcomes: list[VmOutcome] = []

    def add(self, outcome: VmOutcome) -> None:
        """What became of a VM; shown while the job runs, and the report of one that is cancelled."""
        self._outcomes.append(outcome)

    @property
    def report(self) -> JobReport:
        """Of the VMs that the job is done with."""
        return JobReport(vms=list(self._outcomes))

    def update(self, *, done_bytes: int = 0, total_bytes: int = 0, doing: str = "") -> None:
        """Replace what is shown; ``total_bytes`` of 0 is unknown."""
        self._progress = Progress(done_bytes=done_bytes, total_bytes=total_bytes, doing=doing)

    @property
    def current(self) -> Progress:
        """The newest."""
        return self._progress


JobWork = Callable[[JobProgress], Awaitable[JobReport]]
"""Does the work and returns its report; an error of one VM in it makes the job a failed one."""


class Jobs:
    """Running and recent jobs of this daemon; made by `open_jobs`.

    Attributes: ``running_max`` and ``kept`` may be changed; ``ended`` counts jobs by kind and state, ``last_done`` has
    when the last of a kind was done; ``on_end`` hears of each end.
    """

    def __init__(
        self, nursery: trio.Nursery, history: JobHistory, *, running_max: int, kept: int, clock: Callable[[], float]
    ) -> None:
        self._nursery = nursery
        self._history = history
        self.running_max = running_max
        self.kept = kept
        self._clock = clock
        self._jobs: dict[JobId, JobInfo] = {}  # oldest first
        self._progress: dict[JobId, JobProgress] = {}  # of running jobs only
        self._ends: dict[JobId, trio.Event] = {}  # of these, too
        self.ended: Counter[tuple[str, str]] = Counter()
        self.last_done: dict[str, float] = {}
        self.on_end: Callable[[JobInfo], None] = lambda info: None
        self._scopes: dict[JobId, trio.CancelScope] = {}  # and of these
        self._history_limiter = trio.CapacityLimiter(1)  # records of one job stay in order

    def start(self, kind: JobKind, vms: Sequence[str], work: JobWork, *, peer: Peer) -> JobId:
        """Run ``work`` in the background; raises Refused when too many jobs run already."""
        if len(self._progress) >= self.running_max:
            raise Refused(
                f"{len(self._progress)} jobs run already, and control.jobs_running_max allows no more; try again when "
                "one is done"
            )
        job_id = JobId(uuid.uuid4().hex)
        progress = JobProgress()
        self._progress[job_id] = progress
        self._ends[job_id] = trio.Event()
        self._scopes[job_id] = trio.CancelScope()
        self._jobs[job_id] = JobInfo(
            id=job_id, kind=kind, state="running", vms=list(vms), caller_uid=peer.uid, started=self._clock()
        )
        self._forget_old()
        self._nursery.start_soon(self._run, job_id, work, progress, name=f"{kind} job {job_id}")
        return job_id

    def get(self, job_id: JobId) -> JobInfo:
        """A running or recent job; raises NotFound."""
        info = self._jobs.get(job_id)
        if info is None:
            raise NotFound(f"no job {job_id} is known to this daemon; `vmfs-stub jobs` lists them")
        progress = self._progress.get(job_id)
        if progress is None:
            return info
        report = progress.report
        result = report.model_dump(mode="json") if report.vms else None
        return info.model_copy(update={"progress": progress.current, "result": result})

    async def wait(self, job_id: JobId, *, wait_s: float) -> JobInfo:
        """The same, when the job has ended, or after so many seconds.  Raises NotFound."""
        if (ended := self._ends.get(job_id)) is not None:
            with trio.move_on_after(wait_s):
                await ended.wait()
        return self.get(job_id)

    def cancel(self, job_id: JobId) -> JobInfo:
        """End a running job where it is: when `wait` says so, it has.  Raises NotFound, Refused when it is over."""
        info = self.get(job_id)
        if (scope := self._scopes.get(job_id)) is None:
            raise Refused(f"the {info.kind} job {job_id} is over ({info.state}): there is nothing to cancel")
        scope.cancel()
        return info

    def list(self) -> list[JobInfo]:
        """Running and recent jobs, newest first."""
        return [self.get(job_id) for job_id in reversed(self._jobs)]

    async def _run(self, job_id: JobId, work: JobWork, progress: JobProgress) -> None:
        info = self._jobs[job_id]
        await self._record(
            lambda: self._history.start_job(
                job_id, kind=info.kind, vms=info.vms, caller_uid=info.caller_uid, now=info.started
            )
        )
        outcome: dict[str, Any] = {"state": "interrupted"}
        scope = self._scopes[job_id]
        try:
            with scope:
                report = await work(progress)
            if scope.cancelled_caught:
                report = progress.report
            failed = next((vm.error for vm in report.vms if vm.error is not None), None)
            state = "cancelled" if scope.cancelled_caught else "done" if failed is None else "failed"
            outcome = {"state": state, "result": report.model_dump(mode="json"), "error": failed}
        except Exception as exc:  # whatever it is, one job must not end the mount
            outcome = {"state": "failed", "error": failure_info(f"{info.kind} job {job_id}", exc)}
        finally:
            if outcome["state"] == "interrupted" and progress.report.vms:
                outcome["result"] = progress.report.model_dump(mode="json")
            ended = info.model_copy(update={**outcome, "ended": self._clock(), "progress": progress.current})
            self._jobs[job_id] = ended
            self._count(ended)
            del self._progress[job_id], self._scopes[job_id]
            self._ends.pop(job_id).set()
            await self._record(lambda: self._record_end(ended))

    def _count(self, info: JobInfo) -> None:
        self.ended[info.kind, info.state] += 1
        if info.state == "done" and info.ended is not None:
            self.last_done[info.kind] = info.ended
        self.on_end(info)

    def _record_end(self, info: JobInfo) -> None:
        error = None if info.error is None else info.error.model_dump()
        self._history.end_job(
            JobId(info.id), state=info.state, report=info.result, error=error, now=info.ended or info.started
        )
        self._history.forget_jobs(keep=self.kept)

    async def _record(self, write: Callable[[], None]) -> None:
        """History is worth a warning, never a failed backup; bounded by the catalog's own time-out."""
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(write, limiter=self._history_limiter)
        except (VmfsStubError, RuntimeError) as exc:  # the latter where no thread can be started
            log.warning("a job could not be recorded: %s", exc)

    def _forget_old(self) -> None:
        for job_id in [job_id for job_id in self._jobs if job_id not in self._progress]:
            if len(self._jobs) <= self.kept:
                break
            del self._jobs[job_id]


def failure_info(what: str, error: Exception) -> ErrorInfo:
    """How a job's failure is told, after logging it; a failure that nobody foresaw with its traceback."""
    cause = unwrapped(error)
    if isinstance(cause, VmfsStubError):
        log.warning("%s failed: %s", what, cause)
        return error_info(cause)
    log.error("%s failed unexpectedly", what, exc_info=error)
    return ErrorInfo(
        error=VmfsStubError.__name__,
        message=f"unexpected {type(cause).__name__}: {cause}; the daemon's log has the traceback",
    )


class Named(Protocol):
    """What a job does something with."""

    @property
    def name(self) -> str: ...


V = TypeVar("V", bound=Named)


async def one_by_one(
    kind: JobKind, vms: Sequence[V], step: Callable[[V], Awaitable[VmOutcome]], *, tolerant: bool
) -> list[VmOutcome]:
    """Run ``step`` for one VM after the other; what goes wrong with one, whatever it is, spoils no other's turn.

    ``tolerant`` when a VM that is in use is skipped without that being an error.
    """
    outcomes = []
    for vm in vms:
        try:
            outcomes.append(await step(vm))
        except InUse as exc:
            error = None if tolerant else error_info(exc)
            outcomes.append(VmOutcome(vm=vm.name, outcome="skipped", message=str(exc), error=error))
        except Exception as exc:
            outcomes.append(failed_outcome(vm.name, failure_info(f"{kind} of VM {vm.name}", exc)))
    return outcomes


def failed_outcome(vm: str, error: ErrorInfo) -> VmOutcome:
    """What to report of a VM with which the job failed."""
    return VmOutcome(vm=vm, outcome="failed", message=error.message, error=error)


@asynccontextmanager
async def open_jobs(
    history: JobHistory, *, running_max: int, kept: int, clock: Callable[[], float] = time.time
) -> AsyncIterator[Jobs]:
    """Jobs live inside this; leaving it cancels those that run, and waits until each has stopped.

    ``running_max`` and ``kept`` are counts of jobs; ``clock`` gives seconds since the epoch.
    """
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery, history, running_max=running_max, kept=kept, clock=clock)
        try:
            yield jobs
        finally:
            nursery.cancel_scope.deadline = -math.inf
