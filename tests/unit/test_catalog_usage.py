"""Samples in the catalog: bounded, never lost by an upgrade, and never idleness where they are damaged."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.old_catalog import SCHEMA_1
from vmfs_stub.catalog.catalog import SCHEMA_VERSION, Catalog, KnownVm
from vmfs_stub.catalog.migrations import MIGRATIONS
from vmfs_stub.catalog.usage_rows import LastUse
from vmfs_stub.core.ids import JobId, VmId
from vmfs_stub.core.usage import DAY_S, FRESH_S, HOUR_S, Counters, GuestState, Reading, Sample, bucketed, rows_max

VM, OTHER = VmId("a" * 32), VmId("b" * 32)
START = 20_000 * DAY_S
FOREVER = 1e12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    with closing(Catalog.open(path)) as opened:
        yield opened


def sample(start_s: float, length_s: float = 300.0, **fields: float | None) -> Sample:
    """One in which the VM ran, a little."""
    usual: dict[str, float | None] = {
        "off_s": 0.0,
        "running_s": length_s,
        "cpu_percent_max": 1.5,
        "disk_bytes_per_s_max": 10.0,
        "network_bytes_per_s_max": 20.0,
        "cpu_s": 4.5,
        "read_bytes": 1000,
        "written_bytes": 2000,
        "requests": 3,
        "network_bytes": 6000,
    }
    return Sample(start_s, start_s + length_s, **{**usual, **fields})  # type: ignore[arg-type]


def everything(catalog: Catalog, vm_id: VmId = VM) -> list[Sample]:
    return catalog.samples(vm_id, since_s=0, until_s=FOREVER)


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def count(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM samples").fetchone()
        return int(rows)


def test_samples_come_back_as_they_were(catalog: Catalog) -> None:
    first, second = sample(START), sample(START + 400.125, cpu_percent_max=None, read_bytes=2**62)
    catalog.add_samples([(VM, first), (VM, second), (OTHER, first)])
    assert everything(catalog) == [first, second]
    assert everything(catalog, OTHER) == [first]
    assert catalog.samples(VM, since_s=START + 300, until_s=START + 400) == []
    assert catalog.samples(VM, since_s=START + 299, until_s=START + 400) == [first]
    assert catalog.samples(VM, since_s=START + 300, until_s=START + 401) == [second]
    assert everything(catalog, VmId("c" * 32)) == []


def test_a_sample_that_cannot_be_is_not_kept(catalog: Catalog) -> None:
    catalog.add_samples([(VM, sample(START, -300.0)), (VM, sample(START, off_s=1e9)), (VM, sample(START, cpu_s=-1.0))])
    assert everything(catalog) == []


def test_all_samples_are_those_of_each_vm_merged(catalog: Catalog) -> None:
    rows = [sample(START + number * 300, cpu_percent_max=None if number == 40 else number) for number in range(100)]
    catalog.add_samples([(VM, each) for each in rows] + [(OTHER, each) for each in rows[:5]])
    found = catalog.all_samples(START - 1)
    assert found == {VM: bucketed(rows, HOUR_S), OTHER: bucketed(rows[:5], HOUR_S)}
    assert catalog.all_samples(START - 1, resolution_s=DAY_S)[VM] == bucketed(rows, DAY_S)
    assert catalog.all_samples(rows[9].end_s) == {VM: bucketed(rows[10:], HOUR_S)}
    assert catalog.all_samples(FOREVER) == {}


def test_of_all_samples_those_of_a_vm_that_was_off_are_few(catalog: Catalog) -> None:
    off: dict[str, float | None] = dict.fromkeys(
        ("running_s", "cpu_percent_max", "disk_bytes_per_s_max", "network_bytes_per_s_max", "cpu_s", "read_bytes",
         "written_bytes", "requests", "network_bytes"), 0
    )  # fmt: skip
    rows = [sample(START + number * 300, **off, off_s=300) for number in range(288 * 2)]
    unknown = 400
    rows[unknown] = sample(rows[unknown].start_s, **{**off, "cpu_percent_max": None}, off_s=300)
    del rows[17 * 12]  # a gap between two hours in each of which it was off all the time
    del rows[100]
    catalog.add_samples([(VM, each) for each in rows])
    found = catalog.all_samples(START - 1)[VM]
    assert len(found) == 4 + 3
    assert sum(each.off_s for each in found) == 300 * (288 * 2 - 2)
    assert [each.cpu_percent_max for each in found] == [0, 0, 0, 0, 0, None, 0]
    assert found[0].end_s == START + 8 * HOUR_S
    assert bucketed(found, DAY_S) == bucketed(rows, DAY_S)


def test_readings_are_replaced_with_the_samples_they_belong_to(catalog: Catalog) -> None:
    first = {"1" * 32: Reading(START, GuestState.PAUSED, Counters(1.5, 2, None, 4, 5), START - 9)}
    catalog.add_samples([], readings=first)
    catalog.add_samples([])
    assert catalog.readings() == first
    second = {"2" * 32: Reading(START, GuestState.OFF, Counters())}
    catalog.add_samples([], readings=second)
    assert catalog.readings() == second


def test_the_last_use_never_goes_back(catalog: Catalog) -> None:
    catalog.add_samples([], uses={VM: LastUse(5.0, None), OTHER: LastUse(None, 1.0)})
    catalog.add_samples([], uses={VM: LastUse(4.0, 6.0)})
    assert catalog.last_uses() == {VM: LastUse(5.0, 6.0), OTHER: LastUse(None, 1.0)}


def test_samples_become_hours_then_days_and_go(catalog: Catalog, path: Path) -> None:
    rows = [sample(START + number * 300, read_bytes=number) for number in range(288 * 3)]
    catalog.add_samples([(VM, each) for each in rows])
    now = START + 3 * DAY_S
    catalog.roll_samples(now)
    assert everything(catalog) == bucketed(rows[:288], HOUR_S) + rows[288:]
    catalog.roll_samples(now)
    assert count(path) == 24 + 288 * 2
    catalog.roll_samples(START + 36 * DAY_S)
    assert everything(catalog) == bucketed(rows[:288], DAY_S) + bucketed(rows[288:], HOUR_S)
    catalog.roll_samples(START + 40 * DAY_S)
    assert everything(catalog) == bucketed(rows, DAY_S)
    catalog.roll_samples(START + 731 * DAY_S)
    assert everything(catalog) == bucketed(rows[288:], DAY_S)
    catalog.roll_samples(START + 800 * DAY_S)
    assert everything(catalog) == []
    assert catalog.last_uses() == {}


def test_a_vm_that_was_used_lately_is_remembered_without_samples(catalog: Catalog) -> None:
    catalog.add_samples([(VM, sample(START))], uses={VM: LastUse(START + 700 * DAY_S, None)})
    catalog.roll_samples(START + 800 * DAY_S)
    assert catalog.last_uses() == {VM: LastUse(START + 700 * DAY_S, None)}


def test_two_years_of_a_vm_are_bounded(catalog: Catalog, path: Path) -> None:
    """1,000 VMs are 1,000 times that: rows of different VMs know nothing of each other."""
    most = 0
    for day in range(780):
        start_s = START + day * DAY_S
        hourly = day % 60 == 59 or day > 770
        for part in range(0, 288, 12 if hourly else 288):
            batch = range(part, part + (12 if hourly else 288))
            catalog.add_samples([(VM, sample(start_s + number * 300 + day)) for number in batch])
            catalog.roll_samples(start_s + (batch[-1] + 1) * 300 + day)
            if hourly:
                most = max(most, count(path))
    assert 2000 < most <= rows_max(300)
    assert sum(each.running_s for each in everything(catalog)) > 729 * DAY_S


def test_what_is_still_to_come_is_forgotten(catalog: Catalog) -> None:
    rows = [sample(START), sample(START + 300), sample(START + 600)]
    catalog.add_samples([(VM, each) for each in rows])
    catalog.add_samples([], uses={VM: LastUse(START + 900, START + 5), OTHER: LastUse(None, START + 601)})
    catalog.forget_samples(after_s=START + 600)
    assert catalog.last_uses() == {VM: LastUse(START + 600, START + 5), OTHER: LastUse(None, START + 600)}
    assert everything(catalog) == rows[:2]


@pytest.mark.parametrize(
    "damage",
    [
        "off = -5",
        "off = 9223372036854775807",
        "off = 9223372036854775807, running = 9223372036854775807",
        "running = 200000, off = 100001",
        "length = 0",
        "length = -5",
        "length = 86400000 * 30, off = 86400000 * 29",
        "length = 9223372036854775807",
        "cpu_max = -1",
        "disk_max = -1",
        "read = -1",
    ],
)
def test_a_damaged_sample_is_a_gap(catalog: Catalog, path: Path, damage: str) -> None:
    rows = [sample(START), sample(START + 3600), sample(START + 7200)]
    catalog.add_samples([(VM, each) for each in rows])
    change(path, f"UPDATE samples SET {damage} WHERE start = {round((START + 3600) * 1000)}")
    wanted = [rows[0], rows[2]]
    assert everything(catalog) == wanted
    assert catalog.all_samples(0, resolution_s=DAY_S) == {VM: bucketed(wanted, DAY_S)}
    catalog.roll_samples(START + FRESH_S + DAY_S)
    assert everything(catalog) == wanted


def test_samples_that_overlap_count_once(catalog: Catalog, path: Path) -> None:
    catalog.add_samples([(VM, sample(START, 300.0, off_s=300.0, running_s=0.0))])
    columns = "off, running, cpu_max, disk_max, network_max, cpu, read, written, requests, network"
    change(path, f"INSERT INTO samples SELECT vm, 0, start, length + 9, {columns} FROM samples")
    assert sum(each.off_s for each in everything(catalog)) == 300
    assert sum(each.off_s for each in catalog.all_samples(0)[VM]) == 300


def test_a_damaged_reading_was_not_taken(catalog: Catalog, path: Path) -> None:
    catalog.add_samples([], readings={"1" * 32: Reading(START, GuestState.OFF, Counters())})
    change(path, "UPDATE readings SET state = 'dancing'")
    assert catalog.readings() == {}


def test_a_catalog_of_version_1_keeps_everything(path: Path) -> None:
    job = JobId("c" * 32)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(SCHEMA_1)
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        connection.execute("INSERT INTO vms VALUES (?, 'web', 1.0, 2.0)", (VM,))
        connection.execute("INSERT INTO access VALUES (?, 'disk.raw', '/usr/bin/qemu', 0, 7.0)", (VM,))
        connection.execute(
            "INSERT INTO jobs VALUES (?, 'backup', 'done', '[\"web\"]', 0, 3.0, 4.0, '{}', NULL)", (job,)
        )
    for _ in range(2):
        with closing(Catalog.open(path)) as catalog:
            assert catalog.known_vms() == [KnownVm(VM, "web", 1.0, 2.0)]
            assert catalog.last_accesses() == {(VM, "disk.raw"): 7.0}
            assert [(each.id, each.state, each.vms) for each in catalog.jobs(count_max=9)] == [(job, "done", ("web",))]
            catalog.add_samples([(VM, sample(START))])
            assert everything(catalog) == [sample(START)]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert not path.with_name("catalog.sqlite.damaged-1").exists()


def test_an_upgrade_that_was_cut_short_is_made_again(path: Path) -> None:
    """Version and tables change together, or not at all."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(SCHEMA_1)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"BEGIN;\n{MIGRATIONS[1]}")
    with closing(Catalog.open(path)) as catalog:
        catalog.add_samples([(VM, sample(START))])
        assert everything(catalog) == [sample(START)]
