"""Backups of VMs in use: the restore point is all disks at one moment, and no guest's write fails or waits for long."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.datastore_harness import BLOCK, CHUNK, Fault, Killed, Rig, Services, survives_kill, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from vmfs_stub.core.errors import Abandoned, InUse, PrimaryIOError, StoreFull
from vmfs_stub.core.names import FROZEN_DIR, PRIVATE_DIR
from vmfs_stub.core.usage import GuestState
from vmfs_stub.services import copying, frozen_disk, running_backup, set_aside
from vmfs_stub.services.associated import AssociatedFiles
from vmfs_stub.services.backup_report import BackupReport
from vmfs_stub.services.changes import DiskChanges
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disk_parts import DiskParts
from vmfs_stub.services.frozen_disk import FrozenDisk
from vmfs_stub.services.frozen_guests import FrozenGuests
from vmfs_stub.services.set_aside import SetAside
from vmfs_stub.services.write_gate import WriteGate
from vmfs_stub.store.store import Store

PATHS = ("vm/disk.img", "vm/second.img")
DISK, SECOND = PATHS
RUNNING = GuestState.RUNNING
SIZE = 40 * CHUNK + 100
EIO = OSError(errno.EIO, os.strerror(errno.EIO))
ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def noise(size: int = SIZE, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@contextmanager
def rig_with_disks(*, head: int = 0, clones: bool = False) -> Iterator[Rig]:
    """Two disks, with holes in them.  With ``clones`` the filesystem has them (a copy in one call stands for one)."""
    with temporary_rig(head=head) as rig, pytest.MonkeyPatch.context() as patch:
        for number, path in enumerate(PATHS):
            rig.make_disk(path, noise(seed=number + 1))
            os.truncate(rig.backing / path, 12 * CHUNK)
            os.truncate(rig.backing / path, 30 * CHUNK)
            with (rig.backing / path).open("r+b") as file:
                os.pwrite(file.fileno(), noise(10 * CHUNK + 100, seed=number + 7), 30 * CHUNK)
            rig.medium.note(rig.backing / path)
        if clones:
            patch.setattr(running_backup, "can_clone", lambda *args: True)
            patch.setattr(frozen_disk, "clone", lambda files, fd, to: files.call("aside.clone", copy_all, fd, to))
        yield rig


def copy_all(fd: int, to: int) -> None:
    os.truncate(to, 0)
    os.pwrite(to, os.pread(fd, os.fstat(fd).st_size, 0), 0)


def point_bytes(rig: Rig, report: BackupReport, path: str) -> bytes:
    """What a restore point has of a file."""
    store, vm = Store(rig.objects, rig.store.description), rig.vm("vm")
    point = store.open_point(vm.id, report.point_id)
    (number,) = [n for n, stored in enumerate(point.manifest.files) if stored.path == path.removeprefix("vm/")]
    table, parts = point.chunks(number), bytearray()
    for at, ref in enumerate(table.locate(0, table.chunk_count)):
        parts += bytes(min(CHUNK, table.size - at * CHUNK)) if ref is None else store.fetch([ref])[0]
    return bytes(parts)


def consistency(rig: Rig, report: BackupReport) -> str:
    store = Store(rig.objects, rig.store.description)
    return store.open_point(rig.vm("vm").id, report.point_id).manifest.metadata["consistency"]


class Guest:
    """A guest that has both disks open, and knows what they hold; ``at_moment`` is what that was at the last moment."""

    def __init__(self, disks: list[Disk], services: Services, *, seed: int = 3) -> None:
        self.disks = disks
        self.chosen = random.Random(seed)
        self.contents = [bytearray((services.rig.backing / path).read_bytes()) for path in PATHS]
        self.at_moment: list[bytes] = []
        self.writes = 0
        self.is_over = False

    async def write(self, number: int, offset: int, data: bytes) -> None:
        written = 0
        while written < len(data):
            written += await self.disks[number].write(offset + written, data[written:])
        content = self.contents[number]
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
        self.writes += 1

    async def truncate(self, number: int, size: int) -> None:
        await self.disks[number].truncate(size)
        content = self.contents[number]
        content.extend(bytes(max(0, size - len(content))))
        del content[size:]

    async def write_somewhere(self) -> None:
        """Anything: a block, less, more, over the end; perhaps it cuts or extends the disk."""
        chosen, number = self.chosen, self.chosen.randrange(2)
        fate, size = chosen.random(), len(self.contents[number])
        if fate < 0.05:
            await self.truncate(number, chosen.randrange(size // 2, size + 2 * CHUNK))
            return
        length = chosen.choice((1, 512, BLOCK, 3 * BLOCK, CHUNK, 2 * CHUNK + 5))
        offset = chosen.randrange(size + 100)
        if fate < 0.5:
            offset -= offset % BLOCK
        await self.write(number, offset, chosen.randbytes(length) if fate < 0.9 else bytes(length))

    def write_always(self, nursery: trio.Nursery) -> None:
        async def go_on() -> None:
            while not self.is_over:
                await self.write_somewhere()

        nursery.start_soon(go_on)


@asynccontextmanager
async def guest_of(services: Services, *, seed: int = 3) -> AsyncIterator[Guest]:
    """Both disks are open; at every moment that a backup takes, the guest notes what they hold."""
    disks = [await services.open(path) for path in PATHS]
    guest = Guest(disks, services, seed=seed)
    begin = FrozenDisk.begin

    def noting(self: FrozenDisk) -> None:
        if self.disk in disks and not any(disk.aside for disk in disks):
            guest.at_moment = [bytes(content) for content in guest.contents]
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenDisk, "begin", noting)
        try:
            yield guest
        finally:
            if not services.files.dead:
                for disk in disks:
                    await services.disks.release(disk)


def check_moment(services: Services, guest: Guest, report: BackupReport) -> None:
    for path, content in zip(PATHS, guest.at_moment, strict=True):
        found = point_bytes(services.rig, report, path)
        chunks = [slice(at, at + CHUNK) for at in range(0, len(content), CHUNK)]
        wrong = [number for number, chunk in enumerate(chunks) if found[chunk] != content[chunk]]
        assert (len(found), wrong) == (len(content), []), path


async def check_now(guest: Guest) -> None:
    """No write was lost, and none was done twice."""
    for disk, content in zip(guest.disks, guest.contents, strict=True):
        assert bytes(await disk.read(0, len(content) + 10)) == bytes(content)


async def back_up_while_written(services: Services, guest: Guest, **kwargs: Any) -> BackupReport:
    """A backup, with the guest writing all the time and at every step of it."""
    async with trio.open_nursery() as nursery:
        guest.is_over = False
        guest.write_always(nursery)
        report = await services.back_up_in_use("vm", **kwargs)
        guest.is_over = True
    return report


def nothing_left(services: Services) -> None:
    """No private file, no map of a point that is not there, no gate, no lease."""
    frozen = services.rig.backing / PRIVATE_DIR / FROZEN_DIR
    assert list(frozen.iterdir()) == []
    assert [path.name for path in (services.rig.runtime / "changes").iterdir() if not path.name.isdecimal()] == []
    held = {str(fd) for fd in services.rig.medium.held()}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            assert link.name in held or not link.readlink().is_relative_to(frozen)


# The moment


@pytest.mark.parametrize("clones", [False, True])
@pytest.mark.parametrize("seed", range(6))
async def test_the_point_is_all_disks_at_one_moment(seed: int, clones: bool) -> None:
    with rig_with_disks(clones=clones) as rig:
        async with rig.running() as services, guest_of(services, seed=seed) as guest:
            for _ in range(4):
                report = await back_up_while_written(services, guest)
                check_moment(services, guest, report)
                await check_now(guest)
                nothing_left(services)
            assert guest.writes > 50
            assert consistency(rig, report) == "crash"
        report = await _back_up_idle(rig)
        for path, content in zip(PATHS, guest.contents, strict=True):
            assert point_bytes(rig, report, path) == bytes(content)
        assert consistency(rig, report) == "off"


async def _back_up_idle(rig: Rig) -> BackupReport:
    async with rig.running() as services:
        return await services.archive("vm", archive=False)


@pytest.mark.parametrize("seed", range(8))
async def test_the_point_of_placeholders_is_what_they_stood_for(seed: int) -> None:
    with rig_with_disks(head=BLOCK) as rig:
        async with rig.running() as services:
            await services.archive("vm")
        async with rig.running() as services, guest_of(services, seed=seed) as guest:
            guest.contents = [bytearray(await disk.read(0, 0) or b"") for disk in guest.disks]
            guest.contents = [bytearray(content) for content in first_contents(rig)]
            for _ in range(3):
                report = await back_up_while_written(services, guest)
                check_moment(services, guest, report)
            await check_now(guest)
            nothing_left(services)


def first_contents(rig: Rig) -> list[bytes]:
    """What the restore point that the placeholders are of has."""
    store, vm = Store(rig.objects, rig.store.description), rig.vm("vm")
    (point_id,) = {key.split("/")[2] for key in rig.objects.contents if key.startswith("manifests/")}
    report = BackupReport("vm", point_id, 0)  # type: ignore[arg-type]
    assert store.open_point(vm.id, report.point_id)
    return [point_bytes(rig, report, path) for path in PATHS]


async def test_whole_absent_chunks_that_are_overwritten_are_taken_over_and_never_fetched() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services:
            await services.archive("vm")
        async with rig.running() as services, guest_of(services) as guest:
            guest.contents = [bytearray(content) for content in first_contents(rig)]

            async def overwrite() -> None:
                for at in range(30, 40):
                    await guest.write(0, at * CHUNK, noise(CHUNK, seed=at))

            fetches = services.recall.counters.fetches
            report = await _between(services, overwrite)
            check_moment(services, guest, report)
            assert report.read_bytes == 0
            assert services.recall.counters.fetches == fetches


async def test_of_a_chunk_that_is_absent_in_part_the_rest_comes_from_its_point() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services:
            await services.archive("vm")
        async with rig.running() as services, guest_of(services) as guest:
            guest.contents = [bytearray(content) for content in first_contents(rig)]
            await guest.write(0, 35 * CHUNK + 2 * BLOCK, noise(BLOCK, seed=50))

            async def overwrite() -> None:
                await guest.write(0, 35 * CHUNK + BLOCK, noise(BLOCK * 3, seed=51))

            check_moment(services, guest, await _between(services, overwrite))
            await check_now(guest)


async def test_a_chunk_that_comes_back_while_it_is_set_aside_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its absent blocks are seen, then filled in for the backup, and the guest changes it before the mover reads it."""
    is_back, is_written = threading.Event(), threading.Event()
    bring_back = DiskParts._recall_mixed

    async def bringing_back(self: DiskParts, *args: Any) -> int:
        stop = await bring_back(self, *args)
        is_back.set()
        return stop

    def after(event: threading.Event, function: Callable[..., Any], *args: Any) -> Any:
        assert event.wait(10)
        return function(*args)

    monkeypatch.setattr(DiskParts, "_recall_mixed", bringing_back)
    with rig_with_disks() as rig:
        async with rig.running() as services:
            await services.archive("vm")
        async with rig.running() as services, guest_of(services) as guest, trio.open_nursery() as nursery:
            guest.contents = [bytearray(content) for content in first_contents(rig)]
            await guest.write(0, 35 * CHUNK + 2 * BLOCK, noise(BLOCK, seed=50))

            async def overwrite() -> None:
                await guest.write(0, 35 * CHUNK + BLOCK, noise(BLOCK, seed=51))
                is_written.set()

            async def begin() -> None:
                services.files.instead["aside.read"] = partial(after, is_back)
                services.files.instead["archive.read"] = partial(after, is_written)
                nursery.start_soon(overwrite)
                await wait_all_tasks_blocked()

            check_moment(services, guest, await _between(services, begin))
            await check_now(guest)


