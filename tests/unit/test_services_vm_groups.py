"""Files at the top that are one domain's are one VM, also without libvirt, and keep their history."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.datastore_harness import CHUNK, Rig, Services, temporary_rig
from tests.fake_hypervisor import domain
from tests.unit.test_services_image_chains import make_base, make_overlay, with_format
from vmfs_stub.core.errors import Abandoned, Refused
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.services.adopt import Wanted
from vmfs_stub.services.adoption_choice import Told
from vmfs_stub.services.restore import restore_point
from vmfs_stub.services.stored_vms import find_named, find_point


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        yield made


def guest(rig: Rig, name: str, *disks: str) -> Domain:
    return with_format(domain(name, *(rig.mountpoint / disk for disk in disks)), "qcow2")


def scan(rig: Rig) -> dict[str, Vm]:
    return {vm.name: vm for vm in DirectoryInventory(rig.backing).scan().vms}


async def regroup(services: Services, *domains: Domain) -> bool:
    vms = DirectoryInventory(services.rig.backing).scan().vms
    chains = await services.chains.look(vms, domains)
    return await services.groups.regroup(vms, domains, chains)


async def test_an_external_snapshot_is_one_vm_with_its_base_and_keeps_its_id(rig: Rig, tmp_path: Path) -> None:
    make_base(rig, "vm.qcow2")
    async with rig.running() as services:
        before = await services.archive("vm", archive=False)
        old = scan(rig)["vm"].id
        make_overlay(rig, "vm.snap1", "vm.qcow2")
        assert await regroup(services, guest(rig, "web", "vm.snap1"))
        assert not await regroup(services, guest(rig, "web", "vm.snap1"))
        (web,) = scan(rig).values()
        assert (web.id, web.name, web.tops) == (old, "web", ("vm.qcow2", "vm.snap1"))
        assert web.is_called == {"web", "vm.qcow2", "vm.snap1"}
        report = await services.archive("web")
        assert sorted(report.placeholders) == ["vm.qcow2", "vm.snap1"]
        assert [point.point_id for point in services.store.points(old)] == [before.point_id, report.point_id]
        point = services.store.open_point(old, report.point_id)
        restore_point(services.store, point, tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["vm.qcow2", "vm.snap1"]
    # Without libvirt, after a restart.
    async with rig.running() as services:
        assert list(scan(rig)) == ["web"]
        await services.bring_back("vm.qcow2")
        await services.bring_back("vm.snap1")
        # After the block commit.
        (rig.backing / "vm.snap1").unlink()
        assert not await regroup(services, guest(rig, "web", "vm.qcow2"))
        assert {name: vm.tops for name, vm in scan(rig).items()} == {"web": ("vm.qcow2",)}


async def test_several_disks_are_one_vm_and_the_former_points_stay(rig: Rig) -> None:
    for name in ("a.img", "b.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    async with rig.running() as services:
        await services.archive("a", archive=False)
        await services.archive("b", archive=False)
        old = {name: vm.id for name, vm in scan(rig).items()}
        await regroup(services, domain("web", rig.mountpoint / "a.img", rig.mountpoint / "b.img"))
        assert scan(rig)["web"].id == old["a"]
        report = await services.archive("web", archive=False)
        assert report.read_bytes == 0, "its bytes are in the store, as another VM's"
        assert len((await services.archive("web")).placeholders) == 2
        assert len(services.store.points(old["b"])) == 1


async def test_a_golden_image_is_nobodys_part(rig: Rig) -> None:
    make_base(rig, "golden.qcow2")
    make_overlay(rig, "one.qcow2", "golden.qcow2")
    one = guest(rig, "one", "one.qcow2")
    async with rig.running() as services:
        await regroup(services, one)
        assert {vm.tops for vm in scan(rig).values()} == {("golden.qcow2", "one.qcow2")}
        make_overlay(rig, "two.qcow2", "golden.qcow2")
        # The second clone is there: what was the first one's alone is not any more.
        assert await regroup(services, one, guest(rig, "two", "two.qcow2"))
        assert sorted(vm.tops for vm in scan(rig).values()) == [("golden.qcow2",), ("one.qcow2",), ("two.qcow2",)]
        assert len({vm.id for vm in scan(rig).values()}) == 3


async def test_a_clone_that_no_domain_has_keeps_the_base_apart(rig: Rig) -> None:
    make_base(rig, "golden.qcow2")
    make_overlay(rig, "one.qcow2", "golden.qcow2")
    make_overlay(rig, "left.qcow2", "golden.qcow2")
    async with rig.running() as services:
        assert not await regroup(services, guest(rig, "one", "one.qcow2"))


async def test_an_iso_and_a_disk_of_two_domains_are_nobodys_part(rig: Rig) -> None:
    for name in ("a.img", "b.img", "x.iso", "shared.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    one = domain("one", *(rig.mountpoint / name for name in ("a.img", "x.iso", "shared.img")))
    disks = [replace(disk, is_read_only="x.iso" in str(disk.path)) for disk in one.disks]
    two = with_format(domain("two", rig.mountpoint / "b.img", rig.mountpoint / "shared.img"), "raw", read_only=True)
    async with rig.running() as services:
        assert not await regroup(services, replace(one, disks=tuple(disks)), two)


async def test_nothing_is_taken_apart_because_something_cannot_be_read(rig: Rig) -> None:
    make_base(rig, "vm.qcow2")
    make_overlay(rig, "vm.snap1", "vm.qcow2")
    told = guest(rig, "web", "vm.snap1")
    async with rig.running() as services:
        await regroup(services, told)
        for number in (1, 2):
            services.files.fail("chain.read", number, OSError(5, os.strerror(5)))
            assert not await regroup(services, told)
        assert scan(rig)["web"].tops == ("vm.qcow2", "vm.snap1")
        # One of them is archived, and the other one is said to be another domain's by now.
        rig.make_disk("b.img", b"b" * CHUNK)
        both = with_format(domain("web", rig.mountpoint / "vm.snap1", rig.mountpoint / "b.img"), "qcow2")
        assert await regroup(services, both)
        await services.archive("web")
        assert not await regroup(services, told, domain("other", rig.mountpoint / "b.img"))
        assert list(scan(rig)) == ["web"]


async def test_nvram_at_the_top_is_part_of_it(rig: Rig) -> None:
    for name in ("vm.img", "a_VARS.fd"):
        rig.make_disk(name, name.encode() * CHUNK)
    async with rig.running() as services:
        before = {vm.name: vm.id for vm in scan(rig).values()}
        told = replace(domain("web", rig.mountpoint / "vm.img"), nvram=rig.mountpoint / "a_VARS.fd")
        assert await regroup(services, told)
        assert scan(rig)["web"].tops == ("a_VARS.fd", "vm.img")
        assert scan(rig)["web"].id == before["vm"]


async def test_a_group_follows_its_domains_name_and_stays_without_the_domain(rig: Rig) -> None:
    for name in ("a.img", "b.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    told = domain("web", rig.mountpoint / "a.img", rig.mountpoint / "b.img")
    async with rig.running() as services:
        await regroup(services, told)
        (vm_id,) = {vm.id for vm in scan(rig).values()}
        assert await regroup(services, replace(told, name="shop"))
        assert scan(rig)["shop"].id == vm_id
        assert not await regroup(services), "undefined, or libvirt is away"
        assert not await regroup(services, domain("other", rig.mountpoint / "c.img"))
        assert list(scan(rig)) == ["shop"]
        # The disk is another domain's from now on.
        moved = replace(told, name="shop", disks=told.disks[:1])
        assert await regroup(services, moved, domain("new", rig.mountpoint / "b.img"))
        assert {name: vm.tops for name, vm in scan(rig).items()} == {"shop": ("a.img",), "b": ("b.img",)}


async def test_nothing_is_changed_while_a_file_is_archived_or_in_a_job(rig: Rig) -> None:
    for name in ("a.img", "b.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    told = domain("web", rig.mountpoint / "a.img", rig.mountpoint / "b.img")
    async with rig.running() as services:
        with rig.path_fd("a.img") as fd, trio.CancelScope() as scope:
            async with services.disks.reserve(fd, scope):
                assert not await regroup(services, told)
        await services.archive("a")
        assert not await regroup(services, told)
        assert sorted(scan(rig)) == ["a", "b"]
        await services.bring_back("a.img")
        assert await regroup(services, told)


async def test_a_job_that_began_before_gives_up_on_what_is_another_vm_by_now(rig: Rig) -> None:
    for name in ("a.img", "b.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    async with rig.running() as services:
        before = scan(rig)["b"]
        await regroup(services, domain("web", rig.mountpoint / "a.img", rig.mountpoint / "b.img"))
        with pytest.raises(Abandoned, match="another VM"):
            await services.archiver.run(before, archive=True, progress=lambda count: None)
        whole = scan(rig)["web"]
        (rig.backing / "b.img").rename(rig.backing / "c.img")
        with pytest.raises(Abandoned, match="renamed"):
            await services.archiver.run(whole, archive=True, progress=lambda count: None)


async def test_a_crash_between_two_marks_is_mended_by_the_next_look(rig: Rig) -> None:
    for name in ("a.img", "b.img", "c.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    told = domain("web", *(rig.mountpoint / name for name in ("a.img", "b.img", "c.img")))
    async with rig.running() as services:
        scan(rig)
        services.files.fail("inventory.identify", 2, OSError(5, os.strerror(5)))
        assert await regroup(services, told)
        assert len(scan(rig)) == 3
        assert await regroup(services, told)
        assert list(scan(rig)) == ["web"]


async def test_a_copy_is_a_vm_of_its_own(rig: Rig) -> None:
    for name in ("a.img", "b.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    async with rig.running() as services:
        await regroup(services, domain("web", rig.mountpoint / "a.img", rig.mountpoint / "b.img"))
        shutil.copy2(rig.backing / "a.img", rig.backing / "copy.img")
        assert sorted(scan(rig)) == ["copy", "web"]


async def test_adopting_a_group_is_refused_with_what_to_do_instead(rig: Rig) -> None:
    names = [f"{letter}.img" for letter in "abcdefghij"]
    for name in names:
        rig.make_disk(name, name.encode() * CHUNK)
    async with rig.running() as services:
        await regroup(services, domain("web", *(rig.mountpoint / name for name in names)))
        await services.archive("web", archive=False)
    rig.lose_host()
    async with rig.running() as services:
        ((wanted,), _) = await services.adopter.find([], everything=True)
        assert isinstance(wanted, Wanted)
        with pytest.raises(Refused) as caught:
            await services.adopter.run(wanted, told=Told(force=True, accept_loss=True), progress=lambda count: None)
        assert "VM web was several files at the top of its datastore (a.img, b.img, " in str(caught.value)
        assert "h.img and 2 more)" in str(caught.value)
        command = re.search(r"`vmfs-stub restore (\S+) --to DIR`", str(caught.value))
        assert command is not None
        stored, named = find_named(services.store.vms(), command[1])
        point = services.store.open_point(stored.vm_id, find_point(stored, named).point_id)
        restore_point(services.store, point, rig.base / "out")
    for name in names:
        (rig.base / "out" / name).rename(rig.backing / name)
        assert (rig.backing / name).read_bytes() == name.encode() * CHUNK
    async with rig.running() as services:
        await regroup(services, domain("web", *(rig.mountpoint / name for name in names)))
        assert [(vm.name, len(vm.files)) for vm in DirectoryInventory(rig.backing).scan().vms] == [("web", len(names))]


async def test_no_two_vms_have_one_id_while_the_marks_are_made(rig: Rig) -> None:
    """The overlay was marked first, with the id of its base, which was a VM of its own of that id until its turn."""
    make_base(rig, "vm.qcow2")
    make_overlay(rig, "vm.snap1", "vm.qcow2")
    told = guest(rig, "web", "vm.snap1")
    async with rig.running() as services:
        scan(rig)
        services.files.fail("inventory.identify", 2, OSError(5, os.strerror(5)))
        assert await regroup(services, told)
        vms = DirectoryInventory(rig.backing).scan().vms
        assert len({vm.id for vm in vms}) == len(vms) == 2
        assert await regroup(services, told)
        assert scan(rig)["web"].tops == ("vm.qcow2", "vm.snap1")


async def test_a_disk_that_goes_to_another_domain_does_not_take_the_id_along(rig: Rig) -> None:
    for name in ("a.img", "b.img", "c.img", "d.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    web = domain("web", rig.mountpoint / "a.img", rig.mountpoint / "b.img")
    async with rig.running() as services:
        await regroup(services, web)
        (vm_id,) = {vm.id for vm in scan(rig).values() if vm.name == "web"}
        less = replace(web, disks=web.disks[:1])
        assert await regroup(services, less, domain("new", rig.mountpoint / "b.img", rig.mountpoint / "c.img"))
        found = scan(rig)
        assert {name: vm.tops for name, vm in found.items()} == {
            "web": ("a.img",),
            "new": ("b.img", "c.img"),
            "d": ("d.img",),
        }
        assert found["web"].id == vm_id != found["new"].id


async def test_a_domain_of_the_disks_of_two_others_has_an_id_of_its_own(rig: Rig) -> None:
    for name in ("a.img", "b.img", "c.img", "d.img"):
        rig.make_disk(name, name.encode() * CHUNK)
    web = domain("web", rig.mountpoint / "a.img", rig.mountpoint / "b.img")
    shop = domain("shop", rig.mountpoint / "c.img", rig.mountpoint / "d.img")
    async with rig.running() as services:
        await regroup(services, web, shop)
        before = {vm.name: vm.id for vm in scan(rig).values()}
        rest = [replace(each, disks=each.disks[:1]) for each in (web, shop)]
        assert await regroup(services, *rest, domain("new", rig.mountpoint / "b.img", rig.mountpoint / "d.img"))
        found = scan(rig)
        assert {name: vm.tops for name, vm in found.items()} == {
            "web": ("a.img",),
            "shop": ("c.img",),
            "new": ("b.img", "d.img"),
        }
        assert found["new"].id not in before.values()
