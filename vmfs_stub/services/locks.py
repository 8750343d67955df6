"""Two small pieces of coordination for one disk: locks on ranges of chunks, and a sync that callers share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from vmfs_stub.core.extents import Extent


class RangeLock:
    """Mutual exclusion on ranges; a holder takes its whole range at once, so nobody waits in a circle.

    Who came first goes first where ranges meet, so that a truncate is not starved by writes.  Not re-entrant.
    """

    def __init__(self) -> None:
        self._held: list[Extent] = []
        self._wanted: list[Extent] = []
        """Ranges of those who wait, in the order in which they came."""
        self._waiters = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def hold(self, first: int, end: int) -> AsyncIterator[None]:
        """Hold [first, end) within the block; waits while any of it is held."""
        wanted = Extent(first, end)
        if self._meets(self._held, wanted) or self._meets(self._wanted, wanted):
            await self._wait(wanted)
        self._held.append(wanted)
        try:
            yield
        finally:
            _remove(self._held, wanted)
            self._waiters.unpark_all()

    async def _wait(self, wanted: Extent) -> None:
        self._wanted.append(wanted)
        try:
            while self._meets(self._held, wanted) or self._meets(self._before(wanted), wanted):
                await self._waiters.park()
        finally:
            _remove(self._wanted, wanted)
            # Those behind may go now, with this one or because it gave up.
            self._waiters.unpark_all()

    def _before(self, wanted: Extent) -> list[Extent]:
        return self._wanted[: next(n for n, other in enumerate(self._wanted) if other is wanted)]

    @staticmethod
    def _meets(ranges: list[Extent], wanted: Extent) -> bool:
        return any(other.start < wanted.end and wanted.start < other.end for other in ranges)


def _remove(ranges: list[Extent], gone: Extent) -> None:
    """Remove this very object; equal ranges are other people's."""
    del ranges[next(n for n, other in enumerate(ranges) if other is gone)]


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
