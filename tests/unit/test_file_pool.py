"""The pool of worker threads for file calls."""

from __future__ import annotations

import threading

import pytest
import trio

from vmfs_stub.services.file_pool import FilePool


async def test_results_and_errors_reach_their_own_caller() -> None:
    pool, results = FilePool(4), {}

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
    pool, gate, lock, running, most = FilePool(3), threading.Event(), threading.Lock(), 0, 0
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
    pool, done = FilePool(1), []
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
    pool = FilePool(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        with trio.CancelScope(shield=True):
            assert await pool.run(lambda: 7) == 7
    pool.close()
    with pytest.raises(ZeroDivisionError):
        await FilePool(1).run(lambda: 1 // 0)
