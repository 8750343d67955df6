"""Failures that were found once, each by the smallest course of events that showed it."""

from __future__ import annotations

import errno
import random

import pytest
import trio
import trio.testing

from tests.datastore_harness import BLOCK, CHUNK, Rig, Services, temporary_rig
from vmfs_stub.core.errors import StoreError, StoreUnavailable
from vmfs_stub.services.locks import SharedSync

DISK = "vm/disk.img"
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


async def archived(rig: Rig) -> None:
    # Different chunks, so that each has a frame of its own.
    rig.make_disk(DISK, b"".join(bytes([number]) * CHUNK for number in range(1, 5)))
    async with rig.running() as services:
        await services.archive("vm")


async def test_a_sync_that_is_cancelled_loses_no_bits() -> None:
    """The bits were taken, and then nobody wrote them: after a reboot the guest's blocks were the archived ones."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            for number in range(16):
                await disk.write(number * BLOCK, NEW)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(services.disks.sync_dirty)
                        for _ in range(number % 5):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
            await services.disks.release(disk)
        rig.reboot()
        async with rig.running() as services:
            disk = await services.open(DISK)
            assert await disk.read(0, 16 * BLOCK) == NEW * 16
            await services.disks.release(disk)


async def test_a_graduation_in_the_background_and_one_at_the_close_are_one() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            await disk.read(0, 4 * CHUNK)
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(services.disks.graduate, disk)
            assert disk.placeholder is None
            await services.disks.release(disk)
            assert (rig.is_placeholder(DISK), rig.maps(), rig.pins()) == (False, [], [])


async def test_graduation_goes_on_after_its_last_sync_failed() -> None:
    """The record was gone, and every later try failed for want of it."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            content = await disk.read(0, 4 * CHUNK)
            services.files.fail("graduate.sync", 1, OSError(errno.EIO, "planted"))
            with pytest.raises(OSError, match="planted"):
                await services.disks.graduate(disk)
            await services.disks.release(disk)
            disk = await services.open(DISK)
            assert await disk.read(0, 4 * CHUNK) == content
            await services.disks.release(disk)
            assert (rig.is_placeholder(DISK), rig.maps(), rig.pins()) == (False, [], [])


async def test_a_failed_recall_is_not_the_answer_to_a_later_read() -> None:
    """A chunk whose fetch had failed was not asked for again while others of the same recall were under way."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            placeholder = disk.placeholder
            assert placeholder is not None
            recall = services.connected.recall

            def away(call: str, key: str) -> None:
                raise StoreUnavailable("away")

            rig.objects.before = away
            with pytest.raises(StoreError):
                await recall.recall_chunks(placeholder, [0, 2], demand=True)
            rig.objects.before = lambda call, key: None
            await recall.recall_chunks(placeholder, [0, 2], demand=True)
            assert placeholder.is_resident(0, 1)
            await services.disks.release(disk)


async def test_recalled_blocks_are_durable_before_a_second_archive_says_that_they_stay() -> None:
    """The copy recalls chunks that are partly here; the ends of the disk then counted as resident, unsynced."""
    for seed in range(6):
        with temporary_rig(head=2 * BLOCK) as rig:
            rig.make_disk(DISK, OLD * (2 * CHUNK // BLOCK))
            async with rig.running() as services:
                await services.archive("vm")
            async with rig.running() as services:
                await _write_in_first_chunk(services)
                await services.archive("vm")
                services.files.kill()
            rig.lose_power(random.Random(seed))
            async with rig.running() as services:
                disk = await services.open(DISK)
                assert await disk.read(0, 5 * BLOCK) == OLD * 4 + NEW
                await services.disks.release(disk)


async def _write_in_first_chunk(services: Services) -> None:
    disk = await services.open(DISK)
    await disk.write(4 * BLOCK, NEW)
    await services.disks.release(disk)


async def test_a_sync_serves_only_who_called_before_it_began() -> None:
    runs: list[int] = []
    go_on = trio.Event()

    async def run() -> None:
        runs.append(len(runs))
        if len(runs) == 1:
            await go_on.wait()

    sync = SharedSync(run)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sync)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            nursery.start_soon(sync)
        await trio.testing.wait_all_tasks_blocked()
        assert runs == [0]
        go_on.set()
    assert runs == [0, 1], "the five share one run that began after they called"


async def test_a_sync_that_fails_or_is_cancelled_is_run_again_for_the_others() -> None:
    outcomes: list[str] = []
    attempts = 0

    async def run() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await trio.sleep_forever()
        if attempts == 2:
            raise OSError(errno.EIO, "planted")

    sync = SharedSync(run)

    async def call() -> None:
        try:
            await sync()
            outcomes.append("done")
        except OSError:
            outcomes.append("failed")

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def first() -> None:
                with scope:
                    await sync()

            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(call)
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert sorted(outcomes) == ["done", "failed"]
