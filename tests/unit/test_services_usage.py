"""The sampler: what it asks, what it keeps, and every way in which it must rather know nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from fake_hypervisor import FakeHypervisor, domain
from trio.testing import MockClock

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.catalog.usage_rows import LastUse
from vmfs_stub.core.errors import NoSpace
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.core.usage import DAY_S, HOUR_S, Counters, GuestState, Reading, Sample
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Scan, Vm, VmFile
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.disk import Caller
from vmfs_stub.services.domains import link
from vmfs_stub.services.mount_usage import IoCount, MountUsage
from vmfs_stub.services.threads import Threads
from vmfs_stub.services.usage import UsageSampler

INTERVAL_S = 300.0
EPOCH_S = 20_000 * DAY_S
MOUNT = Path("/srv/vms")
QEMU = Caller(pid=1, uid=0, executable="/usr/bin/qemu-system-x86_64", cgroup=None)
OFF, RUNNING, UNKNOWN = GuestState.OFF, GuestState.RUNNING, GuestState.UNKNOWN
WEB, DB = VmId("a" * 32), VmId("b" * 32)


def vm_of(vm_id: VmId, name: str, *inos: int) -> Vm:
    files = tuple(VmFile(f"{name}/{ino}.raw", f"{ino}.raw", 1, ino) for ino in inos)
    return Vm(vm_id, name, name, True, files)


class InlineThreads:
    """Runs everything at once."""

    async def files(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args, **kwargs)


class Host:
    """Two VMs: web has a domain if there is one, db has none.  ``set_s`` is by how much the clock was set."""

    def __init__(self, clock: MockClock, catalog: Catalog, *domains: Domain) -> None:
        self.trio_clock = clock
        self.catalog = catalog
        self.set_s = 0.0
        self.vms = [vm_of(WEB, "web", 1), vm_of(DB, "db", 2, 3)]
        self.hypervisor = FakeHypervisor(*domains)
        self.start()

    def start(self) -> None:
        """As a daemon that starts: of what the mount had counted nothing is left."""
        self.mount = MountUsage(("qemu-system-*",), clock=self.now)
        self.sampler = UsageSampler(
            catalog=self.catalog,
            threads=cast("Threads", InlineThreads()),
            hypervisor=self.hypervisor,
            link=partial(link, paths=DatastorePaths(files=PLAIN, backing=Path("/nowhere"), mountpoint=MOUNT)),
            mount=self.mount,
            scan=self.scan,
            interval_s=INTERVAL_S,
            clock=self.now,
            passed=self.trio_clock.current_time,
        )

    def now(self) -> float:
        return EPOCH_S + self.trio_clock.current_time() + self.set_s

    async def scan(self) -> Scan:
        return Scan(tuple(self.vms))

    def tell(self, state: GuestState, counters: Counters | None = None, since_s: float | None = None) -> None:
        """What the hypervisor says of web from now on."""
        (uuid,) = self.hypervisor.known
        self.hypervisor.used[uuid] = Reading(self.now(), state, counters or Counters(), since_s)

    async def round(self, after_s: float = INTERVAL_S) -> None:
        self.trio_clock.jump(after_s)
        for uuid, known in list(self.hypervisor.used.items()):
            self.hypervisor.used[uuid] = Reading(self.now(), known.state, known.counters, known.state_since_s)
        await self.sampler.sample()

    def open(self, ino: int, caller: Caller = QEMU) -> IoCount:
        return self.mount.opened(ino, caller)

    def samples(self, vm_id: VmId) -> list[Sample]:
        return self.catalog.samples(vm_id, since_s=0, until_s=1e12)

    def times(self, vm_id: VmId) -> list[tuple[float, float, float]]:
        """Length, off and running of each sample."""
        return [(each.end_s - each.start_s, each.off_s, each.running_s) for each in self.samples(vm_id)]


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    with closing(Catalog.in_memory()) as opened:
        yield opened


@pytest.fixture
def plain(mock_clock: MockClock, catalog: Catalog) -> Host:
    return Host(mock_clock, catalog)


@pytest.fixture
def host(mock_clock: MockClock, catalog: Catalog) -> Host:
    made = Host(mock_clock, catalog, domain("web", MOUNT / "web/1.raw"))
    made.tell(OFF)
    return made


IS_OFF, RAN, NOT_KNOWN = (300.0, 300.0, 0.0), (300.0, 0.0, 300.0), (300.0, 0.0, 0.0)


# Without a domain


async def test_a_vm_that_no_hypervisor_opens_is_off(plain: Host) -> None:
    for _ in range(3):
        await plain.round()
    assert plain.times(WEB) == plain.times(DB) == [IS_OFF, IS_OFF]
    assert plain.samples(DB)[0].cpu_percent_max == 0.0
    found = plain.sampler.reading(DB)
    assert found is not None
    assert found.state is OFF


async def test_use_through_the_mount(plain: Host) -> None:
    await plain.round()
    use = plain.open(2)
    await plain.round()
    use.requests, use.read_bytes, use.written_bytes = 9, 3000, 6000
    await plain.round()
    plain.mount.closed(2, use)
    for _ in range(2):
        await plain.round()
    assert plain.times(DB) == [(300.0, 0.0, 300.0), RAN, NOT_KNOWN, IS_OFF]
    ran = plain.samples(DB)[1]
    assert (ran.read_bytes, ran.written_bytes, ran.requests) == (3000, 6000, 9)
    assert (ran.cpu_percent_max, ran.disk_bytes_per_s_max, ran.network_bytes_per_s_max) == (None, 30.0, None)
    assert plain.times(WEB) == [IS_OFF] * 4
    last = LastUse(EPOCH_S + 300, EPOCH_S + 900)
    assert plain.sampler.last_use(DB) == last
    assert plain.catalog.last_uses() == {DB: last}


async def test_a_use_between_two_readings_is_not_missed(plain: Host) -> None:
    await plain.round()
    plain.mount.closed(2, plain.open(2))
    await plain.round()
    assert plain.times(DB) == [NOT_KNOWN]


async def test_an_opener_that_cannot_be_told_leaves_it_unknown(plain: Host) -> None:
    await plain.round()
    plain.open(2, Caller(pid=0, uid=0, executable=None, cgroup=None))
    await plain.round()
    await plain.round()
    assert plain.times(DB) == [NOT_KNOWN, NOT_KNOWN]
    assert plain.sampler.last_use(DB) == LastUse()


async def test_a_disk_that_was_removed_while_open_is_still_the_vms(plain: Host) -> None:
    plain.open(2)
    await plain.round()
    plain.vms[1] = vm_of(DB, "db", 3)
    await plain.round()
    await plain.round()
    assert plain.times(DB) == [RAN, RAN]


async def test_a_disk_that_is_no_vms_any_more_is_forgotten(plain: Host) -> None:
    plain.mount.closed(2, plain.open(2))
    await plain.round()
    assert list(plain.mount.look()) == [2]
    plain.vms[1] = vm_of(DB, "db", 3)
    await plain.round()
    assert list(plain.mount.look()) == []


# With a domain


async def test_a_domain_is_asked_of_the_hypervisor(host: Host) -> None:
    host.tell(RUNNING, Counters(10.0, 100, 200, 3, 50))
    await host.round()
    host.tell(RUNNING, Counters(40.0, 400, 800, 9, 350))
    await host.round()
    (found,) = host.samples(WEB)
    assert host.times(WEB) == [RAN]
    assert (found.cpu_percent_max, found.disk_bytes_per_s_max, found.network_bytes_per_s_max) == (10.0, 3.0, 1.0)
    assert host.times(DB) == [IS_OFF]
    assert host.sampler.links is not None
    assert [each.name for each in host.sampler.links.of(WEB)] == ["web"]


async def test_with_one_question_for_all(host: Host) -> None:
    await host.round()
    assert host.hypervisor.asked == ["domains", "readings"]


async def test_what_the_hypervisor_does_not_count_the_mount_does(host: Host) -> None:
    host.tell(RUNNING, Counters(cpu_s=10.0, network_bytes=5))
    use = host.open(1)
    await host.round()
    use.read_bytes += 600
    await host.round()
    (found,) = host.samples(WEB)
    assert (found.read_bytes, found.disk_bytes_per_s_max, found.cpu_percent_max) == (600, 2.0, 0.0)


async def test_a_domain_that_is_off_and_used_by_another_hypervisor_is_not_off(host: Host) -> None:
    await host.round()
    await host.round()
    use = host.open(1)
    await host.round()
    await host.round()
    host.mount.closed(1, use)
    await host.round()
    await host.round()
    assert host.times(WEB) == [IS_OFF, NOT_KNOWN, NOT_KNOWN, NOT_KNOWN, IS_OFF]


async def test_a_domain_of_which_nothing_was_read_is_unknown(host: Host) -> None:
    host.hypervisor.used.clear()
    await host.round()
    await host.round()
    assert host.times(WEB) == [NOT_KNOWN]


async def test_of_several_domains_at_most_one_may_run(mock_clock: MockClock, catalog: Catalog) -> None:
    both = [domain(name, MOUNT / "web/1.raw") for name in ("one", "two")]
    host = Host(mock_clock, catalog, *both)
    states = [(OFF, OFF), (OFF, OFF), (RUNNING, OFF), (RUNNING, OFF), (RUNNING, RUNNING), (RUNNING, RUNNING)]
    for pair in states:
        for each, state in zip(both, pair, strict=True):
            host.hypervisor.used[each.uuid] = Reading(0, state, Counters(cpu_s=1.0))
        await host.round()
    assert host.times(WEB) == [IS_OFF, NOT_KNOWN, RAN, NOT_KNOWN, NOT_KNOWN]


async def test_a_base_has_no_domain_and_is_sampled_by_the_mount(mock_clock: MockClock, catalog: Catalog) -> None:
    web = domain("web", MOUNT / "web/1.raw")
    web = replace(web, disks=(replace(web.disks[0], backing=(MOUNT / "db/2.raw",)),))
    host = Host(mock_clock, catalog, web)
    host.tell(OFF)
    await host.round()
    assert host.sampler.links is not None
    assert (host.sampler.links.of(WEB), host.sampler.links.of(DB)) == ((web,), ())
    host.tell(RUNNING, Counters(cpu_s=1.0))
    use = host.open(2)  # as the guest's hypervisor does with a base
    await host.round()
    use.requests, use.read_bytes = 3, 3000
    await host.round()
    assert (host.times(WEB), host.times(DB)) == ([NOT_KNOWN, RAN], [RAN, RAN])
    ran = host.samples(DB)[1]
    assert (ran.cpu_percent_max, ran.disk_bytes_per_s_max) == (None, 10.0)
    host.mount.closed(2, use)
    host.tell(OFF)
    for _ in range(2):
        await host.round()
    assert host.times(DB)[2:] == [NOT_KNOWN, IS_OFF]


async def test_readings_of_different_domains_are_not_compared(host: Host) -> None:
    host.tell(RUNNING, Counters(cpu_s=1.0))
    await host.round()
    host.hypervisor.known.clear()
    other = domain("other", MOUNT / "web/1.raw")
    host.hypervisor.known[other.uuid] = other
    host.hypervisor.used[other.uuid] = Reading(0, RUNNING, Counters(cpu_s=100.0))
    await host.round()
    assert host.samples(WEB) == []
    await host.round()
    assert host.times(WEB) == [RAN]


# Away


async def test_while_the_hypervisor_is_away_domains_have_a_gap(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    await host.round()
    host.hypervisor.away = True
    for _ in range(4):
        await host.round()
    assert host.sampler.reading(WEB) is None
    host.hypervisor.away = False
    await host.round()
    await host.round()
    assert host.times(WEB) == [IS_OFF]
    assert host.times(DB) == [IS_OFF] * 6
    assert len([each for each in caplog.records if "nobody knows" in each.message]) == 1


async def test_a_short_absence_is_bridged_by_what_counters_say(host: Host) -> None:
    await host.round()
    host.hypervisor.away = True
    await host.round()
    host.hypervisor.away = False
    await host.round()
    assert host.times(WEB) == [(600.0, 600.0, 0.0)]


async def test_a_vm_that_may_have_a_domain_by_now_is_not_sampled(host: Host) -> None:
    await host.round()
    host.hypervisor.away = True
    host.vms.append(vm_of(VmId("c" * 32), "new", 9))
    for _ in range(3):
        await host.round()
    assert host.samples(VmId("c" * 32)) == []


async def test_before_the_hypervisor_has_answered_nothing_is_known(host: Host) -> None:
    host.hypervisor.away = True
    for _ in range(3):
        await host.round()
    assert host.samples(WEB) == host.samples(DB) == []
    assert host.sampler.links is None


# Restarts, clocks, failures


async def test_a_daemon_that_starts_again_goes_on_where_domains_were(host: Host) -> None:
    host.tell(RUNNING, Counters(cpu_s=10.0))
    await host.round()
    host.start()
    host.tell(RUNNING, Counters(cpu_s=40.0))
    await _one_turn(host, after_s=400)
    assert [(each.end_s - each.start_s, each.cpu_s) for each in host.samples(WEB)] == [(400.0, 30.0)]
    assert host.samples(DB) == []


async def test_after_a_long_time_it_does_not(host: Host) -> None:
    await host.round()
    host.start()
    await _one_turn(host, after_s=1000)
    assert host.samples(WEB) == []


async def _one_turn(host: Host, *, after_s: float) -> None:
    """What `run` does until it sleeps."""
    host.trio_clock.jump(after_s)
    for uuid, known in list(host.hypervisor.used.items()):
        host.hypervisor.used[uuid] = Reading(host.now(), known.state, known.counters, known.state_since_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.sampler.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("by_s", [-7200.0, -299.0, -60.0, 60.0, 299.0, 7200.0])
async def test_a_clock_that_was_set_is_a_gap(plain: Host, by_s: float) -> None:
    for _ in range(3):
        await plain.round()
    plain.set_s += by_s
    for _ in range(3):
        await plain.round()
    found = plain.samples(DB)
    assert all(each.end_s - each.start_s == each.off_s == 300.0 for each in found)
    assert all(earlier.end_s <= later.start_s for earlier, later in pairwise(found))
    assert found[-1].end_s == plain.now()
    assert len(found) == (2 if by_s == -7200 else 4)


async def test_samples_of_times_to_come_are_forgotten_at_the_start(host: Host) -> None:
    for _ in range(5):
        await host.round()
    host.set_s -= 10_000
    host.start()
    await _one_turn(host, after_s=300)
    assert host.samples(WEB) == host.samples(DB) == []
    await host.round()
    assert host.times(WEB) == [IS_OFF]


async def test_a_missed_round_is_a_gap_and_a_late_one_is_none(plain: Host) -> None:
    await plain.round()
    await plain.round(899.0)
    await plain.round(901.0)
    await plain.round()
    assert plain.times(DB) == [(899.0, 899.0, 0.0), IS_OFF]


async def test_what_cannot_be_recorded_is_a_gap_and_no_more(
    plain: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await plain.round()

    def fail(*arguments: object, **options: object) -> None:
        raise NoSpace("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(plain.catalog, "add_samples", fail)
        with pytest.raises(NoSpace):
            await plain.round()
        plain.trio_clock.jump(300)
        with caplog.at_level(logging.WARNING):
            await plain.sampler._guarded(plain.sampler.sample)
        assert "no space left" in caplog.text
    await plain.round()
    assert plain.times(DB) == [IS_OFF]


async def test_a_use_that_could_not_be_recorded_is_recorded_later(plain: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    await plain.round()
    plain.mount.closed(2, plain.open(2))
    opened_s = plain.now()

    def fail(*arguments: object, **options: object) -> None:
        raise NoSpace("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(plain.catalog, "add_samples", fail)
        with pytest.raises(NoSpace):
            await plain.round()
    await plain.round()
    assert plain.catalog.last_uses()[DB].open_s == opened_s


async def test_an_open_is_recorded_before_the_next_round(autojump_clock: MockClock, catalog: Catalog) -> None:
    """A daemon that dies must not forget it: the time after it would look as if nobody had used the VM."""
    host = Host(autojump_clock, catalog)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.sampler.run)
        await trio.sleep(95)
        use = host.open(2)
        opened_s = host.now()
        await trio.sleep(10)
        assert catalog.last_uses() == {DB: LastUse(opened_s, None)}
        use.requests += 1
        await trio.sleep(20)
        assert catalog.last_uses() == {DB: LastUse(opened_s, None)}
        await trio.sleep(200)
        assert catalog.last_uses()[DB].io_s == EPOCH_S + 110
        nursery.cancel_scope.cancel()


async def test_a_use_is_never_later_than_now(plain: Host) -> None:
    use = plain.open(2)
    use.requests += 1
    await plain.round()
    plain.set_s -= 5000
    await plain.round()
    assert plain.sampler.last_use(DB) == plain.catalog.last_uses()[DB]
    assert plain.sampler.last_use(DB).open_s == plain.now()


async def test_a_programming_error_does_not_end_the_daemon(plain: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> Scan:
        raise ValueError("a bug")

    plain.sampler._scan = broken
    await _one_turn(plain, after_s=300)
    assert "a bug" in caplog.text


async def test_it_samples_at_its_interval_and_rolls_each_hour(
    autojump_clock: MockClock, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, rolled = Host(autojump_clock, catalog), list[float]()
    monkeypatch.setattr(catalog, "roll_samples", rolled.append)
    with trio.move_on_after(2.5 * HOUR_S + 1):
        await host.sampler.run()
    assert host.times(DB) == [IS_OFF] * 30
    assert rolled == [EPOCH_S, EPOCH_S + HOUR_S, EPOCH_S + 2 * HOUR_S]


# What it costs


COST_SHARE_MAX = 0.01
VM_COUNT = 1000


async def test_a_thousand_domains_take_less_than_a_hundredth_of_a_processor(
    mock_clock: MockClock, tmp_path: Path
) -> None:
    """Of a catalog on a disk; the real cost is a small part of this."""
    made = [vm_of(VmId(f"{number:032x}"), f"vm{number}", 2 * number, 2 * number + 1) for number in range(VM_COUNT)]
    domains = [domain(vm.name, *(MOUNT / file.path for file in vm.files)) for vm in made]
    with closing(Catalog.open(tmp_path / "catalog.sqlite")) as catalog:
        host = Host(mock_clock, catalog, *domains)
        host.vms = made
        rounds, spent_s = 6, 0.0
        for turn in range(rounds):
            host.trio_clock.jump(INTERVAL_S)
            counters = Counters(10.0 * turn, 1000 * turn, 1000 * turn, 10 * turn, 100 * turn)
            host.hypervisor.used = {each.uuid: Reading(host.now(), RUNNING, counters) for each in domains}
            before_s = time.process_time()
            await host.sampler.sample()
            spent_s += time.process_time() - before_s
        assert {len(host.samples(vm.id)) for vm in made} == {rounds - 1}
    share = spent_s / rounds / INTERVAL_S
    print(f"sampling {VM_COUNT} domains: {spent_s / rounds * 1000:.0f} ms, {share:.4%} of one processor")
    assert share < COST_SHARE_MAX
