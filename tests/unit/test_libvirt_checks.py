"""What `doctor` says of libvirt: without a libvirt, on domains as plain values."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hypervisor import domain

from vmfs_stub.cli import context, libvirt_checks
from vmfs_stub.cli.host_checks import HostFinding
from vmfs_stub.config import Config, parse_config
from vmfs_stub.control.messages import LibvirtStatus
from vmfs_stub.core.errors import HypervisorAway
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.inventory.libvirt import LibvirtConnection
from vmfs_stub.inventory.libvirt_binding import has_binding

MOUNT = Path("/srv/images")
WEB = domain("web", MOUNT / "web/disk.raw")
LAX = replace(WEB, disks=tuple(replace(disk, stops_on_error=False) for disk in WEB.disks))


def config(libvirt: str = "", mountpoint: Path = MOUNT, backing: Path = Path("/srv/backing")) -> Config:
    text = f"""[datastore]
name = "vms"
backing = "{backing}"
mountpoint = "{mountpoint}"
[store]
url = "file:///srv/store"
[libvirt]
{libvirt}
"""
    return parse_config(text, origin="test")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[Domain]:
    """What libvirt, which is there, answers."""
    found: list[Domain] = []
    monkeypatch.setattr(libvirt_checks, "look_at_domains", lambda settings: found)
    monkeypatch.setattr(libvirt_checks, "is_there", lambda uri: True)
    return found


def findings(given: Config, severity: str = "warning") -> Sequence[HostFinding]:
    return [found for found in libvirt_checks.check_libvirt(given) if found.severity == severity]


def test_a_disk_without_stop_is_a_finding_with_the_exact_change(known: list[Domain]) -> None:
    known += [LAX, domain("elsewhere", Path("/other/disk.raw"))]
    (found,) = findings(config())
    assert "domain web: vda" in found.message
    assert found.remedy.startswith("virsh edit web, and in the <disk> of vda: <driver … error_policy='stop' rerror_")
    (ok,) = findings(config(), "ok")
    assert "1 of 2 domains have disks on the mount" in ok.message
    assert findings(config("require_stop_on_error = false")) == []
    known[0] = WEB
    assert findings(config()) == []


def test_a_disk_that_is_named_through_a_link_counts(known: list[Domain], tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "images").symlink_to("mount")
    known += [replace(LAX, disks=(replace(LAX.disks[0], path=tmp_path / "images/web/disk.raw"),))]
    given = config(mountpoint=tmp_path / "mount")
    (found,) = findings(given)
    assert "domain web: vda" in found.message
    assert "1 of 1 domains have disks on the mount" in findings(given, "ok")[0].message


def test_what_keeps_a_domain_from_being_archived_is_told(known: list[Domain]) -> None:
    known.append(replace(WEB, problems=("disk vdb is shared",)))
    assert "domain web cannot be archived: disk vdb is shared" in [each.message for each in findings(config(), "note")]


def test_where_the_memory_of_saved_guests_goes(known: list[Domain], tmp_path: Path) -> None:
    mount, backing, save = tmp_path / "mount", tmp_path / "backing", tmp_path / "save"
    for directory in (mount, backing / "web", save):
        directory.mkdir(parents=True)
    (backing / "web/disk.raw").touch()
    given = config(f'save_dir = "{save}"', mount, backing)
    assert "does not lie on the mount" in findings(given, "note")[-1].message
    save.rmdir()
    save.symlink_to("mount/saved")
    assert "lies on the mount" in findings(given, "ok")[-1].message
    save.unlink()
    save.symlink_to("mount")
    assert f"{save} leads to the top on the mount, which is not for memory alone" in findings(given, "note")[-1].message
    save.unlink()
    save.symlink_to("mount/web")
    assert f"{save} leads to web on the mount, which is not for memory alone" in findings(given, "note")[-1].message
    (backing / "web/disk.raw").unlink()
    (backing / "web").rmdir()
    backing.rmdir()
    assert "cannot be told" in findings(given, "note")[-1].message


def test_a_host_without_libvirt_is_no_problem_unless_it_should_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: object) -> list[Domain]:
        raise HypervisorAway("cannot connect")

    monkeypatch.setattr(libvirt_checks, "look_at_domains", refuse)
    monkeypatch.setattr(libvirt_checks, "is_there", lambda uri: False)
    for given in (config(), config("enabled = false")):
        assert [found.severity for found in libvirt_checks.check_libvirt(given)] == ["note"]
    assert [found.severity for found in libvirt_checks.check_libvirt(config("enabled = true"))] == ["problem"]


@pytest.mark.parametrize(
    ("known_to_daemon", "severity", "said"),
    [
        (
            LibvirtStatus(uri="qemu:///system", connected=False, last_error="no such socket"),
            "problem",
            "no such socket",
        ),
        (LibvirtStatus(uri="qemu:///system", connected=True), "note", "not used"),
        (None, "note", "not used"),
    ],
)
def test_a_libvirt_that_the_daemon_misses_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, known_to_daemon: LibvirtStatus | None, severity: str, said: str
) -> None:
    monkeypatch.setattr(libvirt_checks, "is_there", lambda uri: False)
    status = SimpleNamespace(libvirt=known_to_daemon)
    monkeypatch.setattr(context, "client_of", lambda config: SimpleNamespace(status=lambda: status))
    (found,) = libvirt_checks.check_libvirt(config())
    assert (found.severity, said in found.message) == (severity, True)
    (found,) = libvirt_checks.check_libvirt(config("enabled = false"))
    assert found.severity == "note"


def test_without_the_binding_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name == "libvirt":
            raise ImportError(name)
        return imported(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not has_binding()
    with pytest.raises(HypervisorAway, match=r"pip install 'vmfs-stub\[libvirt\]'"):
        LibvirtConnection.to("qemu:///system", lambda event: None)
    (found,) = findings(config("enabled = true"), "problem")
    assert "vmfs-stub[libvirt]" in found.message
    assert findings(config(), "problem") == []