async def _between(services: Services, act: Callable[[], Any]) -> BackupReport:
    """A backup with ``act`` after its moment, and before anything is copied."""
    changed = services.archiver._last_points.changed_in_use

    async def acting(disks: Any) -> Any:
        found = await changed(disks)
        await act()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services.archiver._last_points, "changed_in_use", acting)
        return await services.back_up_in_use("vm")


@pytest.mark.parametrize("to", [0, 5 * CHUNK + 7, 29 * CHUNK, SIZE - 3, SIZE + 3 * CHUNK])
async def test_what_is_cut_off_is_set_aside(to: int) -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:

            async def cut() -> None:
                await guest.truncate(0, to)
                await guest.truncate(0, SIZE + CHUNK)
                await guest.write(0, SIZE, b"later")

            check_moment(services, guest, await _between(services, cut))
            await check_now(guest)


async def test_writes_under_way_are_waited_for_and_later_ones_wait_for_the_moment() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            order: list[str] = []
            real = FrozenDisk.begin

            def noting(self: FrozenDisk) -> None:
                order.append("moment")
                real(self)

            def slow(function: Callable[..., Any], *args: Any) -> Any:
                time.sleep(0.05)
                order.append("written")
                return function(*args)

            services.files.instead["write.data"] = slow
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FrozenDisk, "begin", noting)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.write, 0, 0, b"before")
                    await trio.sleep(0.01)
                    report = await services.back_up_in_use("vm")
            assert order == ["written", "moment", "moment"]
            check_moment(services, guest, report)


