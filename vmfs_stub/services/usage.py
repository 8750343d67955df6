"""The sampler: asks at an interval how each VM is used, and keeps what two answers say of the time between them.

A VM with a domain is asked of the hypervisor, all with one question; what the hypervisor does not count comes from the
mount.  A VM without a domain is off while no hypervisor has a disk of it open in the mount.  While the hypervisor is
away nothing is known of VMs with domains, nor of VMs that may have one by now: that is a gap, as is the time of a
daemon that was not there and of a clock that was set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.catalog.usage_rows import LastUse
from vmfs_stub.core.errors import HypervisorAway, VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import GAP_INTERVALS, HOUR_S, Counters, GuestState, Reading, Sample, sample_of
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Scan, Vm
from vmfs_stub.services.domains import LinkDomains, Links
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.mount_usage import DiskLook, MountUsage, latest, looks_by_vm, mount_reading
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

OPENS_INTERVAL_S: Final = 10.0
"""How often it is recorded that hypervisors opened disks: a daemon that dies loses the memory of no more than that."""
CLOCK_SLACK_S: Final = 5.0
"""By more than this the clock and the time that has passed differ only if the clock was set."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of a VM at a moment: by its domains, if it has any, and by the mount (None: before the daemon).

    ``uuids`` are its domains; looks at different ones cannot be compared.
    """

    domain: Reading | None
    mount: Reading | None
    uuids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one round has found out before it is put together; ``readings`` is None while the hypervisor is away."""

    vms: Sequence[Vm]
    domains: Sequence[Domain]
    readings: Mapping[str, Reading] | None
    disks: Mapping[int, DiskLook]
    now_s: float


@dataclass(frozen=True, slots=True)
class _Round:
    """What is known after a round: it is replaced as a whole.

    ``files`` are the VMs of all inodes, ``owners`` of those that were open; ``links`` is None until the hypervisor has
    answered once.
    """

    looks: Mapping[VmId, Look] = field(default_factory=dict)
    links: Links | None = None
    without_domain: frozenset[VmId] = frozenset()
    files: Mapping[int, VmId] = field(default_factory=dict)
    owners: Mapping[int, VmId] = field(default_factory=dict)
    domain_readings: Mapping[str, Reading] = field(default_factory=dict)


