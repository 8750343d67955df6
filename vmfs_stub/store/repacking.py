"""Repacking: what is still needed of packs that are mostly garbage is copied into new ones.

Packs and segments never change, so the segments go on naming the old pack, and moved documents say where each needed
frame is now (`moved.py`).  Every copy is checked by identity and read back before a document names it.  Blocking.
This module must not know which packs these are, nor delete anything: that is the collector's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Final, TypeAlias

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptFrame, IntegrityError, ObjectMissing, StoreConflict, StoreError
from vmfs_stub.core.ids import PackId
from vmfs_stub.core.recall_plan import plan_fetches
from vmfs_stub.store import frames
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.condemned import read_condemned
from vmfs_stub.store.keys import pack_key
from vmfs_stub.store.leases import LEASE_INTERVAL_S
from vmfs_stub.store.moved import Move, read_moves
from vmfs_stub.store.objects import exists
from vmfs_stub.store.quarantine import quarantined_packs
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

Moved: TypeAlias = dict[int, PackId]
"""Which packs frames of a pack are in now, by their offsets there in bytes."""

READ_BYTES: Final = 8 * 1024 * 1024
"""Raw bytes of frames that are read together."""
GAP_BYTES: Final = 256 * 1024
"""Bytes that are read in vain rather than making one more request."""


class Repacking:
    """Moves frames within a store; ``copied_bytes`` are those that it has put, as they are stored."""

    def __init__(
        self,
        store: Store,
        *,
        mirror: Callable[[PackId], None] = lambda pack_id: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``mirror`` sees to it that the replica has what was moved of a pack, or raises a StoreError."""
        self._store = store
        self._mirror = mirror
        self._clock = clock
        self.copied_bytes = 0

    def move(self, needed: Mapping[PackId, Sequence[FrameRef]]) -> dict[PackId, Moved]:
        """Copy these frames of each pack, if that was not done before, and tell readers; returns where they are now.

        A pack of which a frame is damaged is left out, and so are those of which anything was copied when this job was
        taken for dead.
        Raises: StoreUnavailable, StoreDenied, StoreFull.
        """
        moved = self._moved_before(needed)
        left = {
            pack_id: rest
            for pack_id, refs in needed.items()
            if (rest := [ref for ref in refs if ref.offset not in moved[pack_id]])
        }
        if left:
            copied = self._copy(left)
            for pack_id in left:
                moved[pack_id].update(copied.get(pack_id, {}))
            moved = {pack_id: places for pack_id, places in moved.items() if pack_id in copied or pack_id not in left}
        return {pack_id: places for pack_id, places in moved.items() if self._is_mirrored(pack_id)}

    def _moved_before(self, packs: Iterable[PackId]) -> dict[PackId, Moved]:
        """What an earlier run has copied that was cut short, or could not delete the pack.

        First the documents, then the lists, then whether the copies are there: what is about to go does not count.
        """
        objects = self._store.objects
        moves = {pack_id: read_moves(objects, pack_id) for pack_id in packs}
        condemned = read_condemned(objects)
        going = condemned.packs | condemned.retired | quarantined_packs(objects)
        saved = {move.pack_id for found in moves.values() for move in found} - going
        there = {pack_id for pack_id in saved if exists(objects, pack_key(pack_id))}
        return {
            pack_id: {move.old_offset: move.pack_id for move in found if move.pack_id in there}
            for pack_id, found in moves.items()
        }

    def _copy(self, left: Mapping[PackId, Sequence[FrameRef]]) -> dict[PackId, Moved]:
        with closing(ChunkIndex(None, self._store.id)) as index:
            writer = self._store.begin_repair(index=index)
            try:
                job = _Job(self._store, writer, self._clock)
                for pack_id, refs in left.items():
                    job.copy(pack_id, refs)
                return job.finish()
            except StoreConflict as exc:
                log.warning("packs that are mostly garbage stay as they are: %s", exc)
                return {}
            finally:
                writer.abandon()
                writer.end_lease()
                self.copied_bytes += writer.counts.stored_bytes

    def _is_mirrored(self, pack_id: PackId) -> bool:
        try:
            self._mirror(pack_id)
        except (StoreError, IntegrityError) as exc:
            log.warning("pack %s stays as it is, the replica does not have what was moved of it: %s", pack_id, exc)
            return False
        return True


class _Job:
    """Copies under one lease."""

    def __init__(self, store: Store, writer: BackupWriter, clock: Callable[[], float]) -> None:
        self._store = store
        self._writer = writer
        self._clock = clock
        self._renewed_s = clock()
        self._moves: dict[PackId, list[Move]] = {}
        self._new: list[FrameRef] = []

    def copy(self, pack_id: PackId, refs: Sequence[FrameRef]) -> None:
        """All of these frames of one pack, or none of them."""
        moves: list[Move] = []
        try:
            for fetch in plan_fetches(enumerate(refs), fetch_bytes_max=READ_BYTES, gap_bytes_max=GAP_BYTES):
                self._stay_alive()
                for ref, raw in zip(fetch.frames, self._store.fetch_in_place(fetch.frames), strict=True):
                    frames.check_identity(raw, ref, self._store.sealing)
                    moves.append(self._write(ref, raw))
        except (IntegrityError, ObjectMissing) as exc:
            log.warning("pack %s is not repacked; run scrub: %s", pack_id, exc)
            return
        self._moves[pack_id] = moves

    def finish(self) -> dict[PackId, Moved]:
        """Put what was copied, read it back, and tell readers.  Raises: StoreConflict."""
        last = self._writer.finish()
        if last is not None:
            self._writer.put_pack(last)
        self._writer.read_back(self._new)
        self._stay_alive()
        self._writer.commit_moves(self._moves)
        self._store.moved.look_again()
        return {pack_id: {move.old_offset: move.pack_id for move in moves} for pack_id, moves in self._moves.items()}

    def _write(self, old: FrameRef, raw: bytes) -> Move:
        appended = self._writer.append(self._writer.encode(raw))
        for pack in appended.sealed:
            self._writer.put_pack(pack)
        (new,) = appended.entries
        if new is None or (new.raw_length, new.checksum) != (old.raw_length, old.checksum):
            raise CorruptFrame(f"{pack_key(old.pack_id)}: what is at {old.offset} is not what a segment says of it")
        self._new.append(new)
        return Move(old.offset, new.pack_id, new.offset, new.length)

    def _stay_alive(self) -> None:
        now = self._clock()
        if now - self._renewed_s > LEASE_INTERVAL_S:
            self._writer.renew_lease()
            self._renewed_s = now
