"""Writes one VM's restore point, or copies of frames that are moved: whatever puts packs.

Use, by one job: ``encode`` (CPU only; from several threads at once) → ``append`` (one at a time, in file order; hands
out packs when full) → ``put_pack`` (from several threads) → ``read_back`` → segments → ``commit`` (`committing.py`);
a job that moves frames has no segments, and ends with ``commit_moves`` (`moving.py`).

Ordering invariants (must = data loss otherwise):
- must: frames and segments are durable before the commit begins;
- must: nobody else refers to a pack of this job before it was seen, after the put was done, not to have been taken for
  dead: of one that is dead a late try may put again what collectors delete;
- should: index objects come last (without them the chunks are merely stored again).

A writer that ends without either leaves packs that nothing names; garbage collection takes them.
This module must not know where the bytes come from.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import IntegrityError, ObjectMissing
from vmfs_stub.core.ids import ChunkId, PackId, PointId, SegmentId, VmId, WriterId
from vmfs_stub.core.recall_plan import plan_fetches
from vmfs_stub.store import frames
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.committing import Committing
from vmfs_stub.store.format import FRAME_HEADER, INDEX_OBJECT_ENTRIES
from vmfs_stub.store.frames import EncodedChunk
from vmfs_stub.store.index_objects import PackEntries, encode_index
from vmfs_stub.store.keys import INDEX, pack_key, segment_key
from vmfs_stub.store.leases import LEASE_INTERVAL_S, Lease
from vmfs_stub.store.manifest import Manifest, StoredFile
from vmfs_stub.store.moved import Documents, Move, drop_caches
from vmfs_stub.store.objects import Buffer, ObjectStore, absent
from vmfs_stub.store.packs import OpenPack, SealedPack
from vmfs_stub.store.pins import Pin
from vmfs_stub.store.sealing import Sealing
from vmfs_stub.store.segments import Entry, SealedSegment, Segment, SegmentTable, entries_of
from vmfs_stub.store.uses import Uses

BUFFERS_KEPT: Final = 4
"""Buffers of packs, and of batches, kept for the next one: fresh memory costs more than the copy into it."""
READ_BACK_BYTES: Final = 8 * 1024 * 1024
"""Raw bytes per read of ``read_back``: large enough for a disk, small enough to hold decoded, however well a disk
compresses."""
READ_BACK_GAP: Final = 256 * 1024
"""Unwanted bytes that are read rather than starting another read."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Consecutive chunks of a file: None is zeros, a FrameRef is stored already, an EncodedChunk is new.

    ``buffer`` is the memory of the new frames, if any; ``append`` takes it back, so a batch is appended once.
    """

    chunks: tuple[EncodedChunk | FrameRef | None, ...]
    buffer: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True, slots=True)
class Appended:
    """Where a batch's chunks lie, and packs that are full now and must be put."""

    entries: list[FrameRef | None]
    sealed: list[SealedPack]


@dataclass(slots=True)
class WriterCounts:
    """What the job did so far: chunks and bytes; ``stored_bytes`` is after compression."""

    chunks: int = 0
    zero_chunks: int = 0
    reused_chunks: int = 0
    new_chunks: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0


