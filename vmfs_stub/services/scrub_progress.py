"""How far a scrub has come, so that one that was stopped goes on where it was.

A SQLite file, private to one host: losing it costs another reading of the store, never data.  What is damaged is kept
until the round is over, since it is only then that those are named who need it.  Blocking; one user at a time.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.ids import ChunkId, PackId, StoreId
from vmfs_stub.store.cache_file import open_or_remake, unusable

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE round (after TEXT NOT NULL);                       -- one row: all packs up to this one are dealt with
INSERT INTO round VALUES ('');
CREATE TABLE damaged (
    pack TEXT PRIMARY KEY,
    problem TEXT NOT NULL,
    offsets TEXT) WITHOUT ROWID;                                -- JSON list of bytes; NULL: all of the pack
"""
_NEEDED: Final = (
    "CREATE TEMP TABLE needed (pack TEXT PRIMARY KEY) WITHOUT ROWID",
    """
    CREATE TEMP TABLE needed_frames (       -- of packs of which frames have moved
        pack TEXT, offset INTEGER, chunk BLOB, length INTEGER, raw_length INTEGER, checksum BLOB,
        PRIMARY KEY (pack, offset)
    ) WITHOUT ROWID""",
)


@dataclass(frozen=True, slots=True)
class PackDamage:
    """What is wrong with a pack; ``offsets`` are those of its damaged frames in bytes, None when it is not known."""

    pack_id: PackId
    problem: str
    offsets: frozenset[int] | None


class ScrubProgress:
    """One round over the packs, in the order of their names; all calls may raise PrimaryIOError."""

    def __init__(self, path: Path | None, store_id: StoreId, *, restart: bool = False) -> None:
        """Open the file, or make it afresh when it is missing, damaged or another store's; None keeps it in memory.

        With ``restart`` what is in it does not count.  Raises: PrimaryIOError.
        """
        self._path = path
        self._database = open_or_remake(path, store_id, schema=_SCHEMA, version=SCHEMA_VERSION)
        with self._transaction() as database:
            for table in _NEEDED:
                database.execute(table)
        if restart:
            self.finish()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @property
    def after(self) -> str:
        """The last pack that was dealt with; empty when a round begins."""
        with self._transaction() as database:
            return str(database.execute("SELECT after FROM round").fetchone()[0])

    def passed(self, pack_id: PackId, damage: PackDamage | None) -> None:
        """This pack, and all before it, were dealt with."""
        if damage is not None:
            self.found(damage)
        with self._transaction() as database:
            database.execute("UPDATE round SET after = ?", (pack_id,))

    def found(self, damage: PackDamage) -> None:
        """This pack is damaged."""
        offsets = None if damage.offsets is None else json.dumps(sorted(damage.offsets))
        with self._transaction() as database:
            row = (damage.pack_id, damage.problem, offsets)
            database.execute("INSERT OR REPLACE INTO damaged VALUES (?, ?, ?)", row)

    def damaged(self, after: str, count_max: int) -> list[PackDamage]:
        """Packs that this round found damaged, by name from behind ``after`` on, at most so many."""
        query = "SELECT pack, problem, offsets FROM damaged WHERE pack > ? ORDER BY pack LIMIT ?"
        with self._transaction() as database:
            return [
                PackDamage(PackId(pack), problem, None if offsets is None else frozenset(json.loads(offsets)))
                for pack, problem, offsets in database.execute(query, (after, count_max))
            ]

    def finish(self) -> None:
        """The next round begins."""
        with self._transaction() as database:
            database.execute("DELETE FROM damaged")
            database.execute("UPDATE round SET after = ''")

    def need(self, packs: Iterable[PackId]) -> None:
        """Restore points need these packs; not kept from one run to the next."""
        with self._transaction() as database:
            database.executemany("INSERT OR IGNORE INTO temp.needed VALUES (?)", ((pack,) for pack in packs))

    def needed(self, first_digits: str) -> set[PackId]:
        """The needed packs whose names begin so."""
        query = "SELECT pack FROM temp.needed WHERE pack >= ? AND pack < ?"
        with self._transaction() as database:
            return {PackId(pack) for (pack,) in database.execute(query, (first_digits, f"{first_digits}g"))}

    def need_frames(self, refs: Iterable[FrameRef]) -> None:
        """Restore points need these frames of packs of which frames have moved; not kept either."""
        rows = ((ref.pack_id, ref.offset, ref.chunk_id, ref.length, ref.raw_length, ref.checksum) for ref in refs)
        with self._transaction() as database:
            database.executemany("INSERT OR IGNORE INTO temp.needed_frames VALUES (?, ?, ?, ?, ?, ?)", rows)

    def needed_frames(self, pack_id: PackId) -> list[FrameRef]:
        """What was said of this pack, in the order of offsets."""
        query = (
            "SELECT chunk, offset, length, raw_length, checksum FROM temp.needed_frames WHERE pack = ? ORDER BY offset"
        )
        with self._transaction() as database:
            return [
                FrameRef(ChunkId(chunk), pack_id, offset, length, raw_length, checksum)
                for chunk, offset, length, raw_length, checksum in database.execute(query, (pack_id,))
            ]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._database:
                yield self._database
        except sqlite3.Error as exc:
            raise unusable(self._path, exc) from exc