async def test_writes_that_do_not_come_to_rest_end_the_backup_and_nobody_waits_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running_backup, "AT_REST_S_MAX", 0.05)
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            services.files.instead["write.data"] = lambda function, *args: (time.sleep(0.3), function(*args))[1]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.write, 0, 0, b"slow")
                await trio.sleep(0.01)
                with pytest.raises(Abandoned, match="did not come to rest"):
                    await services.back_up_in_use("vm")
            services.files.instead.clear()
            await guest.write(1, 0, b"at once")
            await check_now(guest)
            nothing_left(services)
            check_moment(services, guest, await services.back_up_in_use("vm"))


async def test_a_clone_that_hangs_ends_the_backup_and_guests_do_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running_backup, "AT_REST_S_MAX", 0.05)
    with rig_with_disks(clones=True) as rig:
        async with rig.running() as services, guest_of(services) as guest:
            services.files.instead["aside.clone"] = lambda function, *args: time.sleep(0.5)
            async with trio.open_nursery() as nursery:

                async def fail() -> None:
                    with pytest.raises(Abandoned, match="did not come to rest"):
                        await services.back_up_in_use("vm")

                nursery.start_soon(fail)
                await trio.sleep(0.06)
                began = time.monotonic()
                await guest.write(0, 0, b"x")
                assert time.monotonic() - began < 0.3
            nothing_left(services)


