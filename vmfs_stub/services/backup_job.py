"""One backup job: many VMs backed up, some at a time, and those that policy says in the same job made placeholders.

Invariants:
* what goes wrong with one VM, whatever it is, spoils no other's turn; only when a large share of them fails are the
  rest not tried, because then something is wrong with more than VMs;
* policy is asked before the job, and again of each VM right before its placeholders are made, while nobody can use it:
  a mind that has changed makes a backup of it;
* a job that is cancelled leaves the VM in progress as it was, or as a placeholder, and its guest running.
What is unchanged since its last restore point is not read again, so a job that was interrupted is gone on with by
starting another.
"""

from __future__ import annotations

import logging
import shlex
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import trio

from vmfs_stub.core.errors import Abandoned, HypervisorAway, InUse, Refused, Unsupported, VmfsStubError
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.core.policy import Decision, WhenRunning
from vmfs_stub.core.wrapped_errors import unwrapped
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.archive import Archiver, Recheck
from vmfs_stub.services.backup_report import BackupReport
from vmfs_stub.services.claims import Claims
from vmfs_stub.services.hooks import HookCall, Hooks
from vmfs_stub.services.hydration import HydrationService
from vmfs_stub.services.running_backup import Freezer
from vmfs_stub.services.stopped_guests import StoppedGuests

log = logging.getLogger(__name__)

Decide = Callable[[Sequence[Vm]], Awaitable[Mapping[VmId, Decision]]]
"""What policy says of VMs; of one that is missing in the answer, it says that it stays."""


class Made(Protocol):
    """Told of a restore point that was made, and whether placeholders were."""

    async def __call__(self, vm_id: VmId, *, is_archived: bool) -> None: ...


class Placeholders(Enum):
    """Of which VMs a job makes placeholders."""

    NONE = "of none"
    BY_POLICY = "of those that policy says"
    OF_ALL = "of all that it is about"


@dataclass(frozen=True, slots=True)
class JobSettings:
    """``parallel`` is how many VMs are in progress at once.

    When of at least ``failures_count_min`` VMs that failed the share among those tried is above
    ``failures_percent_max``, the rest are not tried.  With ``dry_run`` policy is asked, and not followed.
    """

    parallel: int = 2
    failures_percent_max: float = 50.0
    failures_count_min: int = 5
    dry_run: bool = False


@dataclass(slots=True)
class VmResult:
    """What a job did to one VM; ``outcome`` is a word or two, ``error`` what makes the job a failed one."""

    vm: Vm
    outcome: str = ""
    message: str = ""
    error: Exception | None = None
    decision: Decision | None = None
    report: BackupReport | None = None
    forgotten: list[PointId] = field(default_factory=list)
    seconds: float = 0.0
    done_bytes: int = 0
    guest: str = ""
    """What became of the guest that the job has stopped: ``stopped`` or ``started again``; empty for all others."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who looks on: ``began`` is told of each VM, ``advanced`` of bytes that were dealt with, ``ended`` of results."""

    began: Callable[[Vm], None] = lambda vm: None
    advanced: Callable[[Vm, int], None] = lambda vm, count: None
    ended: Callable[[VmResult], None] = lambda result: None


