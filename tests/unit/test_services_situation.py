"""What stands against archiving VMs: their domains as plain values, and what is seen of all of them at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.datastore_harness import Rig, Services, temporary_rig
from tests.fake_hypervisor import FakeHypervisor, domain
from vmfs_stub.core.errors import HypervisorAway, PrimaryIOError, VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.chains import Chains, DiskUse
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain, DomainDisk
from vmfs_stub.inventory.vm import Scan, UnreadVm, Vm, VmFile
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.domains import Links, link
from vmfs_stub.services.image_chains import NVRAM_TARGET
from vmfs_stub.services.situation import Lookout, Situation

WEB = Vm(VmId("a" * 32), "web", "web", True, (VmFile("web/a", "a", 1, 1), VmFile("web/b", "b", 1, 2)))
DB = Vm(VmId("b" * 32), "db", "db.raw", False, (VmFile("db.raw", "db.raw", 1, 3),))
STOP = "without error_policy='stop' rerror_policy='stop'"


def lax(of: Domain) -> Domain:
    return replace(of, disks=tuple(replace(disk, stops_on_error=False) for disk in of.disks))


def seen(
    *domains: Domain,
    require_stop_on_error: bool = True,
    bases: dict[str, list[str]] | None = None,
    open_: Collection[str] = (),
    scan: Scan | None = None,
) -> Situation:
    """Of domains whose disks are named by their places."""
    scan = scan or Scan((WEB, DB))
    uses: dict[str, list[DiskUse]] = {}
    for each in domains:
        for disk in each.disks:
            uses.setdefault(str(disk.path), []).append(DiskUse(each, disk))
    chains = Chains(bases or {}, uses, resident={"web/a", "web/b", "db.raw"}, open_=open_)
    paths = DatastorePaths(files=PLAIN, backing=Path("/nowhere/backing"), mountpoint=Path("/nowhere/mount"))
    named = [replace(each, disks=tuple(map(_below_mount, each.disks))) for each in domains]
    by_uuid = {each.uuid: each for each in domains}
    found = link(scan.vms, named, paths=paths)
    links = Links({vm.id: tuple(by_uuid[each.uuid] for each in found.of(vm.id)) for vm in scan.vms}, found.vms)
    return Situation(scan, links, chains, require_stop_on_error)


def _below_mount(disk: DomainDisk) -> DomainDisk:
    return replace(disk, path=Path("/nowhere/mount") / disk.path) if disk.path is not None else disk


def test_where_nothing_is_known_nothing_is_against_it() -> None:
    assert seen().against(WEB) == seen().links.of(WEB.id) == ()
    web = domain("web", Path("web/a"), Path("web/b"))
    situation = seen(web, domain("elsewhere", Path("/dev/sda")))
    assert (situation.links.of(WEB.id), situation.links.of(DB.id)) == ((web,), ())
    assert situation.against(WEB) == ()


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
    situation = seen(first, second, bases={"db.raw": ["web/b"]})
    assert [each.name for each in situation.links.of(WEB.id)] == ["first", "second"]
    *by_domains, above = situation.against(WEB)
    assert by_domains[:-1] == [
        "domain first: it is transient",
        "domain first: a block job runs",
        "domain second: vdb is passed through",
        "web/a is a disk of several domains: first, second",
    ]
    assert f"domain first: vda {STOP}" in by_domains[-1]
    assert above == "web/b is the base of db.raw, which is resident"
    assert situation.against(DB) == ("domain second: vdb is passed through",)


def test_several_domains_may_have_the_same_disk_to_read() -> None:
    both = [domain(name, Path("db.raw")) for name in ("one", "two")]
    both = [replace(each, disks=(replace(each.disks[0], is_read_only=True),)) for each in both]
    assert seen(*both).against(DB) == ()


def refusal(situation: Situation, vm: Vm) -> str:
    """Kind and message of what is raised; "" when nothing stands against it."""
    try:
        situation.refuse(vm)
    except VmfsStubError as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def test_an_archive_is_refused_for_the_first_of_what_stands_against_it() -> None:
    web = replace(domain("web", Path("web/a")), problems=("it is transient",))
    running = replace(web, state=GuestState.RUNNING)
    kept = replace(running, metadata={"protected": "yes"})
    scan = Scan((replace(WEB, is_protected=True), DB))
    assert refusal(seen(kept, scan=scan), WEB).startswith("Protected: VM web is protected from being archived")
    assert refusal(seen(kept), WEB).startswith("Protected: VM web: the metadata of domain web")
    assert refusal(seen(running), WEB).startswith("InUse: VM web is in use: domain web is running")
    assert (
        refusal(seen(web, open_=["web/b"]), WEB)
        == f"InUse: VM web is in use: {disk_label('web/b')} is open; shut it down first"
    )
    assert refusal(seen(web), WEB) == "Refused: VM web is not archived: domain web: it is transient"
    assert [refusal(seen(kept, scan=scan, open_=["web/b"]), DB), refusal(seen(), WEB)] == ["", ""]


def test_what_cannot_be_read_of_a_vm_is_no_leave_to_archive_it() -> None:
    """It was found before: whether its operator has protected it since is not known."""
    unread = UnreadVm("web", "web", PrimaryIOError("VM web cannot be read: Input/output error"))
    assert refusal(seen(scan=Scan((DB,), (unread,))), WEB) == f"PrimaryIOError: {unread.error}"
    assert refusal(seen(scan=Scan((DB,), (unread,))), DB) == ""


# Looking


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_rig() as made:
        (made.backing / "web").mkdir()
        made.make_disk("web/disk.img", b"x" * 4096)
        yield made


def lookout(services: Services, hypervisor: FakeHypervisor) -> Lookout:
    async def scan() -> Scan:
        return DirectoryInventory(services.rig.backing).scan()

    return Lookout(
        hypervisor=hypervisor,
        threads=services.threads,
        chains=services.connected.chains,
        link=services.connected.link,
        scan=scan,
        require_stop_on_error=True,
    )


async def test_a_domain_may_name_its_disk_by_whatever_path(rig: Rig) -> None:
    images = rig.backing.parent / "images"
    images.symlink_to(rig.mountpoint)
    for path in (rig.mountpoint / "web/disk.img", images / "web/disk.img"):
        hypervisor = FakeHypervisor(lax(domain("guest", path)))
        async with rig.running() as services:
            looked = await lookout(services, hypervisor).look()
            (reason,) = looked.against(rig.vm("web"))
        assert f"domain guest: vda {STOP}" in reason


async def test_what_is_seen_is_what_there_is_now(rig: Rig) -> None:
    known = domain("guest", rig.mountpoint / "web/disk.img")
    hypervisor = FakeHypervisor(lax(known))
    async with rig.running() as services:
        looking, vm = lookout(services, hypervisor), rig.vm("web")
        assert (await looking.look()).against(vm) != ()
        looking.require_stop_on_error = False
        assert (await looking.look()).against(vm) == ()
        looking.require_stop_on_error = True
        hypervisor.put(known.uuid, disks=known.disks, state=GuestState.RUNNING)
        looked = await looking.look()
        assert looked.against(vm) == ()
        assert [each.state for each in looked.links.of(vm.id)] == [GuestState.RUNNING]


async def test_where_it_cannot_be_told_it_is_an_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    known = domain("guest", rig.mountpoint / "web/disk.img")
    hypervisor = FakeHypervisor(known)
    async with rig.running() as services:
        looking = lookout(services, hypervisor)
        hypervisor.away = True
        with pytest.raises(HypervisorAway):
            await looking.look()
        hypervisor.away = False
        hypervisor.put(known.uuid, disks=(replace(known.disks[0], path=Path("/bad\0name")),))
        with pytest.raises(PrimaryIOError, match="of a domain lies cannot be told"):
            await looking.look()
