"""Where blocking calls run: worker threads, a bounded number for each resource.

Separate limits, so that a store that does not answer can use up its own threads and no others: `stat` and the I/O of
other disks go on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import trio

from vmfs_stub.core.errors import StoreUnavailable
from vmfs_stub.services.file_pool import FilePool

P = ParamSpec("P")
T = TypeVar("T")

TRANSFERS_MAX = 4
"""Packs on their way to or from the store at once; each is held in memory meanwhile."""


class Threads:
    """Runs blocking calls off the event loop."""

    def __init__(
        self, *, files_max: int, store_max: int, compute_max: int, store_timeout_s: float, transfer_timeout_s: float
    ) -> None:
        self._files = FilePool(files_max)
        self._store = trio.CapacityLimiter(store_max)
        self._transfers = trio.CapacityLimiter(TRANSFERS_MAX)
        self._compute = trio.CapacityLimiter(compute_max)
        self._store_timeout_s = store_timeout_s
        self._transfer_timeout_s = transfer_timeout_s

    def close(self) -> None:
        """Let the worker threads end."""
        self._files.close()

    async def files(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A call on the backing filesystem; never abandoned, since it may be changing a file."""
        return await self._files.run(partial(function, *args, **kwargs))

    async def store(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A short call on the store, for which perhaps a guest waits.  Raises StoreUnavailable at its time limit."""
        return await _abandonable(partial(function, *args, **kwargs), self._store, self._store_timeout_s)

    async def transfer(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A long call on the store: putting or reading back a pack.  Raises StoreUnavailable at its time limit."""
        return await _abandonable(partial(function, *args, **kwargs), self._transfers, self._transfer_timeout_s)

    async def compute(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Work for a core: compressing, hashing."""
        return await trio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._compute)


async def _abandonable(call: Callable[[], T], limiter: trio.CapacityLimiter, timeout_s: float) -> T:
    # An abandoned call keeps its place among its limiter's threads until it really ends, so that a store that hangs
    # holds a bounded number of them.
    with trio.move_on_after(timeout_s):
        return await trio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=True)
    raise StoreUnavailable(f"the store did not answer within {timeout_s:g} s")
