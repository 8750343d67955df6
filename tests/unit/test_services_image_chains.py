"""Which image is based on which, found out from heads and domains without disturbing anybody."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.datastore_harness import BLOCK, CHUNK, Rig, Services, temporary_rig
from tests.fake_hypervisor import domain
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.chains import Chains, DiskUse
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Scan, Vm, VmFile
from vmfs_stub.services import image_chains
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.domains import Links, link
from vmfs_stub.services.image_chains import ImageChains
from vmfs_stub.services.situation import Situation

MOUNT = Path("/mnt/never-there")


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig(head=BLOCK) as made:
        yield made


def qemu_img(*words: str | Path) -> None:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_overlay(rig: Rig, path: str, base: str, *, base_format: str = "qcow2") -> None:
    """An image on a base that need not be there, with some data of its own."""
    full = rig.backing / path
    full.parent.mkdir(exist_ok=True)
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", base_format, full, "4M")
    with full.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(random.Random(path).randbytes(3 * CHUNK))
    rig.medium.note(full)


def make_base(rig: Rig, path: str) -> None:
    full = rig.backing / path
    full.parent.mkdir(exist_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", full, "4M")
    with full.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(random.Random(path).randbytes(3 * CHUNK))
    rig.medium.note(full)


def paths_of(services: Services, mountpoint: Path) -> DatastorePaths:
    return DatastorePaths(files=services.files, backing=services.rig.backing, mountpoint=mountpoint)


def chains_of(services: Services, *, mountpoint: Path = MOUNT) -> ImageChains:
    return ImageChains(
        files=services.files,
        threads=services.threads,
        disks=services.disks,
        reading=services.store,
        backing=services.rig.backing,
        paths=paths_of(services, mountpoint),
    )


def vms(rig: Rig) -> Sequence[Vm]:
    return DirectoryInventory(rig.backing).scan().vms


async def look(services: Services, *domains: Domain, mountpoint: Path = MOUNT) -> Chains:
    return await chains_of(services, mountpoint=mountpoint).look(vms(services.rig), domains)


def with_format(of: Domain, format_: str, *, backing: Sequence[Path] = (), read_only: bool = False) -> Domain:
    disks = [replace(disk, format=format_, backing=tuple(backing), is_read_only=read_only) for disk in of.disks]
    return replace(of, disks=tuple(disks))


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Services]:
    async with rig.running() as services:
        yield services


async def test_a_base_stays_while_an_overlay_is_resident_and_may_go_after_it(rig: Rig) -> None:
    make_base(rig, "golden/base.qcow2")
    make_overlay(rig, "clone/disk.qcow2", "../golden/base.qcow2")
    async with running(rig) as services:
        chains = await look(services)
        golden, clone = rig.vm("golden"), rig.vm("clone")
        assert chains.never(clone) == ()
        assert chains.never(golden) == ("golden/base.qcow2 is the base of clone/disk.qcow2, which is resident",)
        assert [vm.name for vm in chains.in_order([golden, clone])] == ["clone", "golden"]
        await services.archive("clone")
        assert (await look(services)).never(golden) == ()
        await services.archive("golden")
        chains = await look(services)
        assert chains.bases == {"clone/disk.qcow2": {"golden/base.qcow2"}}


async def test_what_is_archived_is_still_known_to_be_based_on_it_when_no_byte_of_it_is_here() -> None:
    """Without resident heads the restore point says it, and nothing is recalled."""
    with temporary_rig(head=0) as rig:
        make_base(rig, "golden/base.qcow2")
        make_overlay(rig, "clone/disk.qcow2", "../golden/base.qcow2")
        async with running(rig) as services:
            await services.archive("clone")
        async with running(rig) as services:
            running_clone = replace(
                with_format(domain("c", MOUNT / "clone/disk.qcow2"), "qcow2"), state=GuestState.RUNNING
            )
            chains = await look(services, running_clone)
            assert chains.never(rig.vm("golden")) == (
                "golden/base.qcow2 is the base of clone/disk.qcow2, which is a disk of domain c, which is not off",
            )
            assert services.recall.counters.demand_bytes == services.recall.counters.background_bytes == 0
            rig.objects.contents = {}
            chains = await look(services)
            assert "cannot be told" in chains.problems["clone/disk.qcow2"]
            assert "cannot be told" in chains.never(rig.vm("clone"))[0]


async def test_a_head_that_a_guest_wrote_into_a_raw_disk_is_not_believed(rig: Rig) -> None:
    make_base(rig, "victim/disk.qcow2")
    make_overlay(rig, "evil/disk.img", "../victim/disk.qcow2")
    async with running(rig) as services:
        raw = domain("evil", MOUNT / "evil/disk.img")
        assert (await look(services, raw)).never(rig.vm("victim")) == ()
        # Nobody says what it is: then the victim stays, which costs room and no data.
        assert (await look(services)).never(rig.vm("victim"))


async def test_what_domains_say_counts_beside_heads(rig: Rig) -> None:
    rig.make_disk("a/top.img", b"a" * 3 * CHUNK)
    rig.make_disk("b/mid.img", b"b" * 3 * CHUNK)
    rig.make_disk("c/low.img", b"c" * 3 * CHUNK)
    told = with_format(
        domain("x", MOUNT / "a/top.img"), "raw", backing=[MOUNT / "b/mid.img", rig.backing / "c/low.img"]
    )
    async with running(rig) as services:
        chains = await look(services, told)
        assert chains.bases == {"a/top.img": {"b/mid.img"}, "b/mid.img": {"c/low.img"}}
        await services.archive("b")
        assert "is the base of a/top.img" in (await look(services, told)).never(rig.vm("c"))[0]


async def test_names_lead_through_links_from_outside_and_out_again(rig: Rig, tmp_path: Path) -> None:
    """The overlay is known by a link, and its base is named relative to where the link is."""
    make_base(rig, "golden/base.qcow2")
    make_base(rig, "near/base.qcow2")
    make_overlay(rig, "near/disk.qcow2", "base.qcow2")
    images = tmp_path / "images"
    images.mkdir()
    (images / "disk.qcow2").symlink_to("../mount/near/disk.qcow2")
    (images / "base.qcow2").symlink_to(tmp_path / "mount/golden/base.qcow2")
    told = with_format(domain("x", images / "disk.qcow2"), "qcow2")
    async with running(rig) as services:
        chains = await look(services, told, mountpoint=tmp_path / "mount")
        assert chains.bases == {"near/disk.qcow2": {"near/base.qcow2", "golden/base.qcow2"}}
        near, paths = rig.vm("near"), paths_of(services, tmp_path / "mount")
        assert link([near], [told], paths=paths).of(near.id) == (told,)


async def test_links_that_run_in_circles_end(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    async with running(rig) as services:
        chains = await look(services, domain("x", tmp_path / "a"))
        (place,) = chains.uses
        assert place.startswith(str(tmp_path))


async def test_a_base_outside_and_an_overlay_outside_are_noted(rig: Rig) -> None:
    make_overlay(rig, "vm/disk.qcow2", "/elsewhere/base.qcow2")
    make_base(rig, "golden/base.qcow2")
    told = with_format(domain("x", Path("/elsewhere/top.qcow2")), "qcow2", backing=[MOUNT / "golden/base.qcow2"])
    async with running(rig) as services:
        chains = await look(services, told)
        assert chains.bases["vm/disk.qcow2"] == {"/elsewhere/base.qcow2"}
        assert chains.never(rig.vm("vm")) == ()
        assert chains.never(rig.vm("golden")) == (
            "golden/base.qcow2 is the base of /elsewhere/top.qcow2, which lies outside this datastore",
        )


async def test_circles_and_data_files_are_refused_by_name(rig: Rig) -> None:
    make_overlay(rig, "a/disk.qcow2", "../b/disk.qcow2")
    make_overlay(rig, "b/disk.qcow2", "../a/disk.qcow2")
    make_overlay(rig, "c/disk.qcow2", "../a/disk.qcow2")
    (rig.backing / "d").mkdir()
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", f"data_file={rig.backing}/d/data.raw", rig.backing / "d/x.qcow2", "1M"
    )
    async with running(rig) as services:
        chains = await look(services)
        for name in "abc":
            assert "runs in a circle" in chains.never(rig.vm(name))[0]
        assert any("its data is in another file" in reason for reason in chains.never(rig.vm("d")))


async def test_a_look_disturbs_neither_a_job_nor_a_guest(rig: Rig) -> None:
    make_base(rig, "golden/base.qcow2")
    make_overlay(rig, "clone/disk.qcow2", "../golden/base.qcow2")
    async with running(rig) as services:
        with rig.path_fd("clone/disk.qcow2") as fd, trio.CancelScope() as scope:
            async with services.disks.reserve(fd, scope) as reservation:
                chains = await look(services)
                assert reservation.is_intact
        assert not scope.cancelled_caught
        assert chains.bases == {"clone/disk.qcow2": {"golden/base.qcow2"}}
        disk = await services.open("clone/disk.qcow2")
        assert (await look(services)).open_ == {"clone/disk.qcow2"}
        await services.disks.release(disk)
        assert services.disks.get(disk.ino) is None


async def test_what_was_read_is_kept_until_the_file_changes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base(rig, "golden/base.qcow2")
    make_overlay(rig, "clone/disk.qcow2", "../golden/base.qcow2")
    async with running(rig) as services:
        chains = chains_of(services)
        await chains.look(vms(rig), ())
        before = services.files.counts["chain.read"]
        await chains.look(vms(rig), ())
        assert services.files.counts["chain.read"] == 2 * before, "it changed just now"
        monkeypatch.setattr(image_chains, "SETTLED_NS", -1)
        await chains.look(vms(rig), ())
        read = services.files.counts["chain.read"]
        await chains.look(vms(rig), ())
        assert services.files.counts["chain.read"] == read
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "raw", rig.backing / "clone/disk.qcow2")
        assert (await chains.look(vms(rig), ())).bases == {"clone/disk.qcow2": {"clone/other"}}


async def test_hard_links_are_one_image(rig: Rig) -> None:
    make_base(rig, "a/base.qcow2")
    (rig.backing / "b").mkdir()
    (rig.backing / "b/same.qcow2").hardlink_to(rig.backing / "a/base.qcow2")
    make_overlay(rig, "clone/disk.qcow2", "../b/same.qcow2")
    async with running(rig) as services:
        chains = await look(services)
        assert chains.never(rig.vm("a"))
        assert chains.never(rig.vm("b"))


async def test_what_cannot_be_read_is_a_problem_of_that_image_alone(rig: Rig) -> None:
    make_base(rig, "golden/base.qcow2")
    make_overlay(rig, "clone/disk.qcow2", "../golden/base.qcow2")
    async with running(rig) as services:
        services.files.fail("chain.read", 1, OSError(5, "Input/output error"))
        chains = await look(services)
        assert len(chains.problems) == 1
        assert len((await look(services)).problems) == 0


def vm(name: str, *files: str) -> Vm:
    number = int.from_bytes(name.encode())
    found = tuple(VmFile(file, file.rpartition("/")[2], 100, hash(file)) for file in files)
    return Vm(VmId(f"{number:032x}"), name, name, True, found)


def situation(chains: Chains, *, require_stop_on_error: bool = False, **domains: Sequence[Domain]) -> Situation:
    """With the domains of VMs by the VMs' names."""
    links = Links({vm(name).id: tuple(each) for name, each in domains.items()})
    return Situation(Scan(()), links, chains, require_stop_on_error)


