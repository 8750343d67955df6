"""Where blocking calls run: worker threads, a bounded number for each resource.

Separate limits, so that a store that does not answer can use up its own threads and no others: `stat` and the I/O of
other disks go on.  What no guest waits for runs below demand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import trio

from vmfs_stub.core.errors import StoreUnavailable
from vmfs_stub.services.worker_pool import NoThread, WorkerPool

P = ParamSpec("P")
T = TypeVar("T")

TRANSFERS_MAX = 4
"""Packs on their way to or from the store at once; each is held in memory meanwhile."""


class Threads:
    """Runs blocking calls off the event loop."""

    def __init__(
        self, *, files_max: int, store_max: int, compute_max: int, store_timeout_s: float, transfer_timeout_s: float
    ) -> None:
        self._files = WorkerPool("files", files_max)
        self._store = WorkerPool("store", store_max)
        self._background = WorkerPool("background", store_max, below_demand=True)
        self._transfers = WorkerPool("transfers", TRANSFERS_MAX, below_demand=True)
        self._replica = WorkerPool("replica", TRANSFERS_MAX, below_demand=True)
        self._compute = WorkerPool("compute", compute_max, below_demand=True)
        self._steps = WorkerPool("steps", 1, below_demand=True)
        self._token: trio.lowlevel.TrioToken | None = None
        self._store_timeout_s = store_timeout_s
        self._transfer_timeout_s = transfer_timeout_s

    def close(self) -> None:
        """Let the worker threads end."""
        pools = (self._files, self._store, self._background, self._transfers, self._replica, self._compute, self._steps)
        for pool in pools:
            pool.close()

    async def files(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A call on the backing filesystem; never abandoned, since it may be changing a file."""
        return await self._files.run(partial(function, *args, **kwargs))

    async def store(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A short call on the store, for which perhaps a guest waits.  Raises StoreUnavailable at its time limit."""
        return await _within(self._store_timeout_s, self._store, partial(function, *args, **kwargs))

    async def background(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A short call on the store for which no guest waits.  Raises StoreUnavailable at its time limit."""
        return await _within(self._store_timeout_s, self._background, partial(function, *args, **kwargs))

    async def transfer(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A long call on the store: putting or reading back a pack.  Raises StoreUnavailable at its time limit."""
        return await _within(self._transfer_timeout_s, self._transfers, partial(function, *args, **kwargs))

    async def step(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A step of a job that changes files and asks the store in between, by `ask_store`; no guest waits for it.

        Never abandoned, as for `files`, but in nobody's way while the store is slow.
        """
        self._token = trio.lowlevel.current_trio_token()
        return await self._steps.run(partial(function, *args, **kwargs))

    def ask_store(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As `background`, from within a step and from threads of its own; blocks."""
        return trio.from_thread.run(partial(self.background, function, *args, **kwargs), trio_token=self._token)

    async def replica(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A call on the replica, or for it, apart from those on the store: one that hangs must not stop backups.

        Raises StoreUnavailable at the time limit of a long call.
        """
        return await _within(self._transfer_timeout_s, self._replica, partial(function, *args, **kwargs))

    async def compute(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Work for a core: compressing, hashing; no guest waits for it."""
        return await self._compute.run(partial(function, *args, **kwargs))


async def _within(timeout_s: float, pool: WorkerPool, call: Callable[[], T]) -> T:
    with trio.move_on_after(timeout_s):
        try:
            return await pool.run(call, abandonable=True)
        except NoThread as exc:
            raise StoreUnavailable(str(exc)) from exc
    raise StoreUnavailable(f"the store did not answer within {timeout_s:g} s")
