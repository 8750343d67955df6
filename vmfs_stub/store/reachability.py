"""Which packs and segments the manifests of a store need.

Manifests and segments never change, so what they name is kept in a SQLite file from one time to the next, and a look at
a large store costs little more than a listing.  What is kept is believed only with its checksum, since what is needed
and not known to be would be deleted.  Memory is bounded at any size of store.  Blocking; one user at a time.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final

from xxhash import xxh3_128_digest

from vmfs_stub.core.errors import CorruptStoreObject, ObjectMissing, PointNotFound, PrimaryIOError, UnknownFormat
from vmfs_stub.core.ids import PackId, SegmentId, StoreId
from vmfs_stub.store.cache_file import is_damage, open_or_remake, remove, unusable
from vmfs_stub.store.format import INDEX_SIZE_MAX, MANIFEST_SIZE_MAX, SEGMENT_SIZE_MAX
from vmfs_stub.store.index_objects import decode_index
from vmfs_stub.store.keys import MOVED, PENDING_SUFFIX, is_id, segment_key
from vmfs_stub.store.manifest import decode_manifest
from vmfs_stub.store.moved import moved_packs
from vmfs_stub.store.objects import ObjectStore, exists
from vmfs_stub.store.sealing import PLAIN, Sealing
from vmfs_stub.store.segments import Segment

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE objects (                      -- manifests, segments and index objects
    key TEXT PRIMARY KEY,
    named BLOB NOT NULL,                    -- segments, or packs, one behind the other
    digest BLOB NOT NULL                    -- of the key and these
) WITHOUT ROWID;
"""
_LOOK: Final = """
CREATE TEMP TABLE IF NOT EXISTS segments (id BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS packs (id BLOB PRIMARY KEY) WITHOUT ROWID;
DELETE FROM temp.segments;
DELETE FROM temp.packs;
"""
_SEGMENT_BYTES: Final = 40
_PACK_BYTES: Final = 16
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

        Where frames of a needed pack were moved to is needed, too.  A file that fails is done without.
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
            self._enter("segments", named, _SEGMENT_BYTES)
        missing = []
        for key, named in self._named(self._segment_keys(), self._packs_of):
            if named is None:
                missing.append(key)
            self._enter("packs", named, _PACK_BYTES)
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
                packs = moved_packs(self._objects, left.pop(pack_id))
                self._enter("packs", bytes.fromhex("".join(packs)), _PACK_BYTES)

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
        return self._has("packs", pack_id)

    def has_segment(self, segment_id: SegmentId) -> bool:
        """Whether what was looked at needs it."""
        return self._has("segments", segment_id)

    def forget_all_but(self, keys: Collection[str]) -> None:
        """Keep what is known of these objects, and of the segments that were last found to be needed.

        Raises: PrimaryIOError.
        """
        with self._translated(), self._database:
            for (key,) in self._database.execute("SELECT key FROM objects").fetchall():
                if key not in keys and not self._is_needed_segment(key):
                    self._database.execute("DELETE FROM objects WHERE key = ?", (key,))

    def _is_needed_segment(self, key: str) -> bool:
        return key.startswith("segments/") and self.has_segment(SegmentId(key.rpartition("/")[2]))

    def _has(self, table: str, an_id: str) -> bool:
        query = f"SELECT 1 FROM temp.{table} WHERE id = ?"
        with self._translated():
            return self._database.execute(query, (bytes.fromhex(an_id),)).fetchone() is not None

    def _enter(self, table: str, named: bytes | None, size: int) -> None:
        ids = ((an_id,) for an_id in _split(named or b"", size))
        self._database.executemany(f"INSERT OR IGNORE INTO temp.{table} VALUES (?)", ids)

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
        segment_id = SegmentId(key.rpartition("/")[2])
        segment = Segment(self._objects.get(key, size_max=SEGMENT_SIZE_MAX), segment_id, self._sealing)
        return bytes.fromhex("".join(segment.packs))


def committed_name(key: str) -> str:
    """The key that a manifest has, or will have when it is pending."""
    return key.partition(".")[0] if key.endswith(PENDING_SUFFIX) else key


def _split(named: bytes, size: int) -> list[bytes]:
    return [named[at : at + size] for at in range(0, len(named), size)]


def _digest(key: str, named: bytes) -> bytes:
    return xxh3_128_digest(key.encode() + b"\0" + named)
