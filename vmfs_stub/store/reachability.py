"""Which packs and segments the manifests of a store need.

Manifests and segments never change, so what they name is kept in a SQLite file from one time to the next, and a look at
a large store costs little more than a listing.  What is kept is believed only with its checksum, since what is needed
and not known to be would be deleted.  Memory is bounded at any size of store.  Blocking; one user at a time.
"""

from __future__ import annotations

import logging
import sqlite3
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final

from xxhash import xxh3_128_digest

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptStoreObject, ObjectMissing, PointNotFound, PrimaryIOError, UnknownFormat
from vmfs_stub.core.ids import PackId, SegmentId, StoreId
from vmfs_stub.store.cache_file import is_damage, open_or_remake, remove, unusable
from vmfs_stub.store.format import DOCUMENT_SIZE_MAX, INDEX_SIZE_MAX, MANIFEST_SIZE_MAX, PACK_SIZE_MAX, SEGMENT_SIZE_MAX
from vmfs_stub.store.index_objects import decode_index
from vmfs_stub.store.keys import MOVED, PENDING_SUFFIX, SEGMENTS, is_id, segment_key
from vmfs_stub.store.manifest import decode_manifest
from vmfs_stub.store.moved import decode_moved
from vmfs_stub.store.objects import ObjectStore, exists
from vmfs_stub.store.sealing import PLAIN, Sealing
from vmfs_stub.store.segments import Segment

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 2
_SCHEMA: Final = """
CREATE TABLE objects (                      -- manifests, segments and index objects
    key TEXT PRIMARY KEY,
    named BLOB NOT NULL,                    -- segments, or packs, one behind the other; of a segment with their use
    digest BLOB NOT NULL                    -- of the key and these
) WITHOUT ROWID;
"""
_LOOK: Final = """
CREATE TEMP TABLE IF NOT EXISTS segments (id BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS packs (
    id BLOB PRIMARY KEY,
    used INTEGER NOT NULL,                  -- bytes of it that one segment at least refers to
    is_moved INTEGER NOT NULL DEFAULT 0     -- some of its frames are elsewhere
) WITHOUT ROWID;
DELETE FROM temp.segments;
DELETE FROM temp.packs;
"""
_SEGMENT_BYTES: Final = 40
_PACK_BYTES: Final = 16
_USE: Final = struct.Struct(">16sQ")
"""A pack, and how many bytes of it a segment refers to."""
ALL_USED: Final = PACK_SIZE_MAX
"""The use of a pack that is not to be repacked, whatever points need of it: frames that were moved once are not moved
again, since readers follow a few moves at most, and of many documents about one pack they read a few."""
MOVED_BEFORE_MAX: Final = 8
"""Documents about a pack that may be repacked: of runs that were cut short; fewer than a reader tries places."""
_BATCH: Final = 256


