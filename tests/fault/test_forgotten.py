"""A placeholder whose restore point is forgotten all the same, as its pin came in between, goes on working."""

from __future__ import annotations

from tests.datastore_harness import CHUNK, temporary_rig
from tests.fault.scenarios import DISK, PATHS, archived, contents_of, first_contents, make_vm
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.store.forgotten import Forgotten, encode_forgotten
from vmfs_stub.store.keys import forgotten_key


async def test_a_placeholder_of_a_forgotten_point_is_read_backed_up_and_brought_back() -> None:
    with temporary_rig() as rig:
        contents = make_vm(rig)
        await archived(rig)
        ids = {tuple(key.split("/")[1:3]) for key in rig.pins()}
        for vm_id, point_id in ids:
            key = forgotten_key(VmId(vm_id), PointId(point_id))
            mark = Forgotten("host2", 1.0, "by hand", "n")
            rig.objects.contents[key] = encode_forgotten(mark, VmId(vm_id), PointId(point_id))
        assert rig.store.vms() == []
        async with rig.running() as services:
            assert services.recovered.findings == []
            disk = await services.open(DISK)
            assert bytes(await disk.read(CHUNK, 10)) == contents[DISK][CHUNK : CHUNK + 10]
            await services.disks.release(disk)
            report = await services.archive("vm", archive=False)
            assert [point.point_id for vm in rig.store.vms() for point in vm.points] == [report.point_id]
        async with rig.running() as services:
            for path in PATHS:
                assert await contents_of(services, path) == first_contents()[path]
                await services.bring_back(path)
        assert (rig.maps(), rig.pins()) == ([], [])
