"""One backup job: many VMs backed up, some at a time, and those that policy says in the same job made placeholders.

Invariants:
* what goes wrong with one VM, whatever it is, spoils no other's turn; only when a large share of them fails are the
  rest not tried, because then something is wrong with more than VMs;
* policy is asked before the job of all, and of each VM again at its turn (`backup_turn`).
What is unchanged since its last restore point is not read again, so a job that was interrupted is gone on with by
starting another.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import trio

from vmfs_stub.core.errors import Refused, VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.policy import Decision
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.backup_turn import Turn, TurnMeans, VmResult
from vmfs_stub.services.claims import Claims

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class Watch:
    """Who looks on: ``began`` is told of each VM, ``advanced`` of bytes that were dealt with, ``ended`` of results."""

    began: Callable[[Vm], None] = lambda vm: None
    advanced: Callable[[Vm, int], None] = lambda vm, count: None
    ended: Callable[[VmResult], None] = lambda result: None


class BackupJobs:
    """Runs backup jobs; what they have in common.

    ``is_paused`` says whether no further VM is to be begun.  Attributes: ``settings`` and ``means`` may be replaced,
    for jobs that begin after that.
    """

    def __init__(
        self, *, settings: JobSettings, means: TurnMeans, claims: Claims, is_paused: Callable[[], bool]
    ) -> None:
        self.settings = settings
        self.means = means
        self.claims = claims
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
        mount has it open, or a hook forbids it: nobody has named it; ``alone`` for one after the other.
        Raises nothing that VMs cause.
        """
        settings = replace(self.settings, parallel=1) if alone else self.settings
        return await _Run(self, settings, vms, placeholders, tolerant=tolerant, watch=watch or Watch()).run()

    async def rehearse(self, vms: Sequence[Vm]) -> list[VmResult]:
        """What a job would do, without doing it."""
        decisions, why = await self.means.decisions(vms)
        results = [VmResult(vm, decision=decisions.get(vm.id)) for vm in vms]
        for result in results:
            would = result.decision is not None and result.decision.archives
            result.outcome = "would be archived" if would else "would be backed up"
            result.message = result.decision.reason if result.decision is not None else why
        return results


class _Run:
    """One job.

    ``_ran`` are the domains that ran when policy was asked.
    """

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
        self._means = jobs.means
        self._settings = settings
        self._placeholders = placeholders
        self._tolerant = tolerant
        self._watch = watch
        self._results = [VmResult(vm) for vm in vms]
        self._waiting = deque(self._results)
        self._claimed: Mapping[VmId, int] | None = None
        self._tried = self._failed = 0
        self._ran: frozenset[str] = frozenset()

    async def run(self) -> list[VmResult]:
        vms = [result.vm for result in self._results]
        if self._placeholders is Placeholders.BY_POLICY:
            self._ran = await self._means.guests.all_running()
            decisions, why = await self._means.decisions(vms)
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
        self._watch.began(result.vm)
        turn = Turn(
            self._means,
            result,
            archives=self._archives(result),
            ran=self._ran,
            claimed=self._claimed,
            advanced=partial(self._watch.advanced, result.vm),
            dry_run=self._settings.dry_run,
            tolerant=self._tolerant,
        )
        try:
            await turn.run()
        finally:
            self._tried += 1
            self._failed += result.outcome == "failed"
            self._watch.ended(result)
        await turn.tell()

    def _archives(self, result: VmResult) -> bool:
        """Whether placeholders are to be made of it."""
        if self._placeholders is Placeholders.BY_POLICY:
            return result.decision is not None and result.decision.archives and not self._settings.dry_run
        return self._placeholders is Placeholders.OF_ALL
