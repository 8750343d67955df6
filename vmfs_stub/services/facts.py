"""What a policy has to know of each VM at one moment, gathered from all who know something of it.

The state is the hypervisor's; of a VM that is no domain's it is whether anybody has its disks open.  How it was used is
in the catalog; when it was recalled is noted on its files, so that neither is lost with the other.  Whatever cannot be
told is a reason not to archive, here or in the policy.  Nothing is changed, and no file is opened but as O_PATH.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from vmfs_stub.catalog.usage_rows import LastUse
from vmfs_stub.core.errors import ClaimedElsewhere, HypervisorAway, PrimaryError, VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import printable
from vmfs_stub.core.policy import Facts, Policy, decide, predicted_usable_s
from vmfs_stub.core.unused import SPAN_S_MIN, last_start_s
from vmfs_stub.core.usage import GuestState, Sample
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.primary.recall_note import recalled_s
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.mount_usage import latest
from vmfs_stub.services.situation import Situation
from vmfs_stub.services.sources import is_worth_placeholder
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

PLACEHOLDER_OWN_BYTES = 64 << 10
"""What a placeholder may occupy besides its resident blocks: the block of its attributes, those of its extents."""


class Samples(Protocol):
    """The catalog, as far as it knows how VMs were used."""

    def all_samples(self, since_s: float) -> Mapping[VmId, Sequence[Sample]]:
        """The samples of each VM that end after ``since_s``, in order.  Blocking.  Raises PrimaryError."""
        ...


@dataclass(frozen=True, slots=True)
class FactsSettings:
    """Sizes in bytes, as `archive` goes by them; ``boot_bytes`` and ``store_bytes_per_s`` as in the configuration."""

    placeholder_bytes_min: int
    resident_bytes: int
    """What of each file stays: its head and tail."""
    boot_bytes: int
    store_bytes_per_s: int


@dataclass(slots=True)
class _OnDisk:
    """What a VM's files say: sums of those that an archive makes placeholders of, sizes in bytes."""

    frees_bytes: int = 0
    archived_bytes: int = 0
    """Of those that are placeholders."""
    placeholder_count: int = 0
    apt_count: int = 0
    recalled_s: float | None = None
    open: list[str] = field(default_factory=list)
    never: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Known:
    """What is asked once for all VMs; ``situation`` is None where ``blind`` says why nothing can be told of it."""

    situation: Situation | None
    blind: str
    samples: Mapping[VmId, Sequence[Sample]]
    elsewhere: frozenset[str]


