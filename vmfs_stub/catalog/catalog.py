"""The catalog: VMs, jobs, accesses and usage in one SQLite database; schema.sql describes it.

Purpose: history and usage that outlive the daemon.  Nothing in it is needed to serve or recall a byte, so a damaged
catalog is set aside and begun anew rather than stopping the mount.  Blocking and thread-safe by a lock of its own;
one process writes it.  Must not know the clock: callers pass times, in seconds since the epoch.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from vmfs_stub.catalog import usage_rows
from vmfs_stub.catalog.migrations import MIGRATIONS
from vmfs_stub.catalog.usage_rows import LastUse
from vmfs_stub.core.errors import NoSpace, PrimaryIOError, UnknownFormat
from vmfs_stub.core.forecast import FreeSpace
from vmfs_stub.core.ids import JobId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.core.usage import HOUR_S, Reading, Sample

SCHEMA_VERSION = 3
_BUSY_TIMEOUT_S = 10.0
_ACCESS_ROWS_PER_DISK = 32
"""Executables and users remembered per disk: any user who may read a disk could otherwise add rows without end."""
_JOBS = "SELECT id, kind, state, vms, caller_uid, started, ended, report, error FROM jobs"

_DAMAGED = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_ERROR,  # the statements are right, so the tables are not
        sqlite3.SQLITE_SCHEMA,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_READONLY,  # the file says that it is of a later format; a filesystem's refusal comes again
    }
)

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownVm:
    """A VM that was met; times in seconds since the epoch, None where it is not known, or never was.

    ``last_point`` is when its newest restore point was made.
    """

    id: VmId
    name: str
    first_seen: float
    last_seen: float
    last_point: float | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job and how it ended; ``report`` and ``error`` are JSON objects."""

    id: JobId
    kind: str
    state: str
    vms: tuple[str, ...]
    caller_uid: int
    started: float
    ended: float | None
    report: dict[str, Any] | None
    error: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class Access:
    """The last open of a disk by one executable and user."""

    vm: VmId
    disk: str
    executable: str
    uid: int
    opened: float


