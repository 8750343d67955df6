"""Worker threads for many short file calls.

Every write of a guest, and every read that the page cache does not have, hops to a thread and back.  trio's own hop
makes a coroutine's worth of bookkeeping for each call and wakes the event loop for each answer; here the answers that
are ready together wake it once, which at queue depth 32 costs a sixth.  Calls cannot be cancelled: they may be
changing a file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

import outcome
import trio

T = TypeVar("T")

_Call = tuple[trio.lowlevel.Task, Callable[[], object]]


class FilePool:
    """At most ``threads_max`` calls at once; more wait in a queue, of which callers bound the length."""

    def __init__(self, threads_max: int) -> None:
        self._threads_max = threads_max
        self._thread_count = 0
        self._busy_count = 0
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._lock = threading.Lock()
        self._answers: list[tuple[trio.lowlevel.Task, outcome.Outcome[object]]] = []
        self._is_waking = False

    async def run(self, call: Callable[[], T]) -> T:
        """Call in a worker thread; returns or raises what it does.  Not cancellable."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
        self._busy_count += 1
        if self._busy_count > self._thread_count < self._threads_max:
            self._thread_count += 1
            threading.Thread(target=self._work, name=f"files-{self._thread_count}", daemon=True).start()
        self._calls.put((trio.lowlevel.current_task(), call))
        try:
            answer: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        finally:
            self._busy_count -= 1
        return answer

    def close(self) -> None:
        """Let the threads end; no call may be in progress."""
        for _ in range(self._thread_count):
            self._calls.put(None)
        self._thread_count = 0

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            task, call = item
            answer: outcome.Outcome[object] = outcome.capture(call)
            with self._lock:
                self._answers.append((task, answer))
                wake, self._is_waking = not self._is_waking, True
            if wake and self._token is not None:
                try:
                    self._token.run_sync_soon(self._deliver)
                except trio.RunFinishedError:
                    return
            del item, task, call, answer

    def _deliver(self) -> None:
        with self._lock:
            answers, self._answers, self._is_waking = self._answers, [], False
        for task, answer in answers:
            trio.lowlevel.reschedule(task, answer)