class FactsService:
    """Gathers facts; ``backing_fd`` is the backing directory, and stays the caller's.

    Attributes: ``settings`` may be replaced.
    """

    def __init__(
        self,
        *,
        threads: Threads,
        services: DiskServices,
        store: Store,
        findings: Findings,
        samples: Samples,
        last_use: Callable[[VmId], LastUse],
        look: Callable[[], Awaitable[Situation]],
        backing_fd: int,
        settings: FactsSettings,
    ) -> None:
        self._threads = threads
        self._files = services.files
        self._disks = services.disks
        self._recall = services.recall
        self._hydration = services.hydration
        self._store = store
        self._findings = findings
        self._samples = samples
        self._last_use = last_use
        self._look_around = look
        self._backing_fd = backing_fd
        self.settings = settings

    async def gather(
        self, vms: Sequence[Vm], policy: Policy, *, now_s: float, situation: Situation | None = None
    ) -> list[Facts]:
        """The facts of these VMs, in their order; ``situation`` is what was seen just now, if anybody has looked.

        Only what ``policy`` goes by is asked for.  What cannot be had of a source is left out, and told in the log.
        """
        known = await self._ask(policy, now_s, situation)
        on_disk = await self._threads.files(self._look, vms)

        def all_facts() -> list[Facts]:
            return [self._facts(vm, on_disk[vm.id], known) for vm in vms]

        # Of thousands of VMs that takes a while, which guests must not wait for.
        found = await self._threads.compute(all_facts)
        for number in await self._threads.compute(_wanting_points, found, policy, now_s):
            found[number] = replace(found[number], last_point_s=await self._last_point_s(found[number].vm_id))
        return found

    async def _last_point_s(self, vm_id: VmId) -> float | None:
        try:
            points = await self._threads.background(self._store.points, vm_id)
        except VmfsStubError as exc:
            log.warning("VM %s: which restore points there are cannot be told: %s", vm_id, exc)
            return None
        return points[-1].created_s if points else None

    async def _ask(self, policy: Policy, now_s: float, situation: Situation | None) -> _Known:
        blind = ""
        try:
            situation = situation or await self._look_around()
        except (HypervisorAway, PrimaryError) as exc:
            log.warning("no VM is archived: %s", exc)
            blind = "libvirt does not answer" if isinstance(exc, HypervisorAway) else str(exc)
        samples: Mapping[VmId, Sequence[Sample]] = {}
        try:
            samples = await self._threads.files(self._samples.all_samples, now_s - _longest_window_s(policy))
        except VmfsStubError as exc:
            log.warning("how VMs were used cannot be told, so that none is idle: %s", exc)
        elsewhere = frozenset(
            finding.subject for finding in self._findings.all() if isinstance(finding.error, ClaimedElsewhere)
        )
        return _Known(situation, blind, samples, elsewhere)

    def _facts(self, vm: Vm, on_disk: _OnDisk, known: _Known) -> Facts:
        situation = known.situation
        domains = () if situation is None else situation.links.of(vm.id)
        domain = domains[0] if len(domains) == 1 else None
        state = self._state(on_disk, domains, is_blind=situation is None)
        samples, use = known.samples.get(vm.id, ()), self._last_use(vm.id)
        against = [known.blind] if situation is None else [*situation.against(vm), *_open(on_disk, domains, state)]
        never = [*on_disk.never, *against]
        if f"VM {vm.id}" in known.elsewhere:
            never.append("its newest state is in another datastore")
        if self._recall.held:
            never.append("recalls are held, so that it could not come back")
        frees_bytes = on_disk.frees_bytes
        protecting = next((domain.name for domain in domains if domain.is_protected), "")
        return Facts(
            vm_id=vm.id,
            name=vm.name,
            path=printable(vm.path),
            state=state,
            size_bytes=vm.size_bytes,
            frees_bytes=frees_bytes,
            usable_s=predicted_usable_s(
                frees_bytes + on_disk.archived_bytes,
                boot_bytes=self.settings.boot_bytes,
                bytes_per_s=self.settings.store_bytes_per_s,
            ),
            metadata={} if domain is None else domain.metadata,
            state_since_s=None if domain is None else domain.state_since_s,
            last_started_s=last_start_s(samples),
            last_used_s=latest([use.open_s, use.io_s]),
            last_recalled_s=on_disk.recalled_s,
            samples=samples,
            is_protected=vm.is_protected or bool(protecting),
            protected_by="" if vm.is_protected else protecting,
            is_placeholder=0 < on_disk.placeholder_count == on_disk.apt_count and frees_bytes == 0,
            never=tuple(never),
        )

    @staticmethod
    def _state(on_disk: _OnDisk, domains: Sequence[Domain], *, is_blind: bool) -> GuestState:
        if is_blind:
            return GuestState.UNKNOWN
        if not domains:
            return GuestState.RUNNING if on_disk.open else GuestState.OFF
        return domains[0].state if len(domains) == 1 else GuestState.UNKNOWN

    # Blocking

    def _look(self, vms: Sequence[Vm]) -> dict[VmId, _OnDisk]:
        found = {}
        for vm in vms:
            found[vm.id] = on_disk = _OnDisk()
            for file in {file.ino: file for file in vm.files}.values():
                try:
                    self._look_at(file, on_disk)
                except OSError as exc:
                    on_disk.never.append(f"{disk_label(file.path)} cannot be looked at: {exc.strerror}")
        return found

    def _look_at(self, file: VmFile, on_disk: _OnDisk) -> None:
        path_fd = self._files.call("facts.open", open_beneath, self._backing_fd, file.path)
        try:
            st = os.fstat(path_fd)
            recalled_at_s = recalled_s(self._files, path_fd)
        finally:
            os.close(path_fd)
        disk = self._disks.get(st.st_ino)
        if disk is not None and disk.open_count:
            on_disk.open.append(disk_label(file.path))
        if self._hydration.is_hydrating(st.st_ino):
            on_disk.never.append(f"{disk_label(file.path)} is coming back")
        known = self._disks.placeholders.get(st.st_ino)
        occupied = min(st.st_size, st.st_blocks * 512)
        if known is None and not is_worth_placeholder(
            st.st_size, st.st_blocks * 512, bytes_min=self.settings.placeholder_bytes_min
        ):
            return
        on_disk.apt_count += 1
        stays_bytes = self.settings.resident_bytes
        if known is not None:
            stays_bytes += PLACEHOLDER_OWN_BYTES
            on_disk.placeholder_count += 1
            on_disk.archived_bytes += max(0, st.st_size - occupied)
            if known.problem is not None:
                on_disk.never.append(str(known.problem))
            elif occupied > stays_bytes:
                recalled_at_s = st.st_ctime  # it came back in part; that is the last time that something did
        on_disk.frees_bytes += max(0, occupied - stays_bytes)
        if recalled_at_s is not None:
            on_disk.recalled_s = max(recalled_at_s, on_disk.recalled_s or 0.0)


def _open(on_disk: _OnDisk, domains: Sequence[Domain], state: GuestState) -> list[str]:
    """Why a VM that somebody has open is not to be archived; one whose guest runs may be idle."""
    if on_disk.open and not domains:
        return [f"{on_disk.open[0]} is open, and no domain is known that has it"]
    if on_disk.open and state.is_off:
        return [f"{on_disk.open[0]} is open, though the domain is off"]
    return []


def _wanting_points(all_facts: Sequence[Facts], policy: Policy, now_s: float) -> list[int]:
    """Which of these VMs are archived if only their last restore point is not too old: it takes a listing for each."""
    with_age = {rule.name for rule in policy.rules if rule.point_age_max_s is not None}
    if not with_age:
        return []
    decisions = [decide(replace(facts, last_point_s=now_s), policy, now_s=now_s) for facts in all_facts]
    return [number for number, each in enumerate(decisions) if each.archives and each.rule in with_age]


def _longest_window_s(policy: Policy) -> float:
    windows = [policy.unused_for_s_min, SPAN_S_MIN]
    for rule in policy.rules:
        windows += [each for each in (rule.off_for_s, rule.not_started_for_s) if each is not None]
        windows += [rule.idle.window_s] if rule.idle is not None else []
    return max(windows)
