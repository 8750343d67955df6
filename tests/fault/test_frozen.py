"""After a failed sync nothing that it covered is believed, until a reboot tells what is on the disk."""

from __future__ import annotations

import errno
import random

import pytest

from tests.datastore_harness import BLOCK, CHUNK, Rig, RigFiles, temporary_rig
from vmfs_stub.core.errors import MapFrozen

DISK = "vm/disk.img"
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


async def archived(rig: Rig) -> None:
    rig.make_disk(DISK, OLD * (3 * CHUNK // BLOCK))
    async with rig.running() as services:
        await services.archive("vm")


def failing(rig: Rig, site: str) -> RigFiles:
    files = RigFiles(rig.medium)
    files.fail(site, 1, OSError(errno.EIO, "planted"))
    return files


@pytest.mark.parametrize(("site", "data_only"), [("sync.data", True), ("sync.data", False), ("sync.file", False)])
async def test_a_failed_sync_freezes_the_disk_until_reboot(site: str, data_only: bool) -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running(files=failing(rig, site)) as services:
            disk = await services.open(DISK)
            await disk.write(0, NEW)
            with pytest.raises(MapFrozen):
                await disk.sync(data_only=data_only)
            with pytest.raises(MapFrozen):
                await disk.sync(data_only=data_only)
            with pytest.raises(MapFrozen):
                await disk.read(0, 1)
            with pytest.raises(MapFrozen):
                await disk.write(BLOCK, NEW)
            await services.disks.release(disk)
            with pytest.raises(MapFrozen):
                await services.open(DISK)
        async with rig.running() as services:
            with pytest.raises(MapFrozen):
                await services.open(DISK)
        rig.lose_power(random.Random(0))
        async with rig.running() as services:
            disk = await services.open(DISK)
            assert await disk.read(0, BLOCK) in (OLD, NEW)
            assert await disk.read(BLOCK, BLOCK) == OLD
            await services.disks.release(disk)


async def test_a_failed_sync_at_the_close_freezes_the_disk_too() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running(files=failing(rig, "sync.data")) as services:
            disk = await services.open(DISK)
            await disk.write(0, NEW)
            await services.disks.release(disk)
            with pytest.raises(MapFrozen):
                await services.open(DISK)


@pytest.mark.parametrize(("site", "number"), [("sync.data", 1), ("archive.sync", 1)])
async def test_a_failed_sync_in_a_second_archive_is_not_forgotten(site: str, number: int) -> None:
    """The kernel tells of lost data once; the sync at the close would succeed, and make bits durable without data."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            await disk.write(0, NEW)
            await services.disks.release(disk)
            services.files.fail(site, number, OSError(errno.EIO, "planted"))
            with pytest.raises(MapFrozen):
                await services.archive("vm")
            with pytest.raises(MapFrozen):
                await services.open(DISK)
        rig.lose_power(random.Random(0))
        async with rig.running() as services:
            disk = await services.open(DISK)
            assert await disk.read(0, 2 * BLOCK) == NEW + OLD
            await services.disks.release(disk)


async def test_a_short_write_keeps_what_it_says_it_wrote() -> None:
    """A write that ends inside an absent block counts only up to that block."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running() as services:
            disk = await services.open(DISK)
            services.files.instead["write.data"] = lambda function, fd, data, offset: function(
                fd, data[: BLOCK + 100], offset
            )
            assert await disk.write(0, NEW * 3) == BLOCK
            services.files.instead["write.data"] = lambda function, fd, data, offset: function(fd, data[:100], offset)
            with pytest.raises(OSError, match="No space"):
                await disk.write(4 * BLOCK, NEW)
            del services.files.instead["write.data"]
            assert await disk.read(0, 5 * BLOCK) == NEW + OLD * 4
            await services.disks.release(disk)