# Who else uses it


async def test_a_vm_that_is_closed_and_opened_meanwhile() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:

            async def reopen() -> None:
                for path, disk in zip(PATHS, guest.disks, strict=True):
                    await services.disks.release(disk)
                    assert await services.open(path) is disk
                await guest.write(1, 3 * CHUNK, b"later")

            check_moment(services, guest, await _between(services, reopen))
            with pytest.raises(InUse):
                await services.archive("vm")


async def test_a_file_that_a_program_outside_has_open_is_not_backed_up() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services):
            fd = os.open(rig.backing / SECOND, os.O_RDONLY)
            with pytest.raises(InUse, match="open in some program"):
                await services.back_up_in_use("vm")
            os.close(fd)
            nothing_left(services)
            await services.back_up_in_use("vm")


async def test_two_jobs_do_not_copy_one_vm_at_once() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:

            async def another() -> None:
                with pytest.raises(InUse, match="another job"):
                    await services.back_up_in_use("vm")

            check_moment(services, guest, await _between(services, another))


async def test_a_vm_that_is_renamed_or_removed_meanwhile_has_no_point() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services):

            async def rename() -> None:
                (rig.backing / "vm").rename(rig.backing / "other")

            with pytest.raises(Abandoned, match="renamed or removed"):
                await _between(services, rename)
            (rig.backing / "other").rename(rig.backing / "vm")
            nothing_left(services)


