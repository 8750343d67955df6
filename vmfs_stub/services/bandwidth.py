"""How fast backups read disks, all of them together: by what the clock on the wall shows now.

A part of a disk is only told to the mover when it may be read, so that the mover needs to know no limits.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import replace

import trio

from vmfs_stub.core.extents import Extent
from vmfs_stub.core.windows import Windows
from vmfs_stub.services.mover import Content, Part

PIECE_BYTES = 2 << 20
"""What is let through at once where there is a limit."""
LOOK_INTERVAL_S = 1.0
"""How long a wait may go on before the limit is looked at again: the next window may have opened."""


def local_minute(at_s: float | None = None) -> int:
    """The minute of the day in this host's time zone, now or at ``at_s`` (seconds since the epoch)."""
    now = time.localtime(at_s)
    return now.tm_hour * 60 + now.tm_min


class Bandwidth:
    """Lets backups through at the limit of the hour; ``minute`` says which minute of the day it is.

    ``windows`` may be replaced at any time.
    """

    def __init__(self, windows: Windows | None = None, *, minute: Callable[[], int] = local_minute) -> None:
        self.windows = windows or Windows()
        self._minute = minute
        self._free_s = 0.0
        self._turn = trio.Lock()

    def pieces(self, part: Part, chunk_size: int) -> Iterator[Part]:
        """The part as it is, or in pieces that can be let through one at a time."""
        if self.windows.are_unlimited:
            yield part
            return
        step = max(1, PIECE_BYTES // chunk_size)
        for start in range(part.chunks.start, part.chunks.end, step):
            yield replace(part, chunks=Extent(start, min(part.chunks.end, start + step)))

    async def metered(
        self, parts: AsyncIterator[Part], *, size: int, chunk_size: int, read: Callable[[int], None]
    ) -> AsyncGenerator[Part, None]:
        """The parts of a file of ``size`` bytes, those that are read when they may be; ``read`` is told of bytes."""
        async for part in parts:
            if part.content is not Content.DATA:
                yield part
                continue
            for piece in self.pieces(part, chunk_size):
                count = min(size, piece.chunks.end * chunk_size) - piece.chunks.start * chunk_size
                await self.take(count)
                read(count)
                yield piece

    async def take(self, count: int) -> None:
        """Return when ``count`` more bytes may be read; who came first goes first."""
        if self.windows.are_unlimited:
            return
        async with self._turn:
            left = float(count)
            while left > 0 and (limit := self.windows.limit(self._minute())):
                step_s = min(left / limit, LOOK_INTERVAL_S)
                # What was not used before may not be caught up on: others were promised the room.
                self._free_s = max(self._free_s, trio.current_time()) + step_s
                await trio.sleep_until(self._free_s)
                left -= step_s * limit
