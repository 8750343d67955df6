"""What a VM's users do to its files while a job runs, or between the look at them and the job."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.datastore_harness import BLOCK, CHUNK, temporary_rig
from vmfs_stub.core.errors import Abandoned
from vmfs_stub.services.restore import restore_point


async def test_another_vm_under_the_name_is_not_taken_for_it() -> None:
    with temporary_rig() as rig:
        rig.make_disk("one/disk.img", b"1" * CHUNK)
        rig.make_disk("two/disk.img", b"2" * CHUNK)
        vm = rig.vm("one")
        rig.vm("two")
        (rig.backing / "one").rename(rig.backing / "elsewhere")
        (rig.backing / "two").rename(rig.backing / "one")
        async with rig.running() as services:
            with pytest.raises(Abandoned, match="another VM"):
                await services.archiver.run(vm, archive=True, progress=lambda count: None)
        assert rig.pins() == []
        assert not rig.is_placeholder("one/disk.img")
        assert rig.store.vms() == []


async def test_a_replaced_file_is_not_taken_for_the_one_that_was_found() -> None:
    with temporary_rig() as rig:
        rig.make_disk("one/disk.img", b"1" * CHUNK)
        vm = rig.vm("one")
        rig.make_disk("one/new.img", b"2" * CHUNK)
        (rig.backing / "one/new.img").replace(rig.backing / "one/disk.img")
        async with rig.running() as services:
            with pytest.raises(Abandoned, match="replaced"):
                await services.archiver.run(vm, archive=True, progress=lambda count: None)
        assert rig.store.vms() == []


async def test_a_vm_that_is_swapped_during_the_copy_makes_no_restore_point() -> None:
    with temporary_rig() as rig:
        rig.make_disk("one/disk.img", random.Random(1).randbytes(8 * CHUNK))
        rig.make_disk("two/disk.img", b"2" * CHUNK)
        rig.vm("two")
        vm, swapped = rig.vm("one"), False

        def swap(count: int) -> None:
            nonlocal swapped
            if not swapped:
                swapped = True
                (rig.backing / "one").rename(rig.backing / "elsewhere")
                (rig.backing / "two").rename(rig.backing / "one")

        async with rig.running() as services:
            with pytest.raises(Abandoned, match="another VM"):
                await services.archiver.run(vm, archive=True, progress=swap)
        assert rig.store.vms() == []
        assert rig.pins() == []


async def test_two_names_of_one_file_are_archived_once_and_restored_as_two(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(3 * CHUNK)
    with temporary_rig() as rig:
        rig.make_disk("vm/a.img", content)
        os.link(rig.backing / "vm/a.img", rig.backing / "vm/b.img")
        rig.make_disk("vm/z.img", content[::-1])
        async with rig.running() as services:
            report = await services.archive("vm")
            assert report.placeholders == ["vm/a.img", "vm/z.img"]
            assert len(rig.pins()) == 2
            for name, expected in (("a", content), ("b", content), ("z", content[::-1])):
                disk = await services.open(f"vm/{name}.img")
                assert await disk.read(0, len(expected)) == expected
                await services.disks.release(disk)
        point = rig.store.open_point(rig.vm("vm").id, report.point_id)
        await trio.to_thread.run_sync(restore_point, rig.store, point, tmp_path / "restored")
        for name, expected in (("a", content), ("b", content), ("z", content[::-1])):
            assert (tmp_path / f"restored/{name}.img").read_bytes() == expected


async def test_an_archive_does_not_take_a_recall_of_an_earlier_opening_for_its_own() -> None:
    """Hydration was stopped while a chunk was on its way; it landed for an opening that was over, and the copy, which
    had joined it, read the chunk's absent blocks as zeros and archived these."""
    content = bytearray(random.Random(5).randbytes(4 * CHUNK))
    with temporary_rig() as rig:
        rig.make_disk("vm/disk.img", bytes(content))
        ino = (rig.backing / "vm/disk.img").stat().st_ino
        async with rig.running(hydrates=True) as services:
            await services.archive("vm")
            go_on, asked = threading.Event(), threading.Event()

            def slow(call: str, key: str) -> None:
                if call == "get_range" and not asked.is_set():
                    asked.set()
                    go_on.wait(10)

            disk = await services.open("vm/disk.img")
            await disk.write(0, b"n" * BLOCK)
            content[:BLOCK] = b"n" * BLOCK
            rig.objects.before = slow
            services.hydration.after_use(disk)
            await trio.to_thread.run_sync(asked.wait)
            await services.disks.release(disk)
            await services.hydration.stop(ino)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(services.archive, "vm")
                await trio.testing.wait_all_tasks_blocked(0.2)
                go_on.set()
            disk = await services.open("vm/disk.img")
            assert await disk.read(0, len(content)) == content
            await services.disks.release(disk)


async def test_a_vm_with_a_file_that_was_not_found_is_not_archived() -> None:
    """Its restore point, which any host could go on from, would be without that file."""
    with temporary_rig() as rig:
        rig.make_disk("one/disk.img", b"1" * CHUNK)
        vm = rig.vm("one")
        rig.make_disk("one/overlay.img", b"2" * CHUNK)
        async with rig.running() as services:
            with pytest.raises(Abandoned, match="made, renamed or removed"):
                await services.archiver.run(vm, archive=True, progress=lambda count: None)
        assert rig.store.vms() == []
        assert rig.pins() == []
        assert not rig.is_placeholder("one/disk.img")


async def test_a_file_that_is_made_during_the_copy_makes_no_restore_point() -> None:
    with temporary_rig() as rig:
        rig.make_disk("one/disk.img", random.Random(1).randbytes(8 * CHUNK))
        vm = rig.vm("one")

        def make(count: int) -> None:
            (rig.backing / "one/overlay.img").touch()

        async with rig.running() as services:
            with pytest.raises(Abandoned, match="made, renamed or removed"):
                await services.archiver.run(vm, archive=True, progress=make)
        assert rig.store.vms() == []
        assert rig.pins() == []