class UsageSampler:
    """Samples the VMs of one datastore into its catalog."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        threads: Threads,
        hypervisor: Hypervisor,
        link: LinkDomains,
        mount: MountUsage,
        scan: Callable[[], Awaitable[Scan]],
        interval_s: float,
        clock: Callable[[], float] = time.time,
        passed: Callable[[], float] = trio.current_time,
    ) -> None:
        """``passed`` is a clock that nobody sets; both in seconds."""
        self._catalog = catalog
        self._threads = threads
        self._hypervisor = hypervisor
        self._link = link
        self._mount = mount
        self._scan = scan
        self._interval_s = interval_s
        self._clock = clock
        self._passed = passed
        self._round = _Round()
        self._known_uses: dict[VmId, LastUse] = {}
        self._last: tuple[float, float] | None = None
        self._rolled_s: float | None = None
        self._was_away = False
        self._turn = trio.Lock()

    # What others ask

    @property
    def links(self) -> Links | None:
        """Which domains are which VMs, as of the last round; None while that is not known."""
        return self._round.links

    def reading(self, vm_id: VmId) -> Reading | None:
        """What a VM did when it was last looked; None: nobody has looked yet, or the hypervisor is away."""
        look = self._round.looks.get(vm_id)
        if look is None or (self._was_away and look.domain is not None):
            return None
        return _combined(look, look)[1]

    def last_use(self, vm_id: VmId) -> LastUse:
        """When a hypervisor last used a VM, as far as is known; of a disk that is open, as of the last round."""
        return self._known_uses.get(vm_id, LastUse())

    # Sampling

    async def run(self) -> None:
        """Sample for ever.  Whatever goes wrong with that costs samples, and nothing else."""
        await self._guarded(self._go_on)
        while True:
            await self._guarded(self.sample)
            next_s = self._passed() + self._interval_s
            while (left_s := next_s - self._passed()) > 0:
                await trio.sleep(min(left_s, OPENS_INTERVAL_S))
                await self._guarded(self._record_opens)

    async def _guarded(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except VmfsStubError as exc:
            log.warning("how VMs are used could not be recorded: %s", exc)
        except Exception:
            log.exception("how VMs are used could not be recorded")

    async def _go_on(self) -> None:
        """Take up what an earlier daemon knew; of what the mount counted then nothing is left."""
        self._known_uses = await self._threads.files(self._catalog.last_uses)
        readings = await self._threads.files(self._catalog.readings)
        self._round = _Round(domain_readings=readings)
        newest_s = latest(reading.at_s for reading in readings.values())
        if newest_s is not None and newest_s > self._clock():
            await self._set_back(self._clock())

    async def sample(self) -> None:
        """One round, after one that is under way.  Raises PrimaryError."""
        async with self._turn:
            await self._sample_all()

    async def _sample_all(self) -> None:
        now_s, passed_s = self._clock(), self._passed()
        if self._last is not None:
            expected_s = self._last[0] + passed_s - self._last[1]
            if abs(now_s - expected_s) > CLOCK_SLACK_S:
                log.warning(
                    "the clock was set by %+.0f s: how VMs were used meanwhile is not known", now_s - expected_s
                )
                self._forget_before()
            if now_s <= self._last[0]:
                await self._set_back(now_s)
        self._last = now_s, passed_s
        asked = await self._ask(now_s)
        before, self._round, samples, new_uses = self._round, *await self._threads.files(self._taken, asked)
        self._mount.forget(ino for ino in asked.disks if ino not in self._round.owners)
        readings = None if asked.readings is None else self._round.domain_readings
        if samples or new_uses or readings != before.domain_readings:
            await self._threads.files(partial(self._catalog.add_samples, samples, readings=readings, uses=new_uses))
            self._known_uses |= new_uses
        if self._rolled_s is None or not 0 <= now_s - self._rolled_s < HOUR_S:
            await self._threads.files(self._catalog.roll_samples, now_s)
            self._rolled_s = now_s

    async def _record_opens(self) -> None:
        async with self._turn:
            disks = looks_by_vm(self._mount.look(), self._round.files)
            uses = self._new_uses({vm_id: _last_use(each, self._clock()) for vm_id, each in disks.items()})
            opened = {vm_id: use for vm_id, use in uses.items() if use.open_s != self.last_use(vm_id).open_s}
            if opened:
                await self._threads.files(partial(self._catalog.add_samples, (), uses=opened))
                self._known_uses |= opened

    def _forget_before(self) -> None:
        self._round = _Round(
            links=self._round.links,
            without_domain=self._round.without_domain,
            files=self._round.files,
            owners=self._round.owners,
        )

    async def _set_back(self, now_s: float) -> None:
        """The clock was ahead: what was recorded with it is of no time that there has been."""
        log.warning("the clock was set back: samples of times that are still to come are forgotten")
        self._forget_before()
        await self._threads.files(partial(self._catalog.forget_samples, after_s=now_s))
        self._known_uses = await self._threads.files(self._catalog.last_uses)

    async def _ask(self, now_s: float) -> _Asked:
        domains: Sequence[Domain] = ()
        readings: Mapping[str, Reading] | None = None
        try:
            domains = await self._hypervisor.domains()
            readings = await self._hypervisor.readings()
        except HypervisorAway as exc:
            if not self._was_away:
                log.warning("%s; until it does, nobody knows how VMs with domains are used", exc)
        self._was_away = readings is None
        scan = await self._scan()
        return _Asked(scan.vms, domains, readings, self._mount.look(), now_s)

    def _taken(self, asked: _Asked) -> tuple[_Round, list[tuple[VmId, Sample]], dict[VmId, LastUse]]:
        """What is known now, what that says of the time before, and the uses that nobody knew of; in a thread."""
        before = self._round
        links, without_domain = before.links, before.without_domain
        if asked.readings is not None:
            links = self._link(asked.vms, asked.domains)
            without_domain = frozenset(vm.id for vm in asked.vms if not links.of(vm.id))
        files = {file.ino: vm.id for vm in asked.vms for file in vm.files}
        owners = {ino: files[ino] for ino in asked.disks if ino in files}
        # A file that is gone and still open is the VM's whose it was.
        still_open = (ino for ino, disk in asked.disks.items() if not disk.state.is_off)
        owners = {ino: before.owners[ino] for ino in still_open if ino in before.owners} | owners
        disks = looks_by_vm(asked.disks, owners)
        looks: dict[VmId, Look] = {}
        samples = []
        for vm in asked.vms:
            mounted = mount_reading(disks.get(vm.id, ()), at_s=asked.now_s)
            domains = () if links is None else links.of(vm.id)
            if vm.id in without_domain:
                looks[vm.id] = Look(None, mounted)
            elif domains and asked.readings is not None:
                uuids = tuple(domain.uuid for domain in domains)
                looks[vm.id] = Look(_domain_reading(domains, asked.readings, asked.now_s), mounted, uuids)
            elif vm.id in before.looks:
                looks[vm.id] = before.looks[vm.id]
                continue
            else:
                continue
            earlier = before.looks.get(vm.id) or self._earlier(domains, before)
            sample = None if earlier is None else self._between(earlier, looks[vm.id])
            if sample is not None:
                samples.append((vm.id, sample))
        uses = {vm_id: _last_use(each, asked.now_s) for vm_id, each in disks.items()}
        kept = before.domain_readings if asked.readings is None else asked.readings
        after = _Round(looks, links, without_domain, files, owners, kept)
        return after, samples, self._new_uses(uses)

    def _earlier(self, domains: Sequence[Domain], before: _Round) -> Look | None:
        """What an earlier daemon had read of a VM's only domain."""
        if len(domains) != 1 or domains[0].uuid not in before.domain_readings:
            return None
        return Look(before.domain_readings[domains[0].uuid], None, (domains[0].uuid,))

    def _between(self, before: Look, after: Look) -> Sample | None:
        if before.uuids != after.uuids:
            return None
        return sample_of(*_combined(before, after), gap_s=GAP_INTERVALS * self._interval_s)

    def _new_uses(self, uses: Mapping[VmId, LastUse]) -> dict[VmId, LastUse]:
        found = {}
        for vm_id, use in uses.items():
            known = self._known_uses.get(vm_id, LastUse())
            newest = LastUse(latest((known.open_s, use.open_s)), latest((known.io_s, use.io_s)))
            if newest != known:
                found[vm_id] = newest
        return found


