"""One VM's turn in a backup job: backed up, and made placeholders where that is meant and nothing stands against it.

Invariants:
* what stands against an archive is looked at under the VM's lease, while nobody can use it, and policy decides again
  from what was seen there: a mind that has changed makes a backup of it;
* a turn that is cancelled leaves the VM as it was, or as a placeholder, and its guest running.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from vmfs_stub.services.hooks import HookCall, Hooks
from vmfs_stub.services.hydration import HydrationService
from vmfs_stub.services.running_backup import Freezer
from vmfs_stub.services.situation import Situation
from vmfs_stub.services.stopped_guests import StoppedGuests

log = logging.getLogger(__name__)


class Decide(Protocol):
    """What policy says of VMs; of one that is missing in the answer, it says that it stays.

    It decides from ``situation``, what was seen just now; without one it looks itself.
    """

    async def __call__(self, vms: Sequence[Vm], situation: Situation | None = None) -> Mapping[VmId, Decision]: ...


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
class TurnMeans:
    """What the turns of a datastore's VMs are made with.

    ``look`` sees what is so now; ``freezer_of`` tells what brings a VM's guest's filesystems to rest, if anything does;
    ``found_again`` reads which files a VM has now, and whether it is protected.  ``backed_up`` is told of each VM of
    which there may be a new restore point, ``made`` of each that has one.  ``forget`` applies retention to a VM that
    was backed up: what went, and what to say of it.
    """

    archiver: Archiver
    hydration: HydrationService
    guests: StoppedGuests
    hooks: Hooks
    decide: Decide
    look: Callable[[], Awaitable[Situation]]
    freezer_of: Callable[[Vm], Awaitable[Freezer | None]]
    found_again: Callable[[Vm], Awaitable[Vm]]
    backed_up: Callable[[VmId], None]
    made: Callable[[VmId], Awaitable[None]]
    forget: Callable[[Vm], Awaitable[tuple[list[PointId], str]]]

    async def decisions(
        self, vms: Sequence[Vm], situation: Situation | None = None
    ) -> tuple[Mapping[VmId, Decision], str]:
        """What policy says, and why it says nothing of some; where it cannot be asked, nothing is archived."""
        try:
            return await self.decide(vms, situation), "policy says nothing of it"
        except Exception as exc:
            log.warning("policy could not decide, so this job archives nothing", exc_info=exc)
            return {}, f"policy could not decide: {unwrapped(exc)}"


class Turn:
    """What a job does with the VM of ``result``, and says there.

    ``archives`` when placeholders are to be made of it: as the result's decision says, or, if it has none, an operator.
    ``ran`` are the domains that ran when that was decided: a guest that was started since is none that was meant.
    ``claimed`` is what `Claims.survey` returned; ``advanced`` is told of bytes that were dealt with.  ``dry_run`` and
    ``tolerant`` as in `backup_job`.
    """

    def __init__(
        self,
        means: TurnMeans,
        result: VmResult,
        *,
        archives: bool,
        ran: frozenset[str],
        claimed: Mapping[VmId, int] | None,
        advanced: Callable[[int], None],
        dry_run: bool,
        tolerant: bool,
    ) -> None:
        self._means = means
        self._result = result
        self._archives = archives
        self._ran = ran
        self._claimed = claimed
        self._advanced = advanced
        self._dry_run = dry_run
        self._tolerant = tolerant
        self._call = _call(result, archives=archives)

    async def run(self) -> None:
        """Back the VM up; its result says what went wrong.  Raises nothing that the VM causes."""
        result = self._result
        began_s = trio.current_time()
        result.outcome = "cancelled"
        try:
            await self._back_up()
        except InUse as exc:
            self._skip(exc)
        except Exception as exc:
            result.outcome, result.message, result.error = "failed", str(unwrapped(exc)), exc
        finally:
            if result.guest == "started again":
                result.message = "; ".join(filter(None, (result.message, "its guest was stopped and started again")))
            result.seconds = trio.current_time() - began_s

    async def tell(self) -> None:
        """Run the hooks that hear what came of it."""
        result, call, hooks = self._result, self._call, self._means.hooks
        try:
            if result.guest == "started again":
                await hooks.after(replace(call, what="start", undo=""), result.guest)
            await hooks.after(call, f"{result.outcome}{f': {result.message}' if result.message else ''}")
        except Exception:
            log.exception("the hook after the %s of VM %s failed unexpectedly", call.what, call.vm)

    def _skip(self, why: Refused) -> None:
        result = self._result
        result.outcome, result.message = "skipped", str(why)
        result.error = None if self._tolerant and isinstance(why, InUse) else why

    async def _back_up(self) -> None:
        result = self._result
        if forbidden := await self._means.hooks.before(self._call):
            result.outcome, result.message = "skipped", forbidden
            result.error = None if self._tolerant else Refused(forbidden)
        elif not self._archives:
            await self._copy(result.vm, archive=False)
        elif result.decision is None:
            await self._archive_named(result.vm)
        else:
            await self._archive_idle(result.vm, result.decision)

    async def _archive_named(self, vm: Vm) -> None:
        """What an operator wants archived; nothing is done when anything stands against it.

        One that comes up only later leaves a backup, which is not what was wanted: that is an error, too.
        """
        try:
            (await self._means.look()).refuse(vm)
        except Refused as exc:
            self._skip(exc)
        else:
            report = await self._copy(vm, archive=True, recheck=partial(self._against, vm, by_policy=False))
            if report.kept:
                self._result.error = Refused(self._result.message)

    async def _archive_idle(self, vm: Vm, decision: Decision) -> None:
        """What policy wants archived is backed up all the same when that is not to be, while it is in use."""
        kept = ""
        try:
            domain = await self._means.guests.running(vm)
            if domain is None:
                await self._copy(vm, archive=True, recheck=partial(self._against, vm, by_policy=True))
                return
            kept = await self._archive_running(decision, domain)
        except (HypervisorAway, InUse, Abandoned) as exc:
            if self._result.guest:
                raise
            kept = str(exc)
        if kept:
            await self._only_copy(kept)

    async def _only_copy(self, kept: str) -> None:
        """Of a VM that is not archived for this reason."""
        result = self._result
        try:
            await self._copy(result.vm, archive=False)
        except InUse as exc:
            raise exc if str(exc) == kept else InUse(f"{exc}; it is not archived: {kept}") from exc
        result.message = "; ".join(filter(None, (f"not archived: {kept}", result.message)))

    async def _archive_running(self, decision: Decision, domain: Domain) -> str:
        """Stop the guest of an idle VM first; returns why that is not to be, and nothing was done."""
        means, result, vm = self._means, self._result, self._result.vm
        if decision.when_running is WhenRunning.SKIP:
            return "its guest runs, and the rule stops none"
        if domain.uuid not in self._ran:
            return "its guest was started since policy decided"
        # Once it is off it is no idle VM that runs, so this is when policy has to be sure, also of who protected it.
        if kept := await self._against_by_policy(await means.found_again(vm)):
            return kept
        call = HookCall(
            "stop", vm.name, vm.id, decision.reason, decision.rule or "", f"virsh start {shlex.quote(domain.name)}"
        )
        if forbidden := await means.hooks.before(call):
            return forbidden
        async with means.guests.stopped(vm, domain, decision.when_running) as stopped:
            result.guest = "started again"
            await means.hooks.after(call, "stopped")
            vm = await means.found_again(vm)
            if decision.when_running is WhenRunning.MANAGED_SAVE and not means.guests.has_memory(vm, stopped):
                raise Unsupported(f"VM {vm.name}: the memory of its guest was saved, and is not among its files")
            report = await self._copy(vm, archive=True, recheck=partial(self._against, vm, by_policy=False))
            if report.placeholders and not report.abandoned:
                stopped.was_archived = True
                result.guest = "stopped"
        return ""

    async def _against(self, vm: Vm, *, by_policy: bool) -> str:
        """What stands against archiving it now, policy included if that decided; empty when nothing does."""
        try:
            situation = await self._means.look()
            situation.refuse(vm)
        except VmfsStubError as exc:
            return str(exc)
        return await self._against_by_policy(vm, situation) if by_policy else ""

    async def _against_by_policy(self, vm: Vm, situation: Situation | None = None) -> str:
        """Why policy does not want it archived any more; empty when it does."""
        decisions, why = await self._means.decisions([vm], situation)
        decision = decisions.get(vm.id)
        if decision is None:
            return why
        return "" if decision.archives else decision.reason

    async def _copy(self, vm: Vm, *, archive: bool, recheck: Recheck | None = None) -> BackupReport:
        """Make the restore point, and placeholders if that is still wanted."""
        means, result = self._means, self._result

        def advance(count: int) -> None:
            result.done_bytes += count
            self._advanced(count)

        for file in vm.files:
            await means.hydration.stop(file.ino)
        archiver = means.archiver
        try:
            try:
                report = await archiver.run(
                    vm, archive=archive, progress=advance, claimed=self._claimed, recheck=recheck
                )
            except (InUse, Abandoned):  # whoever opens it meanwhile goes first, and is not disturbed by the next try
                if archive:
                    raise
                # A snapshot may have made another file its own since the job began.
                vm = await means.found_again(vm)
                freezer = await means.freezer_of(vm)
                report = await archiver.run_in_use(vm, progress=advance, claimed=self._claimed, freezer=freezer)
            result.report = report
        finally:
            means.backed_up(vm.id)
        result.outcome = "archived" if report.placeholders else "backed up"
        await means.made(vm.id)
        result.forgotten, retention = await means.forget(vm)
        said = [
            report.abandoned or _left_out(report),
            _in_use(report),
            _not_archived(report.kept),
            self._rehearsed(),
        ]
        result.message = "; ".join(filter(None, (*said, report.warning, retention)))
        return report

    def _rehearsed(self) -> str:
        decision = self._result.decision
        if decision is None or not decision.archives or not self._dry_run:
            return ""
        return f"would be archived, but for [archive] dry_run: {decision.reason}"


def _call(result: VmResult, *, archives: bool) -> HookCall:
    """What hooks are told of the whole."""
    vm, decision = result.vm, result.decision
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
