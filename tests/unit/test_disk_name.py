"""How disks are named: the VM and the path stay what they are, whatever the names hold."""

from __future__ import annotations

import pytest

from vmfs_stub.services.disk_name import DiskName


@pytest.mark.parametrize(
    ("path", "vm", "label"),
    [
        ("web/a.img", "web", "VM web, disk web/a.img"),
        ("web/deep/a.img", "web", "VM web, disk web/deep/a.img"),
        ("single.raw", "single", "VM single, disk single.raw"),
        ("two, disk x/a.img", "two, disk x", "VM two, disk x, disk two, disk x/a.img"),
    ],
)
def test_vm_and_path(path: str, vm: str, label: str) -> None:
    name = DiskName.of(path)
    assert (name.vm, name.path, str(name)) == (vm, path, label)


def test_a_file_whose_path_cannot_be_told() -> None:
    assert str(DiskName("", "inode 7")) == "inode 7"