# What goes wrong


async def test_more_than_may_be_set_aside_ends_the_backup_and_no_write_fails() -> None:
    with rig_with_disks() as rig:
        rig.settings = replace(rig.settings, set_aside_bytes_max=3 * CHUNK)
        async with rig.running() as services, guest_of(services) as guest:

            async def overwrite() -> None:
                for at in range(12):
                    await guest.write(0, at * CHUNK, noise(CHUNK, seed=at + 60))

            with pytest.raises(Abandoned, match="set_aside_bytes_max"):
                await _between(services, overwrite)
            await check_now(guest)
            nothing_left(services)
            assert not [key for key in rig.objects.contents if key.startswith("manifests/")]
            check_moment(services, guest, await services.back_up_in_use("vm"))


async def test_too_little_room_on_primary_ends_the_backup() -> None:
    with rig_with_disks() as rig:
        rig.settings = replace(rig.settings, free_floor_percent=100.0)
        async with rig.running() as services, guest_of(services) as guest:
            with pytest.raises(Abandoned, match="free_floor_percent"):
                await _between(services, lambda: guest.write(0, 0, b"x"))
            await check_now(guest)
    with rig_with_disks(clones=True) as rig:
        rig.settings = replace(rig.settings, free_floor_percent=100.0)
        async with rig.running() as services, guest_of(services) as guest:
            with pytest.raises(PrimaryIOError, match="free_floor_percent"):
                await services.back_up_in_use("vm")
            nothing_left(services)


@pytest.mark.parametrize("site", ["aside.read", "aside.write", "aside.mark"])
async def test_what_cannot_be_set_aside_ends_the_backup_and_no_write_fails(site: str) -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:

            async def write() -> None:
                services.files.fail(site, 1, ENOSPC)
                await guest.write(0, 5 * CHUNK, noise(CHUNK, seed=9))

            with pytest.raises(Abandoned, match="No space left"):
                await _between(services, write)
            await check_now(guest)
            nothing_left(services)
            check_moment(services, guest, await services.back_up_in_use("vm"))


# Changed blocks


async def test_after_a_backup_in_use_only_what_changed_since_its_moment_is_read() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            assert (await services.back_up_in_use("vm")).read_bytes > 20 * CHUNK
            assert (await services.back_up_in_use("vm")).read_bytes == 0
            await guest.write(0, 3 * CHUNK, b"x")
            report = await _between(services, lambda: guest.write(1, 5 * CHUNK, b"after the moment"))
            assert report.read_bytes == CHUNK
            check_moment(services, guest, report)
            report = await services.back_up_in_use("vm")
            assert report.read_bytes == CHUNK
            check_moment(services, guest, report)
            await guest.write(0, 9 * CHUNK, b"y")
        async with rig.running() as services:
            report = await services.archive("vm", archive=False)
            assert report.read_bytes == CHUNK
            for path, content in zip(PATHS, guest.contents, strict=True):
                assert point_bytes(rig, report, path) == bytes(content)


async def test_a_backup_in_use_that_fails_changes_nothing_of_what_is_known() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            await services.back_up_in_use("vm")
            await guest.write(0, 3 * CHUNK, b"x")
            services.files.fail("store.manifest.put", 1, StoreFull("full"))
            with pytest.raises(StoreFull):
                await _between(services, lambda: guest.write(0, 4 * CHUNK, b"after the moment"))
            nothing_left(services)
            await guest.write(0, 5 * CHUNK, b"x")
            report = await services.back_up_in_use("vm")
            assert report.read_bytes == 3 * CHUNK
            check_moment(services, guest, report)


async def test_a_change_that_cannot_be_noted_for_the_coming_point_leaves_what_is_known_as_it_was() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            await services.back_up_in_use("vm")

            async def write() -> None:
                services.files.fail("changes.allocate", 1, ENOSPC)
                await guest.write(0, 4 * CHUNK, b"after the moment")

            await _between(services, write)
            await guest.write(0, 5 * CHUNK, b"x")
            report = await services.back_up_in_use("vm")
            assert report.read_bytes == 2 * CHUNK
            check_moment(services, guest, report)


