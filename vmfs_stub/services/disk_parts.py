"""What is to be copied of a disk, part by part: residency and what changed decide, and neither leaves the daemon.

Chunks that have not changed since the last restore point are taken over from it by reference.  Of the others holes are
not read; what is wholly absent on primary is taken over, too; of what is absent in part the rest is recalled first.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing

from vmfs_stub.core.changed import Changed
from vmfs_stub.core.chunking import chunk_count
from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.mover import Content, Part
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.threads import Threads

PART_BYTES = 8 << 20
"""Data of a part: enough that telling of it costs nothing, little enough that a recall of mixed chunks is one step."""
ZEROS_CHUNKS_MAX = 1 << 16
"""Chunks of a hole in one part; they are entered into the file's table at once."""


class DiskParts:
    """Cuts disks into parts; ``chunk_size`` is the store's."""

    def __init__(self, *, files: FileCalls, threads: Threads, recall: RecallService, chunk_size: int) -> None:
        self._files = files
        self._threads = threads
        self._recall = recall
        self._chunk_size = chunk_size

    async def of(self, disk: Disk, changed: Changed | None = None) -> AsyncGenerator[Part, None]:
        """All parts of ``disk``, which nobody changes meanwhile; without ``changed`` all of it may have changed.

        Raises StoreError, IntegrityError, PrimaryError.
        """
        size = disk.fstat().st_size
        count, at = chunk_count(size, self._chunk_size), 0
        while at < count:
            same = Extent(count, count) if changed is None else changed.unchanged(at, size=size)
            async with aclosing(self._of_range(disk, at, same.start, size)) as parts:
                async for part in parts:
                    yield part
            if changed is not None and same.length:
                yield Part(same, Content.STORED, changed.origin)
            at = same.end

    async def _of_range(self, disk: Disk, at: int, count: int, size: int) -> AsyncGenerator[Part, None]:
        """The parts from chunk ``at`` up to ``count``."""
        while at < count:
            if disk.placeholder is None:
                data = await self._threads.files(self._data, disk, at, count)
                if data.start > at:
                    part = Part(Extent(at, min(data.start, at + ZEROS_CHUNKS_MAX)), Content.ZEROS)
                    yield part
                    at = part.chunks.end
                    continue
                end = data.end
            else:
                absent_count = min(count - at, disk.placeholder.wholly_absent_count(at, size=size))
                if absent_count:
                    yield Part(Extent(at, at + absent_count), Content.STORED, disk.placeholder.origin)
                    at += absent_count
                    continue
                # In a placeholder a hole may be an absent block as well as zeros: all of it is read.
                end = await self._recall_mixed(disk.placeholder, at, min(count, at + self._step), size)
            for start in range(at, end, self._step):
                yield Part(Extent(start, min(end, start + self._step)), Content.DATA)
            at = end

    @property
    def _step(self) -> int:
        return max(1, PART_BYTES // self._chunk_size)

    def _data(self, disk: Disk, at: int, count: int) -> Extent:
        """The next run of chunks from ``at`` on that hold data; empty at ``count`` when there is none."""
        try:
            start = self._files.call("archive.seek", os.lseek, disk.fd, at * self._chunk_size, os.SEEK_DATA)
            end = self._files.call("archive.seek", os.lseek, disk.fd, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise PrimaryIOError(f"{disk.label}: looking for data failed: {exc.strerror}") from exc
            return Extent(count, count)
        first = min(count, max(at, start // self._chunk_size))
        return Extent(first, max(first, min(count, -(-end // self._chunk_size))))

    async def _recall_mixed(self, placeholder: Placeholder, at: int, end: int, size: int) -> int:
        """Bring back chunks of which only a part is absent; returns where the next wholly absent one begins."""
        stop = next((chunk for chunk in range(at + 1, end) if placeholder.is_wholly_absent(chunk, size=size)), end)
        offset, length = at * self._chunk_size, (stop - at) * self._chunk_size
        while absent := placeholder.absent_chunks(offset, length):
            await self._recall.recall_chunks(placeholder, absent, demand=False)
        if not placeholder.is_resident(offset, min(length, size - offset)):
            raise AssertionError(f"{placeholder.label}: absent blocks would be backed up as zeros")
        return stop
