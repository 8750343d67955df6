"""The chunk index: which chunks are stored already, and where.

Purpose: dedup.  A SQLite file private to one host and one daemon, a cache of the store's ``index/`` objects: losing
it, or any row of it, costs time or room, never data.  SQLite bounds the memory at any size of store.

Invariants: a row that does not match its own checksum is never used (the file is then rebuilt); a pack that is not in
``packs`` is never handed out, so forgetting a pack is one row.  What is handed out is a claim, not a proof: a commit
checks that every pack is still there.  Packs of jobs that were cut short, and never published an index object, are used
by the next one, so that nothing is stored twice; once after a start it is seen that they are there still.

This module must not know frames' contents.
"""

from __future__ import annotations

import logging
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from xxhash import xxh3_64_intdigest

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptStoreObject, NoSpace, ObjectMissing, PrimaryIOError, UnknownFormat
from vmfs_stub.core.ids import ChunkId, PackId, StoreId
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.store.cache_file import FILE_SUFFIXES, is_damage, open_cache
from vmfs_stub.store.format import INDEX_SIZE_MAX
from vmfs_stub.store.index_objects import decode_index
from vmfs_stub.store.keys import INDEX, is_id, pack_key
from vmfs_stub.store.objects import ObjectStore, exists
from vmfs_stub.store.quarantine import quarantined_packs

T = TypeVar("T")
log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE objects (                                       -- index objects of the store that are in here
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE);
CREATE TABLE packs (                                         -- packs that may be handed out
    number INTEGER PRIMARY KEY AUTOINCREMENT,                -- never used again, so old rows of chunks stay void
    id TEXT NOT NULL UNIQUE,
    object INTEGER);                                         -- index object that lists it; NULL: not published
