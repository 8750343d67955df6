"""The end of a placeholder whose file is removed: its pin goes only when the file cannot come back."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.datastore_harness import (
    BLOCK,
    CALLER,
    CHUNK,
    Killed,
    Rig,
    RigFiles,
    Services,
    survives_kill,
    temporary_rig,
)
from tests.model.guest import Guest
from vmfs_stub.core.errors import InUse, PrimaryIOError
from vmfs_stub.mount import filesystem

DISK = "vm/disk.img"
CONTENT = b"o" * (4 * CHUNK)


class Journal:
    """Was everything synced since the file was unlinked?  Asked whenever a pin is about to go."""

    def __init__(self, rig: Rig, files: RigFiles) -> None:
        self._rig = rig
        self._files = files
        self.pins_gone: list[str] = []
        self.is_synced = False
        for site in ("remove.sync", "recovery.sync_removals"):
            files.instead[site] = self._sync
        rig.objects.before = self._before

    def _sync(self, function: object, fd: int) -> None:
        self.is_synced = not (self._rig.backing / DISK).exists()

    def _before(self, call: str, key: str) -> None:
        if call == "delete" and key.startswith("pins/"):
            assert self.is_synced, "a power loss could bring back a file without its pin"
            self.pins_gone.append(key)


async def archived(rig: Rig) -> None:
    rig.make_disk(DISK, CONTENT)
    async with rig.running() as services:
        await services.archive("vm")


async def remove(services: Services, path: str) -> None:
    """What the mount does at an unlink."""
    with services.rig.path_fd(path) as fd:
        await services.disks.removing(fd)
        services.files.call("mount.unlink", (services.rig.backing / path).unlink)
        await services.disks.removed(fd)


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
async def test_a_pin_goes_after_the_unlink_is_durable(is_open: bool) -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running(files=(files := RigFiles(rig.medium))) as services:
            journal = Journal(rig, files)
            disk = await services.open(DISK) if is_open else None
            await remove(services, DISK)
            if disk is not None:
                assert journal.pins_gone == []
                await services.disks.release(disk)
            assert len(journal.pins_gone) == 1
        assert (rig.pins(), rig.maps()) == ([], [])


async def test_a_pin_goes_after_a_killed_daemons_unlink_is_durable() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        with survives_kill():
            async with rig.running() as services:
                await services.open(DISK)
                await remove(services, DISK)
                services.files.kill()
                raise Killed
        files = RigFiles(rig.medium)
        journal = Journal(rig, files)
        async with rig.running(files=files) as services:
            assert services.recovered.findings == []
        assert len(journal.pins_gone) == 1
        assert (rig.pins(), rig.maps()) == ([], [])


async def test_a_removed_disk_whose_last_sync_fails_is_gone_all_the_same() -> None:
    """It stayed known by its inode's number, and the next file of that number could not be opened."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            await disk.write(0, b"n" * BLOCK)
            await remove(services, DISK)
            services.files.fail("sync.data", 1, OSError(errno.EIO, os.strerror(errno.EIO)))
            await services.disks.release(disk)
            assert services.disks.placeholders.get(disk.ino) is None
            assert (rig.pins(), rig.maps()) == ([], [])


@pytest.mark.parametrize("seed", range(8))
async def test_a_removal_that_could_not_be_noted_is_noted_by_the_next_try(seed: int) -> None:
    """The first try was remembered as done, and after a power loss a file was missed that had been removed."""
    with temporary_rig() as rig:
        await archived(rig)
        with survives_kill():
            async with rig.running() as services:
                await services.open(DISK)
                services.files.fail("map.sync", 1, OSError(errno.EIO, os.strerror(errno.EIO)))
                with pytest.raises(OSError, match="Input/output"):
                    await remove(services, DISK)
                await remove(services, DISK)
                rig.medium.commit()
                services.files.kill()
                raise Killed
        rig.lose_power(random.Random(seed))
        async with rig.running() as services:
            assert services.recovered.findings == []


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
async def test_a_whole_file_whose_graduation_was_not_synced_is_not_marked_as_removed(is_open: bool) -> None:
    """Its record was gone, its map said removed and its unlink was never made: the next start refused a whole file."""
    with temporary_rig() as rig:
        await archived(rig)
        with survives_kill():
            async with rig.running() as services:
                disk = await services.open(DISK)
                assert await disk.read(0, len(CONTENT)) == CONTENT
                services.files.fail("graduate.sync", 1, OSError(errno.EIO, "planted"))
                if is_open:
                    with pytest.raises(OSError, match="planted"):
                        await services.disks.graduate(disk)
                else:
                    await services.disks.release(disk)
                services.files.fail("mount.unlink", 1, Killed())
                await remove(services, DISK)
        async with rig.running() as services:
            assert services.recovered.findings == []
            disk = await services.open(DISK)
            assert await disk.read(0, len(CONTENT)) == CONTENT
            await services.disks.release(disk)


