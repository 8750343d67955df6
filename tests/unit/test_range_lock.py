"""The lock on ranges of chunks: exclusion where ranges meet, and whoever came first goes first."""

from __future__ import annotations

import random

import trio
import trio.testing

from vmfs_stub.services.locks import RangeLock


async def test_ranges_that_meet_exclude_each_other_and_others_do_not() -> None:
    lock, inside = RangeLock(), []
    chosen = random.Random(5)

    async def user() -> None:
        for _ in range(30):
            first = chosen.randrange(20)
            end = first + chosen.randrange(1, 6)
            async with lock.hold(first, end):
                assert not any(a < end and first < b for a, b in inside)
                inside.append((first, end))
                await trio.lowlevel.checkpoint()
                inside.remove((first, end))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(user)


async def test_a_large_range_is_not_starved_by_small_ones(autojump_clock: trio.testing.MockClock) -> None:
    lock, got = RangeLock(), trio.Event()

    async def writer(first: int) -> None:
        while not got.is_set():
            async with lock.hold(first, first + 1):
                await trio.sleep(1)

    async def truncate() -> None:
        async with lock.hold(0, 100):
            got.set()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(writer, number)
                nursery.start_soon(writer, number)
            await trio.sleep(0.5)
            nursery.start_soon(truncate)


async def test_one_that_gives_up_holds_nobody_back() -> None:
    lock = RangeLock()
    async with trio.open_nursery() as nursery, lock.hold(0, 1):
        with trio.move_on_after(0.01):
            async with lock.hold(0, 10):
                raise AssertionError
        done = trio.Event()

        async def third() -> None:
            async with lock.hold(5, 6):
                done.set()

        nursery.start_soon(third)
        with trio.fail_after(5):
            await done.wait()
