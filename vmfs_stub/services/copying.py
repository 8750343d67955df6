"""Copying the contents of one disk into a backup: read, encode, append, put and read back, all at once.

The stages run at the same time, on both cores, and are bounded: what is read waits for what is put, so memory does not
grow with the disk.  Holes are not read, chunks of zeros not stored; chunks that are absent on primary are taken over by
reference.  Knows nothing of placeholders beyond which chunks are absent.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import trio

from vmfs_stub.core.chunking import FrameRef, chunk_count
from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.ids import SegmentId
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.backup_writer import BackupWriter, EncodedBatch
from vmfs_stub.store.packs import SealedPack
from vmfs_stub.store.segments import SegmentTable

BATCH_BYTES = 2 << 20
"""How much is read and encoded at once; large enough that the hops between threads do not count."""
HOLE_CHUNKS_MAX = 1 << 16
"""Chunks of a hole that are entered into the table at once."""
REUSED_BATCH = 1024
"""Reused frames that are read back together."""


@dataclass(slots=True)
class _Slot:
    """A batch on its way through the encoders, in file order."""

    length: int
    done: trio.Event = field(default_factory=trio.Event)
    batch: EncodedBatch | None = None


class Copier:
    """Copies disks into one backup; made by `open_copier`.

    ``reused`` receives the frames that are to be read back although this job did not store them, or is None.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        recall: RecallService,
        writer: BackupWriter,
        packs: trio.MemorySendChannel[SealedPack],
        reused: trio.MemorySendChannel[list[FrameRef]] | None,
        workers: int,
        progress: Callable[[int], None],
    ) -> None:
        self._files = files
        self._threads = threads
        self._recall = recall
        self._writer = writer
        self._packs = packs
        self._reused = reused
        self._workers = workers
        self._progress = progress

    async def copy(self, disk: Disk) -> tuple[SegmentId | None, ...]:
        """Copy all of ``disk``, which nobody changes meanwhile; returns its segments.

        Raises StoreError, IntegrityError, PrimaryIOError.
        """
        table = self._writer.begin_file()
        send, receive = trio.open_memory_channel[_Slot](self._workers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._encode_all, disk, send)
            async for slot in receive:
                await slot.done.wait()
                assert slot.batch is not None
                await self._append(table, slot.batch)
                self._progress(slot.length)
        for segment in table.close():
            await self._threads.transfer(self._writer.put_segment, segment)
        return tuple(table.ids)

    async def _encode_all(self, disk: Disk, slots: trio.MemorySendChannel[_Slot]) -> None:
        size = disk.fstat().st_size
        async with slots, aclosing(self._parts(disk, size)) as parts, trio.open_nursery() as nursery:
            async for chunks, batch in parts:
                start = chunks.start * self._writer.chunk_size
                slot = _Slot(min(size, chunks.end * self._writer.chunk_size) - start, batch=batch)
                await slots.send(slot)
                if batch is None:
                    nursery.start_soon(self._encode, disk, start, slot)
                else:
                    slot.done.set()

    async def _encode(self, disk: Disk, start: int, slot: _Slot) -> None:
        placeholder = disk.placeholder
        if placeholder is not None and not placeholder.is_resident(start, slot.length):
            raise AssertionError(f"{disk.label}: absent blocks would be backed up as zeros")
        slot.batch = await self._threads.compute(self._read_and_encode, disk, start, slot.length)
        slot.done.set()

    def _read_and_encode(self, disk: Disk, start: int, length: int) -> EncodedBatch:
        buffer = bytearray(length)
        try:
            count = self._files.call("archive.read", os.preadv, disk.fd, [buffer], start)
            if count != length:
                raise OSError(errno.EIO, f"{count} of {length} bytes at {start} could be read")
        except OSError as exc:
            raise PrimaryIOError(f"{disk.label}: reading it for the backup failed: {exc.strerror}") from exc
        return self._writer.encode(buffer)

    async def _append(self, table: SegmentTable, batch: EncodedBatch) -> None:
        appended = self._writer.append(batch)
        for segment in table.extend(appended.entries):
            await self._threads.transfer(self._writer.put_segment, segment)
        for pack in appended.sealed:
            await self._packs.send(pack)
        if self._reused is not None:
            reused = [ref for ref in appended.entries if ref is not None and not self._writer.is_new(ref)]
            if reused:
                await self._reused.send(reused)

    # Which parts of the file are read, and which are known without

    async def _parts(self, disk: Disk, size: int) -> AsyncGenerator[tuple[Extent, EncodedBatch | None], None]:
        """Consecutive ranges of chunks, each with its batch, or None when it must be read."""
        count, at = chunk_count(size, self._writer.chunk_size), 0
        while at < count:
            absent = self._wholly_absent(disk, at, size)
            if absent is not None and absent.length:
                yield absent, await self._by_reference(disk, absent)
                at = absent.end
                continue
            data = await self._threads.files(self._data_chunks, disk, at, count)
            if data.start > at:
                hole = Extent(at, min(data.start, at + HOLE_CHUNKS_MAX))
                yield hole, EncodedBatch((None,) * hole.length, bytearray())
                at = hole.end
                continue
            end = min(data.end, at + max(1, BATCH_BYTES // self._writer.chunk_size))
            end = await self._recall_mixed(disk, at, end, size)
            yield Extent(at, end), None
            at = end

    def _data_chunks(self, disk: Disk, at: int, count: int) -> Extent:
        """The next run of chunks from ``at`` on that hold data; empty at ``count`` when there is none."""
        chunk_size = self._writer.chunk_size
        if disk.placeholder is not None:
            # In a placeholder a hole may be an absent block as well as zeros.
            return Extent(at, count)
        try:
            start = self._files.call("archive.seek", os.lseek, disk.fd, at * chunk_size, os.SEEK_DATA)
            end = self._files.call("archive.seek", os.lseek, disk.fd, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise PrimaryIOError(f"{disk.label}: looking for data failed: {exc.strerror}") from exc
            return Extent(count, count)
        return Extent(max(at, start // chunk_size), min(count, -(-end // chunk_size)))

    def _wholly_absent(self, disk: Disk, at: int, size: int) -> Extent | None:
        """The run of chunks from ``at`` on of which every block is absent; it may be empty."""
        placeholder = disk.placeholder
        if placeholder is None:
            return None
        end, last = at, chunk_count(size, self._writer.chunk_size)
        while end < last and end - at < HOLE_CHUNKS_MAX and placeholder.is_wholly_absent(end, size=size):
            end += 1
        return Extent(at, end)

    async def _by_reference(self, disk: Disk, chunks: Extent) -> EncodedBatch:
        assert disk.placeholder is not None
        table = await self._recall.table(disk.placeholder)
        refs = await self._threads.transfer(table.locate, chunks.start, chunks.end)
        return EncodedBatch(tuple(refs), bytearray())

    async def _recall_mixed(self, disk: Disk, at: int, end: int, size: int) -> int:
        """Bring back chunks of which only a part is absent; returns where the next wholly absent one begins."""
        placeholder = disk.placeholder
        if placeholder is None:
            return end
        stop = next((chunk for chunk in range(at + 1, end) if placeholder.is_wholly_absent(chunk, size=size)), end)
        chunk_size = self._writer.chunk_size
        while absent := placeholder.absent_chunks(at * chunk_size, (stop - at) * chunk_size):
            await self._recall.recall_chunks(placeholder, absent, demand=False)
        return stop


@asynccontextmanager
async def open_copier(
    *,
    files: FileCalls,
    threads: Threads,
    recall: RecallService,
    writer: BackupWriter,
    workers: int,
    verify: bool,
    progress: Callable[[int], None],
) -> AsyncIterator[Copier]:
    """Copy disks within the block; at its end everything is put, durable and read back.

    With ``verify`` that goes for every frame that is referred to, reused ones included; else for new ones.
    Raises StoreError, IntegrityError.
    """
    packs_send, packs_receive = trio.open_memory_channel[SealedPack](0)
    reused_send, reused_receive = trio.open_memory_channel[list[FrameRef]](0)
    async with trio.open_nursery() as nursery:
        for _ in range(workers):
            nursery.start_soon(_put_packs, threads, writer, packs_receive.clone())
        nursery.start_soon(_read_back_reused, threads, writer, reused_receive)
        packs_receive.close()
        async with packs_send, reused_send:
            yield Copier(
                files=files,
                threads=threads,
                recall=recall,
                writer=writer,
                packs=packs_send,
                reused=reused_send if verify else None,
                workers=workers,
                progress=progress,
            )
            last = writer.finish()
            if last is not None:
                await packs_send.send(last)


async def _put_packs(threads: Threads, writer: BackupWriter, packs: trio.MemoryReceiveChannel[SealedPack]) -> None:
    async with packs:
        async for pack in packs:
            await threads.transfer(writer.put_pack, pack)
            await threads.transfer(writer.read_back, pack.refs)


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
