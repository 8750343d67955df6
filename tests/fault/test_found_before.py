"""Failures that were found once, each by the smallest course of events that showed it."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing

from tests.datastore_harness import BLOCK, CHUNK, Killed, Rig, RigFiles, Services, survives_kill, temporary_rig
from tests.model.contents import Contents
from tests.model.guest import Guest
from vmfs_stub.core.errors import CorruptFrame, MapFrozen, PrimaryIOError, StoreError, StoreUnavailable
from vmfs_stub.paced_io import WriteBackFailed
from vmfs_stub.services.locks import SharedSync
from vmfs_stub.services.placeholder import Placeholder

DISK = "vm/disk.img"
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


async def archived(rig: Rig) -> None:
    rig.make_disk(DISK, random.Random(4).randbytes(4 * CHUNK))
    async with rig.running() as services:
        await services.archive("vm")


async def test_a_sync_that_is_cancelled_loses_no_bits() -> None:
    """The bits were taken, and then nobody wrote them: after a reboot the guest's blocks were the archived ones."""
    with temporary_rig() as rig:
        await archived(rig)
        for number in range(40):
            async with rig.running() as services:
                disk = await services.open(DISK)
                await disk.write(number * BLOCK, NEW)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(services.disks.sync_dirty)
                        for _ in range(number % 4):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
                await services.disks.release(disk)
            rig.reboot()
            async with rig.running() as services:
                disk = await services.open(DISK)
                assert await disk.read(0, (number + 1) * BLOCK) == NEW * (number + 1)
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


@pytest.mark.parametrize("is_cut", [False, True], ids=["replaced", "cut to nothing"])
async def test_what_guests_have_replaced_as_a_whole_is_an_ordinary_file_while_it_is_open(*, is_cut: bool) -> None:
    """No read had to recall anything, so nothing began; it stayed a placeholder until its last handle was closed."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running(hydrates=True) as services:
            disk = await services.open(DISK)
            for number in range(4 * CHUNK // BLOCK):
                await services.disks.sync_dirty()
                await services.wait_hydrated()
                assert disk.placeholder is not None
                await (disk.truncate(0) if is_cut else disk.write(number * BLOCK, NEW))
                if is_cut:
                    break
            await disk.sync(data_only=False)
            await services.disks.sync_dirty()
            await services.wait_hydrated()
            assert disk.placeholder is None
            assert (rig.is_placeholder(DISK), rig.maps(), rig.pins()) == (False, [], [])
            await services.disks.release(disk)
        assert (rig.backing / DISK).read_bytes() == (b"" if is_cut else NEW * (4 * CHUNK // BLOCK))


async def test_guests_that_have_no_disk_open_are_not_waited_for() -> None:
    """A job that began within a second of the last request took small steps for as long, beside nobody."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            guests = services.connected.recall.guests
            one, again = await services.open(DISK), await services.open(DISK)
            await one.read(0, BLOCK)
            await services.disks.release(again)
            assert guests.is_recent, "somebody has it open yet"
            await services.disks.release(one)
            assert not guests.is_recent


