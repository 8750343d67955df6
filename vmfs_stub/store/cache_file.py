"""SQLite files in which a host keeps what one store says.  Each may be deleted at any time, and is then made afresh.

SQLite bounds the memory at any size of store.  This module must not know what is kept.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.ids import StoreId

FILE_SUFFIXES: Final = ("", "-wal", "-shm", "-journal")
"""Of all files of one database."""
_STORE: Final = "CREATE TABLE store (id TEXT NOT NULL)"
"""One row: the store that this is a cache of."""
_CACHE_KIB: Final = 16 * 1024


class OtherCache(sqlite3.DatabaseError):
    """The file is whole, and belongs to another store or version."""


def open_cache(
    path: Path | None, store_id: StoreId, *, schema: str, version: int, alone: bool = False
) -> sqlite3.Connection:
    """Open the file, or make it where there is none; None keeps it in memory.  For use under a lock of the caller's.

    ``alone``: no other process may use it until it is closed; when one does, that is an error at once.
    Raises: OtherCache, sqlite3.Error.
    """
    timeout_s = 0.0 if alone else 30.0
    database = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False, timeout=timeout_s)
    try:
        if alone:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        database.execute("PRAGMA temp_store = FILE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        found = database.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            database.executescript(f"{_STORE};{schema}")
            with database:
                database.execute("INSERT INTO store VALUES (?)", (store_id,))
                database.execute(f"PRAGMA user_version = {version}")
        elif found != version or database.execute("SELECT id FROM store").fetchall() != [(store_id,)]:
            raise OtherCache("it belongs to another store or version")
        if alone:
            database.execute("BEGIN EXCLUSIVE")
            database.commit()
    except BaseException:
        database.close()
        raise
    return database


def open_or_remake(
    path: Path | None, store_id: StoreId, *, schema: str, version: int, alone: bool = False
) -> sqlite3.Connection:
    """The same, for a command; a file that is damaged or another store's is made afresh.  Raises: PrimaryIOError."""
    try:
        try:
            return open_cache(path, store_id, schema=schema, version=version, alone=alone)
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            if path is None or not is_damage(exc):
                raise
            remove(path)
            return open_cache(path, store_id, schema=schema, version=version, alone=alone)
    except (sqlite3.Error, OSError) as exc:
        raise unusable(path, exc) from exc


def remove(path: Path) -> None:
    """Remove all files of a database that nobody uses.  Raises: OSError."""
    for suffix in FILE_SUFFIXES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def is_damage(exc: Exception) -> bool:
    """Whether the file is to be made afresh; else it is whole, and cannot be used now."""
    if isinstance(exc, (OtherCache, UnicodeDecodeError)):  # the last, where a message quotes what is damaged
        return True
    code = getattr(exc, "sqlite_errorcode", None)
    if code is None:  # of the module, not of SQLite: a text that is none
        return isinstance(exc, (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.OperationalError))
    primary = code & 0xFF
    return primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR)


def unusable(path: Path | None, exc: Exception) -> PrimaryIOError:
    """What is said of a file that cannot be used."""
    return PrimaryIOError(f"{path}: cannot be used ({exc}); it may be deleted, it is made afresh")