class Reachability:
    """`look` finds out what some manifests need, `has_pack` and `has_segment` tell it."""

    def __init__(
        self,
        path: Path | None,
        store_id: StoreId,
        objects: ObjectStore,
        *,
        sealing: Sealing = PLAIN,
        workers: int = 16,
    ) -> None:
        """Open the file, or make it afresh when it is missing, damaged or another store's; None keeps it in memory.

        So does one that cannot be used, or that another process uses.
        """
        self._objects = objects
        self._store_id = store_id
        self._sealing = sealing
        self._workers = workers
        self._path = path
        try:
            self._database = open_or_remake(path, store_id, schema=_SCHEMA, version=SCHEMA_VERSION, alone=True)
        except PrimaryIOError as exc:
            log.warning("%s; does another garbage collection run here?  This one keeps what it finds in memory", exc)
            self._stand_in()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def look(self, keys: Collection[str]) -> None:
        """Find out what the manifests of these keys need, pending ones included; one that is gone needs nothing.

        Where frames of a needed pack were moved to is needed, too, all of it.  A file that fails is done without.
        Raises: IntegrityError kinds (also of a document that says so), UnknownFormat, ObjectMissing (of a segment),
        StoreUnavailable, StoreDenied: what is needed is then not known.
        """
        try:
            self._look(keys)
        except sqlite3.Error as exc:
            if self._path is None:
                raise unusable(None, exc) from exc
            log.warning("%s; it is not used in this run", unusable(self._path, exc))
            self._database.close()
            if is_damage(exc):
                with suppress(OSError):
                    remove(self._path)
            self._stand_in()
            with self._translated():
                self._look(keys)

    def _stand_in(self) -> None:
        self._path = None
        self._database = open_or_remake(None, self._store_id, schema=_SCHEMA, version=SCHEMA_VERSION)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise unusable(self._path, exc) from exc

    def _look(self, keys: Collection[str]) -> None:
        self._database.executescript(_LOOK)
        for _, named in self._named(iter(sorted(keys)), self._segments_of):
            ids = ((an_id,) for an_id in _split(named or b"", _SEGMENT_BYTES))
            self._database.executemany("INSERT OR IGNORE INTO temp.segments VALUES (?)", ids)
        missing = []
        for key, named in self._named(self._segment_keys(), self._packs_of):
            if named is None:
                missing.append(key)
            self._enter_packs(_USE.iter_unpack(named or b""))
        self._enter_moved()
        if missing:
            self._check_gone(missing, keys)

    def _enter_moved(self) -> None:
        """What frames of a needed pack were moved to is needed, whatever there is of the pack itself."""
        left: dict[PackId, list[str]] = {}
        for info in self._objects.list(MOVED):
            pack_id = PackId(info.key.split("/")[1])
            if is_id(pack_id):
                left.setdefault(pack_id, []).append(info.key)
        while found := [pack_id for pack_id in left if self.has_pack(pack_id)]:
            for pack_id in found:
                documents = left.pop(pack_id)
                for _, named in self._named(iter(sorted(documents)), self._moved_to):
                    self._enter_packs((an_id, ALL_USED) for an_id in _split(named or b"", _PACK_BYTES))
                used = ALL_USED if len(documents) > MOVED_BEFORE_MAX else 0
                update = "UPDATE temp.packs SET is_moved = 1, used = max(used, ?) WHERE id = ?"
                self._database.execute(update, (used, bytes.fromhex(pack_id)))

    def _check_gone(self, segments: Sequence[str], keys: Iterable[str]) -> None:
        """Another collector may have deleted these, after the manifests that name them.

        Or a backup that was taken for dead goes on: what it has pending without them is never committed.
        """
        ids = {bytes.fromhex(key.rpartition("/")[2]) for key in segments}
        for key in keys:
            if key.endswith(PENDING_SUFFIX) or ids.isdisjoint(_split(self._kept(key) or b"", _SEGMENT_BYTES)):
                continue
            if exists(self._objects, key):
                msg = f"{key} needs {segments[0]}, which is not in the store; run verify, and forget what is lost"
                raise ObjectMissing(msg)

    def packs_of_index(self, keys: Collection[str]) -> Iterator[tuple[str, list[PackId]]]:
        """Which packs these index objects name; one that is gone or cannot be read names none.

        Raises: StoreUnavailable, StoreDenied, PrimaryIOError.
        """
        with self._translated():
            for key, named in self._named(iter(sorted(keys)), self._indexed_packs):
                yield key, [PackId(an_id.hex()) for an_id in _split(named or b"", _PACK_BYTES)]

    def has_pack(self, pack_id: PackId) -> bool:
        """Whether what was looked at needs it."""
        return self._row("packs", "1", pack_id) is not None

    def has_segment(self, segment_id: SegmentId) -> bool:
        """Whether what was looked at needs it."""
        return self._row("segments", "1", segment_id) is not None

    def is_moved(self, pack_id: PackId) -> bool:
        """Whether what was looked at needs it, and frames of it are elsewhere."""
        return self._row("packs", "is_moved", pack_id) == (1,)

    def least_use(self, pack_id: PackId) -> int | None:
        """Bytes of a needed pack that are needed at the least; None of one that is not needed.

        As many as the segment that refers to most of it: what several refer to may be the same, or not.
        """
        row = self._row("packs", "used", pack_id)
        return None if row is None else row[0]

    def references(
        self, packs: Set[PackId], *, but: Set[SegmentId] = frozenset()
    ) -> Iterator[tuple[SegmentId, list[FrameRef]]]:
        """The needed segments that refer to one of these packs, all ``but`` those, and to which frames of them.

        Raises: ObjectMissing, CorruptSegment, UnknownFormat, StoreUnavailable, StoreDenied, PrimaryIOError.
        """
        wanted = {bytes.fromhex(pack_id) for pack_id in packs}
        naming: list[SegmentId] = []
        with self._translated():
            for key in self._segment_keys():
                segment_id = SegmentId(key.rpartition("/")[2])
                named = _USE.iter_unpack(self._kept(key) or b"") if segment_id not in but else ()
                if any(an_id in wanted for an_id, _ in named):
                    naming.append(segment_id)
        for segment_id in naming:
            yield segment_id, self._segment(segment_key(segment_id)).refs_to(packs)

    def forget_all_but(self, keys: Collection[str]) -> None:
        """Keep what is known of these objects, and of the segments and moved documents that were last needed.

        Raises: PrimaryIOError.
        """
        with self._translated(), self._database:
            for (key,) in self._database.execute("SELECT key FROM objects").fetchall():
                if key not in keys and not self._is_of_use(key):
                    self._database.execute("DELETE FROM objects WHERE key = ?", (key,))

    def _is_of_use(self, key: str) -> bool:
        if key.startswith(MOVED):
            return self.has_pack(PackId(key.split("/")[1]))
        return key.startswith(SEGMENTS) and self.has_segment(SegmentId(key.rpartition("/")[2]))

    def _row(self, table: str, column: str, an_id: str) -> tuple[Any, ...] | None:
        query = f"SELECT {column} FROM temp.{table} WHERE id = ?"
        with self._translated():
            found: tuple[Any, ...] | None = self._database.execute(query, (bytes.fromhex(an_id),)).fetchone()
        return found

    def _enter_packs(self, used: Iterable[tuple[bytes, int]]) -> None:
        insert = "INSERT INTO temp.packs (id, used) VALUES (?, ?)"
        self._database.executemany(f"{insert} ON CONFLICT DO UPDATE SET used = max(used, excluded.used)", used)

    def _segment_keys(self) -> Iterator[str]:
        last = b""
        query = "SELECT id FROM temp.segments WHERE id > ? ORDER BY id LIMIT ?"
        while rows := self._database.execute(query, (last, _BATCH)).fetchall():
            yield from (segment_key(SegmentId(an_id.hex())) for (an_id,) in rows)
            last = rows[-1][0]

    def _named(self, keys: Iterator[str], read: Callable[[str], bytes]) -> Iterator[tuple[str, bytes | None]]:
        """What each of these objects names, None when it is gone; those not known are read, several at a time."""
        while batch := list(islice(keys, _BATCH)):
            known = {key: self._kept(key) for key in batch}
            unknown = [key for key, named in known.items() if named is None]
            with self._database:
                for key, named in zip(unknown, self._mapped(read, unknown), strict=True):
                    if named is not None:
                        row = (key, named, _digest(key, named))
                        self._database.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", row)
                    known[key] = named
            yield from known.items()

    def _kept(self, key: str) -> bytes | None:
        row = self._database.execute("SELECT named, digest FROM objects WHERE key = ?", (key,)).fetchone()
        return row[0] if row is not None and row[1] == _digest(key, row[0]) else None

    def _mapped(self, read: Callable[[str], bytes], keys: list[str]) -> list[bytes | None]:
        def attempt(key: str) -> bytes | None:
            try:
                return read(key)
            except ObjectMissing:
                return None

        if self._workers == 1:
            return [attempt(key) for key in keys]
        with ThreadPoolExecutor(self._workers) as executor:
            return list(executor.map(attempt, keys))

    def _segments_of(self, key: str) -> bytes:
        try:
            data = self._objects.get(key, size_max=MANIFEST_SIZE_MAX)
        except ObjectMissing:
            if not key.endswith(PENDING_SUFFIX):
                raise
            # Since it was listed, it was committed, unless it was withdrawn.
            data = self._objects.get(committed_name(key), size_max=MANIFEST_SIZE_MAX)
        try:
            manifest = decode_manifest(data, committed_name(key))
        except PointNotFound:
            return b""  # a void one
        named = {one for stored in manifest.files for one in stored.segments if one is not None}
        return bytes.fromhex("".join(sorted(named)))

    def _indexed_packs(self, key: str) -> bytes:
        try:
            packs = decode_index(self._objects.get(key, size_max=INDEX_SIZE_MAX), key)
        except (CorruptStoreObject, UnknownFormat):
            return b""  # it is of no use, and no harm
        return bytes.fromhex("".join(pack_id for pack_id, _ in packs))

    def _packs_of(self, key: str) -> bytes:
        return b"".join(_USE.pack(bytes.fromhex(pack_id), used) for pack_id, used in self._segment(key).use().items())

    def _segment(self, key: str) -> Segment:
        segment_id = SegmentId(key.rpartition("/")[2])
        return Segment(self._objects.get(key, size_max=SEGMENT_SIZE_MAX), segment_id, self._sealing)

    def _moved_to(self, key: str) -> bytes:
        moves = decode_moved(self._objects.get(key, size_max=DOCUMENT_SIZE_MAX), key)
        return bytes.fromhex("".join(sorted({move.pack_id for move in moves})))


def committed_name(key: str) -> str:
    """The key that a manifest has, or will have when it is pending."""
    return key.partition(".")[0] if key.endswith(PENDING_SUFFIX) else key


def _split(named: bytes, size: int) -> list[bytes]:
    return [named[at : at + size] for at in range(0, len(named), size)]


def _digest(key: str, named: bytes) -> bytes:
    return xxh3_128_digest(key.encode() + b"\0" + named)
