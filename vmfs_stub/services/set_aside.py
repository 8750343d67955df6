"""A disk as it was at one moment, while guests go on writing: what they change is set aside before.

Whoever is about to change bytes calls `keep` first, and waits for no more than one read and one write of the chunks
that it changes.  A guest's write is never refused, nor fails, for a backup: what cannot be set aside ends the backup.
Invariants:
* from the moment on, no byte of a chunk that is not copied is changed before `keep` has returned;
* `keep` sets aside what the chunk *was*: its bytes, or that it was absent, wholly or in part.  Filling in what is
  absent changes nothing of that, so it passes by here;
* what was said to be copied is not set aside any more, and never read again for this backup.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from vmfs_stub.core.chunking import BLOCK_SIZE, chunk_count
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.origin import Origin
from vmfs_stub.primary.aside_file import lay_out, mark
from vmfs_stub.primary.files import FileCalls, read_fully, write_fully
from vmfs_stub.services.locks import RangeLock
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.objects import Buffer

log = logging.getLogger(__name__)

AT_ONCE_BYTES_MAX: Final = 64 << 20
"""A guest that cuts off more than this does not wait until it is set aside: the backup ends."""
_STEP_BYTES: Final = 1 << 20
_ANY_CHUNK: Final = 1 << 62


class Kept(IntEnum):
    """What is known of a chunk."""

    UNTOUCHED = 0
    """Nobody has changed it since the moment."""
    WHOLE = 1
    """All its bytes are set aside."""
    IN_PART = 2
    """So are those that were here; the others are its placeholder's."""
    ABSENT = 3
    """It was not here: it is as its placeholder's restore point has it."""


_OTHERS: Final = {kept: re.compile(b"[^" + re.escape(bytes([kept])) + b"]") for kept in Kept}


@dataclass(slots=True)
class Room:
    """How much may be set aside by one backup, and what must stay free on its filesystem, in bytes."""

    bytes_max: int
    floor_percent: float
    used_bytes: int = 0

    def take(self, count: int, fd: int) -> None:
        """So many bytes more are about to be written there.  Raises OSError when they are too many."""
        if self.used_bytes + count > self.bytes_max:
            raise OSError(errno.EDQUOT, f"more than {self.bytes_max} bytes ([jobs] set_aside_bytes_max)")
        self.check_free(fd)
        self.used_bytes += count

    def check_free(self, fd: int) -> None:
        """Raises OSError when less is free than must stay so."""
        space = os.fstatvfs(fd)
        if space.f_bavail * 100 < space.f_blocks * self.floor_percent:
            raise OSError(errno.ENOSPC, f"less than {self.floor_percent:g} % are free ([primary] free_floor_percent)")


