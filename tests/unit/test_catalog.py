"""The catalog remembers, and losing it is never worse than losing history."""

from __future__ import annotations

import logging
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.old_catalog import SCHEMA_1
from vmfs_stub.catalog.catalog import SCHEMA_VERSION, Catalog
from vmfs_stub.core.errors import PrimaryIOError, UnknownFormat
from vmfs_stub.core.ids import JobId, VmId

VM = VmId("a" * 32)
JOB = JobId("b" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    opened = Catalog.open(path)
    yield opened
    opened.close()


def test_vms_keep_their_first_sight(catalog: Catalog) -> None:
    catalog.see_vms([(VM, "old")], now=1.0)
    catalog.see_vms([(VM, "new")], now=2.0)
    (vm,) = catalog.known_vms()
    assert (vm.id, vm.name, vm.first_seen, vm.last_seen) == (VM, "new", 1.0, 2.0)


def test_jobs_and_reports(catalog: Catalog) -> None:
    catalog.start_job(JOB, kind="backup", vms=["a"], caller_uid=0, now=1.0)
    (job,) = catalog.jobs(count_max=10)
    assert (job.state, job.vms, job.ended, job.report) == ("running", ("a",), None, None)
    catalog.end_job(JOB, state="failed", report={"n": 1}, error={"error": "InUse", "message": "m"}, now=2.0)
    (job,) = catalog.jobs(count_max=10)
    assert (job.state, job.ended, job.report, job.error) == (
        "failed",
        2.0,
        {"n": 1},
        {"error": "InUse", "message": "m"},
    )


def test_only_the_newest_jobs_are_kept(catalog: Catalog) -> None:
    ids = [JobId(f"{number:032x}") for number in range(6)]
    for number, job_id in enumerate(ids):
        catalog.start_job(job_id, kind="recall", vms=[], caller_uid=7, now=float(number))
        if number:
            catalog.end_job(job_id, state="done", report=None, error=None, now=9.0)
    catalog.forget_jobs(keep=2)
    assert [job.id for job in catalog.jobs(count_max=10)] == [ids[5], ids[4], ids[0]]
    assert [job.id for job in catalog.jobs(count_max=1)] == [ids[5]]
    assert catalog.job(ids[4]) == catalog.jobs(count_max=2)[1]
    assert catalog.job(ids[3]) is None


def test_a_restart_interrupts_what_was_running(path: Path) -> None:
    first = Catalog.open(path)
    first.start_job(JOB, kind="backup", vms=[], caller_uid=0, now=1.0)
    first.close()
    second = Catalog.open(path)
    assert [job.state for job in second.jobs(count_max=1)] == ["interrupted"]
    second.close()


def test_accesses(catalog: Catalog) -> None:
    catalog.record_access(VM, "disk.raw", executable="/usr/bin/qemu", uid=64055, now=5.0)
    catalog.record_access(VM, "disk.raw", executable="/usr/bin/qemu", uid=64055, now=4.0)
    catalog.record_access(VM, "disk.raw", executable=None, uid=0, now=7.0)
    catalog.record_access(VM, "bad\udcff", executable=None, uid=0, now=6.0)
    assert [(a.disk, a.executable, a.uid, a.opened) for a in catalog.accesses(VM)] == [
        ("disk.raw", "", 0, 7.0),
        (r"bad\xff", "", 0, 6.0),
        ("disk.raw", "/usr/bin/qemu", 64055, 5.0),
    ]
    assert catalog.last_accesses() == {(VM, "disk.raw"): 7.0, (VM, r"bad\xff"): 6.0}


def test_access_rows_are_bounded(catalog: Catalog) -> None:
    for number in range(100):
        catalog.record_access(VM, "d", executable=f"/x{number}", uid=0, now=float(number))
    kept = catalog.accesses(VM)
    assert len(kept) == 32
    assert kept[0].executable == "/x99"


def test_it_is_private_and_used_from_many_threads(catalog: Catalog, path: Path) -> None:
    def use(number: int) -> None:
        for turn in range(20):
            catalog.record_access(VM, f"d{number}", executable="/x", uid=0, now=float(turn))
            catalog.last_accesses()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert catalog.last_accesses() == {(VM, f"d{number}"): 19.0 for number in range(4)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["garbage", "torn page"])
def test_a_damaged_catalog_is_set_aside(path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = Catalog.open(path)
    for number in range(200):
        first.record_access(VM, f"disk-{number}" * 20, executable="/x", uid=0, now=1.0)
    first.close()
    content = bytearray(path.read_bytes())
    if damage == "garbage":
        content[:] = b"this is no database" * 100
    else:
        content[8192:12288] = b"\xa5" * 4096
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        second = Catalog.open(path)
    assert second.last_accesses() == {}
    second.close()
    assert (path.parent / "catalog.sqlite.damaged-1").read_bytes() == bytes(content)
    assert "is damaged" in caplog.text
    path.write_bytes(b"again" * 1000)
    Catalog.open(path).close()
    assert (path.parent / "catalog.sqlite.damaged-2").exists()


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE vms (x)",
        "CREATE TABLE jobs (id, state CHECK (state = 'running')); INSERT INTO jobs VALUES (1, 'running')",
    ],
)
def test_a_catalog_with_other_tables_is_set_aside(path: Path, script: str) -> None:
    """It would fail at every start otherwise, and history would be kept in memory for ever."""
    connection = sqlite3.connect(path)
    connection.executescript(f"{script}; PRAGMA user_version = 1")
    connection.close()
    catalog = Catalog.open(path)
    catalog.see_vms([(VM, "web")], now=1.0)
    catalog.close()
    assert path.with_name("catalog.sqlite.damaged-1").exists()