CREATE INDEX packs_by_object ON packs (object);
CREATE TABLE chunks (                                        -- one place per chunk; void when its pack is gone
    id BLOB PRIMARY KEY,                                     -- 32 bytes
    pack INTEGER NOT NULL,
    place BLOB NOT NULL                                      -- offset, length, raw length, checksum, check of the row
) WITHOUT ROWID;
"""
_PLACE = struct.Struct("<III16sQ")
_CHECKED = struct.Struct("<32s16sIII16s")
_LOOKUP_MAX: Final = 500
"""Chunks per query: below SQLite's smallest limit of parameters."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync did; ``damaged`` index objects were skipped (their chunks are stored again when met).

    ``quarantined`` are all packs that the store has a mark of: none of them is handed out.
    """

    added: int
    removed: int
    damaged: tuple[str, ...]
    quarantined: frozenset[PackId]


class _Damaged(Exception):
    """A row that does not match its checksum."""


class ChunkIndex:
    """Thread-safe; one per host and store.  ``path`` None keeps it in memory.

    With ``on_lost``, a file that cannot be used (no room, say) is told to that instead of raised, and nothing is known
    of the store until a sync finds that it can be used again, which ``on_regained`` is told: meanwhile less is
    deduplicated, and every backup still works.
    """

    def __init__(
        self,
        path: Path | None,
        store_id: StoreId,
        *,
        files: FileCalls = PLAIN,
        on_lost: Callable[[NoSpace | PrimaryIOError], None] | None = None,
        on_regained: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the file, or make it afresh when it is missing, damaged or another store's.

        Raises: PrimaryIOError, NoSpace.
        """
        self._files = files
        self._path = path
        self._store_id = store_id
        self._on_lost = on_lost
        self._on_regained = on_regained
        self._stands_in = False
        """An empty index in memory stands in for the file."""
        self._closed = False
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._has_looked_for_unpublished = False
        nothing: set[str] = set()
        with self._lock:
            self._guarded(_known_objects, nothing)

    def close(self) -> None:
        """Close the file for good: a thread that comes late must not open it beside the next daemon."""
        with self._lock:
            self._closed = True
            self._let_go()

    def _let_go(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def lookup(self, ids: Sequence[ChunkId]) -> dict[ChunkId, FrameRef]:
        """Where those of the chunks lie that are known.

        Raises: PrimaryIOError.
        """
        found: dict[ChunkId, FrameRef] = {}

        def query(database: sqlite3.Connection) -> dict[ChunkId, FrameRef]:
            for start in range(0, len(ids), _LOOKUP_MAX):
                part = ids[start : start + _LOOKUP_MAX]
                marks = ",".join("?" * len(part))
                rows = database.execute(
                    "SELECT c.id, p.id, c.place FROM chunks c JOIN packs p ON p.number = c.pack "
                    f"WHERE c.id IN ({marks})",
                    part,
                )
                for row in rows:
                    ref = _ref(*row)
                    found[ref.chunk_id] = ref
            return found

        with self._lock:
            return self._guarded(query, {})

    def add(self, pack_id: PackId, refs: Sequence[FrameRef]) -> None:
        """Enter a pack that is durable in the store.

        Raises: PrimaryIOError, NoSpace.
        """
        with self._lock:
            self._guarded(partial(_insert, packs=[(pack_id, refs)], key=None), None)

    def forget_packs(self, pack_ids: Iterable[PackId]) -> None:
        """Never hand out these packs again (they are gone or condemned)."""
        with self._lock:
            self._guarded(partial(_forget, pack_ids=list(pack_ids)), None)

    def sync(self, objects: ObjectStore) -> SyncReport:
        """Bring the file up to date with the store's ``index/``, by listing it and reading what is new.

        Packs that are in quarantine are forgotten, and are not entered again.

        Raises: StoreUnavailable, StoreDenied, PrimaryIOError, NoSpace.
        """
        quarantined = quarantined_packs(objects)
        with self._lock:
            is_usable = not self._stands_in or self._took_up_file()
            self._guarded(partial(_forget, pack_ids=list(quarantined)), None)
            if not is_usable:
                return SyncReport(0, 0, (), quarantined)
        if not self._has_looked_for_unpublished:
            self._look_for_unpublished(objects)
        listed = {info.key for info in objects.list(INDEX)}
        nothing: set[str] = set()
        with self._lock:
            known = self._guarded(_known_objects, nothing)
            for key in known - listed:
                self._guarded(partial(_drop_object, key=key), None)
        added = 0
        damaged: list[str] = []
        for key in sorted(listed - known):
            if self._stands_in:
                break  # it is small, and not for all that is in a store
            try:
                packs = decode_index(objects.get(key, size_max=INDEX_SIZE_MAX), key)
            except ObjectMissing:
                continue  # removed since the listing
            except (CorruptStoreObject, UnknownFormat) as exc:
                log.warning("index object skipped, its chunks are stored again when met: %s", exc)
                damaged.append(key)
                continue
            with self._lock:
                sound = [(pack_id, refs) for pack_id, refs in packs if pack_id not in quarantined]
                self._guarded(partial(_insert, packs=sound, key=key), None)
            added += 1
        return SyncReport(added, len(known - listed), tuple(damaged), quarantined)

    def _look_for_unpublished(self, objects: ObjectStore) -> None:
        nothing: list[PackId] = []
        with self._lock:
            unpublished = self._guarded(_unpublished, nothing)
        gone = [pack_id for pack_id in unpublished if not exists(objects, pack_key(pack_id))]
        with self._lock:
            self._guarded(partial(_forget, pack_ids=gone), None)
        self._has_looked_for_unpublished = True

    def _guarded(self, action: Callable[[sqlite3.Connection], T], rebuilt: T) -> T:
        """Run ``action`` in a transaction; a damaged file is made afresh, and the answer is ``rebuilt``."""
        try:
            database = self._opened()
            return self._files.call("index.use", _transact, database, action)
        except (sqlite3.Error, _Damaged, UnicodeDecodeError) as exc:
            if not _is_damage(exc):
                error = _foreign(exc, self._path)
                if self._on_lost is None or self._stands_in:
                    raise error from exc
                self._on_lost(error)
                self._let_go()
                self._database, self._stands_in = self._open(in_memory=True), True
                return rebuilt
            log.warning("chunk index %s is damaged (%s): it is made afresh", self._path, exc)
        self._remove()
        try:
            self._opened()
        except sqlite3.Error as exc:
            raise _foreign(exc, self._path) from exc
        return rebuilt

    def _check_open(self) -> None:
        if self._closed:
            raise PrimaryIOError(f"chunk index {self._path}: is closed, as the daemon ends")

    def _took_up_file(self) -> bool:
        self._check_open()
        try:
            database = self._open(in_memory=False)
        except (sqlite3.Error, _Damaged, UnicodeDecodeError):
            return False
        self._let_go()
        self._database, self._stands_in = database, False
        self._on_regained()
        return True

    def _opened(self) -> sqlite3.Connection:
        self._check_open()
        if self._database is None:
            self._database = self._open(in_memory=self._stands_in)
        return self._database

    def _remove(self) -> None:
        self._let_go()
        if self._path is not None and not self._stands_in:
            for suffix in FILE_SUFFIXES:
                self._files.call("index.remove", self._path.with_name(self._path.name + suffix).unlink, missing_ok=True)

    def _open(self, *, in_memory: bool) -> sqlite3.Connection:
        path = None if in_memory else self._path
        return self._files.call("index.open", open_cache, path, self._store_id, schema=_SCHEMA, version=SCHEMA_VERSION)


def _transact(database: sqlite3.Connection, action: Callable[[sqlite3.Connection], T]) -> T:
    with database:
        return action(database)


def _insert(database: sqlite3.Connection, packs: Iterable[tuple[PackId, Sequence[FrameRef]]], key: str | None) -> None:
    number: int | None = None
    if key is not None:
        if database.execute("SELECT 1 FROM objects WHERE key = ?", (key,)).fetchone() is not None:
            return  # another job has read it meanwhile
        number = database.execute("INSERT INTO objects (key) VALUES (?)", (key,)).lastrowid
    for pack_id, refs in packs:
        if database.execute("UPDATE packs SET object = ? WHERE id = ?", (number, pack_id)).rowcount:
            continue
        pack = database.execute("INSERT INTO packs (id, object) VALUES (?, ?)", (pack_id, number)).lastrowid
        database.executemany(
            "INSERT INTO chunks VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET pack = excluded.pack, "
            "place = excluded.place WHERE pack NOT IN (SELECT number FROM packs)",
            ((ref.chunk_id, pack, _place(ref)) for ref in refs),
        )


def _forget(database: sqlite3.Connection, pack_ids: Sequence[PackId]) -> None:
    """Not by the table's index: with a damaged one a row may not be found there, and yet be handed out."""
    for start in range(0, len(pack_ids), _LOOKUP_MAX):
        part = pack_ids[start : start + _LOOKUP_MAX]
        database.execute(f"DELETE FROM packs NOT INDEXED WHERE id IN ({','.join('?' * len(part))})", part)


def _unpublished(database: sqlite3.Connection) -> list[PackId]:
    rows = database.execute("SELECT id FROM packs WHERE object IS NULL").fetchall()
    if not all(isinstance(pack_id, str) and is_id(pack_id) for (pack_id,) in rows):
        msg = "a pack's name is none"
        raise _Damaged(msg)
    return [PackId(pack_id) for (pack_id,) in rows]


def _known_objects(database: sqlite3.Connection) -> set[str]:
    return {key for (key,) in database.execute("SELECT key FROM objects")}


def _drop_object(database: sqlite3.Connection, key: str) -> None:
    database.execute("DELETE FROM packs NOT INDEXED WHERE object = (SELECT number FROM objects WHERE key = ?)", (key,))
    database.execute("DELETE FROM objects WHERE key = ?", (key,))


def _row_check(ref: FrameRef) -> int:
    return xxh3_64_intdigest(
        _CHECKED.pack(ref.chunk_id, bytes.fromhex(ref.pack_id), ref.offset, ref.length, ref.raw_length, ref.checksum)
    )


def _place(ref: FrameRef) -> bytes:
    return _PLACE.pack(ref.offset, ref.length, ref.raw_length, ref.checksum, _row_check(ref))


def _ref(chunk_id: bytes, pack_id: str, place: bytes) -> FrameRef:
    try:
        offset, length, raw_length, checksum, check = _PLACE.unpack(place)
        ref = FrameRef(ChunkId(chunk_id), PackId(pack_id), offset, length, raw_length, checksum)
        if _row_check(ref) == check:
            return ref
    except (struct.error, TypeError, ValueError):
        pass
    msg = "a row does not match its checksum"
    raise _Damaged(msg)


def _is_damage(exc: Exception) -> bool:
    return isinstance(exc, _Damaged) or is_damage(exc)


def _foreign(exc: Exception, path: Path | None) -> NoSpace | PrimaryIOError:
    if getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return NoSpace(f"chunk index {path}: no room left; free space on this filesystem")
    return PrimaryIOError(f"chunk index {path}: {exc}; it may be deleted, it is made afresh")
