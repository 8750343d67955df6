"""The catalog: VMs, jobs and accesses in one SQLite database; schema.sql describes it.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vmfs_stub.catalog.migrations import MIGRATIONS
from vmfs_stub.core.errors import NoSpace, PrimaryIOError, UnknownFormat
from vmfs_stub.core.ids import JobId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.core.sites import PLAIN, FileCalls

SCHEMA_VERSION = 2
_BUSY_TIMEOUT_S = 10.0
_ACCESS_ROWS_PER_DISK = 32
"""Executables and users remembered per disk: any user who may read a disk could otherwise add rows without end."""

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

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownVm:
    """A VM that was met; times in seconds since the epoch."""

    id: VmId
    name: str
    first_seen: float
    last_seen: float


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
    """The open catalog; close it when the last user is gone."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, files: FileCalls = PLAIN) -> Catalog:
        """Open or create the catalog at ``path`` (0600); a damaged one is kept beside it under another name.

        Jobs that were running are marked interrupted.  Raises PrimaryIOError, NoSpace, UnknownFormat.
        """
        with _translated(path):
            try:
                connection = files.call("catalog.open", _connect, path)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:
                if not _is_damage(exc):
                    raise
                aside = files.call("catalog.set_aside", _set_aside, path)
                log.warning("%s is damaged (%s): kept as %s, begun anew; usage history is lost", path, exc, aside)
                connection = files.call("catalog.open", _connect, path)
        return cls(connection, path)

    @classmethod
    def in_memory(cls) -> Catalog:
        """A catalog that is forgotten with the daemon, for when there is no room for any other."""
        path = Path(":memory:")
        with _translated(path):
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            _prepare(connection, path)
        return cls(connection, path)

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
        rows = self._read("SELECT id, name, first_seen, last_seen FROM vms ORDER BY name, id")
        return [KnownVm(VmId(row[0]), *row[1:]) for row in rows]

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
        rows = self._read(
            "SELECT id, kind, state, vms, caller_uid, started, ended, report, error FROM jobs "
            "ORDER BY started DESC, id LIMIT ?",
            (count_max,),
        )
        return self._jobs_of(rows)

    def job(self, job_id: JobId) -> JobRecord | None:
        """One job; None when none of that id is remembered."""
        rows = self._read(
            "SELECT id, kind, state, vms, caller_uid, started, ended, report, error FROM jobs WHERE id = ?", (job_id,)
        )
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

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated(self._path), self._connection:
            yield self._connection

    def _read(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
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


def _connect(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        _prepare(connection, path)
        with connection:
            connection.execute("UPDATE jobs SET state = 'interrupted' WHERE state = 'running'")
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    (check,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if check != "ok":
        damage = sqlite3.DatabaseError(check)
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        schema = resources.files("vmfs_stub.catalog").joinpath("schema.sql").read_text(encoding="utf-8")
        connection.executescript(f"BEGIN;\n{schema}\nCOMMIT;")
    elif version in MIGRATIONS:
        steps = "\n".join(MIGRATIONS[step] for step in range(version, SCHEMA_VERSION))
        connection.executescript(f"BEGIN IMMEDIATE;\n{steps}\nPRAGMA user_version = {SCHEMA_VERSION};\nCOMMIT;")
    elif version != SCHEMA_VERSION:
        raise UnknownFormat(
            f"{path} was written by another version (schema {version}, this one knows {SCHEMA_VERSION}); upgrade "
            "vmfs-stub, or move the file away to begin a new catalog"
        )


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
