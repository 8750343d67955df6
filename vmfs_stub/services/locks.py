"""Two small pieces of coordination for one disk: locks on ranges of chunks, and a sync that callers share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from vmfs_stub.core.extents import Extent


class RangeLock:
    """Mutual exclusion on ranges; a holder takes its whole range at once, so nobody waits in a circle.

    Not re-entrant, and not fair: holders keep it for one file call, not longer.
    """

    def __init__(self) -> None:
        self._held: list[Extent] = []
        self._waiters = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def hold(self, first: int, end: int) -> AsyncIterator[None]:
        """Hold [first, end) within the block; waits while any of it is held."""
        wanted = Extent(first, end)
        while any(held.start < end and first < held.end for held in self._held):
            await self._waiters.park()
        self._held.append(wanted)
        try:
            yield
        finally:
            self._held.remove(wanted)
            self._waiters.unpark_all()


class SharedSync:
    """Runs a sync for many callers; a caller is served only by a run that *began after* it called.

    A run that began earlier may have looked at the data before the caller's last write.
    """

    def __init__(self, run: Callable[[], Awaitable[None]]) -> None:
        self._run = run
        self._begun = 0
        self._done = 0
        self._running = False
        self._waiters = trio.lowlevel.ParkingLot()

    async def __call__(self) -> None:
        """Return when a sync that began after this call has ended.  Raises what the run raises."""
        wanted = self._begun + 1
        while self._done < wanted:
            if self._running:
                await self._waiters.park()
                continue
            self._running = True
            self._begun += 1
            number = self._begun
            try:
                await self._run()
                self._done = number
            finally:
                self._running = False
                self._waiters.unpark_all()
