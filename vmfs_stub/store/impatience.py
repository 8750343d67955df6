"""Calls that are given up after a time, by whoever has another way.

A filesystem that hangs keeps the thread that asked it, for as long as it likes.  So each call runs in a thread of
these, and its caller waits for a limited time only.  Calls that hang keep their threads, of which there are so many and
no more: further ones wait for their turn, for the same time.  The threads do not keep the process from ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import outcome

from vmfs_stub.core.errors import StoreUnavailable

T = TypeVar("T")

THREADS_MAX: Final = 32
"""More than a datastore's recalls at once; a thread that waits costs next to nothing."""


class _Call:
    """``over`` is set when there is an outcome; nobody waits for one that is ``given_up``."""

    __slots__ = ("function", "given_up", "outcome", "over")

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.given_up = False
        self.over = threading.Event()
        self.outcome: outcome.Outcome[Any] | None = None


class Impatience:
    """Makes calls in threads of its own; ``patience_s`` is how long one is waited for."""

    def __init__(self, patience_s: float, *, threads_max: int = THREADS_MAX) -> None:
        self._patience_s = patience_s
        self._threads_max = threads_max
        self._queue: SimpleQueue[_Call] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._unoccupied = 0
        """Threads that wait, less calls that wait for one."""

    def call(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises.  Raises StoreUnavailable when that takes too long."""
        call = _Call(function)
        self._see_to_thread()
        self._queue.put(call)
        if not call.over.wait(self._patience_s):
            call.given_up = True
            raise StoreUnavailable(f"the store did not answer within {self._patience_s:g} s")
        assert call.outcome is not None
        found: T = call.outcome.unwrap()
        return found

    def _see_to_thread(self) -> None:
        with self._lock:
            self._unoccupied -= 1
            if self._unoccupied >= 0 or self._threads >= self._threads_max:
                return
            thread = threading.Thread(target=self._work, name=f"impatient-{self._threads + 1}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # the limit of processes: those that run do it, or nobody does, in time
            self._threads += 1
            self._unoccupied += 1

    def _work(self) -> None:
        while True:
            call = self._queue.get()
            if not call.given_up:
                call.outcome = outcome.capture(call.function)
                call.over.set()
            del call
            with self._lock:
                self._unoccupied += 1
