"""The pools of worker threads."""

from __future__ import annotations

import ctypes
import platform
import threading
from functools import partial

import pytest
import trio
import trio.testing

from vmfs_stub.core.errors import PrimaryIOError, StoreUnavailable
from vmfs_stub.services.threads import Threads
from vmfs_stub.services.worker_pool import IOPRIO_BELOW_DEMAND, WorkerPool


async def test_results_and_errors_reach_their_own_caller() -> None:
    pool, results = WorkerPool("test", 4), {}

    def call(number: int) -> int:
        if number % 3 == 0:
            raise OSError(number, "planned")
        return number * 2

    async def caller(number: int) -> None:
        try:
            results[number] = await pool.run(lambda: call(number))
        except OSError as exc:
            results[number] = -(exc.errno or 0)

    async with trio.open_nursery() as nursery:
        for number in range(1, 200):
            nursery.start_soon(caller, number)
    assert results == {n: -n if n % 3 == 0 else n * 2 for n in range(1, 200)}
    pool.close()


async def test_no_more_threads_than_allowed_and_the_loop_goes_on() -> None:
    pool, gate, lock, running, most = WorkerPool("test", 3), threading.Event(), threading.Lock(), 0, 0
    started = threading.Semaphore(0)

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        started.release()
        assert gate.wait(10)
        with lock:
            running -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(pool.run, call)
        for _ in range(3):
            await trio.to_thread.run_sync(started.acquire)
        await trio.sleep(0.01)
        gate.set()
    assert most == 3
    pool.close()


async def test_a_call_in_progress_is_not_cancelled_and_a_cancelled_caller_starts_none() -> None:
    pool, done = WorkerPool("test", 1), []
    with trio.CancelScope() as scope:
        scope.cancel()
        await pool.run(lambda: done.append("never"))
    assert scope.cancelled_caught
    assert done == []

    started, gate = threading.Event(), threading.Event()

    def call() -> None:
        started.set()
        assert gate.wait(10)
        done.append("whole")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, call)
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()
        gate.set()
    assert done == ["whole"]
    pool.close()


async def test_a_shielded_caller_works_after_cancellation() -> None:
    pool = WorkerPool("test", 1)
    with trio.CancelScope() as scope:
        scope.cancel()
        with trio.CancelScope(shield=True):
            assert await pool.run(lambda: 7) == 7
    pool.close()
    with pytest.raises(ZeroDivisionError):
        await WorkerPool("test", 1).run(lambda: 1 // 0)


async def test_an_abandoned_call_keeps_its_thread_until_it_ends() -> None:
    pool, begun, gate, done = WorkerPool("test", 1), threading.Event(), threading.Event(), []

    def hang() -> None:
        begun.set()
        assert gate.wait(10)
        done.append("hung")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.run, hang, abandonable=True))
        assert await trio.to_thread.run_sync(begun.wait, 10)
        nursery.cancel_scope.cancel()
    assert nursery.cancel_scope.cancelled_caught
    with trio.move_on_after(0.02) as scope:
        await pool.run(lambda: done.append("never begun"), abandonable=True)
    assert scope.cancelled_caught
    gate.set()
    assert await pool.run(lambda: "free again", abandonable=True) == "free again"
    assert done == ["hung"]
    pool.close()


@pytest.mark.parametrize("below_demand", [False, True])
async def test_only_the_threads_of_a_pool_below_demand_stand_back(below_demand: bool) -> None:
    def priority() -> int:
        number = {"x86_64": 252, "aarch64": 31}[platform.machine()]
        return int(ctypes.CDLL(None).syscall(number, 1, 0))  # ioprio_get of this thread

    pool, usual = WorkerPool("test", 1, below_demand=below_demand), priority()
    assert usual != IOPRIO_BELOW_DEMAND
    assert await pool.run(priority) == (IOPRIO_BELOW_DEMAND if below_demand else usual)
    pool.close()


async def test_at_the_limit_of_threads_work_waits_for_those_that_run_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call was queued for a thread that never came, and its caller waited for ever."""
    pool, start = WorkerPool("test", 4), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with trio.fail_after(5):
        with pytest.raises(PrimaryIOError, match="thread"):
            await pool.run(lambda: 1)
        monkeypatch.setattr(threading.Thread, "start", start)
        assert await pool.run(lambda: 1) == 1
        monkeypatch.setattr(threading.Thread, "start", refuse)
        gate, results = threading.Event(), []

        async def wait() -> None:
            results.append(await pool.run(lambda: gate.wait(5)))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
        assert results == [True] * 3
    pool.close()


async def test_the_store_is_away_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error was none that the daemon knew, and one look at the store ended it."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = Threads(files_max=1, store_max=1, compute_max=1, store_timeout_s=5, transfer_timeout_s=5)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(StoreUnavailable, match="thread"):
        await threads.store(lambda: 1)
    threads.close()
