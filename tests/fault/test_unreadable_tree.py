"""A guest's user makes directories that cannot be walked: the start succeeds, says so, and removes nothing."""

from __future__ import annotations

import os

from tests.datastore_harness import CHUNK, Killed, Rig, RigFiles, survives_kill, temporary_rig
from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.primary.tree import DEPTH_MAX


def nest(rig: Rig, path: str, *, name: str, depth: int) -> int:
    """Directories inside each other below ``path``; a descriptor of the innermost, which the caller closes."""
    (rig.backing / path).mkdir(exist_ok=True)
    fd = os.open(rig.backing / path, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


async def test_a_placeholder_at_a_path_too_long_for_a_call_is_found_at_start() -> None:
    with temporary_rig() as rig:
        rig.make_disk("vm/disk.raw", os.urandom(2 * CHUNK))
        async with rig.running() as life:
            await life.archive("vm")
        inner = nest(rig, "vm", name="x" * 250, depth=18)
        os.rename(rig.backing / "vm/disk.raw", "disk.raw", dst_dir_fd=inner)
        os.close(inner)
        async with rig.running() as life:
            assert life.recovered.findings == []
            assert len(life.disks.placeholders) == 1


async def test_what_lies_too_deep_is_a_finding_and_no_map_is_removed() -> None:
    with temporary_rig() as rig:
        content = os.urandom(2 * CHUNK)
        rig.make_disk("vm/disk.raw", content)
        files = RigFiles(rig.medium)
        # The record is set, the map does not know yet: a lone map in this state is removed when its file has none.
        files.fail("archive.record_sync", 1, Killed())
        with survives_kill():
            async with rig.running(files=files) as life:
                await life.archive("vm")
        assert rig.is_placeholder("vm/disk.raw")
        inner = nest(rig, "mine", name="d", depth=DEPTH_MAX)
        os.rename(rig.backing / "vm/disk.raw", "disk.raw", dst_dir_fd=inner)
        maps, pins = rig.maps(), rig.pins()
        async with rig.running() as life:
            ((subject, error),) = life.recovered.findings
            assert subject.startswith("VM mine, disk mine/d/d")
            assert isinstance(error, PrimaryIOError)
            assert "nested deeper" in str(error)
        assert (rig.maps(), rig.pins()) == (maps, pins)
        os.rename("disk.raw", rig.backing / "vm/disk.raw", src_dir_fd=inner)
        os.close(inner)
        async with rig.running() as life:
            disk = await life.open("vm/disk.raw")
            assert await disk.read(0, len(content)) == content
            await life.disks.release(disk)
