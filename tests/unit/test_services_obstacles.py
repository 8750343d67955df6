"""What stands against archiving VMs: their domains as plain values, and what is looked at for all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.datastore_harness import Rig, Services, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from vmfs_stub.core.errors import HypervisorAway, PrimaryIOError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.chains import Chains, DiskUse
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain, DomainDisk
from vmfs_stub.inventory.vm import Scan, Vm, VmFile
from vmfs_stub.services.image_chains import NVRAM_TARGET
from vmfs_stub.services.obstacles import Obstacles, ObstacleSight

WEB = Vm(VmId("a" * 32), "web", "web", True, (VmFile("web/a", "a", 1, 1), VmFile("web/b", "b", 1, 2)))
DB = Vm(VmId("b" * 32), "db", "db.raw", False, (VmFile("db.raw", "db.raw", 1, 3),))
STOP = "without error_policy='stop' rerror_policy='stop'"


def lax(of: Domain) -> Domain:
    return replace(of, disks=tuple(replace(disk, stops_on_error=False) for disk in of.disks))


def seen(*domains: Domain, require_stop_on_error: bool = True, bases: dict[str, list[str]] | None = None) -> Obstacles:
    """Of domains whose disks are named by their places."""
    uses: dict[str, list[DiskUse]] = {}
    for each in domains:
        for disk in each.disks:
            uses.setdefault(str(disk.path), []).append(DiskUse(each, disk))
    return Obstacles(Chains(bases or {}, uses, resident={"web/a", "web/b", "db.raw"}), require_stop_on_error)


def test_where_nothing_is_known_nothing_is_against_it() -> None:
    assert seen().against(WEB) == seen().domains_of(WEB) == ()
    web = domain("web", Path("web/a"), Path("web/b"))
    obstacles = seen(web, domain("elsewhere", Path("/dev/sda")))
    assert (obstacles.domains_of(WEB), obstacles.domains_of(DB)) == ((web,), ())
    assert obstacles.against(WEB) == ()


def test_a_guest_that_would_see_a_recall_that_fails() -> None:
    known = lax(domain("web", Path("web/a"), Path("web/b"), Path("db.raw")))
    (reason,) = seen(known).against(WEB)
    assert f"domain web: vda, vdb {STOP}" in reason
    assert "`vmfs-stub doctor`" in reason
    assert "require_stop_on_error" in reason
    (reason,) = seen(known).against(DB)
    assert f"domain web: vdc {STOP}" in reason
    assert seen(known, require_stop_on_error=False).against(WEB) == ()


def test_disks_that_a_guest_only_reads_and_nvram_need_no_policy() -> None:
    known = lax(domain("web", Path("web/a"), Path("web/b")))
    disc = replace(known.disks[0], is_read_only=True, device="cdrom")
    nvram = DomainDisk(NVRAM_TARGET, NVRAM_TARGET, "file", Path("web/b"), "raw")
    assert seen(replace(known, disks=(disc, nvram))).against(WEB) == ()


def test_all_reasons_are_told_the_domains_first() -> None:
    first = lax(replace(domain("first", Path("web/a")), problems=("it is transient", "a block job runs")))
    second = replace(domain("second", Path("web/a"), Path("db.raw")), problems=("vdb is passed through",))
    obstacles = seen(first, second, bases={"db.raw": ["web/b"]})
    assert [each.name for each in obstacles.domains_of(WEB)] == ["first", "second"]
    by_domains = obstacles.by_domains(WEB)
    assert by_domains[:-1] == (
        "domain first: it is transient",
        "domain first: a block job runs",
        "domain second: vdb is passed through",
        "web/a is a disk of several domains: first, second",
    )
    assert f"domain first: vda {STOP}" in by_domains[-1]
    assert obstacles.against(WEB) == (*by_domains, "web/b is the base of db.raw, which is resident")
    assert obstacles.against(DB) == ("domain second: vdb is passed through",)


def test_several_domains_may_have_the_same_disk_to_read() -> None:
    both = [domain(name, Path("db.raw")) for name in ("one", "two")]
    both = [replace(each, disks=(replace(each.disks[0], is_read_only=True),)) for each in both]
    assert seen(*both).against(DB) == ()


# Looking


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        (made.backing / "web").mkdir()
        made.make_disk("web/disk.img", b"x" * 4096)
        yield made


def sight(services: Services, hypervisor: FakeHypervisor) -> ObstacleSight:
    async def scan() -> Scan:
        return DirectoryInventory(services.rig.backing).scan()

    return ObstacleSight(hypervisor=hypervisor, chains=services.connected.chains, scan=scan, require_stop_on_error=True)


async def test_a_domain_may_name_its_disk_by_whatever_path(rig: Rig) -> None:
    images = rig.backing.parent / "images"
    images.symlink_to(rig.mountpoint)
    for path in (rig.mountpoint / "web/disk.img", images / "web/disk.img"):
        hypervisor = FakeHypervisor(lax(domain("guest", path)))
        async with rig.running() as services:
            looked = await sight(services, hypervisor).look()
            (reason,) = looked.against(rig.vm("web"))
        assert f"domain guest: vda {STOP}" in reason


async def test_what_is_seen_is_what_there_is_now(rig: Rig) -> None:
    known = domain("guest", rig.mountpoint / "web/disk.img")
    hypervisor = FakeHypervisor(lax(known))
    async with rig.running() as services:
        looking, vm = sight(services, hypervisor), rig.vm("web")
        assert (await looking.look()).against(vm) != ()
        looking.require_stop_on_error = False
        assert (await looking.look()).against(vm) == ()
        looking.require_stop_on_error = True
        hypervisor.put(known.uuid, disks=known.disks, state=GuestState.RUNNING)
        looked = await looking.look()
        assert looked.against(vm) == ()
        assert [each.state for each in looked.domains_of(vm)] == [GuestState.RUNNING]


async def test_where_it_cannot_be_told_it_is_an_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    known = domain("guest", rig.mountpoint / "web/disk.img")
    hypervisor = FakeHypervisor(known)
    async with rig.running() as services:
        looking = sight(services, hypervisor)
        hypervisor.away = True
        with pytest.raises(HypervisorAway):
            await looking.look()
        hypervisor.away = False
        hypervisor.put(known.uuid, disks=(replace(known.disks[0], path=Path("/bad\0name")),))
        with pytest.raises(PrimaryIOError, match="of a domain lies cannot be told"):
            await looking.look()
