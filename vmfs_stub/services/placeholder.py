"""A placeholder that is open: which of its blocks are here, and the order in which that changes.

Invariants:
* a bit is set after the data is in the file, while the chunk is locked, with no await in between the last look at the
  bits and the file call that relies on it;
* a fill writes only blocks whose bit is clear, and never beyond the archived limit or the end of the file;
* after a failed sync everything is an error: what it covered is not known any more.
Knows nothing of the store: whoever has the bytes of a chunk calls `fill`.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from vmfs_stub.core.chunking import BLOCK_SIZE
from vmfs_stub.core.errors import MapFrozen
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.names import PLACEHOLDER_XATTR
from vmfs_stub.core.origin import Origin
from vmfs_stub.core.residency import block_count, blocks_merged, blocks_replaced, blocks_touched
from vmfs_stub.paced_io import WriteBackFailed, write_buffers
from vmfs_stub.primary.durable_map import MapState
from vmfs_stub.primary.files import FileCalls, punch_hole
from vmfs_stub.primary.placeholder import PlaceholderMaps
from vmfs_stub.primary.recall_note import note_recalled
from vmfs_stub.services.locks import RangeLock, SharedSync
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.objects import Buffer

log = logging.getLogger(__name__)

_ANY_CHUNK = 1 << 62
"""End of a range that holds every chunk."""

PUNCH_BYTES_MAX = 256 << 20
"""How much of a file one punch releases, so that a chunk is not locked for long."""


class Placeholder:
    """Residency of one open disk.

    ``chunk_blocks`` is the number of blocks of a chunk; ``maps`` its record and maps; ``label`` names it in messages.
    """

    def __init__(self, *, files: FileCalls, threads: Threads, fd: int, maps: PlaceholderMaps, label: str) -> None:
        self._files = files
        self._threads = threads
        self._fd = fd
        self._locks = RangeLock()
        self.maps = maps
        self.label = label
        self.chunk_size = maps.durable.header.chunk_size
        self.chunk_blocks = self.chunk_size // BLOCK_SIZE
        self.sync = SharedSync(self._sync)
        self._maps_lock = trio.Lock()
        self.ended = False
        """Graduated, laid down or superseded: the maps are closed, and nothing here may touch them."""
        self._absent_from = 0
        """No chunk before this one holds an absent block: none becomes absent again."""

    @property
    def origin(self) -> Origin:
        """The stored file that it stands for."""
        record = self.maps.record
        return Origin(record.store_id, record.vm_id, record.point_id, record.file_index, record.size, self.chunk_size)

    # What is here

    def check(self) -> None:
        """Raises MapFrozen after a failed sync."""
        if not self.ended and self.maps.live.frozen:
            raise MapFrozen(f"{self.label}: a sync of this disk failed; what it covered is not certain any more")

    def is_resident(self, offset: int, length: int) -> bool:
        """Whether ``length`` bytes at ``offset`` can be read from the backing file."""
        touched = blocks_touched(offset, length)
        return self.ended or self.maps.live.is_resident(touched.start, touched.end)

    def absent_chunks(self, offset: int, length: int) -> list[int]:
        """Indexes of the chunks that hold absent blocks of this byte range, ascending."""
        touched = blocks_touched(offset, length)
        chunks: list[int] = []
        for run in () if self.ended else self.maps.live.absent_runs(touched.start, touched.end):
            first = run.start // self.chunk_blocks
            if chunks and chunks[-1] == first:
                first += 1
            chunks.extend(range(first, (run.end - 1) // self.chunk_blocks + 1))
        return chunks

    def is_wholly_absent(self, chunk: int, *, size: int) -> bool:
        """Whether a chunk is as it was archived, with no byte of it here, so that a reference stands for it.

        ``size`` is the file's size now: a chunk that was cut or extended since differs from the archived one.
        """
        live, first, end = self.maps.live, chunk * self.chunk_blocks, (chunk + 1) * self.chunk_size
        archived_end = min(end, self.maps.record.size)
        if archived_end != min(end, size) or live.archived_limit < archived_end:
            return False
        blocks = block_count(archived_end) - first
        return sum(run.length for run in live.absent_runs(first, first + blocks)) == blocks > 0

    def wholly_absent_count(self, chunk: int, *, size: int) -> int:
        """How many chunks from ``chunk`` on are wholly absent, as far as one look tells; 0 when it is not."""
        live, first = self.maps.live, chunk * self.chunk_blocks
        run = next(live.absent_runs(first, block_count(self.maps.record.size)), None)
        if run is None or run.start != first:
            return 0
        whole_end = min(self.maps.record.size, size, live.archived_limit) // self.chunk_size
        return max(
            min(run.length // self.chunk_blocks, whole_end - chunk), int(self.is_wholly_absent(chunk, size=size))
        )

    def absent_bytes(self) -> int:
        """Bytes that are still to come back, in whole blocks."""
        return self.maps.live.absent_count() * BLOCK_SIZE

    def next_absent(self, chunk: int) -> int | None:
        """The first chunk from ``chunk`` on that holds an absent block; None when there is none."""
        if self.ended:
            return None
        first = chunk * self.chunk_blocks
        run = next(self.maps.live.absent_runs(first, block_count(self.maps.record.size)), None)
        return None if run is None else run.start // self.chunk_blocks

    def is_whole(self) -> bool:
        """Whether nothing of it is absent, and it has not ended."""
        found = self.next_absent(self._absent_from)
        if found is not None:
            self._absent_from = found
        return found is None and not self.ended

    # Changes

    async def fill(self, first_chunk: int, raws: Sequence[Buffer | None], *, paced: bool) -> None:
        """Put recalled chunks where blocks are still absent; None is a chunk of zeros.

        ``raws`` are the archived bytes of consecutive chunks from ``first_chunk`` on; ``paced`` when no guest waits for
        them.  Raises OSError, MapFrozen.
        """
        end_chunk = first_chunk + len(raws)
        async with self._locks.hold(first_chunk, end_chunk):
            if self.ended:
                return
            live = self.maps.live
            runs = list(live.absent_runs(first_chunk * self.chunk_blocks, end_chunk * self.chunk_blocks))
            if not runs:
                return
            try:
                await self._threads.files(self._write_runs, runs, first_chunk, raws, live.archived_limit, paced)
            except WriteBackFailed as exc:
                raise self.freeze(exc) from exc
            for run in runs:
                live.set_resident(run.start, run.end)

    def _write_runs(
        self, runs: Sequence[Extent], first_chunk: int, raws: Sequence[Buffer | None], limit: int, paced: bool
    ) -> None:
        for run in runs:
            at, run_end = run.start * BLOCK_SIZE, min(run.end * BLOCK_SIZE, limit)
            while at < run_end:
                end, parts = at, []
                while end < run_end and (raw := raws[end // self.chunk_size - first_chunk]) is not None:
                    chunk_start = end // self.chunk_size * self.chunk_size
                    part_end = min(run_end, chunk_start + self.chunk_size)
                    part = memoryview(raw)[end - chunk_start : part_end - chunk_start]
                    if len(part) != part_end - end:
                        raise OSError(errno.EIO, "a recalled chunk is shorter than what was archived")
                    parts.append(part)
                    end = part_end
                if parts:
                    self._files.call("recall.fill", write_buffers, self._fd, parts, at, paced=paced)
                else:
                    while end < run_end and raws[end // self.chunk_size - first_chunk] is None:
                        end = min(run_end, (end // self.chunk_size + 1) * self.chunk_size)
                    # Not only left alone: a guest's write that failed half way may have left bytes here.
                    self._files.call("recall.fill_zeros", punch_hole, self._fd, at, end - at)
                at = end

    async def write(self, offset: int, data: bytes) -> int | None:
        """Write guest data; the number of bytes written, or None when it could not be done as things are now.

        That is: a block that is only partly covered is absent, or this placeholder has ended.  Whole blocks need
        nothing of what was archived.  Raises MapFrozen, OSError.
        """
        first, end = offset // self.chunk_size, -(-(offset + len(data)) // self.chunk_size)
        async with self._locks.hold(first, end):
            if self.ended:
                return None
            live, size = self.maps.live, os.fstat(self._fd).st_size
            if not all(live.is_resident(b, b + 1) for b in blocks_merged(offset, len(data), size=size)):
                return None
            if offset + len(data) > size:
                await self._keep_limit()
            written = await self._threads.files(self._files.call, "write.data", os.pwrite, self._fd, data, offset)
            replaced = blocks_replaced(offset, written, size=size)
            live.set_resident(replaced.start, replaced.end)
            live.set_guest_mtime(time.time_ns())
            return self._kept_of(offset, written)

    def _kept_of(self, offset: int, written: int) -> int:
        """How much of a write counts: a short one may end in an absent block, which stays as it was archived."""
        last = (offset + written - 1) // BLOCK_SIZE
        if written == 0 or self.maps.live.is_resident(last, last + 1):
            return written
        if last * BLOCK_SIZE <= offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return last * BLOCK_SIZE - offset

    async def truncate(self, size: int) -> bool:
        """Cut or extend the file to ``size`` bytes; false when this has ended.  Raises MapFrozen, OSError."""
        async with self._locks.hold(0, _ANY_CHUNK):
            if self.ended:
                return False
            if size > os.fstat(self._fd).st_size:
                await self._keep_limit()
            await self._threads.files(self._files.call, "write.truncate", os.ftruncate, self._fd, size)
            self.maps.live.lower_archived_limit(size)
            self.maps.live.set_guest_mtime(time.time_ns())
        return True

    async def _keep_limit(self) -> None:
        """Before the file grows: the limit is durable, or a power loss could bring back what was cut off."""
        if self.maps.durable.header.archived_limit != self.maps.live.archived_limit:
            await self.sync()

    async def set_times(self, *, atime_ns: int, mtime_ns: int) -> bool:
        """Set both times (nanoseconds since the epoch); false when this has ended.  Raises OSError."""
        async with self._locks.hold(0, _ANY_CHUNK):
            if self.ended:
                return False
            await self._threads.files(self._files.call, "write.times", os.utime, self._fd, ns=(atime_ns, mtime_ns))
            self.maps.live.set_guest_mtime(mtime_ns)
        return True

    async def punch_absent(self) -> None:
        """Release the space of all absent blocks, then note that this is done.  Raises OSError, MapFrozen."""
        chunk, step = 0, max(1, PUNCH_BYTES_MAX // self.chunk_size)
        while (found := self.next_absent(chunk)) is not None:
            chunk = found + step
            async with self._locks.hold(found, chunk):
                runs = list(self.maps.live.absent_runs(found * self.chunk_blocks, chunk * self.chunk_blocks))
                await self._threads.files(self._punch, runs, self.maps.live.archived_limit)
        await self.set_state(MapState.PUNCHED, only_from=(MapState.PREPARED, MapState.COMMITTED))

    def _punch(self, runs: Sequence[Extent], limit: int) -> None:
        # What lies behind the limit in its block is the file's own, though the block is absent: a power loss can have
        # left there what a guest wrote.
        has_more = os.fstat(self._fd).st_size > limit
        for run in runs:
            start, end = run.start * BLOCK_SIZE, run.end * BLOCK_SIZE
            length = (min(end, limit) if has_more else end) - start
            if length > 0:
                self._files.call("archive.punch", punch_hole, self._fd, start, length)

    # Making it durable

    async def _sync(self) -> None:
        async with self._maps_lock:
            if self.ended:
                return
            self.check()
            # The bits are taken before the data is synced: a bit that is set meanwhile waits for the next sync.
            pages, header = self.maps.live.take_dirty(), self.maps.current_header()
            try:
                # Not to be cancelled between taking the bits and writing them: nobody would write them any more.
                with trio.CancelScope(shield=True):
                    await self._threads.files(self.maps.sync, self._files, self._fd, pages, header)
            except OSError as exc:
                raise self.freeze(exc) from exc

    def freeze(self, cause: OSError) -> MapFrozen:
        """A sync of the file or its map failed: nothing is certain from here on; returns what to raise."""
        if not self.ended:
            self.maps.live.freeze()
        log.error("%s: syncing failed (%s); the disk is frozen", self.label, cause)
        return MapFrozen(f"{self.label}: syncing failed ({cause.strerror}); the disk gives errors until reboot")

    @property
    def is_frozen(self) -> bool:
        """Whether a sync failed in this boot."""
        return not self.ended and self.maps.live.frozen

    @property
    def mtime_ns(self) -> int:
        """The modification time that stat reports: the archived one until a guest changes the file."""
        return self.maps.live.guest_mtime_ns or self.maps.record.mtime_ns

    @property
    def is_dirty(self) -> bool:
        """Whether a sync would have anything to write to the durable map."""
        return not self.ended and self.maps.live.is_dirty and not self.maps.live.frozen

    async def set_state(self, state: MapState, *, only_from: Collection[MapState] = tuple(MapState)) -> None:
        """Durably move to another state of its life, if it is in one of these and has not ended.  Raises OSError."""
        async with self._maps_lock:
            if self.ended or self.maps.durable.header.state not in only_from:
                return
            await self._threads.files(self.maps.durable.set_state, state)

    async def set_hydrate(self) -> None:
        """Durably note that this placeholder is coming back as a whole, also after a restart.  Raises OSError."""
        async with self._maps_lock:
            if not self.ended and not self.maps.durable.header.hydrate:
                header = replace(self.maps.durable.header, hydrate=True)
                await self._threads.files(self.maps.durable.update, {}, header)

    @asynccontextmanager
    async def superseding(self, *, is_superseded: Callable[[], bool]) -> AsyncIterator[None]:
        """Within the block the file becomes another placeholder; nothing is filled or written by this one meanwhile.

        If it did, as ``is_superseded`` tells at the end, this one ends and its maps are closed; else it goes on.
        """
        async with self._locks.hold(0, _ANY_CHUNK), self._maps_lock:
            try:
                yield
            finally:
                if is_superseded():
                    self.ended = True
                    self.maps.live.close(discard=True)
                    self.maps.durable.close()

    async def lay_down(self) -> None:
        """Sync, and give up the volatile map; nobody uses this object afterwards.  Raises OSError."""
        async with self._locks.hold(0, _ANY_CHUNK), self._maps_lock:
            self.ended = True
            await self._threads.files(self.maps.lay_down, self._files, self._fd)

    async def graduate(self) -> bool:
        """Turn the file into an ordinary one; every block is resident.  Raises MapFrozen, OSError.

        False when it has ended meanwhile: whoever ended it does what comes after.

        Order: data and bits durable, state noted, times set, the time of the recall noted, record removed and that
        durable.  The map goes last, by the caller, after the pin.
        """
        async with self._locks.hold(0, _ANY_CHUNK):
            if self.ended:
                return False
            if self.maps.live.absent_count():
                raise AssertionError(f"{self.label}: graduation with absent blocks")
            await self.sync()
            async with self._maps_lock:
                await self._threads.files(self.maps.durable.set_state, MapState.GRADUATING)
                await self._threads.files(self._remove_record)
                self.ended = True
                self.maps.live.close(discard=True)
                self.maps.durable.close()
        return True

    def _remove_record(self) -> None:
        mtime_ns = self.maps.live.guest_mtime_ns or self.maps.record.mtime_ns
        atime_ns = os.fstat(self._fd).st_atime_ns
        self._files.call("graduate.times", os.utime, self._fd, ns=(atime_ns, mtime_ns))
        note_recalled(self._files, self._fd, label=self.label)
        try:
            self._files.call("graduate.record", os.removexattr, self._fd, PLACEHOLDER_XATTR)
        except OSError as exc:
            # An earlier try got this far, and failed in the sync.
            if exc.errno != errno.ENODATA:
                raise
        self._files.call("graduate.sync", os.fsync, self._fd)
