"""Worker threads for blocking calls.

Every write of a guest, and every read that the page cache does not have, hops to a thread and back.  trio's own hop
makes a coroutine's worth of bookkeeping for each call and wakes the event loop for each answer; here the answers that
are ready together wake it once, which at queue depth 32 costs a sixth.  And a pool can be below demand: the disk, as
far as its scheduler knows such things, serves its threads last.  The processor does not: a thread that had to wait for
it while it holds the interpreter's lock would keep the event loop waiting, too.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

import outcome
import trio

from vmfs_stub.core.errors import PrimaryIOError

T = TypeVar("T")

_SYS_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}.get(platform.machine())
_IOPRIO_WHO_PROCESS: Final = 1
IOPRIO_BELOW_DEMAND: Final = 2 << 13 | 7
"""Best effort, last.  Not the idle class: on a disk that is never idle it could outwait every time limit."""
_libc = ctypes.CDLL(None, use_errno=True)


class NoThread(PrimaryIOError):
    """The system allows this process not even one thread of a pool."""


class _Call:
    """One call: who waits for it, or that nobody does any more."""

    __slots__ = ("abandoned", "answer", "function", "task")

    def __init__(self, task: trio.lowlevel.Task, function: Callable[[], object]) -> None:
        self.task = task
        self.function = function
        self.abandoned = False
        self.answer: outcome.Outcome[object] | None = None


class _Worker:
    """One thread; it waits at its own ``gate``, since of several that wait at one the kernel wakes too many."""

    __slots__ = ("call", "gate")

    def __init__(self) -> None:
        self.call: _Call | None = None
        self.gate = threading.Lock()
        self.gate.acquire()

    def begin(self, call: _Call | None) -> None:
        """Let it make this call; None lets it end."""
        self.call = call
        self.gate.release()


class WorkerPool:
    """At most ``threads_max`` calls at once; more wait in a queue, of which callers bound the length.

    Only the event loop gives a worker that waits its next call.  One that has made a call takes the next itself, if
    there is one; else it says so with its answer.
    """

    def __init__(self, name: str, threads_max: int, *, below_demand: bool = False) -> None:
        self._name = name
        self._threads_max = threads_max
        self._below_demand = below_demand
        self._thread_count = 0
        self._queue: deque[_Call] = deque()
        self._idle: list[_Worker] = []
        self._token: trio.lowlevel.TrioToken | None = None
        self._lock = threading.Lock()
        self._done: list[_Call] = []
        self._waiting: list[_Worker] = []
        self._is_waking = False
        self._is_closed = False

    async def run(self, function: Callable[[], T], *, abandonable: bool = False) -> T:
        """Call in a worker thread; returns or raises what it does.

        Not cancellable unless ``abandonable``: a cancelled caller then goes on at once, and the call, if it has begun,
        keeps its thread until it ends, so that a call that hangs still counts.
        Raises NoThread when the system allows not even one.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
        call = _Call(trio.lowlevel.current_task(), function)
        if self._idle:
            # The one that waits for the shortest time: what it needs is still in the processor's caches.
            self._idle.pop().begin(call)
        else:
            if self._thread_count < self._threads_max:
                self._start_thread()
            self._queue.append(call)

        def abort(_: object) -> trio.lowlevel.Abort:
            call.abandoned = abandonable
            return trio.lowlevel.Abort.SUCCEEDED if abandonable else trio.lowlevel.Abort.FAILED

        answer: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return answer

    def _start_thread(self) -> None:
        worker = _Worker()
        name = f"{self._name}-{self._thread_count + 1}"
        thread = threading.Thread(target=self._work, args=(worker,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            # The limit of processes; those that run already do the work, later.
            if self._thread_count == 0:
                raise NoThread(f"no thread for {self._name} could be started: {exc}") from exc
        else:
            self._thread_count += 1

    def close(self) -> None:
        """Let the threads end, each after the call that it is in."""
        self._is_closed = True
        self._deliver()
        while self._idle:
            self._idle.pop().begin(None)

    def _work(self, worker: _Worker) -> None:
        if self._below_demand:
            stand_back()
        done: _Call | None = None
        while True:
            call = self._next()
            ends = call is None and self._is_closed
            waits = worker if call is None and not ends else None
            if (done or waits) and not self._say(done, waits):
                return
            if ends:
                return
            done = None  # or its answer, which may be large, would stay while this waits
            if call is None:
                worker.gate.acquire()
                call, worker.call = worker.call, None
                if call is None:
                    return
            if not call.abandoned:
                call.answer = outcome.capture(call.function)
            done = call

    def _next(self) -> _Call | None:
        try:
            return self._queue.popleft()
        except IndexError:
            return None

    def _say(self, done: _Call | None, waits: _Worker | None) -> bool:
        """Tell the event loop that a call is done, that a worker waits, or both; false when the loop has ended."""
        with self._lock:
            if done is not None:
                self._done.append(done)
            if waits is not None:
                self._waiting.append(waits)
            wake, self._is_waking = not self._is_waking, True
        if wake and self._token is not None:
            try:
                self._token.run_sync_soon(self._deliver)
            except trio.RunFinishedError:
                return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            done, self._done = self._done, []
            waiting, self._waiting = self._waiting, []
            self._is_waking = False
        for worker in waiting:
            call = self._next()
            if call is not None or self._is_closed:
                worker.begin(call)
            else:
                self._idle.append(worker)
        for call in done:
            if not call.abandoned and call.answer is not None:
                trio.lowlevel.reschedule(call.task, call.answer)


def stand_back() -> None:
    """Put the disk accesses of this thread, and of those it starts, behind others'; no failure where that cannot be."""
    if _SYS_IOPRIO_SET is not None:
        _libc.syscall(_SYS_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, IOPRIO_BELOW_DEMAND)
