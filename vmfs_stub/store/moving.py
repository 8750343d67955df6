"""Moving frames: copies of them are written into new packs, and readers are told where they are, in one job.

The order is that of docs/FORMAT.md (must = needed data is lost otherwise): the job has a lease, the packs are put and
read back, then the documents are put (`moved.py`).  Blocking.  This module must not know why frames are moved, nor from
where they are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptFrame
from vmfs_stub.core.ids import PackId
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.keys import pack_key
from vmfs_stub.store.moved import Documents, Move
from vmfs_stub.store.store import Store


class Moving:
    """One such job, see `moving`."""

    def __init__(self, store: Store, writer: BackupWriter) -> None:
        self._store = store
        self._writer = writer
        self._new: list[FrameRef] = []

    @property
    def stored_bytes(self) -> int:
        """How much was written, as it is stored."""
        return self._writer.counts.stored_bytes

    def stay_alive(self) -> None:
        """To be called between requests that may take long; never fails."""
        self._writer.stay_alive()

    def write(self, old: FrameRef, raw: bytes) -> Move:
        """Copy a frame, whose raw bytes were checked by identity.

        Raises: CorruptFrame when a segment expects what no chunk of this identity is; StoreUnavailable, StoreDenied,
        StoreFull.
        """
        self.stay_alive()
        appended = self._writer.append(self._writer.encode(raw))
        for pack in appended.sealed:
            self._writer.put_pack(pack)
        (new,) = appended.entries
        if new is None or (new.raw_length, new.checksum) != (old.raw_length, old.checksum):
            raise CorruptFrame(f"{pack_key(old.pack_id)}: what is at {old.offset} is not what a segment says of it")
        self._new.append(new)
        return Move(old.offset, new.pack_id, new.offset, new.length)

    def finish(self, moves: Mapping[PackId, Sequence[Move]]) -> dict[PackId, Documents]:
        """Put what is left, read all copies back, and tell readers of these moves; returns what tells them.

        Raises: as `BackupWriter.read_back` and `BackupWriter.commit_moves`.
        """
        last = self._writer.finish()
        if last is not None:
            self._writer.put_pack(last)
        self._writer.read_back(self._new)
        told = self._writer.commit_moves(moves)
        self._store.moved.look_again()
        return told


@contextmanager
def moving(store: Store, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Moving]:
    """Begin such a job, and end it, finished or not; ``clock`` tells when the lease is to be renewed.

    Raises: as `Store.begin_moves`.
    """
    with closing(ChunkIndex(None, store.id)) as index:
        writer = store.begin_moves(index=index, clock=clock)
        try:
            yield Moving(store, writer)
        finally:
            writer.abandon()
            writer.end_lease()
