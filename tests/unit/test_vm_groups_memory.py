"""The memory of a saved guest whose disks are several files at the top: it stays with them."""

from __future__ import annotations

from pathlib import Path

from tests.fake_hypervisor import domain
from vmfs_stub.core.ids import VmId
from vmfs_stub.inventory.chains import Chains, DiskUse
from vmfs_stub.inventory.identity import Group
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.services.vm_groups import wanted_regroupings


def test_memory_is_not_parted_from_its_vm() -> None:
    disks = (VmFile("a.raw", "a.raw", 1, 1), VmFile("b.raw", "b.raw", 1, 2))
    web = domain("web", *(Path(disk.path) for disk in disks))
    memory = VmFile("save/web.save", "web.save", 1, 3)
    vm = Vm(VmId("a" * 32), "web", "a.raw", False, (*disks, memory), Group("web", web.uuid))
    uses = {str(disk.path): [DiskUse(web, disk)] for disk in web.disks}
    chains = Chains({}, uses, places={file.ino: file.path for file in vm.files})
    assert wanted_regroupings([vm], [web], chains) == []
