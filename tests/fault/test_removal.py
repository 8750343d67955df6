"""The end of a placeholder whose file is removed: its pin goes only when the file cannot come back."""

from __future__ import annotations

import errno
import os
import random

import pytest

from tests.datastore_harness import BLOCK, CHUNK, Killed, Rig, RigFiles, Services, survives_kill, temporary_rig

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
