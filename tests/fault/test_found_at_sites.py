"""Failures that the sweep over all sites found, each by the call that showed it."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from tests.datastore_harness import BLOCK, CHUNK, Fault, Rig, RigFiles, Services, temporary_rig
from tests.fault.spoilings import shortened
from vmfs_stub.core.errors import PrimaryError, PrimaryIOError, VmfsStubError
from vmfs_stub.services.restore import restore_point

DISK = "vm/disk.img"
CONTENT = random.Random(9).randbytes(3 * CHUNK + 700)
EIO = OSError(errno.EIO, os.strerror(errno.EIO))


async def archived(rig: Rig) -> None:
    rig.make_disk(DISK, CONTENT)
    async with rig.running() as services:
        await services.archive("vm")


async def read(services: Services) -> bytes:
    disk = await services.open(DISK)
    try:
        return bytes(await disk.read(0, len(CONTENT) + BLOCK))
    finally:
        await services.disks.release(disk)


def open_below(rig: Rig) -> list[str]:
    """What this process has open in a rig, and the medium does not hold because it might come back."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = link.readlink()
        except OSError:
            continue
        if target.is_relative_to(rig.base) and int(link.name) not in rig.medium.held():
            found.append(str(target))
    return found


def failing(rig: Rig, site: str, *, for_good: bool = False) -> RigFiles:
    files = RigFiles(rig.medium)
    files.spoil(site, 1, Fault(EIO, for_good=for_good))
    return files


async def test_a_short_read_is_read_on_and_is_no_end_of_file() -> None:
    """The kernel gives a guest zeros for what is missing of an answer."""
    with temporary_rig() as rig:
        rig.make_disk(DISK, CONTENT)
        files = RigFiles(rig.medium)
        files.spoil("read.cached", 1, Fault(change=lambda count: 0, for_good=True))
        files.spoil("read.data", 1, Fault(change=shortened, for_good=True))
        async with rig.running(files=files) as services:
            assert await read(services) == CONTENT
        assert files.counts["read.data"] > 1


async def test_going_on_with_what_was_unfinished_does_not_end_the_daemon() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running(files=failing(rig, "resume.open")) as services:
            assert await read(services) == CONTENT


async def test_a_half_made_map_that_cannot_be_removed_does_not_keep_the_daemon_from_starting() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        left = rig.maps()[0].with_name("left.new")
        left.write_bytes(b"half")
        async with rig.running(files=failing(rig, "recovery.clean")) as services:
            assert await read(services) == CONTENT
        async with rig.running():
            assert not left.exists()


async def test_a_volatile_map_that_cannot_be_removed_is_no_failure() -> None:
    """A graduation broke off after the record was gone, and the durable map stayed open."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running(files=failing(rig, "volatile.remove")) as services:
            await services.bring_back(DISK)
            assert (rig.is_placeholder(DISK), rig.maps(), rig.pins()) == (False, [], [])
        assert open_below(rig) == []


async def test_what_the_volatile_map_holds_is_told_or_the_disk_is_refused() -> None:
    """Where its data lies could not be asked, and then all its blocks counted as absent: a guest's writes were lost."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running(files=failing(rig, "volatile.seek")) as services:
            with pytest.raises(OSError, match="Input/output error"):
                await services.open(DISK)
            assert await read(services) == CONTENT
        assert open_below(rig) == []


@pytest.mark.parametrize("site", ["archive.readlink", "archive.walk"])
async def test_a_walk_that_breaks_off_leaves_nothing_open(site: str) -> None:
    with temporary_rig() as rig:
        rig.make_disk(DISK, CONTENT)
        (rig.backing / "vm/link").symlink_to("nowhere")
        async with rig.running(files=failing(rig, site)) as services:
            caught: BaseException | None = None
            try:
                await services.archive("vm")
            except PrimaryIOError as exc:
                caught = exc  # whoever keeps the error keeps what its frames hold
            assert caught is not None
            assert [path for path in open_below(rig) if "vm" in Path(path).relative_to(rig.base).parts] == []


@pytest.mark.parametrize("site", ["archive.backing", "archive.look", "archive.open", "archive.xattrs", "archive.seek"])
async def test_a_vm_that_cannot_be_looked_at_is_not_one_that_was_renamed(site: str) -> None:
    with temporary_rig() as rig:
        rig.make_disk(DISK, CONTENT)
        async with rig.running(files=failing(rig, site)) as services:
            with pytest.raises(PrimaryIOError):
                await services.archive("vm")
            await services.archive("vm")
            assert rig.is_placeholder(DISK)


@pytest.mark.parametrize("site", ["hydrate.space", "open.file", "graduate.times", "graduate.record", "graduate.sync"])
async def test_a_recall_fails_with_an_error_that_says_what_failed(site: str) -> None:
    """It was reported as a bug of the daemon."""
    with temporary_rig() as rig:
        await archived(rig)
        async with rig.running(files=failing(rig, site)) as services:
            with pytest.raises(PrimaryError, match=r"disk vm/disk\.img"):
                await services.bring_back(DISK)
            await services.bring_back(DISK)
            assert (rig.is_placeholder(DISK), rig.maps(), rig.pins()) == (False, [], [])


@pytest.mark.parametrize(
    ("site", "number"), [("restore.move", 1), ("restore.move", 2), ("restore.unlink", 1), ("restore.sync", 4)]
)
async def test_a_restore_that_fails_at_the_end_leaves_nothing_in_its_way(site: str, number: int) -> None:
    """Some names were there, and the next try was refused because of them."""
    with temporary_rig() as rig:
        await archived(rig)
        rig.make_disk("vm/below/second.img", CONTENT[::-1])
        target = rig.base / "restored"
        async with rig.running() as services:
            await services.archive("vm")
            (vm,) = services.store.vms()
            point = services.store.open_point(vm.vm_id, vm.points[-1].point_id)
            files = services.files
            files.fail(site, number, EIO)
            with pytest.raises(PrimaryIOError):
                restore_point(services.store, point, target, files=files)
            assert list(target.iterdir()) == []
            restore_point(services.store, point, target, files=files)
        assert (target / "disk.img").read_bytes() == CONTENT
        assert (target / "below/second.img").read_bytes() == CONTENT[::-1]


async def test_a_restore_undoes_only_what_it_did() -> None:
    with temporary_rig() as rig:
        await archived(rig)
        target, taken = rig.base / "restored", b"somebody else's"
        target.mkdir()
        async with rig.running() as services:
            (vm,) = services.store.vms()
            point = services.store.open_point(vm.vm_id, vm.points[-1].point_id)
            services.files.instead["restore.move"] = lambda *args, **kwargs: _take(target / "disk.img", taken)
            with pytest.raises(VmfsStubError):
                restore_point(services.store, point, target, files=services.files)
        assert [path.name for path in target.iterdir()] == ["disk.img"]
        assert (target / "disk.img").read_bytes() == taken


def _take(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
