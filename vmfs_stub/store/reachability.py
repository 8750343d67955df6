"""Which packs and segments the manifests of a store need.

Manifests and segments never change, so what they name is kept in a SQLite file from one time to the next, and a look at
a large store costs little more than a listing.  What is kept is believed only with its checksum, since what is needed
and not known to be would be deleted.  Memory is bounded at any size of store.  Blocking; one user at a time.
"""

from __future__ import annotations

import logging
import sqlite3
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from xxhash import xxh3_128_digest

from vmfs_stub.core.batches import batched
from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    CorruptStoreObject,
    IntegrityError,
    ObjectMissing,
    PointNotFound,
    PrimaryIOError,
    UnknownFormat,
)
from vmfs_stub.core.ids import PackId, SegmentId, StoreId
from vmfs_stub.store.cache_file import is_damage, open_or_remake, remove, unusable
from vmfs_stub.store.format import DOCUMENT_SIZE_MAX, INDEX_SIZE_MAX, MANIFEST_SIZE_MAX, PACK_SIZE
from vmfs_stub.store.index_objects import decode_index
from vmfs_stub.store.keys import MOVED, PENDING_SUFFIX, SEGMENTS, committed_name, is_id, noted_pack, segment_key
from vmfs_stub.store.manifest import decode_manifest
from vmfs_stub.store.moved import decode_moved
from vmfs_stub.store.objects import ObjectStore, exists
from vmfs_stub.store.sealing import PLAIN, Sealing
from vmfs_stub.store.segments import Segment, read_segment