def test_all_reasons_are_told_together() -> None:
    shared = domain("one", MOUNT / "a/disk.img"), domain("two", MOUNT / "a/disk.img")
    shared = (replace(shared[0], problems=("vdb is passed through",)), shared[1])
    a = vm("a", "a/disk.img")
    uses = {"a/disk.img": [DiskUse(each, each.disks[0]) for each in shared]}
    chains = Chains({"b/top.img": {"a/disk.img"}}, uses, resident={"a/disk.img", "b/top.img"})
    assert situation(chains, require_stop_on_error=True, a=shared).against(a) == (
        "domain one: vdb is passed through",
        "a/disk.img is a disk of several domains: one, two",
        "a/disk.img is the base of b/top.img, which is resident",
    )


def test_a_guest_that_would_see_a_failed_recall_is_an_obstacle_unless_that_is_waived() -> None:
    a, told = vm("a", "a/disk.img"), domain("guest", MOUNT / "a/disk.img")
    told = replace(told, disks=(replace(told.disks[0], stops_on_error=False),))
    chains = Chains({}, {"a/disk.img": [DiskUse(told, told.disks[0])]}, resident={"a/disk.img"})
    (reason,) = situation(chains, require_stop_on_error=True, a=[told]).against(a)
    assert "domain guest: vda without error_policy='stop'" in reason
    assert situation(chains, a=[told]).against(a) == ()