async def test_a_failed_recall_is_not_the_answer_to_a_later_read() -> None:
    """A chunk whose fetch had failed was not asked for again while others of the same recall were under way."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            placeholder = disk.placeholder
            assert placeholder is not None
            recall = services.connected.recall

            go_on = threading.Event()
            calls: list[str] = []

            def away_or_slow(call: str, key: str) -> None:
                if call == "get_range":
                    calls.append(key)
                    if len(calls) == 1:
                        raise StoreUnavailable("away")
                    if len(calls) == 2:
                        go_on.wait(10)

            rig.objects.before = away_or_slow
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_expect_away, recall.recall_chunks, placeholder, [0, 2])
                while len(calls) < 2:  # noqa: ASYNC110 - the calls are made in threads
                    await trio.sleep(0.001)
                await trio.testing.wait_all_tasks_blocked(0.01)
                for chunk in (0, 2):
                    if not placeholder.is_resident(chunk * CHUNK, 1) and len(calls) == 2:
                        with trio.move_on_after(0.5):
                            await recall.recall_chunks(placeholder, [chunk], demand=True)
                go_on.set()
            assert placeholder.is_resident(0, 1)
            assert placeholder.is_resident(2 * CHUNK, 1)
            await services.disks.release(disk)


async def _expect_away(
    recall_chunks: Callable[..., Awaitable[None]], placeholder: Placeholder, chunks: list[int]
) -> None:
    with pytest.raises(StoreError):
        await recall_chunks(placeholder, chunks, demand=True)


async def test_recalled_blocks_are_durable_before_a_second_archive_says_that_they_stay() -> None:
    """The copy recalls chunks that are partly here; the ends of the disk then counted as resident, unsynced."""
    for seed in range(12):
        with temporary_rig() as rig:
            rig.make_disk(DISK, OLD * (2 * CHUNK // BLOCK))
            async with rig.running() as services:
                await services.archive("vm")
            rig.settings = replace(rig.settings, resident_head_bytes=2 * BLOCK)
            files = RigFiles(rig.medium)
            with survives_kill():
                async with rig.running(files=files) as services:
                    await _write_in_first_chunk(services)
                    files.fail("archive.record_sync", 1, Killed())
                    await services.archive("vm")
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


FAR_NS = 10_500_000_000 * 10**9 + 5
"""A time in the year 2302, which a user can give any file; in nanoseconds it needs more than 63 bits."""


async def test_a_disk_from_the_far_future_comes_back() -> None:
    """Its space was given up, and then the manifest that led to its bytes was refused for the time in it."""
    with temporary_rig() as rig:
        content = random.Random(4).randbytes(4 * CHUNK)
        rig.make_disk(DISK, content)
        os.utime(rig.backing / DISK, ns=(FAR_NS, FAR_NS))
        async with rig.running() as services:
            await services.archive("vm")
            disk = await services.open(DISK)
            assert await disk.read(0, 4 * CHUNK) == content
            assert services.mtime_ns(DISK) == FAR_NS
            await services.disks.release(disk)


async def test_any_time_can_be_set_on_a_placeholder_and_told_of_it() -> None:
    """A time past 2262 did not fit the volatile map, which then took no other change; 0 was taken for none at all."""
    with temporary_rig() as rig:
        rig.make_disk(DISK, OLD * (CHUNK // BLOCK))
        os.utime(rig.backing / DISK, ns=(0, 0))
        async with rig.running() as services:
            await services.archive("vm")
            disk = await services.open(DISK)
            await disk.read(0, 1)
            assert services.mtime_ns(DISK) == 0
            for wanted, told in ((FAR_NS, (1 << 63) - 1), (-FAR_NS, -(1 << 63)), (7, 7), (0, 1)):
                await disk.set_times(atime_ns=None, mtime_ns=wanted)
                assert services.mtime_ns(DISK) == told
            await services.disks.release(disk)


async def test_a_volatile_map_that_cannot_be_removed_stops_nobody() -> None:
    """The file was an ordinary one, its placeholder had ended, and a write asked that again and again for ever."""
    with temporary_rig() as rig:
        await archived(rig)
        for _ in range(2):
            async with rig.running() as services:
                disk = await services.open(DISK)
                services.files.fail("volatile.remove", 1, OSError(errno.EROFS, "planted"))
                await services.disks.release(disk)
        async with rig.running() as services:
            disk = await services.open(DISK)
            await disk.read(0, 4 * CHUNK)
            services.files.fail("volatile.remove", 1, OSError(errno.EROFS, "planted"))
            await services.disks.graduate(disk)
            await disk.write(0, NEW)
            assert await disk.read(0, BLOCK) == NEW
            await services.disks.release(disk)
        assert (rig.is_placeholder(DISK), rig.maps(), rig.pins()) == (False, [], [])


async def test_a_placeholder_that_ended_in_a_failure_is_not_asked_any_more() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            await disk.read(0, 4 * CHUNK)
            placeholder = disk.placeholder
            assert placeholder is not None

            def close() -> None:
                raise OSError(errno.EIO, "planted")

            placeholder.maps.durable.close = close  # type: ignore[method-assign]
            with pytest.raises(OSError, match="planted"):
                await services.disks.graduate(disk)
            with trio.fail_after(5):
                await disk.write(0, NEW)
            await services.disks.release(disk)


async def test_a_vm_whose_chunks_lie_in_a_damaged_pack_can_be_archived_the_next_time() -> None:
    """Its chunks were found in the damaged pack again and again, and it could never be archived."""
    with temporary_rig() as rig:
        content = random.Random(7).randbytes(4 * CHUNK)
        rig.make_disk("one/disk.img", content)
        rig.make_disk("two/disk.img", content)
        async with rig.running() as services:
            await services.archive("one")
            (pack,) = (key for key in rig.objects.contents if key.startswith("packs/"))
            damaged = bytearray(rig.objects.contents[pack])
            damaged[CHUNK // 2] ^= 1
            rig.objects.contents[pack] = bytes(damaged)
            with pytest.raises(CorruptFrame):
                await services.archive("two")
            assert not rig.is_placeholder("two/disk.img")
            await services.archive("two")
            disk = await services.open("two/disk.img")
            assert await disk.read(0, 4 * CHUNK) == content
            await services.disks.release(disk)


async def test_two_names_of_a_placeholder_that_go_at_once_are_its_last() -> None:
    """Each left it to the other to note that; pin and map stayed for ever, and the start told of a lost file."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            guest = Guest(services)
            await guest.link(DISK, "vm/second.img")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.unlink, DISK)
                nursery.start_soon(guest.unlink, "vm/second.img")
            assert (rig.maps(), rig.pins(), len(services.disks.placeholders)) == ([], [], 0)
            await guest.end()