class BackupWriter:
    """One such job; see the module for the order of calls."""

    def __init__(
        self,
        objects: ObjectStore,
        fetch: Callable[[Sequence[FrameRef]], list[bytes]],
        index: ChunkIndex,
        *,
        chunk_size: int,
        sealing: Sealing,
        clock: Callable[[], float],
        quarantined: frozenset[PackId] = frozenset(),
        lease_clock: Callable[[], float] | None = None,
    ) -> None:
        """Take out a lease, which the job renews by itself if it has a ``lease_clock``; see `renew_lease`.

        ``quarantined`` are packs that ``index`` does not hand out.  Whoever takes over references to them does so
        because there is no other copy: the commit refuses only those that were put in quarantine since.
        Raises: StoreUnavailable, StoreDenied, StoreFull."""
        self.chunk_size = chunk_size
        self.writer_id = WriterId(secrets.token_hex(8))
        self._sealing = sealing
        self._frame_seal = sealing.frame_seal(self.writer_id)
        self._objects = objects
        self._fetch = fetch
        self._index = index
        self._clock = clock
        self._lease = Lease(objects, self.writer_id)
        self._lease_clock = lease_clock
        self._renewed_s = 0.0 if lease_clock is None else lease_clock()
        self._lock = threading.Lock()
        self._abandoned = False
        self._pack: OpenPack | None = None
        self._spare: list[bytearray] = []
        self._spare_batches: list[bytearray] = []
        self._unput: dict[PackId, SealedPack] = {}
        self._unindexed: dict[ChunkId, FrameRef] = {}
        """Chunks of this job that the index does not know yet; bounded by the packs that are not put."""
        self._uses = Uses(quarantined)
        self._committing = Committing(objects, self.writer_id, self._uses, index=index, sealing=sealing, clock=clock)
        self._unpublished: list[PackEntries] = []
        self._unpublished_entries = 0
        self.counts = WriterCounts()
        """Totals of what was appended."""

    def is_new(self, ref: FrameRef) -> bool:
        """Whether this job stored the frame itself (else it was there before)."""
        return ref.pack_id in self._uses.own

    def encode(self, data: Buffer) -> EncodedBatch:
        """Encode several whole chunks (the last of a file may be short); thread-safe, no store call.

        ``data`` must start at a chunk boundary and may be used for something else when this returns.  bytes and
        bytearray are read in place; a memoryview is copied first.  Raises: PrimaryIOError (chunk index).
        """
        raw = bytes(data) if isinstance(data, memoryview) else data
        ids = frames.identities(raw, self.chunk_size, self._sealing)
        known = self._known([chunk_id for chunk_id in ids if chunk_id is not None])
        view = memoryview(raw)
        seal = self._frame_seal
        buffer = self._batch_buffer(len(raw) + len(ids) * (FRAME_HEADER.size + seal.growth))
        room = memoryview(buffer)
        chunks: list[EncodedChunk | FrameRef | None] = []
        for number, chunk_id in enumerate(ids):
            if chunk_id is None:
                chunks.append(None)
                continue
            start = number * self.chunk_size
            chunk = view[start : start + self.chunk_size]
            ref = known.get(chunk_id)
            # The index came from objects that others wrote: what a segment will claim is checked here.
            if ref is not None and frames.describes(ref, chunk):
                chunks.append(ref)
            else:
                encoded = frames.encode(chunk, chunk_id, into=room, seal=seal)
                chunks.append(encoded)
                room = room[len(encoded.frame) :]
        return EncodedBatch(tuple(chunks), buffer)

    def append(self, batch: EncodedBatch) -> Appended:
        """Lay the batch's new frames into packs; one call at a time, in file order."""
        entries: list[FrameRef | None] = []
        sealed: list[SealedPack] = []
        counts = self.counts
        with self._lock:
            counts.chunks += len(batch.chunks)
            for chunk in batch.chunks:
                if chunk is None:
                    counts.zero_chunks += 1
                    entries.append(None)
                elif isinstance(chunk, FrameRef):
                    counts.reused_chunks += 1
                    self._uses.packs.add(chunk.pack_id)
                    entries.append(chunk)
                else:
                    entries.append(self._place(chunk, sealed))
            if batch.buffer and len(self._spare_batches) < BUFFERS_KEPT:
                self._spare_batches.append(batch.buffer)
        return Appended(entries, sealed)

    def finish(self) -> SealedPack | None:
        """After the last append: the pack that is not full, if any; it must be put like the others."""
        with self._lock:
            return self._seal()

    def put_pack(self, pack: SealedPack) -> None:
        """Store a pack durably; from any thread.  Its ``data`` must not be used afterwards.

        Raises: StoreUnavailable, StoreDenied, StoreFull, PrimaryIOError (chunk index); StoreConflict when this job was
        taken for dead, so that it will not commit.
        """
        self._objects.put(pack_key(pack.pack_id), pack.data)
        # A late try of a writer that was taken for dead puts again what was deleted since, and another collector may be
        # about to delete it.  From here on jobs of this host refer to it, and soon those of others.
        self._committing.check_not_dead()
        self._index.add(pack.pack_id, pack.refs)
        with self._lock:
            del self._unput[pack.pack_id]
            for ref in pack.refs:
                self._unindexed.pop(ref.chunk_id, None)
            if len(self._spare) < BUFFERS_KEPT:
                self._spare.append(pack.buffer)
            self._unpublished.append((pack.pack_id, pack.refs))
            self._unpublished_entries += len(pack.refs)
            full = self._unpublished_entries >= INDEX_OBJECT_ENTRIES
        if full:
            self._publish_index()

    def read_back(self, refs: Sequence[FrameRef]) -> None:
        """Prove that frames can be read from the store, past its cache; reused ones also by identity.

        Any order, any number of packs; equal ones are read once.
        Raises: CorruptFrame, CorruptPack, ObjectMissing, StoreUnavailable.
        """
        wanted = {(ref.pack_id, ref.offset): ref for ref in refs}.values()
        dropped: set[PackId] = set()
        for fetch in plan_fetches(enumerate(wanted), fetch_bytes_max=READ_BACK_BYTES, gap_bytes_max=READ_BACK_GAP):
            self.stay_alive()
            self._read_back_run(fetch.frames, dropped)

    def put_segment(self, segment: SealedSegment) -> None:
        """Store a segment durably; from any thread.  When it fails, the job has.

        Raises: StoreUnavailable, StoreDenied, StoreFull.
        """
        with self._lock:
            if segment.segment_id in self._uses.segments:
                return  # of an equal part of another file; once it was put, it is never put again
            self._uses.add_segment(segment.segment_id, segment.packs)
        self._objects.put(segment_key(segment.segment_id), segment.data)

    def reuse(self, entries: Sequence[Entry | None]) -> None:
        """Chunks of another restore point are part of this one; `commit` sees that their packs are there."""
        with self._lock:
            zeros = entries.count(None)
            self.counts.chunks += len(entries)
            self.counts.zero_chunks += zeros
            self.counts.reused_chunks += len(entries) - zeros
            self._uses.packs.update({entry.pack_id for entry in entries if entry is not None})

    def reuse_segment(self, segment_id: SegmentId | None, segment: Segment | None, *, chunk_count: int) -> None:
        """A segment of another restore point, of ``chunk_count`` chunks, is part of this one as it is.

        `commit` sees that it and its packs are still there.
        """
        with self._lock:
            self.counts.chunks += chunk_count
            if segment_id is None or segment is None:
                self.counts.zero_chunks += chunk_count
                return
            self.counts.reused_chunks += chunk_count
            self._uses.add_segment(segment_id, frozenset(segment.packs))

    def renew_lease(self) -> None:
        """To be called each LEASE_INTERVAL_S, from one thread at a time; never fails."""
        self._lease.renew()

    def stay_alive(self) -> None:
        """Renew the lease if it is time: of a job for which no other thread does that, between its requests."""
        if self._lease_clock is not None and self._lease_clock() >= self._renewed_s + LEASE_INTERVAL_S:
            self._renewed_s = self._lease_clock()
            self._lease.renew()

    def end_lease(self) -> None:
        """After `abandon`; `commit` does it by itself.  Never fails."""
        self._lease.end()

    def begin_file(self) -> SegmentTable:
        """A table to collect one file's entries in, segment by segment."""
        return SegmentTable(self.chunk_size, self.writer_id, self._sealing)

    def add_file(self, entries: Iterable[FrameRef | None]) -> tuple[SegmentId | None, ...]:
        """Turn a whole file's entries into segments and put them; for files small enough to hold their entries."""
        table = self.begin_file()
        for segment in (*table.extend(entries_of(entries)), *table.close()):
            self.put_segment(segment)
        return tuple(table.ids)

    def commit(
        self,
        *,
        vm_id: VmId,
        point_id: PointId,
        vm_name: str,
        host: str,
        files: Sequence[StoredFile],
        metadata: Mapping[str, str],
        top: StoredFile | None = None,
        pins: Sequence[Pin] = (),
    ) -> Manifest:
        """Make the restore point one that exists; all packs and segments must have been put.

        Raises: CorruptManifest when no reader would accept it, and nothing is written; StoreConflict when garbage
        collection takes something that is used (run the job again: the chunks are then stored afresh);
        StoreUnavailable: the point may or may not exist then, its pins stay.
        """
        if self._unput or self._pack is not None:
            msg = "commit before every pack was put"
            raise RuntimeError(msg)
        manifest = Manifest(
            vm_id, point_id, vm_name, self._clock(), host, self.chunk_size, tuple(files), dict(metadata), top
        )
        self._committing.point(manifest, pins)
        self._publish_index()
        if self._abandoned:
            # Whoever waited for this thread does so no more, and has removed the pins, perhaps before they were made.
            self._committing.withdraw_pins(manifest, pins)
        self._lease.end()
        return manifest

    def commit_moves(self, moves: Mapping[PackId, Sequence[Move]]) -> dict[PackId, Documents]:
        """Tell readers where frames of these packs are now; what this job put must have been read back.

        Returns what tells it, a document for each.
        Raises: StoreConflict when this job was taken for dead, so that its packs may go; StoreUnavailable,
        StoreDenied, StoreFull.  What it told stays: it leads nowhere then, which readers bear, or else a backup may
        count on it by now.
        """
        documents = self._committing.moves(moves, before_each=self.stay_alive)
        self._publish_index()
        self._lease.end()
        return documents

    def abandon(self) -> None:
        """End without a restore point; packs that were put stay until garbage collection.

        A `commit` that is under way in another thread may still make the restore point, but leaves no pins; those of
        one that is over are the caller's to remove.
        """
        with self._lock:
            self._abandoned = True
            self._pack = None
            self._unput.clear()
            self._unindexed.clear()
            self._spare.clear()
            self._spare_batches.clear()

    def _known(self, ids: list[ChunkId]) -> dict[ChunkId, FrameRef]:
        # The job's own chunks last: put_pack enters them into the index before it forgets them here.
        with self._lock:
            own = {chunk_id: ref for chunk_id in ids if (ref := self._unindexed.get(chunk_id)) is not None}
        return self._index.lookup([chunk_id for chunk_id in ids if chunk_id not in own]) | own

    def _batch_buffer(self, size: int) -> bytearray:
        with self._lock:
            spare = self._spare_batches.pop() if self._spare_batches else bytearray()
            if len(spare) >= size:
                return spare  # one that is too small is not kept
        return bytearray(size)

    def _place(self, chunk: EncodedChunk, sealed: list[SealedPack]) -> FrameRef:
        known = self._unindexed.get(chunk.chunk_id)
        if known is not None:
            self.counts.reused_chunks += 1
            return known
        if self._pack is not None and not self._pack.has_room(len(chunk.frame)):
            full = self._seal()
            assert full is not None
            sealed.append(full)
        if self._pack is None:
            buffer = self._spare.pop() if self._spare else None
            pack_id = PackId(secrets.token_hex(8) + self.writer_id)
            self._pack = OpenPack(pack_id, buffer, sealing=self._sealing)
            self._uses.own.add(self._pack.pack_id)
        ref = self._pack.add(chunk)
        self._unindexed[chunk.chunk_id] = ref
        self._uses.packs.add(ref.pack_id)
        self.counts.new_chunks += 1
        self.counts.new_bytes += chunk.raw_length
        self.counts.stored_bytes += len(chunk.frame)
        return ref

    def _seal(self) -> SealedPack | None:
        if self._pack is None:
            return None
        pack = self._pack.seal()
        self._pack = None
        self._unput[pack.pack_id] = pack
        return pack

    def _read_back_run(self, run: Sequence[FrameRef], dropped: set[PackId]) -> None:
        pack_id = run[0].pack_id
        if pack_id not in dropped:
            drop_caches(self._objects, pack_id)
            dropped.add(pack_id)
        try:
            for ref, raw in zip(run, self._fetch(run), strict=True):
                if ref.pack_id not in self._uses.own:
                    frames.check_identity(raw, ref, self._sealing)
        except (IntegrityError, ObjectMissing) as exc:
            # What is there is of no use: the next job stores these chunks again, rather than fail like this one.
            self._index.forget_packs([pack_id])
            if isinstance(exc, ObjectMissing):
                self._forget_missing()
            raise

    def _forget_missing(self) -> None:
        """One pack that the index has is gone, and garbage collection takes many at a time: see which others are."""
        with self._lock:
            used = self._uses.packs - self._uses.own
        self._index.forget_packs(absent(self._objects, used, pack_key))

    def _publish_index(self) -> None:
        with self._lock:
            packs, self._unpublished, self._unpublished_entries = self._unpublished, [], 0
        if packs:
            self._objects.put(f"{INDEX}{secrets.token_hex(8)}{self.writer_id}", encode_index(packs))