class BackupJobs:
    """Runs backup jobs; what they have in common.

    ``forget`` applies retention to a VM that was backed up: what went, and what to say of it.  ``backed_up`` is told of
    each VM of which there may be a new restore point, ``made`` of each that has one, and whether it was archived.
    ``found_again`` reads which files a VM has now, and whether it is protected; ``refuse`` raises what stands against
    archiving it now; ``freezer_of`` tells what brings its guest's filesystems to rest, if anything does.  ``is_paused``
    says whether no further VM is to be begun.
    """

    def __init__(
        self,
        *,
        settings: JobSettings,
        archiver: Archiver,
        claims: Claims,
        hydration: HydrationService,
        guests: StoppedGuests,
        hooks: Hooks,
        decide: Decide,
        refuse: Callable[[Vm], Awaitable[None]],
        freezer_of: Callable[[Vm], Awaitable[Freezer | None]],
        made: Made,
        forget: Callable[[Vm], Awaitable[tuple[list[PointId], str]]],
        backed_up: Callable[[VmId], None],
        found_again: Callable[[Vm], Awaitable[Vm]],
        is_paused: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.archiver = archiver
        self.claims = claims
        self.hydration = hydration
        self.guests = guests
        self.hooks = hooks
        self.decide = decide
        self.refuse = refuse
        self.freezer_of = freezer_of
        self.made = made
        self.forget = forget
        self.backed_up = backed_up
        self.found_again = found_again
        self.is_paused = is_paused

    async def run(
        self,
        vms: Sequence[Vm],
        *,
        placeholders: Placeholders,
        tolerant: bool,
        watch: Watch | None = None,
        alone: bool = False,
    ) -> list[VmResult]:
        """Back the VMs up; results in their order.

        ``tolerant`` when a VM is skipped without that being an error because a program that does not go through the
        mount has it open; ``alone`` for one after the other.
        Raises nothing that VMs cause.
        """
        settings = replace(self.settings, parallel=1) if alone else self.settings
        return await _Run(self, settings, vms, placeholders, tolerant=tolerant, watch=watch or Watch()).run()

    async def rehearse(self, vms: Sequence[Vm]) -> list[VmResult]:
        """What a job would do, without doing it."""
        decisions, why = await self.decisions(vms)
        results = [VmResult(vm, decision=decisions.get(vm.id)) for vm in vms]
        for result in results:
            would = result.decision is not None and result.decision.archives
            result.outcome = "would be archived" if would else "would be backed up"
            result.message = result.decision.reason if result.decision is not None else why
        return results

    async def decisions(self, vms: Sequence[Vm]) -> tuple[Mapping[VmId, Decision], str]:
        """What policy says, and why it says nothing of some; where it cannot be asked, nothing is archived."""
        try:
            return await self.decide(vms), "policy says nothing of it"
        except Exception as exc:
            log.warning("policy could not decide, so this job archives nothing", exc_info=exc)
            return {}, f"policy could not decide: {unwrapped(exc)}"


class _Run:
    """One job."""

    def __init__(
        self,
        jobs: BackupJobs,
        settings: JobSettings,
        vms: Sequence[Vm],
        placeholders: Placeholders,
        *,
        tolerant: bool,
        watch: Watch,
    ) -> None:
        self._jobs = jobs
        self._settings = settings
        self._placeholders = placeholders
        self._tolerant = tolerant
        self._watch = watch
        self._results = [VmResult(vm) for vm in vms]
        self._waiting = deque(self._results)
        self._claimed: Mapping[VmId, int] | None = None
        self._tried = self._failed = 0
        self._ran: frozenset[str] = frozenset()
        """Domains that ran when policy was asked: one that was started since is none that it meant."""

    async def run(self) -> list[VmResult]:
        vms = [result.vm for result in self._results]
        if self._placeholders is Placeholders.BY_POLICY:
            self._ran = await self._jobs.guests.all_running()
            decisions, why = await self._jobs.decisions(vms)
            for result in self._results:
                result.decision = decisions.get(result.vm.id) or Decision(result.vm.id, result.vm.name, False, why)
        if len(vms) > 1:
            # Those of many are listed once, not for each; where that fails, each asks for itself.
            try:
                self._claimed = await self._jobs.claims.survey()
            except VmfsStubError as exc:
                log.warning("which VMs other datastores have cannot be listed: %s", exc)
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(min(self._settings.parallel, len(vms))):
                    nursery.start_soon(self._work)
        finally:
            for result in self._waiting:
                result.outcome, result.message = "not tried", "the job was cancelled"
                self._watch.ended(result)
        return self._results

    async def _work(self) -> None:
        while self._waiting:
            result = self._waiting.popleft()
            if why := self._why_stopped():
                result.outcome, result.message = "not tried", why
                result.error = Refused(f"VM {result.vm.name} was not tried: {why}")
                self._watch.ended(result)
            else:
                await self._try(result)

    def _why_stopped(self) -> str:
        if self._jobs.is_paused() and self._placeholders is not Placeholders.OF_ALL:  # which an operator has named
            return "backup jobs are paused; `vmfs-stub jobs --unpause` lets them go on"
        settings = self._settings
        if self._failed < max(1, settings.failures_count_min):
            return ""
        share = 100 * self._failed / self._tried
        if share <= settings.failures_percent_max:
            return ""
        return f"{self._failed} of {self._tried} VMs failed, and [jobs] failures_percent_max ends the job then"

    async def _try(self, result: VmResult) -> None:
        """Back one VM up; its result says what went wrong."""
        began_s = trio.current_time()
        self._watch.began(result.vm)
        result.outcome = "cancelled"
        call = self._call(result)
        try:
            await self._back_up(result, call)
        except InUse as exc:
            result.outcome, result.message, result.error = "skipped", str(exc), None if self._tolerant else exc
        except Exception as exc:
            result.outcome, result.message, result.error = "failed", str(unwrapped(exc)), exc
            self._failed += 1
        finally:
            self._tried += 1
            if result.guest == "started again":
                result.message = "; ".join(filter(None, (result.message, "its guest was stopped and started again")))
            result.seconds = trio.current_time() - began_s
            self._watch.ended(result)
        try:
            if result.guest == "started again":
                await self._jobs.hooks.after(replace(call, what="start", undo=""), result.guest)
            await self._jobs.hooks.after(call, f"{result.outcome}{f': {result.message}' if result.message else ''}")
        except Exception:
            log.exception("the hook after the %s of VM %s failed unexpectedly", call.what, call.vm)

    async def _back_up(self, result: VmResult, call: HookCall) -> None:
        vm = result.vm
        if forbidden := await self._jobs.hooks.before(call):
            result.outcome, result.message = "skipped", forbidden
            return
        if result.decision is None or not self._archives(result):
            if self._archives(result):
                await self._jobs.refuse(vm)
            await self._copy(result, vm, archive=self._archives(result), recheck=lambda: self._refused(vm))
            return
        kept = ""
        try:
            domain = await self._jobs.guests.running(vm)
            if domain is None:
                await self._copy(result, vm, archive=True, recheck=lambda: self._kept(vm))
                return
            kept = await self._archive_running(result, result.decision, domain)
        except (HypervisorAway, InUse, Abandoned) as exc:
            # What policy meant to archive is backed up all the same, while it is in use.
            if result.guest:
                raise
            kept = str(exc)
        if kept:
            await self._only_copy(result, kept)

    def _archives(self, result: VmResult) -> bool:
        """Whether placeholders are to be made of it."""
        if self._placeholders is Placeholders.BY_POLICY:
            return result.decision is not None and result.decision.archives and not self._settings.dry_run
        return self._placeholders is Placeholders.OF_ALL

    async def _only_copy(self, result: VmResult, kept: str) -> None:
        """Of a VM that is not archived for this reason."""
        try:
            await self._copy(result, result.vm, archive=False)
        except InUse as exc:
            raise exc if str(exc) == kept else InUse(f"{exc}; it is not archived: {kept}") from exc
        result.message = "; ".join(filter(None, (f"not archived: {kept}", result.message)))

    async def _archive_running(self, result: VmResult, decision: Decision, domain: Domain) -> str:
        """Stop the guest of an idle VM first; returns why that is not to be, and nothing was done."""
        vm = result.vm
        if decision.when_running is WhenRunning.SKIP:
            return "its guest runs, and the rule stops none"
        if domain.uuid not in self._ran:
            return "its guest was started since policy decided"
        # Once it is off it is no idle VM that runs, so this is when policy has to be sure, also of who protected it.
        if kept := await self._ask_again(await self._jobs.found_again(vm)):
            return kept
        call = HookCall(
            "stop", vm.name, vm.id, decision.reason, decision.rule or "", f"virsh start {shlex.quote(domain.name)}"
        )
        if forbidden := await self._jobs.hooks.before(call):
            return forbidden
        guests = self._jobs.guests
        async with guests.stopped(vm, domain, decision.when_running) as stopped:
            result.guest = "started again"
            await self._jobs.hooks.after(call, "stopped")
            vm = await self._jobs.found_again(vm)
            if decision.when_running is WhenRunning.MANAGED_SAVE and not guests.has_memory(vm, stopped):
                raise Unsupported(f"VM {vm.name}: the memory of its guest was saved, and is not among its files")
            report = await self._copy(result, vm, archive=True, recheck=lambda: self._refused(vm))
            if report.placeholders and not report.abandoned:
                stopped.was_archived = True
                result.guest = "stopped"
        return ""

    async def _ask_again(self, vm: Vm) -> str:
        """Why policy does not want it archived any more; empty when it does."""
        decisions, why = await self._jobs.decisions([vm])
        decision = decisions.get(vm.id)
        if decision is None:
            return why
        return "" if decision.archives else decision.reason

    async def _kept(self, vm: Vm) -> str:
        """Why it is not to be archived after all; empty when it is."""
        return await self._refused(vm) or await self._ask_again(vm)

    async def _refused(self, vm: Vm) -> str:
        """What stands against archiving it now; empty when nothing does."""
        try:
            await self._jobs.refuse(vm)
        except VmfsStubError as exc:
            return str(exc)
        return ""

    async def _copy(self, result: VmResult, vm: Vm, *, archive: bool, recheck: Recheck | None = None) -> BackupReport:
        """Make the restore point, and placeholders if that is still wanted."""

        def advance(count: int) -> None:
            result.done_bytes += count
            self._watch.advanced(result.vm, count)

        for file in vm.files:
            await self._jobs.hydration.stop(file.ino)
        archiver = self._jobs.archiver
        try:
            try:
                report = await archiver.run(
                    vm, archive=archive, progress=advance, claimed=self._claimed, recheck=recheck
                )
            except (InUse, Abandoned):  # whoever opens it meanwhile goes first, and is not disturbed by the next try
                if archive:
                    raise
                # A snapshot may have made another file its own since the job began.
                vm = await self._jobs.found_again(vm)
                freezer = await self._jobs.freezer_of(vm)
                report = await archiver.run_in_use(vm, progress=advance, claimed=self._claimed, freezer=freezer)
            result.report = report
        finally:
            self._jobs.backed_up(vm.id)
        result.outcome = "archived" if report.placeholders else "backed up"
        await self._jobs.made(vm.id, is_archived=bool(report.placeholders))
        result.forgotten, retention = await self._jobs.forget(vm)
        said = [
            report.abandoned or _left_out(report),
            _in_use(report),
            _not_archived(report.kept),
            self._rehearsed(result),
        ]
        result.message = "; ".join(filter(None, (*said, report.warning, retention)))
        return report

    def _rehearsed(self, result: VmResult) -> str:
        decision = result.decision
        if decision is None or not decision.archives or not self._settings.dry_run:
            return ""
        return f"would be archived, but for [archive] dry_run: {decision.reason}"

    def _call(self, result: VmResult) -> HookCall:
        """What hooks are told of the whole."""
        vm, decision = result.vm, result.decision
        archives = self._archives(result)
        return HookCall(
            "archive" if archives else "backup",
            vm.name,
            vm.id,
            reason=decision.reason if decision is not None else "an operator named it" if archives else "",
            rule=(decision.rule or "") if decision is not None else "",
            undo=f"vmfs-stub recall {shlex.quote(vm.name)}" if archives else "",
        )


def _left_out(report: BackupReport) -> str:
    if not report.left_out:
        return ""
    return f"without {len(report.left_out)} FIFOs, sockets or devices, which no backup holds: " + printable(
        report.left_out[0]
    )


def _in_use(report: BackupReport) -> str:
    return "" if report.consistency == "off" else f"while it was in use ({report.consistency})"


def _not_archived(kept: str) -> str:
    return f"not archived after all: {kept}" if kept else ""
