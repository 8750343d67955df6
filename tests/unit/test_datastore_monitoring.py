# ruff: noqa: ASYNC110 - what is waited for has no event of its own
"""What is watched, how many series that makes, and when it is unhealthy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import parse_config
from vmfs_stub.control.jobs import Jobs
from vmfs_stub.core.errors import StoreUnavailable
from vmfs_stub.core.ids import JobId, VmId
from vmfs_stub.datastore_listing import Listing
from vmfs_stub.datastore_monitoring import OTHERS, SPACE_KEPT_S, Monitoring, Space
from vmfs_stub.services.recall_waits import RecallWaits
from vmfs_stub.services.threads import Threads
from vmfs_stub.settings import Settings

HOUR_S, DAY_S = 3600.0, 86400.0
NOW_S = 1_790_000_000.0
TEXT = """
[datastore]
name = "main"
backing = "/srv/backing"
mountpoint = "/srv/mount"
[store]
url = "file:///srv/store"
[monitoring]
"""


class InLine:
    async def files(self, function, *args, **kwargs):  # type: ignore[no-untyped-def]
        return function(*args, **kwargs)


@dataclass
class Place:
    """Monitoring of a datastore that is not there; ``now_s`` is its time."""

    catalog: Catalog
    backing_fd: int
    now_s: float = NOW_S
    vms: list[SimpleNamespace] = field(default_factory=list)
    free: Space = field(default_factory=lambda: Space(500, 1000))
    wait_s: float = 0.0
    jobs: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(last_done={}, on_end=None))

    def __post_init__(self) -> None:
        self.waits = RecallWaits(clock=lambda: self.wait_s)

    def monitoring(self, limits: str = "") -> Monitoring:
        async def scan() -> SimpleNamespace:
            self.catalog.see_vms([(vm.id, vm.name) for vm in self.vms], now=self.now_s)
            return SimpleNamespace(vms=tuple(self.vms))

        made = Monitoring(
            settings=Settings(parse_config(TEXT + limits, origin="c.toml")),
            catalog=self.catalog,
            threads=cast(Threads, InLine()),
            listing=cast(Listing, SimpleNamespace(scan=scan, saved_bytes=lambda vms: 7)),
            jobs=cast(Jobs, self.jobs),
            waits=self.waits,
            backing_fd=self.backing_fd,
            clock=lambda: self.now_s,
        )
        made.space = lambda: self.free  # type: ignore[method-assign]
        return made

    def add_vm(self, name: str, *, age_s: float | None) -> None:
        vm_id = VmId(f"{len(self.vms):032x}")
        self.vms.append(SimpleNamespace(id=vm_id, name=name))
        self.catalog.see_vms([(vm_id, name)], now=self.now_s)
        if age_s is not None:
            self.catalog.record_point(vm_id, self.now_s - age_s)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    catalog = Catalog.in_memory()
    yield Place(catalog, fd)
    catalog.close()
    os.close(fd)


def subjects(monitoring: Monitoring) -> list[str]:
    found = list(monitoring.problems())
    assert all(finding.severity == "problem" for finding in found)
    return [finding.subject for finding in found]


async def test_ages_and_their_number(place: Place) -> None:
    for number in range(5):
        place.add_vm(f"vm{number}", age_s=number * HOUR_S)
    place.add_vm("vm1", age_s=30 * HOUR_S)  # another VM of that name
    place.add_vm("a-new-one", age_s=None)
    monitoring = place.monitoring("vms_max = 2")
    await monitoring.look()
    assert dict(monitoring.point_ages_s()) == {"vm0": 0.0, "vm1": 30 * HOUR_S, OTHERS: 4 * HOUR_S}
    assert (monitoring.oldest_point_age_s(), monitoring.vms_without_point(), len(monitoring.vms)) == (30 * HOUR_S, 1, 7)
    assert monitoring.saved_bytes == 7
    place.vms.pop(5)  # gone: its old point is nobody's any more
    await monitoring.look()
    assert dict(monitoring.point_ages_s()) == {"vm0": 0.0, "vm1": 1 * HOUR_S, OTHERS: 4 * HOUR_S}
    none = place.monitoring("vms_max = 0")
    await none.look()
    assert dict(none.point_ages_s()) == {OTHERS: 4 * HOUR_S}


async def test_the_last_backup_is_a_job_or_else_a_point(place: Place) -> None:
    monitoring = place.monitoring()
    await monitoring.look()
    assert monitoring.last_backup_age_s() is None
    place.add_vm("web", age_s=5 * HOUR_S)
    await monitoring.look()
    assert monitoring.last_backup_age_s() == 5 * HOUR_S
    place.jobs.last_done["archive"] = NOW_S - 6 * HOUR_S
    assert monitoring.last_backup_age_s() == 6 * HOUR_S, "jobs are known: the last one that was done counts"
    place.jobs.last_done["backup"] = NOW_S - 2 * HOUR_S
    place.jobs.last_done["recall"] = NOW_S
    assert monitoring.last_backup_age_s() == 2 * HOUR_S


async def test_backups_that_are_too_old(place: Place) -> None:
    monitoring = place.monitoring("backup_age_max_hours = 30")
    await monitoring.look()
    assert subjects(monitoring) == [], "without VMs there is nothing to back up"
    place.add_vm("web", age_s=None)
    await monitoring.look()
    assert subjects(monitoring) == ["backups"]
    place.jobs.last_done["backup"] = NOW_S - 29 * HOUR_S
    assert subjects(monitoring) == []
    place.now_s += 2 * HOUR_S
    assert subjects(monitoring) == ["backups"]
    unlimited = place.monitoring("backup_age_max_hours = 0")
    await unlimited.look()
    assert subjects(unlimited) == []


def test_recalls_that_fail(place: Place) -> None:
    monitoring = place.monitoring("recall_failure_hours = 1")
    assert subjects(monitoring) == []
    with pytest.raises(StoreUnavailable), place.waits.measured():
        raise StoreUnavailable("away")
    place.wait_s += 60
    assert subjects(monitoring) == ["recalls"]
    assert subjects(place.monitoring("recall_failure_hours = 0")) == []
    place.wait_s += HOUR_S
    assert subjects(monitoring) == [], "long ago, and nobody has asked since"
    place.wait_s -= HOUR_S
    with place.waits.measured():
        place.wait_s += 1
    assert subjects(monitoring) == []


def test_primary_that_is_nearly_full(place: Place) -> None:
    monitoring = place.monitoring("free_percent_min = 10")
    for free, expected in ((1000, []), (100, []), (99, ["primary"]), (0, ["primary"])):
        place.free = Space(free, 1000)
        assert subjects(monitoring) == expected, free
    assert subjects(place.monitoring("free_percent_min = 0")) == []


async def test_free_space_is_noted_each_hour_and_outlives_the_daemon(place: Place) -> None:
    monitoring = place.monitoring()
    for step in range(6 * 24 * 9):
        place.free = Space(10**12 - step * 10**8, 10**12)
        await monitoring.look()
        place.now_s += 600
    noted = place.catalog.free_space()
    assert len(noted) == SPACE_KEPT_S / HOUR_S + 1
    left_s = monitoring.full_in_s()
    assert left_s == pytest.approx(place.free.free_bytes / (10**8 / 600), rel=0.01)
    later = place.monitoring()
    later._history = place.catalog.free_space()
    assert later.full_in_s() == pytest.approx(left_s)
    place.now_s -= 2 * DAY_S  # the clock was wrong: what was noted of the future is forgotten
    await monitoring.look()
    assert max(each.at_s for each in place.catalog.free_space()) == place.now_s


async def test_earlier_jobs_are_read_at_the_start(place: Place) -> None:
    place.catalog.start_job(JobId("1" * 32), kind="backup", vms=[], caller_uid=0, now=1.0)
    place.catalog.end_job(JobId("1" * 32), state="done", report=None, error=None, now=NOW_S - HOUR_S)
    monitoring = place.monitoring()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(monitoring.run)
        with trio.fail_after(5):
            while monitoring.last_backup_age_s() is None:
                await trio.sleep(0.01)
        assert monitoring.last_backup_age_s() == HOUR_S
        place.add_vm("web", age_s=1.0)
        place.jobs.on_end(None)
        with trio.fail_after(5):
            while not monitoring.vms:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
