"""What is to be copied of a disk, part by part: residency and what changed decide, and neither leaves the daemon.

Chunks that have not changed since the last restore point are taken over from it by reference.  Of the others holes are
not read; what is wholly absent on primary is taken over, too; of what is absent in part the rest is recalled first.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Protocol

from vmfs_stub.core.changed import Changed
from vmfs_stub.core.chunking import chunk_count
from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.sites import FileCalls
from vmfs_stub.services.bandwidth import Bandwidth
from vmfs_stub.services.mover import Content, Part
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.set_aside import Kept, SetAside
from vmfs_stub.services.threads import Threads

PART_BYTES = 8 << 20
"""Data of a part: enough that telling of it costs nothing, little enough that a recall of mixed chunks is one step."""
ZEROS_CHUNKS_MAX = 1 << 16
"""Chunks of a hole in one part; they are entered into the file's table at once."""


class Copied(Protocol):
    """A file that is copied: an open disk, or a file that has what a disk had."""

    @property
    def fd(self) -> int: ...

    @property
    def label(self) -> str: ...

    @property
    def placeholder(self) -> Placeholder | None: ...

    def fstat(self) -> os.stat_result: ...


class DiskParts:
    """Cuts disks into parts; ``chunk_size`` is the store's."""

    def __init__(
        self, *, files: FileCalls, threads: Threads, recall: RecallService, chunk_size: int, bandwidth: Bandwidth
    ) -> None:
        self._files = files
        self._threads = threads
        self._recall = recall
        self._chunk_size = chunk_size
        self._bandwidth = bandwidth

    async def metered(
        self, disk: Copied, changed: Changed | None, *, read: Callable[[int], None], aside: SetAside | None = None
    ) -> AsyncGenerator[Part, None]:
        """All parts of ``disk``, those with data when they may be read; ``read`` is told of how many bytes.

        Without ``changed`` all of it may have changed.  Nobody changes it meanwhile, or what is changed goes ``aside``
        first, and these are the parts as of that moment.  Raises StoreError, IntegrityError, PrimaryError.
        """
        size = disk.fstat().st_size if aside is None else aside.size
        async with (
            aclosing(self._of(disk, changed, aside, size)) as parts,
            aclosing(self._bandwidth.metered(parts, size=size, chunk_size=self._chunk_size, read=read)) as metered,
        ):
            async for part in metered:
                yield part

    async def _of(
        self, disk: Copied, changed: Changed | None, aside: SetAside | None, size: int
    ) -> AsyncGenerator[Part, None]:
        count, at = chunk_count(size, self._chunk_size), 0
        while at < count:
            same = Extent(count, count) if changed is None else changed.unchanged(at, size=size)
            if aside is None:
                ranges = self._of_range(disk, at, same.start, size)
            else:
                ranges = self._of_changing(disk, aside, at, same.start)
            async with aclosing(ranges) as parts:
                async for part in parts:
                    yield part
            if changed is not None and same.length:
                yield Part(same, Content.STORED, changed.origin)
            at = same.end

    async def _of_changing(self, disk: Copied, aside: SetAside, at: int, count: int) -> AsyncGenerator[Part, None]:
        """The parts from chunk ``at`` up to ``count`` as they were; between two of them a guest may change any."""
        while at < count:
            kept, run = aside.run_at(at, count)
            if kept is Kept.IN_PART:
                await self._complete(aside, at, disk.label)
                continue
            if kept is Kept.UNTOUCHED:
                part = await self._untouched(disk, aside, run)
            elif kept is Kept.ABSENT:
                part = Part(run, Content.STORED, aside.origin)
            else:
                part = Part(Extent(at, min(run.end, at + self._step)), Content.DATA)
            if part is not None:
                yield part
                at = part.chunks.end

    async def _untouched(self, disk: Copied, aside: SetAside, run: Extent) -> Part | None:
        """The first part of a run of chunks that nobody has changed; None when a guest changed it meanwhile."""
        start, placeholder = run.start, disk.placeholder
        if placeholder is not None and not placeholder.ended:
            absent_count = min(run.length, placeholder.wholly_absent_count(start, size=aside.size))
            if absent_count:
                return Part(Extent(start, start + absent_count), Content.STORED, aside.origin)
            end = await self._recall_mixed(placeholder, start, min(run.end, start + self._step), aside.size)
            content = Content.DATA
        else:
            data = await self._threads.files(self._data, disk, start, run.end)
            if data.start <= start:
                end, content = min(data.end, start + self._step), Content.DATA
            else:
                end, content = min(data.start, start + ZEROS_CHUNKS_MAX), Content.ZEROS
        # What is changed of data from here on is set aside as a whole, which whoever reads it finds.
        still = await aside.wait_untouched(start, end)
        return Part(still, content) if still.length else None

    async def _complete(self, aside: SetAside, chunk: int, label: str) -> None:
        placeholder = aside.placeholder
        assert placeholder is not None
        try:
            await aside.complete(chunk, partial(self._recall.archived_chunk, placeholder))
        except OSError as exc:
            raise PrimaryIOError(f"{label}: what was set aside of it cannot be completed: {exc.strerror}") from exc

    async def _of_range(self, disk: Copied, at: int, count: int, size: int) -> AsyncGenerator[Part, None]:
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

    def _data(self, disk: Copied, at: int, count: int) -> Extent:
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