class SetAside:
    """One disk; made before the moment, `begin` is the moment, `close` the end.

    ``size`` is the disk's at the moment, ``fd`` that of the private file, which the mover reads, too; ``reason`` is why
    the backup cannot go on, and ``on_end`` is then called once.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        disk_fd: int,
        fd: int,
        chunk_size: int,
        room: Room,
        label: str,
        on_end: Callable[[], None],
    ) -> None:
        self._files = files
        self._threads = threads
        self._disk_fd = disk_fd
        self.fd = fd
        self._chunk_size = chunk_size
        self._room = room
        self._label = label
        self._on_end = on_end
        self._locks = RangeLock()
        self._kept = bytearray()
        """One `Kept` for each chunk; only what was touched takes memory."""
        self._absent: dict[int, list[Extent]] = {}
        """Of chunks that are kept in part, the byte ranges that were not here."""
        self._copied = 0
        """Chunks before this one are not read any more."""
        self._dealt_bytes = 0
        self.size = 0
        self.placeholder: Placeholder | None = None
        """What the disk was at the moment; it may have ended since."""
        self.reason = ""

    def lay_out(self, size: int) -> None:
        """Get ready for a disk of this size.  Blocking.  Raises OSError."""
        lay_out(self._files, self.fd, size=size, chunk_size=self._chunk_size)
        self.size = size
        self._kept = bytearray(chunk_count(size, self._chunk_size))

    def begin(self, placeholder: Placeholder | None) -> None:
        """The moment: no change is under way."""
        self.placeholder = placeholder

    @property
    def origin(self) -> Origin | None:
        """The stored file of which the chunks are that were absent at the moment."""
        return None if self.placeholder is None else self.placeholder.origin

    # Guests

    async def keep(self, offset: int, length: int, placeholder: Placeholder | None) -> None:
        """``length`` bytes at ``offset`` of the disk are about to be changed.  Raises nothing."""
        wanted = self._at_stake(offset, length)
        if self.reason or not self._has_untouched(wanted):
            return
        try:
            if wanted.length * self._chunk_size > AT_ONCE_BYTES_MAX:
                raise OSError(errno.EFBIG, "a guest changed too much of it at once")
            async with self._locks.hold(wanted.start, wanted.end):
                at = max(wanted.start, self._copied)
                while not self.reason and (run := self.next_of(Kept.UNTOUCHED, at, wanted.end)).length:
                    at = await self._keep_some(run, placeholder)
        except OSError as exc:
            self.end(f"what guests changed could not be set aside: {exc.strerror}")
        except Exception:
            log.exception("%s: setting aside met a programming error", self._label)
            self.end("internal error: a bug in vmfs-stub, whose traceback is in the log")

    def _at_stake(self, offset: int, length: int) -> Extent:
        first = max(offset // self._chunk_size, self._copied)
        end = chunk_count(min(offset + length, self.size), self._chunk_size) if length > 0 else 0
        return Extent(first, max(first, end))

    def _has_untouched(self, chunks: Extent) -> bool:
        return self._kept.find(Kept.UNTOUCHED, chunks.start, chunks.end) >= 0

    async def _keep_some(self, run: Extent, placeholder: Placeholder | None) -> int:
        """Keep the first chunks of a run that nobody has changed; returns where the others begin."""
        chunks = Extent(run.start, min(run.end, run.start + max(1, _STEP_BYTES // self._chunk_size)))
        absent: list[list[Extent]] = [[] for _ in range(chunks.length)]
        if placeholder is not None and not placeholder.ended:
            if placeholder.is_wholly_absent(run.start, size=self.size):
                self._kept[run.start] = Kept.ABSENT
                return run.start + 1
            chunks = self._until_wholly_absent(chunks, placeholder)
            absent = [self._absent_in(chunk, placeholder) for chunk in range(chunks.start, chunks.end)]
        await self._threads.files(self._save, chunks, absent)
        for chunk, ranges in zip(range(chunks.start, chunks.end), absent, strict=False):
            self._kept[chunk] = Kept.IN_PART if ranges else Kept.WHOLE
            if ranges:
                self._absent[chunk] = ranges
        return chunks.end

    def _until_wholly_absent(self, chunks: Extent, placeholder: Placeholder) -> Extent:
        numbers = range(chunks.start + 1, chunks.end)
        stop = next((n for n in numbers if placeholder.is_wholly_absent(n, size=self.size)), chunks.end)
        return Extent(chunks.start, stop)

    def _absent_in(self, chunk: int, placeholder: Placeholder) -> list[Extent]:
        """The byte ranges of a chunk that are its restore point's: absent, and not behind the archived limit."""
        live, blocks = placeholder.maps.live, placeholder.chunk_blocks
        limit = min(live.archived_limit, self.size)
        runs = live.absent_runs(chunk * blocks, (chunk + 1) * blocks)
        ranges = [Extent(run.start * BLOCK_SIZE, min(run.end * BLOCK_SIZE, limit)) for run in runs]
        return [each for each in ranges if each.end > each.start]

    def _save(self, chunks: Extent, absent: list[list[Extent]]) -> None:
        start, end = chunks.start * self._chunk_size, min(self.size, chunks.end * self._chunk_size)
        data = read_fully(self._files, "aside.read", self._disk_fd, end - start, start)
        if len(data) != end - start:
            raise OSError(errno.EIO, "the disk is shorter than it was")
        for number in range(chunks.length):
            part = data[number * self._chunk_size : (number + 1) * self._chunk_size]
            if part != bytes(len(part)):
                self._room.take(len(part), self.fd)
                self._files.call("aside.write", write_fully, self.fd, part, start + number * self._chunk_size)
            if not absent[number]:
                chunk = chunks.start + number
                mark(self._files, self.fd, Extent(chunk, chunk + 1), size=self.size)

    def end(self, reason: str) -> None:
        """The backup cannot go on; nothing is set aside any more."""
        if not self.reason:
            self.reason = reason
            log.warning("%s: its backup ends: %s", self._label, reason)
            self._on_end()

    # The backup

    def next_of(self, kept: Kept, at: int, end: int) -> Extent:
        """The next run of such chunks from ``at`` on; empty at ``end`` when there is none."""
        start = self._kept.find(kept, at, end)
        if start < 0:
            return Extent(end, end)
        other = _OTHERS[kept].search(self._kept, start, end)
        return Extent(start, end if other is None else other.start())

    def run_at(self, at: int, end: int) -> tuple[Kept, Extent]:
        """What is known of chunk ``at``, and of how many after it the same, up to ``end``."""
        kept = Kept(self._kept[at])
        return kept, self.next_of(kept, at, end)

    async def wait_untouched(self, start: int, end: int) -> Extent:
        """Which chunks, the first of [start, end), nobody has changed; empty when ``start`` is not such a one.

        Of these all that is kept from now on is what is here now: a chunk that was being kept was perhaps seen when it
        was absent in part, so that it has no mark though it has been filled in meanwhile.
        """
        async with self._locks.hold(start, end):
            still = self.next_of(Kept.UNTOUCHED, start, end)
        return still if still.start == start else Extent(start, start)

    async def complete(self, chunk: int, fetch: Callable[[int], Awaitable[Buffer | None]]) -> None:
        """Of a chunk that is kept in part, put in the rest, which ``fetch`` gets from its restore point.

        Raises as ``fetch``, OSError.
        """
        raw = await fetch(chunk)
        await self._threads.files(self._fill, chunk, self._absent.pop(chunk), raw)
        self._kept[chunk] = Kept.WHOLE

    def _fill(self, chunk: int, ranges: list[Extent], raw: Buffer | None) -> None:
        for each in ranges:
            start = each.start - chunk * self._chunk_size
            part = bytes(each.length) if raw is None else memoryview(raw)[start : start + each.length]
            if len(part) != each.length:
                raise OSError(errno.EIO, "an archived chunk is shorter than what was archived")
            self._room.take(each.length, self.fd)
            self._files.call("aside.fill", write_fully, self.fd, part, each.start)
        mark(self._files, self.fd, Extent(chunk, chunk + 1), size=self.size)

    def dealt_with(self, count: int) -> None:
        """So many bytes more, in the order of the disk, are copied, and not read any more."""
        self._dealt_bytes += count
        is_over = self._dealt_bytes >= self.size
        self._copied = len(self._kept) if is_over else self._dealt_bytes // self._chunk_size

    async def close(self) -> None:
        """Give the file back; the disk does not know of this any more, nor does the mover."""
        async with self._locks.hold(0, _ANY_CHUNK):
            os.close(self.fd)