def test_a_read_only_disk_may_be_that_of_several_domains() -> None:
    both = [with_format(domain(name, MOUNT / "iso/x.iso"), "raw", read_only=True) for name in ("one", "two")]
    chains = Chains({}, {"iso/x.iso": [DiskUse(each, each.disks[0]) for each in both]}, resident={"iso/x.iso"})
    assert situation(chains, iso=both).against(vm("iso", "iso/x.iso")) == ()


def test_vms_that_have_bases_of_each_other_keep_their_order() -> None:
    a, b, c = vm("a", "a/1", "a/2"), vm("b", "b/1", "b/2"), vm("c", "c/1")
    chains = Chains({"a/1": {"b/1"}, "b/2": {"a/2"}, "c/1": {"a/1"}})
    assert [each.name for each in chains.in_order([a, b, c])] == ["c", "a", "b"]
    assert [each.name for each in chains.in_order([b, a])] == ["b", "a"]


def test_a_long_chain_goes_from_its_top() -> None:
    chain = [vm(f"v{number}", f"v{number}/d") for number in range(50)]
    chains = Chains({f"v{number}/d": {f"v{number + 1}/d"} for number in range(49)})
    random.Random(1).shuffle(chain)
    assert [each.name for each in chains.in_order(chain)] == [f"v{number}" for number in range(50)]
