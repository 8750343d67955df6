"""The catalog remembers, and losing it is never worse than losing history."""

from __future__ import annotations

import logging
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmfs_stub.catalog.catalog import Catalog
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


VERSION_1 = """
PRAGMA user_version = 1;
CREATE TABLE vms (
    id TEXT PRIMARY KEY CHECK (length(id) = 32), name TEXT NOT NULL, first_seen REAL NOT NULL, last_seen REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY CHECK (length(id) = 32), kind TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted')),
    vms TEXT NOT NULL CHECK (json_valid(vms)), caller_uid INTEGER NOT NULL, started REAL NOT NULL, ended REAL,
    report TEXT CHECK (report IS NULL OR json_valid(report)), error TEXT CHECK (error IS NULL OR json_valid(error))
) STRICT, WITHOUT ROWID;
CREATE INDEX jobs_by_start ON jobs (started DESC);
CREATE TABLE access (
    vm TEXT NOT NULL CHECK (length(vm) = 32), disk TEXT NOT NULL, executable TEXT NOT NULL, uid INTEGER NOT NULL,
    opened REAL NOT NULL, PRIMARY KEY (vm, disk, executable, uid)
) STRICT, WITHOUT ROWID;
"""


def of_version_1(path: Path) -> None:
    """As the first version wrote it, with a job, a VM and an access."""
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1)
    with connection:
        connection.execute("INSERT INTO vms VALUES (?, 'web', 1, 2)", (VM,))
        connection.execute("INSERT INTO jobs VALUES (?, 'backup', 'done', '[\"a\"]', 0, 1, 2, '{}', NULL)", (JOB,))
        connection.execute("INSERT INTO access VALUES (?, 'd', '', 0, 5)", (VM,))
    connection.close()


def columns(path: Path) -> dict[str, list[tuple[object, ...]]]:
    connection = sqlite3.connect(path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema ORDER BY name")]
    found = {name: connection.execute("SELECT * FROM pragma_table_xinfo(?)", (name,)).fetchall() for name in tables}
    connection.close()
    return found


def test_an_earlier_catalog_is_taken_over_with_all_that_it_knows(path: Path, tmp_path: Path) -> None:
    of_version_1(path)
    catalog = Catalog.open(path)
    other = JobId("c" * 32)
    catalog.start_job(other, kind="backup", vms=[], caller_uid=0, now=3.0)
    catalog.end_job(other, state="cancelled", report={}, error=None, now=4.0)
    assert [(job.id, job.state, job.vms) for job in catalog.jobs(count_max=9)] == [
        (other, "cancelled", ()),
        (JOB, "done", ("a",)),
    ]
    assert [vm.name for vm in catalog.known_vms()] == ["web"]
    assert [access.disk for access in catalog.accesses(VM)] == ["d"]
    catalog.close()
    Catalog.open(tmp_path / "new").close()
    assert columns(path) == columns(tmp_path / "new")
    assert list(path.parent.glob("*.damaged-*")) == []


def test_a_step_that_fails_leaves_the_earlier_catalog(path: Path) -> None:
    of_version_1(path)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE jobs_new (id)")  # nobody's, and in the way
    connection.commit()
    connection.close()
    Catalog.open(path).close()
    (aside,) = path.parent.glob("*.damaged-1")
    kept = sqlite3.connect(aside)
    assert kept.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
    assert kept.execute("PRAGMA user_version").fetchone() == (1,)
    kept.close()
