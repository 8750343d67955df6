"""Where a guest's memory is saved decides whether it can be archived with its VM."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.datastore_harness import Rig, temporary_rig
from tests.fake_hypervisor import domain
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.services.managed_save import ManagedSave


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        made.make_disk("vm/disk.raw", b"disk")
        made.make_disk("flat.raw", b"disk")
        yield made


def at(rig: Rig, save_dir: Path, *, files: FileCalls = PLAIN) -> ManagedSave:
    return ManagedSave.at(save_dir, backing=rig.backing, mountpoint=rig.mountpoint, files=files)


@pytest.mark.parametrize(
    ("place", "memory_dir", "of_vm", "of_flat"),
    [
        ("save", "save", "", ""),
        ("vm", None, "", "vm/guest.save, which is no file of VM flat"),
        ("vm/save", None, "", "vm/save/guest.save, which is no file of VM flat"),
        ("other/save", None, "other/save/guest.save, which is no file of VM vm", "is no file of VM flat"),
        ("/elsewhere", None, "is not on the mount", "is not on the mount"),
    ],
)
def test_memory_is_archived_where_its_vm_is_known(
    rig: Rig, tmp_path: Path, place: str, memory_dir: str | None, of_vm: str, of_flat: str
) -> None:
    link = tmp_path / "qemu-save"
    link.symlink_to(rig.mountpoint / place)
    for save_dir in (link, rig.mountpoint / place):
        found = at(rig, save_dir)
        assert found.memory_dir == memory_dir
        for name, why in (("vm", of_vm), ("flat", of_flat)):
            problem = found.problem(rig.vm(name), domain("guest"))
            assert (why in problem) if why else problem == ""


def test_a_directory_for_memory_stays_one_with_images_in_it(rig: Rig) -> None:
    rig.make_disk("save/guest.save", b"memory")
    found = at(rig, rig.mountpoint / "save")
    assert found.memory_dir == "save"
    inventory = DirectoryInventory(rig.backing, memory_dir=found.memory_dir)
    assert not found.has_image(inventory.find("vm"), domain("guest"))
    inventory.give_memory(inventory.find("vm"), "guest.save")
    assert found.has_image(inventory.find("vm"), domain("guest"))
    assert not found.has_image(inventory.find("flat"), domain("guest"))


def test_no_file_of_a_vm_is_an_image_that_lies_elsewhere_whatever_its_name(rig: Rig, tmp_path: Path) -> None:
    rig.make_disk("None", b"disk")
    assert not at(rig, tmp_path).has_image(rig.vm("None"), domain("guest"))


def test_a_place_that_cannot_be_told_is_not_on_the_mount(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    found = at(rig, tmp_path / "a")
    assert found.memory_dir is None
    assert "is not on the mount" in found.problem(rig.vm("vm"), domain("guest"))


def test_links_in_the_backing_directory_lead_where_they_lead_through_the_mount(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (rig.backing / "save").mkdir()
    (rig.backing / "memory").symlink_to("save")
    (rig.backing / "out").symlink_to(tmp_path / "elsewhere")
    assert at(rig, rig.mountpoint / "memory").memory_dir == "save"
    assert at(rig, rig.mountpoint / "out").place == str(tmp_path / "elsewhere")


def test_the_top_itself_is_no_directory_of_memory(rig: Rig, tmp_path: Path) -> None:
    link = tmp_path / "qemu-save"
    link.symlink_to(rig.mountpoint)
    for save_dir in (rig.mountpoint, link):
        found = at(rig, save_dir)
        assert (found.memory_dir, found.is_on_mount) == (None, True)
        for name in ("vm", "flat"):
            problem = found.problem(rig.vm(name), domain("guest"))
            assert problem == (
                f"its memory image would be guest.save, which is no file of VM {name}: have the save directory lead to "
                f"one at the top of {rig.mountpoint}"
            )


def test_a_place_that_cannot_be_looked_at_is_not_on_the_mount(rig: Rig) -> None:
    class Broken(FileCalls):
        def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if args[0] == str(rig.backing / "save"):
                raise OSError(errno.EIO, "Input/output error")
            return function(*args, **kwargs)

    found = at(rig, rig.mountpoint / "save", files=Broken())
    assert found.memory_dir is None
    assert "is not on the mount" in found.problem(rig.vm("vm"), domain("guest"))