async def test_a_slow_sync_delays_the_end_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unlink was answered after a while, and nobody thought of pin and map until the next start."""
    monkeypatch.setattr(filesystem, "_REMOVED_TIMEOUT_S", 0.05)
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            guest = Guest(services)
            services.files.instead["remove.sync"] = lambda function, fd: time.sleep(0.2)
            await guest.unlink(DISK)
            assert services.ender._waiting or (rig.pins(), rig.maps()) == ([], [])
            await guest.end()


async def test_what_a_removal_noted_is_gone_though_a_close_was_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal gave up waiting for the close; its note was taken for one of the next file with that inode number."""
    monkeypatch.setattr(filesystem, "_REMOVED_TIMEOUT_S", 0.05)
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            guest, disk, removals = Guest(services), await services.open(DISK), services.disks._removals
            await disk.write(0, b"n" * BLOCK)
            is_gone, is_closing = threading.Event(), threading.Event()

            def unlink(function: Callable[..., None], name: bytes, **kwargs: int) -> None:
                function(name, **kwargs)
                is_gone.set()
                assert is_closing.wait(10)

            def sync(function: Callable[[int], None], fd: int) -> None:
                is_closing.set()
                time.sleep(0.2)

            services.files.instead |= {"mount.unlink": unlink, "sync.data": sync}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.unlink, DISK)
                await trio.to_thread.run_sync(is_gone.wait, 10)
                await services.disks.release(disk)
            assert (removals._states_before, dict(removals._under_way)) == ({}, {})
            assert services.ender._waiting or (rig.pins(), rig.maps()) == ([], [])
            await guest.end()


async def test_an_open_that_comes_after_the_removal_is_told_so_and_is_no_finding() -> None:
    """Any user could open a file of his own once more by a descriptor, and the daemon counted as unhealthy for good."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            with rig.path_fd(DISK) as fd:
                await remove(services, DISK)
                with pytest.raises(OSError, match="Stale") as refused:
                    await services.disks.open(fd, writable=False, caller=CALLER)
                assert refused.value.errno == errno.ESTALE
            assert services.findings.all() == []


async def test_a_removal_that_cannot_be_noted_leaves_no_link() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            services.files.fail("map.sync", 1, OSError(errno.EIO, "planted"))
            with pytest.raises((OSError, PrimaryIOError)):
                await remove(services, DISK)
            assert (disk.fstat().st_nlink, disk.is_orphan) == (1, False)
            await services.disks.release(disk)


async def test_an_archive_that_begins_while_a_removal_waits_gives_up() -> None:
    """The removal's note was overtaken by the archive's own: the disk was removed while it became a placeholder."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services, trio.open_nursery() as nursery:
            disks = services.disks
            with rig.path_fd(DISK) as fd:
                ino = os.fstat(fd).st_ino
                lost: list[bool] = []

                async def reserve() -> None:
                    with trio.CancelScope() as scope:
                        async with disks.reserve(fd, scope) as reservation:
                            await trio.sleep_forever()
                    lost.append(reservation.lost)

                async with disks._ino_lock(ino):
                    nursery.start_soon(reserve)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.start_soon(remove, services, DISK)
                    await trio.testing.wait_all_tasks_blocked()
                with trio.fail_after(10):
                    while not lost or rig.pins():
                        await trio.testing.wait_all_tasks_blocked(0.01)
                assert lost == [True]
                assert (rig.pins(), rig.maps()) == ([], [])


async def test_a_file_that_is_about_to_go_is_not_archived() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            with rig.path_fd(DISK) as fd, trio.CancelScope() as scope:
                await services.disks.removing(fd)
                with pytest.raises(InUse, match="is being removed"):
                    async with services.disks.reserve(fd, scope):
                        pass
                await services.disks.removed(fd)
                async with services.disks.reserve(fd, scope) as reservation:
                    assert not reservation.lost
