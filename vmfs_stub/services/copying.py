"""Copying files into a backup: read, encode, append, put and, where it is verified, read back, all at once.

The stages run at the same time, and are bounded: what is read waits for what is put, so memory does not grow with the
file.  Chunks of zeros are not stored.  Knows nothing of placeholders: it is told which parts of a file are in it, and
which the store has already.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import trio

from vmfs_stub.core.chunking import FrameRef, chunk_count
from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import PackId, SegmentId
from vmfs_stub.core.origin import Origin
from vmfs_stub.core.recall_plan import plan_fetches
from vmfs_stub.paced_io import pace, read_into
from vmfs_stub.primary.aside_file import take_set_aside
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.services.mover import Content, CopyOrder, Part
from vmfs_stub.services.origin import open_table
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.backup_writer import BackupWriter, EncodedBatch
from vmfs_stub.store.chunk_table import ChunkTable
from vmfs_stub.store.condemned import Condemned, read_condemned
from vmfs_stub.store.format import SEGMENT_CHUNKS
from vmfs_stub.store.frames import check_identity
from vmfs_stub.store.packs import SealedPack
from vmfs_stub.store.segments import Entry, SealedSegment, Segment, SegmentTable, entries_of
from vmfs_stub.store.store import Store

BATCH_BYTES = 2 << 20
"""How much is read and encoded at once; large enough that the hops between threads do not count."""
SLOTS_PER_WORKER = 2
"""Batches on their way: as many as it takes to keep all workers reading where every other one is stored already."""
REUSED_BATCH = 1024
"""Reused frames that are read back together."""


def batches_at_once(workers: int, *, beside_guests: bool) -> int:
    """How many are read and encoded at once: one more than cores are meant for, since one waits for the disk.

    Beside guests that use their disks it is not: their reads would wait behind its.
    """
    return workers if beside_guests else workers + 1


class BatchTurns:
    """In one of them a batch is read and encoded; all backups of a mover share them."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._limiter = trio.CapacityLimiter(workers)

    def next(self) -> trio.CapacityLimiter:
        """To be waited for, and held while the batch is worked on."""
        self._limiter.total_tokens = batches_at_once(self.workers, beside_guests=pace.beside_guests)
        return self._limiter


class StoredSegment(NamedTuple):
    """A segment of the file's origin that is one of the copy, too; both None: one of zeros."""

    id: SegmentId | None
    segment: Segment | None
    chunk_count: int


class Afresh(NamedTuple):
    """Chunks of the file's origin that are stored once more, from the store: what they lie in is not to be used."""

    refs: list[FrameRef | None]


class _Source(NamedTuple):
    """What is copied: see mover.Copying."""

    fd: int
    order: CopyOrder
    aside_fd: int | None


Taken: TypeAlias = StoredSegment | list[Entry | None]
"""What is taken over from an origin: a whole segment, or chunks of one."""


@dataclass(slots=True)
class _Slot:
    """A batch on its way through the encoders, in file order."""

    length: int
    done: trio.Event = field(default_factory=trio.Event)
    batch: EncodedBatch | None = None
    taken: Taken | None = None
    """Instead of a batch."""


