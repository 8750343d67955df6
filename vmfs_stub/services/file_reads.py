"""Guests' reads of backing files: from the page cache at once, else with the disk waited for off the event loop.

The kernel waits itself where it offers a ring: a hop to a thread and back costs two turns of the processor, for which a
guest waits twice when it is busy.  Whatever is not an ordinary read, such as the end of a file or an error, is
done once more in a worker thread, where there is one way to deal with it.
"""

from __future__ import annotations

import errno
import logging
import os

import outcome
import trio

from vmfs_stub.primary.files import FileCalls, read_fully
from vmfs_stub.primary.read_ring import ReadRing
from vmfs_stub.services.threads import Threads

log = logging.getLogger(__name__)

RING_ENTRIES = 256
"""Reads that the kernel waits for at once; more wait in threads."""
RING_BYTES_MAX = 64 << 10
"""Of one read: the event loop's thread does the copying, which of larger reads is better shared out to threads."""


class FileReads:
    """Reads from open files.  Without a ``ring`` threads wait."""

    def __init__(self, *, files: FileCalls, threads: Threads, ring: ReadRing | None) -> None:
        self._files = files
        self._threads = threads
        self._ring = ring
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._is_listening = False

    async def read(self, fd: int, size: int, offset: int) -> bytes | bytearray:
        """Up to ``size`` bytes at ``offset``, fewer only at end of file.  Not cancellable.  Raises OSError."""
        buffer, may_wait = bytearray(size), size <= RING_BYTES_MAX
        try:
            if self._files.call("read.cached", os.preadv, fd, [buffer], offset, os.RWF_NOWAIT) == size:
                return buffer
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                may_wait = False  # nor would the kernel read it without a thread
            elif exc.errno != errno.EAGAIN:
                raise
        if may_wait and await self._is_filled(fd, buffer, offset):
            return buffer
        return await self._threads.files(read_fully, self._files, "read.data", fd, size, offset)

    async def _is_filled(self, fd: int, buffer: bytearray, offset: int) -> bool:
        """Whether the kernel has read all of it."""
        ring = self._ring
        if ring is None or ring.is_full:
            return False
        if not self._is_listening:
            trio.lowlevel.spawn_system_task(self._listen, ring)
            self._is_listening = True
        try:
            number = self._files.call("read.ring", ring.begin, fd, buffer, offset)
        except OSError:
            return False
        self._waiting[number] = trio.lowlevel.current_task()
        # The buffer is the kernel's until it is done.
        count: int = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return count == len(buffer)

    async def _listen(self, ring: ReadRing) -> None:
        """Wake whoever waits for a read that is done."""
        while self._ring is ring:
            try:
                await trio.lowlevel.wait_readable(ring.fd)
            except trio.ClosedResourceError:
                return
            for number, result in ring.done() if self._ring is ring else ():
                task = self._waiting.pop(number, None)  # none where it was begun, and its reader was told of an error
                if task is not None:
                    trio.lowlevel.reschedule(task, outcome.Value(result))

    def close(self) -> None:
        """Give the ring back; nobody may wait for a read."""
        ring, self._ring = self._ring, None
        if ring is not None:
            if self._is_listening:
                trio.lowlevel.notify_closing(ring.fd)
            ring.close()


def open_ring() -> ReadRing | None:
    """A ring, or None where the kernel, a container or a limit does not allow one."""
    try:
        return ReadRing(RING_ENTRIES)
    except OSError as exc:
        log.info("reads wait in threads: there is no io_uring (%s)", exc.strerror)
        return None
