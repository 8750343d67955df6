"""Which domain is which VM, whatever way a domain names its images."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_hypervisor import domain

from vmfs_stub.core.ids import VmId
from vmfs_stub.core.sites import PLAIN, FileCalls
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.services.datastore_paths import DatastorePaths
from vmfs_stub.services.domains import Links, link

WEB, DB, BASE = VmId("a" * 32), VmId("b" * 32), VmId("c" * 32)
VMS = (
    Vm(WEB, "web", "web", True, (VmFile("web/disk.raw", "disk.raw", 1, 1), VmFile("web/nvram", "nvram", 1, 2))),
    Vm(DB, "db", "db.qcow2", False, (VmFile("db.qcow2", "db.qcow2", 1, 3),)),
    Vm(BASE, "base", "base.qcow2", False, (VmFile("base.qcow2", "base.qcow2", 1, 4),)),
)


class Asked(FileCalls):
    """Remembers which paths were looked at; ``refused`` cannot be."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.refused = ""

    def call(self, site: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.paths.append(args[0])
        if args[0] == self.refused:
            raise OSError(errno.EIO, "Input/output error")
        return function(*args, **kwargs)


class Host:
    """A backing directory, and a mountpoint at which nothing is mounted: nobody may look below it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.backing = base / "backing"
        self.mountpoint = base / "real" / "vms"
        self.asked = Asked()
        (self.backing / "web").mkdir(parents=True)
        self.mountpoint.mkdir(parents=True)
        for vm in VMS:
            for file in vm.files:
                (self.backing / file.path).touch()

    def link(self, *domains: Domain, mountpoint: Path | None = None) -> Links:
        paths = DatastorePaths(files=self.asked, backing=self.backing, mountpoint=mountpoint or self.mountpoint)
        found = link(VMS, domains, paths=paths)
        below = f"{self.mountpoint}/"
        assert not [path for path in self.asked.paths if path.startswith(below)]
        return found

    def owners(self, *paths: Path, mountpoint: Path | None = None) -> tuple[VmId, ...]:
        one = domain("one", *paths)
        return self.link(one, mountpoint=mountpoint).vms_of(one.uuid)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_disk_is_the_vm_that_has_the_file(host: Host) -> None:
    web, db = domain("web", host.mountpoint / "web/disk.raw"), domain("db", host.mountpoint / "db.qcow2")
    links = host.link(web, db, domain("elsewhere", Path("/dev/sda")))
    assert (links.of(WEB), links.of(DB), links.of(BASE)) == ((web,), (db,), ())
    assert links.vms_of(web.uuid) == (WEB,)
    assert links.vms_of(domain("elsewhere").uuid) == ()


def test_nvram_and_files_not_seen_yet_count(host: Host) -> None:
    one = replace(domain("one"), nvram=host.mountpoint / "web/nvram")
    assert host.link(one).vms_of(one.uuid) == (WEB,)
    assert host.owners(host.mountpoint / "web/snapshots/new.qcow2") == (WEB,)
    assert host.owners(host.mountpoint / "new.qcow2") == ()


def test_what_an_image_is_based_on_is_no_link(host: Host) -> None:
    based = domain("one", host.mountpoint / "db.qcow2")
    based = replace(based, disks=(replace(based.disks[0], backing=(host.mountpoint / "base.qcow2",)),))
    links = host.link(based)
    assert (links.vms_of(based.uuid), links.of(BASE)) == ((DB,), ())


def test_several_domains_and_several_vms_are_listed(host: Host) -> None:
    first, second = (domain(name, host.mountpoint / "web/disk.raw", host.mountpoint / "db.qcow2") for name in "ab")
    links = host.link(first, second)
    assert links.of(WEB) == links.of(DB) == (first, second)
    assert links.vms_of(first.uuid) == (WEB, DB)


def test_a_file_with_names_in_several_vms_is_each_ones(host: Host) -> None:
    """Whoever has the domain's disk by another name must not be archived while that runs, either."""
    copy = replace(VMS[1], files=(VmFile("db.qcow2", "db.qcow2", 1, 1),))
    paths = DatastorePaths(files=PLAIN, backing=host.backing, mountpoint=host.mountpoint)
    one = domain("one", host.mountpoint / "web/disk.raw")
    links = link((VMS[0], copy), [one], paths=paths)
    assert (links.vms_of(one.uuid), links.of(DB)) == ((WEB, DB), (one,))


def test_symlinks_outside_are_followed(host: Host) -> None:
    (host.base / "pool").symlink_to("real/vms")
    (host.base / "images").symlink_to(host.base / "pool")
    (host.base / "one.raw").symlink_to(host.base / "images/../vms/web/disk.raw")
    for path in ("pool/web/disk.raw", "images/web/disk.raw", "one.raw", "real/../pool/./web//disk.raw"):
        assert host.owners(Path(f"{host.base}/{path}")) == (WEB,), path


def test_symlinks_below_the_mountpoint_are_followed_there(host: Host) -> None:
    (host.backing / "relative").symlink_to("web/disk.raw")
    (host.backing / "absolute").symlink_to(host.mountpoint / "db.qcow2")
    (host.backing / "web/up").symlink_to("../db.qcow2")
    (host.backing / "out").symlink_to("../outside")
    (host.base / "real/outside").symlink_to(host.mountpoint / "web/disk.raw")
    found = [host.owners(host.mountpoint / name) for name in ("relative", "absolute", "web/up", "out")]
    assert found == [(WEB,), (DB,), (DB,), (WEB,)]


def test_the_mountpoint_may_be_named_by_a_symlink(host: Host) -> None:
    (host.base / "link").symlink_to("real")
    named = host.base / "link/vms"
    assert host.owners(host.mountpoint / "web/disk.raw", mountpoint=named) == (WEB,)
    assert host.owners(named / "web/disk.raw", mountpoint=named) == (WEB,)
    assert host.owners(named / "web/disk.raw") == (WEB,)


def test_what_leads_nowhere_is_no_link(host: Host) -> None:
    (host.base / "loop").symlink_to("loop")
    (host.base / "gone").symlink_to("nowhere")
    for path in (host.base / "loop/x", host.base / "gone", Path("relative/disk.raw"), host.mountpoint, Path("/")):
        assert host.owners(path) == (), path
    assert host.owners(host.base / "real/vmsx/web/disk.raw") == ()


def test_links_that_lead_elsewhere_by_now_are_followed_anew(host: Host) -> None:
    paths = DatastorePaths(files=host.asked, backing=host.backing, mountpoint=host.mountpoint, kept_s=0)
    one = domain("one", host.base / "image")
    for target, owner in (("web/disk.raw", WEB), ("db.qcow2", DB)):
        (host.base / "image").unlink(missing_ok=True)
        (host.base / "image").symlink_to(host.mountpoint / target)
        assert link(VMS, [one], paths=paths).vms_of(one.uuid) == (owner,)


def test_what_cannot_be_looked_at_is_no_link(host: Host) -> None:
    web, db = domain("web", host.mountpoint / "web/disk.raw"), domain("db", host.mountpoint / "db.qcow2")
    host.asked.refused = os.fspath(host.backing / "web")
    links = host.link(web, db)
    assert (links.vms_of(web.uuid), links.vms_of(db.uuid)) == ((), (DB,))


def test_several_threads_may_look_at_once(host: Host) -> None:
    """Samples, notes and jobs ask when they like, each for paths as they are then."""
    paths = DatastorePaths(files=PLAIN, backing=host.backing, mountpoint=host.mountpoint)
    domains = [domain(f"d{number:02}", host.mountpoint / f"web/{number}.raw") for number in range(20)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: link(VMS, domains, paths=paths), range(200)))
    assert all(links.of(WEB) == tuple(domains) for links in found)


def test_each_link_is_read_once(host: Host) -> None:
    many = [domain(f"d{number}", host.mountpoint / f"web/{number}.raw") for number in range(50)]
    host.link(*many)
    assert len(host.asked.paths) == len(set(host.asked.paths))
    assert os.fspath(host.backing / "web") in host.asked.paths