class Copier:
    """Copies files into one backup; made by `open_copier`.

    ``copies`` are the segments of each file that was copied.  ``reused`` receives the frames that are to be read back
    although this job did not store them, or is None.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        store: Store,
        writer: BackupWriter,
        packs: trio.MemorySendChannel[SealedPack],
        segments: trio.MemorySendChannel[SealedSegment],
        reused: trio.MemorySendChannel[list[FrameRef]] | None,
        turns: BatchTurns,
    ) -> None:
        self._files = files
        self._threads = threads
        self._store = store
        self._writer = writer
        self._packs = packs
        self._segments = segments
        self._reused = reused
        self._turns = turns
        self.copies: list[tuple[SegmentId | None, ...]] = []

    async def copy(
        self,
        fd: int,
        order: CopyOrder,
        parts: AsyncIterable[Part],
        progress: Callable[[int], None],
        *,
        aside_fd: int | None = None,
    ) -> None:
        """See mover.Copying."""
        table, source = self._writer.begin_file(), _Source(fd, order, aside_fd)
        send, receive = trio.open_memory_channel[_Slot](SLOTS_PER_WORKER * self._turns.workers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._encode_all, source, parts, send)
            async for slot in receive:
                await slot.done.wait()
                if slot.taken is None:
                    assert slot.batch is not None
                    await self._append(table, slot.batch)
                else:
                    await self._take_over(table, slot.taken)
                progress(slot.length)
        for segment in table.close():
            await self._segments.send(segment)
        self.copies.append(tuple(table.ids))

    async def _encode_all(
        self, source: _Source, parts: AsyncIterable[Part], slots: trio.MemorySendChannel[_Slot]
    ) -> None:
        order = source.order
        # What is to be read back has to be known frame by frame.
        origins = _Origins(self._threads, self._store, order, as_it_is=self._reused is None)
        step = _step(self._writer.chunk_size)
        async with slots, trio.open_nursery() as nursery:
            async for part in parts:
                if part.content is not Content.DATA:
                    async with aclosing(origins.pieces(part)) as pieces:
                        async for chunks, found in pieces:
                            length = self._length(chunks, order)
                            if isinstance(found, Afresh):
                                await slots.send(slot := _Slot(length))
                                nursery.start_soon(self._encode_stored, found, slot)
                            else:
                                await slots.send(_ready(length, found))
                    continue
                for start in range(part.chunks.start, part.chunks.end, step):
                    slot = _Slot(self._length(Extent(start, min(part.chunks.end, start + step)), order))
                    await slots.send(slot)
                    nursery.start_soon(self._encode, source, start * self._writer.chunk_size, slot)

    def _length(self, chunks: Extent, order: CopyOrder) -> int:
        return min(order.size, chunks.end * self._writer.chunk_size) - chunks.start * self._writer.chunk_size

    async def _encode(self, source: _Source, start: int, slot: _Slot) -> None:
        async with self._turns.next():
            slot.batch = await self._threads.compute(self._read_and_encode, source, start, slot.length)
        slot.done.set()

    def _read_and_encode(self, source: _Source, start: int, length: int) -> EncodedBatch:
        buffer = bytearray(length)
        try:
            count = self._files.call("archive.read", read_into, source.fd, buffer, start)
            if source.aside_fd is not None:
                self._take_set_aside(source, source.aside_fd, start, buffer, count)
            elif count != length:
                raise OSError(errno.EIO, f"{count} of {length} bytes at {start} could be read")
        except OSError as exc:
            raise PrimaryIOError(f"{source.order.label}: reading it for the backup failed: {exc.strerror}") from exc
        return self._writer.encode(buffer)

    def _take_set_aside(self, source: _Source, fd: int, start: int, buffer: bytearray, count: int) -> None:
        """Only after the disk was read: what is not set aside by now had not been changed when it was."""
        size, chunk_size = source.order.size, self._writer.chunk_size
        take_set_aside(self._files, fd, buffer, start, read_bytes=count, size=size, chunk_size=chunk_size)

    async def _encode_stored(self, chunks: Afresh, slot: _Slot) -> None:
        slot.batch = await self._threads.transfer(self._fetch_and_encode, chunks.refs, slot.length)
        slot.done.set()

    def _fetch_and_encode(self, refs: Sequence[FrameRef | None], length: int) -> EncodedBatch:
        buffer = bytearray(length)
        wanted = ((at, ref) for at, ref in enumerate(refs) if ref is not None)
        for fetch in plan_fetches(wanted, fetch_bytes_max=BATCH_BYTES):
            raws = self._store.fetch(fetch.frames)
            for at, ref, raw in zip(fetch.chunks, fetch.frames, raws, strict=True):
                check_identity(raw, ref, self._store.sealing)
                start = at * self._writer.chunk_size
                buffer[start : start + len(raw)] = raw
        return self._writer.encode(buffer)

    async def _append(self, table: SegmentTable, batch: EncodedBatch) -> None:
        appended = self._writer.append(batch)
        await self._extend(table, entries_of(appended.entries))
        for pack in appended.sealed:
            await self._packs.send(pack)
        await self._prove(ref for ref in appended.entries if ref is not None and not self._writer.is_new(ref))

    async def _take_over(self, table: SegmentTable, taken: Taken) -> None:
        if isinstance(taken, StoredSegment):
            table.take_over(taken.id)
            self._writer.reuse_segment(taken.id, taken.segment, chunk_count=taken.chunk_count)
        else:
            self._writer.reuse(taken)
            await self._extend(table, taken)
            await self._prove(entry.ref for entry in taken if entry is not None)

    async def _extend(self, table: SegmentTable, entries: Sequence[Entry | None]) -> None:
        for segment in table.extend(entries):
            await self._segments.send(segment)

    async def _prove(self, reused: Iterable[FrameRef]) -> None:
        """Have frames read back that were stored before."""
        if self._reused is not None and (refs := list(reused)):
            await self._reused.send(refs)


def _ready(length: int, taken: Taken) -> _Slot:
    """Of which nothing has to be read."""
    slot = _Slot(length, taken=taken)
    slot.done.set()
    return slot


class _Origins:
    """What of a file is not read: zeros, and what its origins have, which is taken over or stored afresh.

    The table of an origin is opened when it is first asked for.  What a collector has condemned is not taken over: if
    that one died, its list stays though all on it is needed.  Of a segment the entries are, in one of the copy's own.
    With ``as_it_is`` whole segments are taken over where all of one is wanted, and entries of others unseen; without,
    each chunk is seen to be one that the file can have.
    """

    def __init__(self, threads: Threads, store: Store, order: CopyOrder, *, as_it_is: bool) -> None:
        self._threads = threads
        self._store = store
        self._order = order
        self._as_it_is = as_it_is
        self._step = _step(store.chunk_size)
        self._tables: dict[Origin, ChunkTable] = {}
        self._condemned = Condemned()
        """What was on lists when the last of these tables was opened."""

    async def pieces(self, part: Part) -> AsyncGenerator[tuple[Extent, Taken | Afresh], None]:
        """The chunks of a part that is not to be read, one segment or a part of one at a time."""
        at = part.chunks.start
        while at < part.chunks.end:
            number = at // SEGMENT_CHUNKS
            piece = Extent(at, min(part.chunks.end, (number + 1) * SEGMENT_CHUNKS))
            if part.content is Content.ZEROS:
                yield piece, self._zeros(number, piece)
            else:
                table = await self._table(part.origin)
                found = await self._found(table, number, piece)
                if not self._condemned.packs or self._condemned.packs.isdisjoint(_packs_of(found)):
                    yield piece, found
                else:
                    for start in range(piece.start, piece.end, self._step):
                        chunks = Extent(start, min(piece.end, start + self._step))
                        yield chunks, Afresh(await self._threads.background(table.locate, chunks.start, chunks.end))
            at = piece.end

    def _zeros(self, number: int, piece: Extent) -> Taken:
        """A hole may be of many million chunks: whole segments of it are no lists."""
        if piece == self._segment(number, self._order.size):
            return StoredSegment(None, None, piece.length)
        return [None] * piece.length

    async def _found(self, table: ChunkTable, number: int, piece: Extent) -> Taken:
        if not self._as_it_is:
            return entries_of(await self._threads.background(table.locate, piece.start, piece.end))
        # A segment is only taken over where it has as many chunks in the copy as in the origin.
        in_origin, in_copy = (self._segment(number, size) for size in (table.size, self._order.size))
        if piece == in_origin == in_copy:
            segment_id, segment = await self._threads.background(table.segment, number)
            if segment_id not in self._condemned.segments:
                return StoredSegment(segment_id, segment, piece.length)
        return await self._threads.background(table.entries, piece.start, piece.end)

    async def _table(self, origin: Origin | None) -> ChunkTable:
        assert origin is not None
        if origin not in self._tables:
            self._tables[origin] = await self._threads.background(open_table, self._store, origin)
            self._condemned = await self._threads.background(read_condemned, self._store.objects)
        return self._tables[origin]

    def _segment(self, number: int, size: int) -> Extent:
        """The chunks of a segment of a file of this size."""
        end = min(chunk_count(size, self._store.chunk_size), (number + 1) * SEGMENT_CHUNKS)
        return Extent(number * SEGMENT_CHUNKS, end)


def _packs_of(taken: Taken) -> Iterable[PackId]:
    if isinstance(taken, StoredSegment):
        return taken.segment.packs if taken.segment is not None else ()
    return {entry.pack_id for entry in taken if entry is not None}


def _step(chunk_size: int) -> int:
    """Chunks that are read and encoded at once."""
    return max(1, BATCH_BYTES // chunk_size)


@asynccontextmanager
async def open_copier(
    *, files: FileCalls, threads: Threads, store: Store, writer: BackupWriter, turns: BatchTurns, verify: bool
) -> AsyncIterator[Copier]:
    """Copy files within the block; at its end everything is durable, with ``verify`` read back; see mover.Backup.

    Raises StoreError, IntegrityError.
    """
    packs_send, packs_receive = trio.open_memory_channel[SealedPack](0)
    segments_send, segments_receive = trio.open_memory_channel[SealedSegment](0)
    reused_send, reused_receive = trio.open_memory_channel[list[FrameRef]](0)
    async with trio.open_nursery() as nursery:
        for _ in range(turns.workers):
            nursery.start_soon(_put_packs, threads, writer, packs_receive.clone(), verify)
            nursery.start_soon(_put_segments, threads, writer, segments_receive.clone())
        nursery.start_soon(_read_back_reused, threads, writer, reused_receive)
        packs_receive.close()
        segments_receive.close()
        async with packs_send, segments_send, reused_send:
            yield Copier(
                files=files,
                threads=threads,
                store=store,
                writer=writer,
                packs=packs_send,
                segments=segments_send,
                reused=reused_send if verify else None,
                turns=turns,
            )
            last = writer.finish()
            if last is not None:
                await packs_send.send(last)


async def _put_packs(
    threads: Threads, writer: BackupWriter, packs: trio.MemoryReceiveChannel[SealedPack], verify: bool
) -> None:
    async with packs:
        async for pack in packs:
            await threads.transfer(writer.put_pack, pack)
            if verify:
                await threads.transfer(writer.read_back, pack.refs)


async def _put_segments(
    threads: Threads, writer: BackupWriter, segments: trio.MemoryReceiveChannel[SealedSegment]
) -> None:
    async with segments:
        async for segment in segments:
            await threads.transfer(writer.put_segment, segment)


async def _read_back_reused(
    threads: Threads, writer: BackupWriter, reused: trio.MemoryReceiveChannel[list[FrameRef]]
) -> None:
    waiting: list[FrameRef] = []
    async for refs in reused:
        waiting += refs
        if len(waiting) >= REUSED_BATCH:
            await threads.transfer(writer.read_back, waiting)
            waiting = []
    if waiting:
        await threads.transfer(writer.read_back, waiting)
