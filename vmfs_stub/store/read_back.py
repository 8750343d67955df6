"""Which packs of a replica this host has read back, so that none is read again for each restore point that needs it.

A SQLite file, private to one host; losing it costs another reading of packs in the replica, never data.  It says
nothing of whether a pack is still there: that is asked each time.  Thread-safe.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path
from typing import Final

from blake3 import blake3

from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.ids import PackId, StoreId
from vmfs_stub.store.cache_file import open_or_remake

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = "CREATE TABLE packs (id BLOB PRIMARY KEY) WITHOUT ROWID;"

log = logging.getLogger(__name__)


class ReadBack:
    """The packs that were read back from one place; of a file that cannot be used none are kept beyond this process."""

    def __init__(self, path: Path | None, store_id: StoreId, url: str) -> None:
        """Open the file for the replica of that store at ``url``; None keeps it in memory."""
        place = StoreId(blake3(f"{store_id} {url}".encode()).hexdigest()[:32])
        self._lock = threading.Lock()
        try:
            self._database = open_or_remake(path, place, schema=_SCHEMA, version=SCHEMA_VERSION)
        except PrimaryIOError as exc:
            log.warning("%s; until then packs in the replica are read once more than they need be", exc)
            self._database = open_or_remake(None, place, schema=_SCHEMA, version=SCHEMA_VERSION)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def has(self, pack_id: PackId) -> bool:
        """Whether the pack was read back from there."""
        try:
            with self._lock:
                row = self._database.execute("SELECT 1 FROM packs WHERE id = ?", (bytes.fromhex(pack_id),)).fetchone()
        except sqlite3.Error:
            return False
        return row is not None

    def add(self, pack_id: PackId) -> None:
        """The pack was read back."""
        try:
            with self._lock, self._database:
                self._database.execute("INSERT OR IGNORE INTO packs VALUES (?)", (bytes.fromhex(pack_id),))
        except sqlite3.Error as exc:
            log.warning("that pack %s was read back from the replica cannot be noted: %s", pack_id, exc)