def _last_use(disks: Sequence[DiskLook], now_s: float) -> LastUse:
    """Never later than now, whatever clock the mount had been told then."""
    open_s, io_s = latest(disk.last_open_s for disk in disks), latest(disk.last_io_s for disk in disks)
    return LastUse(None if open_s is None else min(open_s, now_s), None if io_s is None else min(io_s, now_s))


def _domain_reading(domains: Sequence[Domain], readings: Mapping[str, Reading], now_s: float) -> Reading:
    """Of a VM with these domains: of several, at most one runs, or nobody can tell what is whose."""
    unknown = Reading(now_s, GuestState.UNKNOWN, Counters())
    found = [readings.get(domain.uuid, unknown) for domain in domains]
    on = [reading for reading in found if not reading.state.is_off]
    if not on:
        return max(found, key=lambda reading: reading.state_since_s or 0.0)
    return on[0] if len(on) == 1 else unknown


def _combined(before: Look, after: Look) -> tuple[Reading, Reading]:
    """Both looks as readings that can be compared: each counter from where both have it, the hypervisor first."""
    if before.domain is None or after.domain is None:
        assert before.mount is not None
        assert after.mount is not None
        return before.mount, after.mount
    old = before.domain.counters
    old_mount = Counters() if before.mount is None else before.mount.counters
    new = after.domain.counters
    new_mount = Counters() if after.mount is None else after.mount.counters
    counted = partial(_counted, old, new, old_mount, new_mount)
    reads, writes, requests = counted("read_bytes"), counted("written_bytes"), counted("requests")
    disk_before = Counters(old.cpu_s, reads[0], writes[0], requests[0], old.network_bytes)
    disk_after = Counters(new.cpu_s, reads[1], writes[1], requests[1], new.network_bytes)
    return _as_seen(before, disk_before), _as_seen(after, disk_after)


def _counted(
    old: Counters, new: Counters, old_mount: Counters, new_mount: Counters, name: str
) -> tuple[int | None, int | None]:
    pair: tuple[int | None, int | None] = getattr(old, name), getattr(new, name)
    mounted: tuple[int | None, int | None] = getattr(old_mount, name), getattr(new_mount, name)
    return mounted if None in pair and None not in mounted else pair


def _as_seen(look: Look, counters: Counters) -> Reading:
    """The domain's state, as far as the mount does not say otherwise."""
    assert look.domain is not None
    domain, mount = look.domain, look.mount
    if mount is None or not domain.state.is_off:
        return Reading(domain.at_s, domain.state, counters, domain.state_since_s)
    if not mount.state.is_off:
        return Reading(domain.at_s, GuestState.UNKNOWN, counters)
    return Reading(domain.at_s, domain.state, counters, latest((domain.state_since_s, mount.state_since_s)))