class Catalog:
    """The open catalog; close it when the last user is gone.

    Attributes: ``is_new`` when it was not there, ``was_damaged`` when what was there was set aside.
    """

    def __init__(
        self, connection: sqlite3.Connection, path: Path, *, is_new: bool = False, was_damaged: bool = False
    ) -> None:
        self.is_new = is_new
        self.was_damaged = was_damaged
        self._connection = connection
        self._path = path
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, files: FileCalls = PLAIN) -> Catalog:
        """Open or create the catalog at ``path`` (0600); a damaged one is kept beside it under another name.

        Jobs that were running are marked interrupted.  Raises PrimaryIOError, NoSpace, UnknownFormat.
        """
        was_damaged = False
        with _translated(path):
            try:
                connection, is_new = files.call("catalog.open", _connect, path)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:
                if not _is_damage(exc):
                    raise
                aside = files.call("catalog.set_aside", _set_aside, path)
                log.warning("%s is damaged (%s): kept as %s, begun anew; usage history is lost", path, exc, aside)
                connection, is_new = files.call("catalog.open", _connect, path)
                was_damaged = True
        return cls(connection, path, is_new=is_new, was_damaged=was_damaged)

    @classmethod
    def in_memory(cls) -> Catalog:
        """A catalog that is forgotten with the daemon, for when there is no room for any other."""
        path = Path(":memory:")
        with _translated(path):
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            _prepare(connection, path)
        return cls(connection, path, is_new=True)

    def close(self) -> None:
        """Close the database; the object cannot be used afterwards."""
        with self._lock, _translated(self._path):
            self._connection.close()

    def see_vms(self, vms: Iterable[tuple[VmId, str]], *, now: float) -> None:
        """Record that these VMs (id, name) exist."""
        with self._write() as connection:
            connection.executemany(
                "INSERT INTO vms (id, name, first_seen, last_seen) VALUES (:id, :name, :now, :now) "
                "ON CONFLICT (id) DO UPDATE SET name = excluded.name, last_seen = excluded.last_seen",
                [{"id": vm_id, "name": name, "now": now} for vm_id, name in vms],
            )

    def known_vms(self) -> list[KnownVm]:
        """Every VM ever met, by name."""
        rows = self._read("SELECT id, name, first_seen, last_seen, last_point FROM vms ORDER BY name, id")
        return [KnownVm(VmId(row[0]), *row[1:]) for row in rows]

    def record_point(self, vm_id: VmId, made_s: float) -> None:
        """Record when a restore point was made of a VM that `see_vms` knows; an earlier one replaces no later one."""
        with self._write() as connection:
            connection.execute(
                "UPDATE vms SET last_point = max(coalesce(last_point, :made), :made) WHERE id = :id",
                {"id": vm_id, "made": made_s},
            )

    def points_seen(self) -> dict[VmId, float]:
        """When the newest known restore point of each VM that has one was made."""
        rows = self._read("SELECT id, last_point FROM vms WHERE last_point IS NOT NULL")
        return {VmId(row[0]): row[1] for row in rows}

    @property
    def is_rebuild_due(self) -> bool:
        """Whether facts about VMs are to be taken from store and primary: so it is until `rebuilt`."""
        return bool(self._read("SELECT 1 FROM due WHERE name = 'rebuild'"))

    def rebuilt(self) -> None:
        """All facts were taken."""
        with self._write() as connection:
            connection.execute("DELETE FROM due WHERE name = 'rebuild'")

    def last_done(self, kinds: Collection[str]) -> float | None:
        """When the last job of one of these kinds that was done came to its end."""
        marks = ", ".join("?" * len(kinds))
        query = f"SELECT max(ended) FROM jobs WHERE state = 'done' AND kind IN ({marks})"
        ((ended,),) = self._read(query, tuple(kinds))
        return None if ended is None else float(ended)

    def record_free_space(self, free_bytes: int, *, now: float, oldest: float) -> None:
        """Record how much of primary is free now; what was recorded before ``oldest`` is forgotten."""
        with self._write() as connection:
            connection.execute("INSERT OR REPLACE INTO free_space (at, free_bytes) VALUES (?, ?)", (now, free_bytes))
            # What a clock that was wrong left in the future would otherwise stay for ever.
            connection.execute("DELETE FROM free_space WHERE at < ? OR at > ?", (oldest, now))

    def free_space(self) -> list[FreeSpace]:
        """What was recorded, oldest first."""
        return [FreeSpace(*row) for row in self._read("SELECT at, free_bytes FROM free_space ORDER BY at")]

    def start_job(self, job_id: JobId, *, kind: str, vms: Sequence[str], caller_uid: int, now: float) -> None:
        """Record a job that begins."""
        with self._write() as connection:
            connection.execute(
                "INSERT INTO jobs (id, kind, state, vms, caller_uid, started) VALUES (?, ?, 'running', ?, ?, ?)",
                (job_id, kind, json.dumps(list(vms)), caller_uid, now),
            )

    def end_job(
        self,
        job_id: JobId,
        *,
        state: str,
        report: Mapping[str, Any] | None,
        error: Mapping[str, str] | None,
        now: float,
    ) -> None:
        """Record how a job ended; ``report`` and ``error`` must be JSON objects."""
        with self._write() as connection:
            connection.execute(
                "UPDATE jobs SET state = ?, ended = ?, report = ?, error = ? WHERE id = ?",
                (state, now, _dump(report), _dump(error), job_id),
            )

    def jobs(self, *, count_max: int) -> list[JobRecord]:
        """The newest ``count_max`` jobs, newest first."""
        rows = self._read(f"{_JOBS} ORDER BY started DESC, id LIMIT ?", (count_max,))
        return self._jobs_of(rows)

    def job(self, job_id: JobId) -> JobRecord | None:
        """One job; None when none of that id is remembered."""
        rows = self._read(f"{_JOBS} WHERE id = ?", (job_id,))
        return next(iter(self._jobs_of(rows)), None)

    def _jobs_of(self, rows: Iterable[Sequence[Any]]) -> list[JobRecord]:
        try:
            return [_job_of(row) for row in rows]
        except (ValueError, TypeError, RecursionError) as exc:
            raise PrimaryIOError(f"a job in the catalog {self._path} is damaged: {exc}") from exc

    def forget_jobs(self, *, keep: int) -> None:
        """Remove all but the newest ``keep`` jobs; running ones stay."""
        with self._write() as connection:
            connection.execute(
                "DELETE FROM jobs WHERE state != 'running' AND id NOT IN "
                "(SELECT id FROM jobs ORDER BY started DESC, id LIMIT ?)",
                (keep,),
            )

    def record_access(self, vm_id: VmId, disk: str, *, executable: str | None, uid: int, now: float) -> None:
        """Record an open of ``disk`` (path relative to the VM), which is kept, and read back, as it is shown."""
        with self._write() as connection:
            connection.execute(
                "INSERT INTO access (vm, disk, executable, uid, opened) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET opened = max(opened, excluded.opened)",
                (vm_id, printable(disk), printable(executable or ""), uid, now),
            )
            connection.execute(
                "DELETE FROM access WHERE vm = :vm AND disk = :disk AND (executable, uid) NOT IN (SELECT executable, "
                "uid FROM access WHERE vm = :vm AND disk = :disk ORDER BY opened DESC LIMIT :keep)",
                {"vm": vm_id, "disk": printable(disk), "keep": _ACCESS_ROWS_PER_DISK},
            )

    def accesses(self, vm_id: VmId) -> list[Access]:
        """Who opened the disks of a VM, latest first."""
        rows = self._read(
            "SELECT vm, disk, executable, uid, opened FROM access WHERE vm = ? ORDER BY opened DESC", (vm_id,)
        )
        return [Access(VmId(row[0]), *row[1:]) for row in rows]

    def last_accesses(self) -> dict[tuple[VmId, str], float]:
        """When each disk, by VM and relative path, was last opened by anybody."""
        rows = self._read("SELECT vm, disk, max(opened) FROM access GROUP BY vm, disk")
        return {(VmId(row[0]), row[1]): row[2] for row in rows}

    # Usage

    def add_samples(
        self,
        samples: Iterable[tuple[VmId, Sample]],
        *,
        readings: Mapping[str, Reading] | None = None,
        uses: Mapping[VmId, LastUse] | None = None,
    ) -> None:
        """Record samples, and with them, in one transaction, the newest readings by domain and last uses.

        Readings that are not given are forgotten; None leaves them as they are.  A sample that cannot be is left out.
        """
        with self._write() as connection:
            usage_rows.add_samples(connection, samples)
            usage_rows.record_uses(connection, uses or {})
            if readings is not None:
                usage_rows.set_readings(connection, readings)

    def samples(self, vm_id: VmId, *, since_s: float, until_s: float) -> list[Sample]:
        """The samples of a VM that reach into this time, in order; they never overlap."""
        parameters = {"vm": vm_id, "since": usage_rows.ms(since_s), "until": usage_rows.ms(until_s)}
        return self._usage(usage_rows.samples_of, usage_rows.SAMPLES, parameters).get(vm_id, [])

    def all_samples(self, since_s: float, *, resolution_s: float = HOUR_S) -> dict[VmId, list[Sample]]:
        """The samples of every VM that end after ``since_s``, in order; finer ones are merged to ``resolution_s``.

        Those in which a VM was off all the time are merged by the day.  A VM of which there are none is left out.
        """
        parameters = {"since": usage_rows.ms(since_s), "resolution": usage_rows.ms(resolution_s)}
        return self._usage(
            lambda rows: usage_rows.samples_of(usage_rows.without_repetition(rows)), usage_rows.ALL_SAMPLES, parameters
        )

    def readings(self) -> dict[str, Reading]:
        """What was last read of each domain, by its UUID."""
        return self._usage(usage_rows.readings_of, usage_rows.READINGS, {})

    def last_uses(self) -> dict[VmId, LastUse]:
        """When hypervisors last used each VM, as far as the mount saw it."""
        return self._usage(usage_rows.uses_of, usage_rows.USES, {})

    def roll_samples(self, now: float) -> None:
        """Merge samples that are old, and forget those that are too old; to be called about once an hour."""
        with self._write() as connection:
            usage_rows.roll_samples(connection, now)

    def forget_samples(self, *, after_s: float) -> None:
        """Remove samples that end after this time, and set later uses to it: a clock that is set back was wrong."""
        with self._write() as connection:
            usage_rows.forget_samples(connection, after_s)

    def _usage(self, read: Callable[[list[tuple[Any, ...]]], T], query: str, parameters: Mapping[str, Any]) -> T:
        try:
            return read(self._read(query, parameters))
        except (ValueError, TypeError, OverflowError) as exc:
            raise PrimaryIOError(f"what the catalog {self._path} knows of usage is damaged: {exc}") from exc

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated(self._path), self._connection:
            yield self._connection

    def _read(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _translated(self._path):
            return self._connection.execute(query, parameters).fetchall()


def _job_of(row: Sequence[Any]) -> JobRecord:
    return JobRecord(
        id=JobId(row[0]),
        kind=row[1],
        state=row[2],
        vms=tuple(json.loads(row[3])),
        caller_uid=row[4],
        started=row[5],
        ended=row[6],
        report=None if row[7] is None else json.loads(row[7]),
        error=None if row[8] is None else json.loads(row[8]),
    )


def _connect(path: Path) -> tuple[sqlite3.Connection, bool]:
    """The database, and whether it was made just now."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        is_new = _prepare(connection, path)
        with connection:
            connection.execute("UPDATE jobs SET state = 'interrupted' WHERE state = 'running'")
    except BaseException:
        connection.close()
        raise
    return connection, is_new


def _prepare(connection: sqlite3.Connection, path: Path) -> bool:
    """Check the database, and bring it to this version; whether it was empty."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    (check,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if check != "ok":
        damage = sqlite3.DatabaseError(check)
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not 0 <= version <= SCHEMA_VERSION:
        raise UnknownFormat(
            f"{path} was written by another version (schema {version}, this one knows {SCHEMA_VERSION}); upgrade "
            "vmfs-stub, or move the file away to begin a new catalog"
        )
    if version < SCHEMA_VERSION:
        steps = [MIGRATIONS[number] for number in range(max(1, version), SCHEMA_VERSION) if version]
        schema = resources.files("vmfs_stub.catalog").joinpath("schema.sql").read_text(encoding="utf-8")
        connection.executescript("\n".join(("BEGIN;", *steps, schema, "COMMIT;")))
    return bool(version == 0)


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as exc:  # the latter, where a message quotes what is damaged
        if _code(exc) == sqlite3.SQLITE_FULL:
            raise NoSpace(f"no space left to write the catalog {path}") from exc
        raise PrimaryIOError(f"the catalog {path} failed: {exc}; it is checked when the daemon starts") from exc
    except OSError as exc:
        raise PrimaryIOError(
            f"the catalog {path} cannot be opened: {exc.strerror}; check it, then start again"
        ) from exc


def _is_damage(error: Exception) -> bool:
    return isinstance(error, UnicodeDecodeError) or _code(error) in _DAMAGED


def _code(error: Exception) -> int:
    """Primary result code; extended codes carry more in the upper bits."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _dump(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(dict(value))