def test_a_catalog_whose_error_is_no_text_is_set_aside(path: Path) -> None:
    """SQLite's message quotes what is damaged."""
    Catalog.open(path).close()
    content = bytearray(path.read_bytes())
    at = content.index(b"CREATE TABLE vms")
    content[at : at + 16] = b"CREATE T\xff\xffLE vms"
    path.write_bytes(content)
    with pytest.raises(UnicodeDecodeError):
        sqlite3.connect(path).execute("SELECT * FROM vms")
    Catalog.open(path).close()
    assert path.with_name("catalog.sqlite.damaged-1").read_bytes() == bytes(content)


def test_a_job_that_is_no_job_is_an_error_in_words(catalog: Catalog, path: Path) -> None:
    catalog.start_job(JobId("1" * 32), kind="backup", vms=["a"], caller_uid=0, now=1.0)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE jobs SET vms = '5'")
    connection.close()
    with pytest.raises(PrimaryIOError, match="a job in the catalog"):
        catalog.jobs(count_max=1)


def test_a_newer_catalog_is_not_touched(path: Path) -> None:
    Catalog.open(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(UnknownFormat, match="schema 99"):
        Catalog.open(path)


def test_failures_are_translated(path: Path, tmp_path: Path) -> None:
    with pytest.raises(PrimaryIOError, match="cannot be opened"):
        Catalog.open(tmp_path / "missing" / "catalog.sqlite")
    catalog = Catalog.open(path)
    catalog.close()
    with pytest.raises(PrimaryIOError, match="closed"):
        catalog.known_vms()


def test_one_in_memory_works_alike() -> None:
    catalog = Catalog.in_memory()
    catalog.see_vms([(VmId("1" * 32), "vm")], now=1.0)
    assert [known.name for known in catalog.known_vms()] == ["vm"]
    catalog.close()


def test_the_newest_point_of_a_vm_only_goes_forward(catalog: Catalog) -> None:
    other = VmId("c" * 32)
    catalog.see_vms([(VM, "web"), (other, "db")], now=1.0)
    assert catalog.points_seen() == {}
    for made_s in (10.0, 9.0, 11.0, 10.5):
        catalog.record_point(VM, made_s)
    catalog.see_vms([(VM, "web")], now=20.0)
    catalog.record_point(VmId("d" * 32), 1.0)  # nobody has met it: there is no row
    assert catalog.points_seen() == {VM: 11.0}
    assert [(vm.name, vm.last_point) for vm in catalog.known_vms()] == [("db", None), ("web", 11.0)]


def test_the_last_job_that_was_done(catalog: Catalog) -> None:
    kinds = ("backup", "archive")
    assert catalog.last_done(kinds) is None
    ends = [("backup", "done", 5.0), ("archive", "done", 7.0), ("backup", "failed", 9.0), ("recall", "done", 11.0)]
    for number, (kind, state, ended) in enumerate(ends):
        job_id = JobId(f"{number:032x}")
        catalog.start_job(job_id, kind=kind, vms=[], caller_uid=0, now=1.0)
        catalog.end_job(job_id, state=state, report=None, error=None, now=ended)
    assert catalog.last_done(kinds) == 7.0
    assert catalog.last_done(("backup",)) == 5.0


def test_free_space_is_kept_for_a_while(catalog: Catalog) -> None:
    for hour in range(10):
        catalog.record_free_space(1000 - hour, now=hour * 3600.0, oldest=(hour - 4) * 3600.0)
    assert [(each.at_s / 3600, each.free_bytes) for each in catalog.free_space()] == [
        (hour, 1000 - hour) for hour in range(5, 10)
    ]
    catalog.record_free_space(1, now=7 * 3600.0, oldest=0.0)  # the clock was set back
    assert [each.at_s / 3600 for each in catalog.free_space()] == [5, 6, 7]


def test_a_new_catalog_is_to_be_rebuilt_until_it_is(path: Path) -> None:
    first = Catalog.open(path)
    assert (first.is_new, first.was_damaged, first.is_rebuild_due) == (True, False, True)
    first.close()
    second = Catalog.open(path)
    assert (second.is_new, second.is_rebuild_due) == (False, True), "the daemon ended before it was rebuilt"
    second.rebuilt()
    second.close()
    third = Catalog.open(path)
    assert (third.is_new, third.is_rebuild_due) == (False, False)
    third.close()
    path.write_bytes(b"this is no database" * 100)
    fourth = Catalog.open(path)
    assert (fourth.is_new, fourth.was_damaged, fourth.is_rebuild_due) == (True, True, True)
    fourth.close()


def described(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every table with its columns."""
    connection = sqlite3.connect(path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {name: connection.execute(f"PRAGMA table_info({name})").fetchall() for name in sorted(tables)}
    found["version"] = [connection.execute("PRAGMA user_version").fetchone()]
    connection.close()
    return found


def test_an_older_catalog_is_brought_to_this_version(path: Path, tmp_path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA_1)
    with connection:
        connection.execute("INSERT INTO vms VALUES (?, 'web', 1.0, 2.0)", (VM,))
        connection.execute("INSERT INTO jobs VALUES (?, 'backup', 'done', '[]', 0, 1.0, 3.0, NULL, NULL)", (JOB,))
    connection.close()
    catalog = Catalog.open(path)
    assert (catalog.is_new, catalog.is_rebuild_due) == (False, True)
    assert [(vm.name, vm.last_point) for vm in catalog.known_vms()] == [("web", None)]
    assert catalog.last_done(("backup",)) == 3.0
    other = JobId("c" * 32)
    catalog.start_job(other, kind="backup", vms=[], caller_uid=0, now=3.0)
    catalog.end_job(other, state="cancelled", report={}, error=None, now=4.0)
    assert [(job.id, job.state) for job in catalog.jobs(count_max=9)] == [(other, "cancelled"), (JOB, "done")]
    catalog.close()
    Catalog.open(tmp_path / "fresh.sqlite").close()
    assert described(path) == described(tmp_path / "fresh.sqlite")
    assert described(path)["version"] == [(SCHEMA_VERSION,)]


def test_a_catalog_of_version_2_keeps_points_and_what_is_due(path: Path, tmp_path: Path) -> None:
    catalog = Catalog.open(path)
    catalog.see_vms([(VM, "web")], now=1.0)
    catalog.record_point(VM, 5.0)
    catalog.close()
    connection = sqlite3.connect(path)
    for column in ("last_archived", "last_recalled"):
        connection.execute(f"ALTER TABLE vms ADD COLUMN {column} REAL")
    with connection:
        connection.execute("UPDATE vms SET last_archived = 5.0, last_recalled = 6.0")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    catalog = Catalog.open(path)
    assert (catalog.was_damaged, catalog.is_rebuild_due, catalog.points_seen()) == (False, True, {VM: 5.0})
    catalog.close()
    Catalog.open(tmp_path / "fresh.sqlite").close()
    assert described(path) == described(tmp_path / "fresh.sqlite")


def test_a_step_that_fails_leaves_the_earlier_catalog(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA_1)
    connection.execute("INSERT INTO jobs VALUES (?, 'backup', 'done', '[\"a\"]', 0, 1, 2, '{}', NULL)", (JOB,))
    connection.execute("CREATE TABLE jobs_new (id)")  # nobody's, and in the way
    connection.commit()
    connection.close()
    Catalog.open(path).close()
    (aside,) = path.parent.glob("*.damaged-1")
    kept = sqlite3.connect(aside)
    assert kept.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
    assert kept.execute("PRAGMA user_version").fetchone() == (1,)
    kept.close()
