"""What the policy says of the VMs of a datastore now: for `policy`, and for jobs that archive."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vmfs_stub.catalog.usage_rows import LastUse
from vmfs_stub.config import Config
from vmfs_stub.control.messages import PolicyRow
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.policy import Decision, Facts, decide_all, predicted_usable_s
from vmfs_stub.daemon_settings import facts_settings
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.facts import FactsService, Samples
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.situation import Situation
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store


@dataclass(frozen=True, slots=True)
class Decided:
    """A VM, what is known of it, and what is to be done with it."""

    vm: Vm
    facts: Facts
    decision: Decision


class DatastorePolicy:
    """Decides of a datastore's VMs; ``backing_fd`` stays the caller's."""

    def __init__(
        self,
        *,
        config: Config,
        threads: Threads,
        services: DiskServices,
        store: Store,
        findings: Findings,
        samples: Samples,
        last_use: Callable[[VmId], LastUse],
        look: Callable[[], Awaitable[Situation]],
        backing_fd: int,
    ) -> None:
        self._threads = threads
        self._backing_fd = backing_fd
        self._policy = config.archive_policy
        self._facts = FactsService(
            threads=threads,
            services=services,
            store=store,
            findings=findings,
            samples=samples,
            last_use=last_use,
            look=look,
            backing_fd=backing_fd,
            settings=facts_settings(config),
        )

    def apply(self, config: Config) -> None:
        """Go by another configuration from the next decision on."""
        self._policy = config.archive_policy
        self._facts.settings = facts_settings(config)

    def expected_s(self, vm: Vm) -> float:
        """How long a VM that is archived is predicted to take until it is usable."""
        settings = self._facts.settings
        seconds = predicted_usable_s(
            vm.size_bytes, boot_bytes=settings.boot_bytes, bytes_per_s=settings.store_bytes_per_s
        )
        return round(seconds, 1)

    async def decide(
        self, vms: Sequence[Vm], situation: Situation | None = None, *, now_s: float | None = None
    ) -> list[Decided]:
        """What a job would do with these VMs, in their order; changes nothing.

        ``vms`` should be all of the datastore: what is left out is not archived for the watermark either.
        ``situation`` is what was seen just now, if anybody has looked; ``now_s`` is Unix time, by default the clock's.
        """
        now_s = time.time() if now_s is None else now_s
        policy = self._policy
        facts = await self._facts.gather(vms, policy, now_s=now_s, situation=situation)
        vfs = os.fstatvfs(self._backing_fd)
        size_bytes, free_bytes = vfs.f_blocks * vfs.f_frsize, vfs.f_bavail * vfs.f_frsize
        decisions = await self._threads.compute(
            partial(decide_all, facts, policy, now_s=now_s, size_bytes=size_bytes, free_bytes=free_bytes)
        )
        return [Decided(*each) for each in zip(vms, facts, decisions, strict=True)]


def policy_row(decided: Decided) -> PolicyRow:
    """What `policy` shows of it."""
    facts, decision = decided.facts, decided.decision
    return PolicyRow(
        vm=decided.vm.name,
        vm_id=decided.vm.id,
        path=facts.path,
        state=facts.state.value,
        archives=decision.archives,
        rule=decision.rule,
        reason=decision.reason,
        when_running=decision.when_running.value,
        frees_bytes=decision.frees_bytes,
        usable_s=decision.usable_s,
        protected=facts.is_protected,
        numbers=dict(decision.numbers),
    )