@pytest.mark.parametrize("is_open", [False, True])
async def test_a_placeholder_ends_when_the_removal_of_each_name_has_returned(is_open: bool) -> None:
    """A file's link count falls before the removal of its last name is sure to be in the journal that is synced."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            guest, is_gone, go_on = Guest(services), threading.Event(), threading.Event()
            await guest.link(DISK, "vm/second.img")

            def unlink(function: Callable[..., None], name: bytes, **kwargs: int) -> None:
                function(name, **kwargs)
                if name == b"second.img":
                    is_gone.set()
                    _wait(go_on)

            services.files.instead["mount.unlink"] = unlink
            disk = await services.open(DISK) if is_open else None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.unlink, "vm/second.img")
                await trio.to_thread.run_sync(_wait, is_gone)
                await guest.unlink(DISK)
                if disk is not None:
                    await services.disks.release(disk)
                left = (list((rig.backing / "vm").iterdir()), len(rig.maps()), len(rig.pins()))
                go_on.set()
            assert left == ([], 1, 1)
            assert (rig.maps(), rig.pins(), len(services.disks.placeholders)) == ([], [], 0)
            await guest.end()


async def test_one_of_two_names_that_were_to_go_stays_a_placeholder() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            guest = Guest(services)
            await guest.link(DISK, "vm/second.img")
            services.files.fail("mount.unlink", 1, OSError(errno.EIO, "planted"))
            with pytest.raises(ExceptionGroup):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.unlink, DISK)
                    nursery.start_soon(guest.unlink, "vm/second.img")
            await guest.end()
        rig.reboot()
        async with rig.running() as services:
            assert services.recovered.findings == []
            assert (len(rig.maps()), len(rig.pins()), services.recovered.punch) == (1, 1, [])


async def test_a_punch_leaves_what_lies_behind_the_archived_end() -> None:
    """A power loss had left a write there without its bit, a guest had read it, and the next start took it away."""
    old = random.Random(7).randbytes(CHUNK + 1000)
    with temporary_rig() as rig:
        rig.make_disk(DISK, old)
        async with rig.running() as services:
            await services.archive("vm")
        with (rig.backing / DISK).open("r+b") as file:
            file.seek(len(old))
            file.write(NEW[len(old) % BLOCK :])
        async with rig.running() as services:
            guest = Guest(services)
            handle = await guest.open(DISK, Contents(bytearray()))
            wanted = old + NEW[len(old) % BLOCK :]
            await guest.sync(handle, data_only=False)
            services.files.fail("mount.unlink", 1, Killed())
            with survives_kill():
                try:
                    await guest.unlink(DISK)
                finally:
                    guest.drop()
        async with rig.running() as services:
            assert services.recovered.punch == [DISK]
            disk = await services.open(DISK)
            assert await disk.read(0, 2 * CHUNK) == wanted
            await services.disks.release(disk)


@pytest.mark.parametrize("is_open", [False, True])
async def test_a_removal_cut_short_is_no_riddle_where_the_record_was_never_durable(is_open: bool) -> None:
    """The map said that a placeholder had been about to go, and the file had no record: whole, but refused for ever."""
    for seed in range(6):
        with temporary_rig() as rig:
            content = random.Random(9).randbytes(2 * CHUNK)
            rig.make_disk(DISK, content)
            with survives_kill():
                async with rig.running() as services:
                    services.files.fail("archive.record_sync", 1, OSError(errno.EIO, "planted"))
                    with pytest.raises(PrimaryIOError):
                        await services.archive("vm")
                    guest = Guest(services)
                    if is_open:
                        await guest.open(DISK, Contents(bytearray()))
                    services.files.fail("mount.unlink", 1, Killed())
                    try:
                        await guest.unlink(DISK)
                    finally:
                        guest.drop()
            rig.lose_power(random.Random(seed))
            async with rig.running() as services:
                assert services.recovered.findings == []
                disk = await services.open(DISK)
                assert await disk.read(0, 3 * CHUNK) == content
                await services.disks.release(disk)


@pytest.mark.parametrize("site", ["mount.unlink", "remove.sync", "map.remove", ""])
async def test_what_a_failed_archive_was_to_replace_goes_with_the_file(site: str) -> None:
    """The earlier placeholder's map and pin stayed when the file was removed, and the start told of a lost file."""
    for seed in range(4):
        with temporary_rig() as rig:
            await archived(rig)
            with survives_kill():
                async with rig.running() as services:
                    await _write_in_first_chunk(services)
                    services.files.fail("archive.record_sync", 1, OSError(errno.EIO, "planted"))
                    with pytest.raises(PrimaryIOError):
                        await services.archive("vm")
                    assert len(rig.maps()) == 2
                    guest = Guest(services)
                    services.files.fail(site, 1, Killed())
                    try:
                        await guest.unlink(DISK)
                    finally:
                        guest.drop()
                    assert (rig.maps(), rig.pins()) == ([], [])
            rig.lose_power(random.Random(seed))
            async with rig.running() as services:
                assert services.recovered.findings == []
                if (rig.backing / DISK).exists():
                    disk = await services.open(DISK)
                    assert await disk.read(4 * BLOCK, BLOCK) in (NEW, random.Random(4).randbytes(5 * BLOCK)[-BLOCK:])
                    await services.disks.release(disk)
                    assert (len(rig.maps()), len(rig.pins())) == (1, 1)
                else:
                    assert (rig.maps(), rig.pins()) == ([], [])


