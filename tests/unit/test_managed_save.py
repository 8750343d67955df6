"""Where the memory of saved guests goes, by where the hypervisor's save directory leads."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.fake_hypervisor import domain
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.managed_save import ManagedSave

FOLDER = Vm(VmId("a" * 32), "web", "web", True, (VmFile("web/disk.raw", "disk.raw", 1, 1),))
FLAT = Vm(VmId("b" * 32), "db", "db.raw", False, (VmFile("db.raw", "db.raw", 1, 2),))
GUEST = domain("guest")


class Host:
    """A backing directory, and a mountpoint at which nothing is mounted: nobody may look below it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.backing = base / "backing"
        self.mountpoint = base / "mount"
        for folder in (self.backing / "save", self.backing / "web/deep", self.mountpoint, base / "libvirt/save"):
            folder.mkdir(parents=True)

    def at(self, save_dir: Path, *, files: FileCalls = PLAIN) -> ManagedSave:
        paths = DatastorePaths(files=files, backing=self.backing, mountpoint=self.mountpoint)
        return ManagedSave.at(save_dir, mountpoint=self.mountpoint, paths=paths)

    def linked(self, target: Path | str) -> ManagedSave:
        """By way of a symbolic link in libvirt's own place."""
        link = self.base / "libvirt/link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        found = self.at(link)
        assert found.save_dir == link
        return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_elsewhere_on_the_host_memory_is_not_archived(host: Host) -> None:
    for found in (host.at(host.base / "libvirt/save"), host.linked(host.base / "libvirt/save"), host.linked("gone")):
        assert found.place.startswith(f"{host.base}/libvirt/")
        assert (found.memory_dir, found.image(GUEST), found.has_image(FOLDER, GUEST)) == (None, None, False)
        assert f"is not on the mount {host.mountpoint}" in found.problem(FOLDER, GUEST)


def test_a_directory_at_the_top_has_the_memory_of_all(host: Host) -> None:
    there = host.mountpoint / "save"
    for found in (host.at(there), host.linked(there), host.linked("../mount/save")):
        assert (found.place, found.memory_dir) == ("save", "save")
        assert found.image(GUEST) == PurePosixPath("save/guest.save")
        assert found.problem(FOLDER, GUEST) == found.problem(FLAT, GUEST) == ""
    assert not found.has_image(FLAT, GUEST)
    image = VmFile("save/guest.save", "guest.save", 1, 9)
    assert found.has_image(Vm(FLAT.id, "db", "db.raw", False, (*FLAT.files, image)), GUEST)


def test_links_in_the_backing_directory_lead_where_they_lead_through_the_mount(host: Host) -> None:
    (host.backing / "memory").symlink_to("save")
    (host.backing / "out").symlink_to(host.base / "libvirt/save")
    assert host.at(host.mountpoint / "memory").memory_dir == "save"
    assert host.at(host.mountpoint / "out").memory_dir is None


def test_in_a_vms_directory_it_is_that_vms_alone(host: Host) -> None:
    for place in ("web/deep", "web/made-later"):
        found = host.linked(host.mountpoint / place)
        assert (found.place, found.memory_dir) == (place, None)
        assert found.problem(FOLDER, GUEST) == ""
        assert f"would be {place}/guest.save, which is no file of VM db" in found.problem(FLAT, GUEST)


def test_the_top_itself_is_no_directory_of_memory(host: Host) -> None:
    found = host.linked(host.mountpoint)
    assert (found.memory_dir, found.has_image(FOLDER, GUEST)) == (None, False)
    assert found.problem(FOLDER, GUEST) != ""
    assert found.problem(FLAT, GUEST) != ""


def test_what_cannot_be_looked_at_is_elsewhere(host: Host) -> None:
    class Broken(FileCalls):
        def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if args[0] == os.fspath(host.backing / "save"):
                raise OSError(errno.EIO, "Input/output error")
            return function(*args, **kwargs)

    found = host.at(host.mountpoint / "save", files=Broken())
    assert found.memory_dir is None
    assert "is not on the mount" in found.problem(FOLDER, GUEST)