async def test_a_change_that_cannot_be_noted_while_maps_are_exchanged_makes_all_be_read() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            await services.back_up_in_use("vm")

            def lose(function: Callable[..., Any], *args: Any) -> Any:
                for disk in guest.disks:
                    disk.changes.unfollow()
                return function(*args) if Path(args[0]).exists() else None

            services.files.instead["changes.replace"] = lose
            await services.back_up_in_use("vm")
            services.files.instead.clear()
            await guest.write(0, 5 * CHUNK, b"x")
            check_moment(services, guest, await services.back_up_in_use("vm"))


@pytest.mark.parametrize("late", [False, True])
async def test_maps_that_cannot_be_exchanged_miss_nothing(late: bool) -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            await services.back_up_in_use("vm")
            await guest.write(0, 3 * CHUNK, b"x")
            services.files.spoil("changes.replace", 1, Fault(EIO, late=late))
            await services.back_up_in_use("vm")
            await guest.write(0, 4 * CHUNK, b"y")
            check_moment(services, guest, await services.back_up_in_use("vm"))
        async with rig.running() as services, guest_of(services) as guest:
            await guest.write(0, 7 * CHUNK, b"z")
            check_moment(services, guest, await services.back_up_in_use("vm"))


async def test_a_sync_that_fails_during_a_backup_in_use_makes_all_be_read() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            await services.back_up_in_use("vm")

            async def fail_to_sync() -> None:
                services.files.fail("sync.file", 1, EIO)
                with pytest.raises(OSError, match="Input/output"):
                    await guest.disks[0].sync(data_only=True)

            await _between(services, fail_to_sync)
            report = await services.back_up_in_use("vm")
            assert report.read_bytes > 10 * CHUNK
            check_moment(services, guest, report)


async def test_a_last_point_that_is_gone_takes_another_moment() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services, guest_of(services) as guest:
            await services.back_up_in_use("vm")
            await guest.write(0, 3 * CHUNK, b"x")

            async def lose_segments() -> None:
                for key in [key for key in rig.objects.contents if key.startswith("segments/")]:
                    del rig.objects.contents[key]
                await guest.write(0, 6 * CHUNK, b"after the first moment")

            report = await _between(services, lose_segments)
            assert report.read_bytes > 20 * CHUNK
            check_moment(services, guest, report)


SITES = ("store.pack.put", "store.manifest.put", "changes.replace", "changes.unfollow", "aside.mark", "write.data")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("site", SITES)
async def test_after_a_kill_nothing_that_changed_is_missed(site: str, power: bool, late: bool) -> None:
    for seed in range(4):
        with rig_with_disks() as rig:
            guest = None
            with survives_kill():
                async with rig.running() as services, guest_of(services, seed=seed) as guest:
                    await back_up_while_written(services, guest)
                    for _ in range(3):
                        await guest.write_somewhere()
                    for disk in guest.disks:
                        await disk.sync(data_only=False)
                    services.files.spoil(site, 1 + seed, Fault(Killed(), late=late))
                    for _ in range(4):
                        await back_up_while_written(services, guest)
                    services.files.kill()
                    raise Killed
            if power:
                rig.lose_power(random.Random(seed))
            async with rig.running() as services:
                assert not services.recovered.findings
                assert list((rig.backing / PRIVATE_DIR / FROZEN_DIR).iterdir()) == []
                before = [(rig.backing / path).read_bytes() for path in PATHS]
                report = await services.archive("vm", archive=False)
                for path, content in zip(PATHS, before, strict=True):
                    assert point_bytes(rig, report, path) == content


# Quiescing