async def test_what_the_disk_takes_badly_while_hydrating_is_an_error_until_reboot() -> None:
    """Waiting for what was recalled to be written takes the error that a guest's next fsync would have reported."""
    with temporary_rig() as rig:
        await archived(rig)
        content = random.Random(4).randbytes(4 * CHUNK)
        async with rig.running() as services:
            disk = await services.open(DISK)
            await disk.write(0, NEW)
            placeholder = disk.placeholder
            assert placeholder is not None
            services.files.fail("recall.fill", 1, WriteBackFailed(errno.EIO, "planted"))
            with pytest.raises(MapFrozen):
                await services.connected.recall.recall_chunks(placeholder, [1, 2], demand=False)
            for refused in (partial(disk.read, 0, BLOCK), partial(disk.sync, data_only=True)):
                with pytest.raises(MapFrozen):
                    await refused()
            await services.disks.release(disk)
        rig.lose_power(random.Random(1))
        async with rig.running() as services:
            disk = await services.open(DISK)
            assert await disk.read(0, BLOCK) in (NEW, content[:BLOCK])
            assert await disk.read(BLOCK, 4 * CHUNK - BLOCK) == content[BLOCK:]
            await services.disks.release(disk)


async def test_a_map_that_was_being_made_when_the_daemon_was_killed_takes_no_memory() -> None:
    """It was written over when its disk was opened again; when the disk was removed it stayed until the reboot."""
    with temporary_rig() as rig:
        await archived(rig)
        with survives_kill():
            async with rig.running() as services:
                services.files.fail("volatile.create", 2, Killed())
                await services.open(DISK)
        assert [path.suffix for path in (rig.runtime / "maps").iterdir()] == [".new"]
        async with rig.running():
            assert list((rig.runtime / "maps").iterdir()) == []


async def test_a_reader_hurries_a_fetch_of_the_background_that_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mover that runs only when nobody else does must not be what a guest waits for."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            placeholder, recall, hurries = disk.placeholder, services.connected.recall, 0
            assert placeholder is not None
            go_on = threading.Event()
            rig.objects.before = lambda call, key: None if call != "get_range" else _wait(go_on)

            @contextmanager
            def hurried() -> Iterator[None]:
                nonlocal hurries
                hurries += 1
                go_on.set()
                yield

            monkeypatch.setattr(services.connected.recall._mover, "hurried", hurried)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(recall.recall_chunks, placeholder, [1], demand=False))
                await trio.testing.wait_all_tasks_blocked()
                assert hurries == 0
                assert len(await disk.read(CHUNK, BLOCK)) == BLOCK
            assert hurries == 1
            rig.objects.before = lambda call, key: None
            await disk.read(2 * CHUNK, BLOCK)
            assert hurries == 1
            await services.disks.release(disk)


def _wait(event: threading.Event) -> None:
    assert event.wait(10)