T = TypeVar("T")
log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 3
_SCHEMA: Final = """
CREATE TABLE objects (                      -- manifests, segments and index objects
    key TEXT PRIMARY KEY,
    named BLOB NOT NULL,                    -- segments, or packs, one behind the other; of a segment with their use
    digest BLOB NOT NULL                    -- of the key and these
) WITHOUT ROWID;
"""
_LOOK: Final = """
CREATE TEMP TABLE IF NOT EXISTS segments (id BLOB PRIMARY KEY) WITHOUT ROWID;
DROP TABLE IF EXISTS temp.former_segments;
ALTER TABLE temp.segments RENAME TO former_segments;    -- those of the look before
CREATE TEMP TABLE segments (id BLOB PRIMARY KEY) WITHOUT ROWID;
DROP TABLE IF EXISTS temp.packs;
CREATE TEMP TABLE packs (
    id BLOB PRIMARY KEY,
    used INTEGER NOT NULL DEFAULT 0,        -- the most bytes of it that one segment refers to
    parts INTEGER NOT NULL DEFAULT 0,       -- a bit for each part of it that any segment refers to
    documents INTEGER NOT NULL DEFAULT 0,   -- about it
    is_target INTEGER NOT NULL DEFAULT 0    -- a document of a needed pack names it
) WITHOUT ROWID;
DROP TABLE IF EXISTS temp.documents;
CREATE TEMP TABLE documents (               -- about packs that are not known to be needed
    key TEXT PRIMARY KEY,
    pack BLOB NOT NULL
) WITHOUT ROWID;
"""
PARTS: Final = 63
"""As many as bits in a number of SQLite."""
PART_SIZE: Final = PACK_SIZE // PARTS
_SEGMENT_BYTES: Final = 40
_PACK_BYTES: Final = 16
_USE: Final = struct.Struct(">16sQQ")
"""A pack, how many bytes of it a segment refers to, and in which parts of it; see `Use`."""
_SEGMENTS_AT_ONCE: Final = 64
"""Segments that are held in memory together."""
_BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class Use:
    """What is known of the use of a pack: the most bytes that one segment refers to, and in which parts of it all do.

    Bit *n* of ``parts`` is for frames that begin in the *n*-th part, of PARTS.
    """

    used: int
    parts: int

    @property
    def guess(self) -> int:
        """Bytes of those parts: about what is needed in all, or more where frames are small."""
        return max(self.used, self.parts.bit_count() * PART_SIZE)


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
        """Open the file, or make it afresh when it is missing, damaged or another store's.

        None, or a file that cannot be used, or that another process uses: what is found is kept in memory.
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
            # Nothing else is asked of them; one that is put again meanwhile is a new one in the next look.
            ids = ((bytes.fromhex(key.rpartition("/")[2]),) for key in missing)
            self._database.executemany("DELETE FROM temp.segments WHERE id = ?", ids)

    def _enter_moved(self) -> None:
        """What frames of a needed pack were moved to is needed, whatever there is of the pack itself."""
        listed = ((info.key, noted_pack(info.key)) for info in self._objects.list(MOVED))
        rows = ((key, bytes.fromhex(pack_id)) for key, pack_id in listed if is_id(pack_id))
        with self._database:
            self._database.executemany("INSERT OR IGNORE INTO temp.documents VALUES (?, ?)", rows)
        query = "SELECT key, pack FROM temp.documents JOIN temp.packs ON id = pack LIMIT ?"
        while found := self._database.execute(query, (_BATCH,)).fetchall():
            for _, named in self._named((key for key, _ in found), self._moved_to):
                targets = [(an_id,) for an_id in _split(named or b"", _PACK_BYTES)]
                insert = "INSERT INTO temp.packs (id, is_target) VALUES (?, 1) ON CONFLICT DO UPDATE SET is_target = 1"
                self._database.executemany(insert, targets)
            update = "UPDATE temp.packs SET documents = documents + 1 WHERE id = ?"
            self._database.executemany(update, ((pack,) for _, pack in found))
            self._database.executemany("DELETE FROM temp.documents WHERE key = ?", ((key,) for key, _ in found))

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
        row = self._row("packs", "documents", pack_id)
        return row is not None and row[0] > 0

    def is_target(self, pack_id: PackId) -> bool:
        """Whether frames of a needed pack were moved there."""
        return self._row("packs", "is_target", pack_id) == (1,)

    def may_move(self, pack_id: PackId, documents_max: int) -> bool:
        """Whether readers would find what is moved from there now: they follow a few moves, and read a few documents.

        At most ``documents_max`` documents about the pack may be there already.
        """
        row = self._row("packs", "documents", pack_id)
        return not self.is_target(pack_id) and (row is None or row[0] <= documents_max)

    def use(self, pack_id: PackId) -> Use | None:
        """How much of a pack is needed, as far as that can be told without a look into segments; None: nothing is."""
        row = self._row("packs", "used, parts", pack_id)
        return None if row is None else Use(*row)

    def references(
        self, packs: Set[PackId], *, only_new: bool = False
    ) -> Iterator[tuple[Set[PackId], list[FrameRef] | None]]:
        """For each needed segment that refers to any of these packs: to which of them, and to which frames.

        None in the place of frames: the segment cannot be read.  With ``only_new`` only segments that were not needed
        in the look before the last one.  What the caller takes out of ``packs`` meanwhile is not looked for any more.
        Raises: ObjectMissing, StoreUnavailable, StoreDenied, PrimaryIOError.
        """
        naming: dict[str, Set[PackId]] = {}
        with self._translated():
            for key, named in self._named(self._segment_keys(only_new=only_new), self._packs_of):
                if named is None:
                    raise ObjectMissing(f"{key} is not there any more")
                if found := packs & {PackId(an_id.hex()) for an_id, _, _ in _USE.iter_unpack(named)}:
                    naming[key] = found
                if len(naming) == _SEGMENTS_AT_ONCE:
                    yield from self._references_in(naming, packs)
                    naming = {}
        yield from self._references_in(naming, packs)

    def _references_in(
        self, naming: Mapping[str, Set[PackId]], packs: Set[PackId]
    ) -> Iterator[tuple[Set[PackId], list[FrameRef] | None]]:
        def attempt(key: str) -> list[FrameRef] | None:
            try:
                return self._segment(key).refs_to(naming[key])
            except (IntegrityError, UnknownFormat) as exc:
                log.warning("packs that it names stay as they are: %s", exc)
                return None

        keys = [key for key, named in naming.items() if named & packs]
        for key, refs in zip(keys, self._mapped(attempt, keys), strict=True):
            yield naming[key], refs

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
            return self.has_pack(noted_pack(key))
        return key.startswith(SEGMENTS) and self.has_segment(SegmentId(key.rpartition("/")[2]))

    def _row(self, table: str, column: str, an_id: str) -> tuple[Any, ...] | None:
        query = f"SELECT {column} FROM temp.{table} WHERE id = ?"
        with self._translated():
            found: tuple[Any, ...] | None = self._database.execute(query, (bytes.fromhex(an_id),)).fetchone()
        return found

    def _enter_packs(self, uses: Iterable[tuple[bytes, int, int]]) -> None:
        insert = "INSERT INTO temp.packs (id, used, parts) VALUES (?, ?, ?)"
        more = "used = max(used, excluded.used), parts = parts | excluded.parts"
        self._database.executemany(f"{insert} ON CONFLICT DO UPDATE SET {more}", uses)

    def _segment_keys(self, *, only_new: bool = False) -> Iterator[str]:
        last = b""
        but = "AND id NOT IN (SELECT id FROM temp.former_segments)" if only_new else ""
        query = f"SELECT id FROM temp.segments WHERE id > ? {but} ORDER BY id LIMIT ?"
        while rows := self._database.execute(query, (last, _BATCH)).fetchall():
            yield from (segment_key(SegmentId(an_id.hex())) for (an_id,) in rows)
            last = rows[-1][0]

    def _named(self, keys: Iterator[str], read: Callable[[str], bytes]) -> Iterator[tuple[str, bytes | None]]:
        """What each of these objects names, None when it is gone; those not known are read, several at a time."""
        for batch in batched(keys, _BATCH):
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

    def _mapped(self, read: Callable[[str], T], keys: list[str]) -> list[T | None]:
        def attempt(key: str) -> T | None:
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
        uses = self._segment(key).use(parts=PARTS, part_size=PART_SIZE)
        return b"".join(_USE.pack(bytes.fromhex(pack_id), *use) for pack_id, use in uses.items())

    def _segment(self, key: str) -> Segment:
        return read_segment(self._objects, SegmentId(key.rpartition("/")[2]), self._sealing)

    def _moved_to(self, key: str) -> bytes:
        moves = decode_moved(self._objects.get(key, size_max=DOCUMENT_SIZE_MAX), key)
        return bytes.fromhex("".join(sorted({move.pack_id for move in moves})))


def _split(named: bytes, size: int) -> list[bytes]:
    return [named[at : at + size] for at in range(0, len(named), size)]


def _digest(key: str, named: bytes) -> bytes:
    return xxh3_128_digest(key.encode() + b"\0" + named)
