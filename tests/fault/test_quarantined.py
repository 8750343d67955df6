"""A backup after the store was found damaged reads what primary has, and stores it afresh."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.datastore_harness import CHUNK, Rig, temporary_rig
from tests.fault.scenarios import PATHS, archived, back_up, contents_of, first_contents, make_vm
from tests.store_points import back_up as back_up_elsewhere
from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.ids import PackId
from vmfs_stub.services.scrub import scrub
from vmfs_stub.services.scrub_progress import ScrubProgress
from vmfs_stub.store.keys import PACKS
from vmfs_stub.store.quarantine import Quarantine, put_quarantine
from vmfs_stub.store.store import Store


def mark_all(rig: Rig) -> set[PackId]:
    marked = {PackId(key.rpartition("/")[2]) for key in rig.objects.contents if key.startswith(PACKS)}
    for pack_id in marked:
        put_quarantine(rig.objects, Quarantine(1.0, (), "damaged"), pack_id)
    return marked


def scrubbed(rig: Rig) -> bool:
    """Whether all that points need can be read."""
    with closing(ScrubProgress(None, rig.store.id)) as progress:
        return scrub(Store.open(rig.objects), progress).is_whole


def used(rig: Rig, point_id: str) -> set[PackId]:
    """The packs that a point refers to."""
    (vm,) = rig.store.vms()
    (point_id,) = [point.point_id for point in vm.points if point.point_id == point_id]
    segments = rig.store.open_point(vm.vm_id, point_id).manifest.files
    return {
        pack
        for stored in segments
        for one in stored.segments
        if one is not None
        for pack in rig.store.segments.load(one).packs
    }


async def test_unchanged_files_are_read_and_stored_again() -> None:
    with temporary_rig() as rig:
        make_vm(rig)
        async with rig.running() as services:
            await back_up(services)
            report = await services.archive("vm", archive=False)
            assert report.read_bytes == 0, "nothing has changed"
            marked = mark_all(rig)
            report = await services.archive("vm", archive=False)
            assert report.read_bytes > 3 * CHUNK
            assert report.point_id is not None
            assert used(rig, report.point_id).isdisjoint(marked)
            report = await services.archive("vm", archive=False)
            assert report.read_bytes == 0, "and then it goes on as before"


async def test_a_placeholder_is_backed_up_with_what_there_is() -> None:
    with temporary_rig() as rig:
        make_vm(rig)
        await archived(rig)
        marked = mark_all(rig)
        async with rig.running() as services:
            report = await services.archive("vm", archive=False)
            assert report.point_id is not None
            assert used(rig, report.point_id) & marked
            for path in PATHS:
                await services.bring_back(path)
            report = await services.archive("vm", archive=False)
            assert used(rig, report.point_id).isdisjoint(marked)
            assert {path: (rig.backing / path).read_bytes() for path in PATHS} == first_contents()


async def test_a_placeholder_is_recalled_from_what_was_repaired() -> None:
    with temporary_rig() as rig:
        make_vm(rig)
        await archived(rig)
        for key, content in list(rig.objects.contents.items()):
            if key.startswith(PACKS):
                rig.objects.contents[key] = b"?" + content[1:]
        async with rig.running() as services:
            with pytest.raises((VmfsStubError, OSError)):
                for path in PATHS:  # one of them has the first frame
                    await contents_of(services, path)
        assert not scrubbed(rig)
        back_up_elsewhere(rig.store, first_contents())
        assert scrubbed(rig)
        async with rig.running() as services:
            for path in PATHS:
                assert await contents_of(services, path) == first_contents()[path]
                await services.bring_back(path)
        assert {path: (rig.backing / path).read_bytes() for path in PATHS} == first_contents()
