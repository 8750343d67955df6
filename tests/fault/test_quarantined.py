"""A backup after the store was found damaged reads what primary has, and stores it afresh."""

from __future__ import annotations

from tests.datastore_harness import CHUNK, Rig, temporary_rig
from tests.fault.scenarios import PATHS, archived, back_up, first_contents, make_vm
from vmfs_stub.core.ids import PackId
from vmfs_stub.store.keys import PACKS
from vmfs_stub.store.quarantine import Quarantine, put_quarantine


def mark_all(rig: Rig) -> set[PackId]:
    marked = {PackId(key.rpartition("/")[2]) for key in rig.objects.contents if key.startswith(PACKS)}
    for pack_id in marked:
        put_quarantine(rig.objects, Quarantine(1.0, (), "damaged"), pack_id)
    return marked


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