async def test_a_guest_with_an_agent_is_at_rest_at_the_moment_and_thawed_after(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig_with_disks() as rig:
        hypervisor = FakeHypervisor(shown := domain("vm", *(rig.backing / path for path in PATHS), state=RUNNING))
        async with rig.running() as services, guest_of(services):
            guests = FrozenGuests(
                hypervisor=hypervisor,
                threads=services.threads,
                notes=services.private.thaws,
                findings=services.findings,
            )
            freezer = partial(guests.at_rest, rig.vm("vm"), shown)
            report = await services.back_up_in_use("vm", freezer=freezer)
            assert (report.consistency, consistency(rig, report)) == ("crash", "crash")
            hypervisor.agents.add(shown.uuid)
            with monkeypatch.context() as patch:
                patch.setattr(FrozenDisk, "begin", _checking(hypervisor, FrozenDisk.begin))
                report = await services.back_up_in_use("vm", freezer=freezer)
            assert (report.consistency, consistency(rig, report)) == ("quiesced", "quiesced")
            assert hypervisor.asked == ["freeze vm", "freeze vm", "thaw vm"]
            monkeypatch.setattr(running_backup, "AT_REST_S_MAX", 0.0)
            with pytest.raises(Abandoned):
                await services.back_up_in_use("vm", freezer=freezer)
            assert (hypervisor.asked[3:], hypervisor.frozen) == (["freeze vm", "thaw vm"], set())
            monkeypatch.undo()
            hypervisor.away = True
            assert (await services.back_up_in_use("vm", freezer=freezer)).consistency == "crash"


def _checking(hypervisor: FakeHypervisor, begin: Callable[[FrozenDisk], None]) -> Callable[[FrozenDisk], None]:
    def checking(self: FrozenDisk) -> None:
        assert hypervisor.frozen, "the moment is not one of rest"
        begin(self)

    return checking


# Every check finds what it is there for


async def _keep_nothing(self: SetAside, offset: int, length: int, placeholder: object) -> None:
    pass


async def _keep_first_only(self: SetAside, offset: int, length: int, placeholder: Any) -> None:
    await REAL_KEEP(self, offset, min(length, 1), placeholder)


async def _do_not_wait(self: WriteGate) -> None:
    await trio.lowlevel.checkpoint()


async def _forget_absent(self: SetAside, chunk: int, fetch: Callable[[int], Any]) -> None:
    self._absent[chunk] = []
    await REAL_COMPLETE(self, chunk, fetch)


async def _late_follow(self: DiskChanges, origin: Any) -> None:
    pass


async def _follow_at_the_end(self: DiskChanges) -> None:
    since = self.since_last_point(exact=False)
    if since is not None:
        await REAL_FOLLOW(self, since.origin)
        await REAL_REPLACE(self)


REAL_KEEP, REAL_COMPLETE = SetAside.keep, SetAside.complete
REAL_FOLLOW, REAL_REPLACE = DiskChanges.follow, DiskChanges.replace
PLANTED: dict[str, tuple[tuple[object, str, object], ...]] = {
    "nothing is set aside": ((SetAside, "keep", _keep_nothing),),
    "of a write over two chunks one is set aside": ((SetAside, "keep", _keep_first_only),),
    "what is set aside is not looked at": ((copying, "take_set_aside", lambda *args, **kwargs: None),),
    "marks come with the bytes": ((set_aside, "mark", lambda *args, **kwargs: None),),
    "the gate lets in": ((WriteGate, "wait_at_rest", _do_not_wait),),
    "chunks count as copied at once": (
        (SetAside, "dealt_with", lambda self, count: setattr(self, "_copied", len(self._kept))),
    ),
    "what was absent in part is zeros": ((SetAside, "complete", _forget_absent),),
    "only the old map is told": (
        (DiskChanges, "follow", _late_follow),
        (DiskChanges, "replace", _follow_at_the_end),
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
async def test_what_is_planted_is_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BATCH_BYTES", 2 * CHUNK)
    for owner, name, instead in PLANTED[planted]:
        monkeypatch.setattr(owner, name, instead)
    for seed in range(12):
        try:
            await test_the_point_is_all_disks_at_one_moment(seed, clones=False)
            await test_the_point_of_placeholders_is_what_they_stood_for(seed)
            await test_of_a_chunk_that_is_absent_in_part_the_rest_comes_from_its_point()
            await test_writes_under_way_are_waited_for_and_later_ones_wait_for_the_moment()
        except AssertionError:
            return
        except BaseExceptionGroup as group:
            if group.split(AssertionError)[0] is not None:
                return
            assert group.split(PrimaryIOError)[0] is not None, group  # a disk that is too short for what was not kept
    pytest.fail("nothing was found")


# Files that come and go


async def _with_names_changed(services: Services, change: Callable[[Rig], None], *, times: int = 1) -> BackupReport:
    """A backup of a VM whose names change so often, each time after its files were opened, and before the moment."""
    shut, left = running_backup.RunningBackup._shut_gates, times

    async def changing(self: Any, disks: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            change(services.rig)
        await shut(self, disks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running_backup.RunningBackup, "_shut_gates", changing)
        return await services.back_up_in_use("vm")


def _snapshot(rig: Rig) -> None:
    rig.make_disk("vm/overlay.img", noise(CHUNK, seed=9))


def _removal(rig: Rig) -> None:
    (rig.backing / SECOND).unlink()


def _exchange(rig: Rig) -> None:
    for old, new in ((DISK, "vm/x"), (SECOND, DISK), ("vm/x", SECOND)):
        (rig.backing / old).rename(rig.backing / new)


def _link(rig: Rig) -> None:
    (rig.backing / "vm/link").symlink_to("overlay.img")


@pytest.mark.parametrize("change", [_snapshot, _removal, _exchange, _link])
async def test_a_point_has_the_names_that_were_the_vms_at_the_moment(change: Callable[[Rig], None]) -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services:
            disk = await services.open(DISK)
            report = await _with_names_changed(services, change)
            await services.disks.release(disk)
        vm = rig.vm("vm")
        stored = Store(rig.objects, rig.store.description).open_point(vm.id, report.point_id).manifest.files
        assert sorted(file.path for file in stored) == sorted(path.name for path in (rig.backing / "vm").iterdir())
        for file in vm.files:
            assert point_bytes(rig, report, file.path) == (rig.backing / file.path).read_bytes()


async def test_no_point_is_made_of_a_vm_of_which_the_names_never_rest() -> None:
    with rig_with_disks() as rig:
        async with rig.running() as services:
            disk = await services.open(DISK)
            with pytest.raises(Abandoned, match="made, renamed or removed"):
                await _with_names_changed(services, _exchange, times=100)
            assert rig.store.vms() == []
            await services.back_up_in_use("vm")
            await services.disks.release(disk)


@pytest.mark.parametrize("in_use", [False, True])
async def test_a_file_that_was_made_after_the_vm_was_found_is_in_the_point(in_use: bool) -> None:
    with rig_with_disks() as rig:
        vm = rig.vm("vm")
        _snapshot(rig)
        async with rig.running() as services:
            if in_use:
                report = await services.archiver.run_in_use(vm, progress=lambda count: None)
            else:
                report = await services.archiver.run(vm, archive=False, progress=lambda count: None)
        assert point_bytes(rig, report, "vm/overlay.img") == noise(CHUNK, seed=9)
        assert point_bytes(rig, report, DISK) == (rig.backing / DISK).read_bytes()


async def test_no_point_is_made_of_a_vm_that_has_other_images_at_the_moment_than_its_definition_says() -> None:
    """A definition that names an overlay, with a base into which that was folded meanwhile, is a corrupt guest."""
    with rig_with_disks() as rig:
        guest = domain("vm", rig.mountpoint / DISK)
        hypervisor = FakeHypervisor(guest)
        async with rig.running() as services:
            services.archiver.associated = AssociatedFiles(
                files=services.files,
                threads=services.threads,
                hypervisor=hypervisor,
                chains=services.chains,
                link=services.connected.link,
                managed_save=rig.managed_save,
            ).of

            def fold_back(rig: Rig) -> None:
                hypervisor.put(guest.uuid, disks=domain("vm", rig.mountpoint / SECOND).disks)

            with pytest.raises(Abandoned, match="other images"):
                await _with_names_changed(services, fold_back)
            assert rig.store.vms() == []
            await services.back_up_in_use("vm")
            hypervisor.away = True
            await services.back_up_in_use("vm")
