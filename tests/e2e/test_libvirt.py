"""A real libvirtd with real guests, beside a daemon: what each sees of the other, and that neither stops the other."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from live_datastore import MIB, SMALL_ENDS, LiveDatastore, MakeDatastore, image, merged, wait_until

from scripts.lab.datastore import Settings, copy_sparse
from scripts.lab.guest import DONE, MARKER, Guest
from scripts.lab.private_libvirt import LabDisk, PrivateLibvirt
from vmfs_stub.control.messages import LibvirtStatus

SIZE = 8 * MIB
STAYS = ("vmfs.stay",)


def settings(libvirt: PrivateLibvirt, *others: Settings) -> Settings:
    return merged(SMALL_ENDS, {"libvirt": {"enabled": True, "uri": libvirt.uri, "timeout_s": 2}}, *others)


@pytest.fixture
def datastore(libvirt: PrivateLibvirt, make_datastore: MakeDatastore) -> LiveDatastore:
    made = make_datastore(settings(libvirt))
    made.start()
    return made


def add_guest(datastore: LiveDatastore, libvirt: PrivateLibvirt, guest: Guest, name: str, *parameters: str) -> Path:
    """A VM with a real guest in it, and its domain, which is off."""
    path = datastore.mountpoint / name / "disk.qcow2"
    path.parent.mkdir()
    copy_sparse(guest.qcow2, path)
    libvirt.define(libvirt.domain_xml(name, [LabDisk(path, "qcow2")], guest=guest, parameters=parameters))
    return path


def add_small(datastore: LiveDatastore, libvirt: PrivateLibvirt, name: str, **more: str) -> Path:
    """A VM of which no guest boots, and its domain."""
    path = datastore.add_vm(name, image(SIZE, seed=len(name)))
    libvirt.define(libvirt.domain_xml(name, [LabDisk(path)], **more))  # type: ignore[arg-type]
    return path


def status(datastore: LiveDatastore) -> LibvirtStatus:
    found = datastore.client.status().libvirt
    assert found is not None
    return found


def note(libvirt: PrivateLibvirt, name: str) -> str:
    """The element with our note, "" without one."""
    found = re.search(r"<vmfs-archive:archived [^>]*>", libvirt.virsh("dumpxml", "--inactive", name))
    return found[0] if found else ""


def test_an_archived_vm_is_noted_starts_by_virsh_and_the_note_goes(
    datastore: LiveDatastore, libvirt: PrivateLibvirt, guest: Guest
) -> None:
    add_guest(datastore, libvirt, guest, "web")
    before = libvirt.virsh("dumpxml", "--inactive", "web")
    begun_s = time.time()
    datastore.archive("web")
    wait_until("the domain says that it is archived", lambda: note(libvirt, "web"))
    written = note(libvirt, "web")
    (archived,) = re.findall(r'archived="([^"]+)"', written)
    assert begun_s - 1 <= float(archived) <= time.time()
    assert f'datastore="{datastore.mountpoint.name}"' in written
    assert 'expected-seconds="' in written
    assert datastore.state("web") == "placeholder"
    datastore.restart()  # nothing is in the kernel's cache, and nothing is written twice
    libvirt.virsh("start", "web")
    libvirt.wait_console("web", MARKER)
    libvirt.wait_state("web", "shut off")
    datastore.recall("web")
    wait_until("the note is gone", lambda: not note(libvirt, "web"))
    after = libvirt.virsh("dumpxml", "--inactive", "web")
    assert re.sub(r"\s+<metadata>.*?</metadata>|\s+<metadata/>", "", after, flags=re.DOTALL) == before


def test_a_note_follows_a_rename_and_a_new_definition_and_outlives_an_absence(
    datastore: LiveDatastore, libvirt: PrivateLibvirt
) -> None:
    add_small(datastore, libvirt, "old")
    datastore.archive("old")
    wait_until("noted", lambda: note(libvirt, "old"))
    libvirt.virsh("domrename", "old", "new")
    assert note(libvirt, "new")
    # Defined anew by somebody who knows of no note.
    xml = libvirt.virsh("dumpxml", "--inactive", "new")
    libvirt.define(re.sub(r"<metadata>.*?</metadata>", "", xml, flags=re.DOTALL))
    wait_until("noted again", lambda: note(libvirt, "new"))
    libvirt.stop()
    datastore.recall("old")
    libvirt.start()
    wait_until("the note is gone", lambda: not note(libvirt, "new"))


def test_a_crash_between_archive_and_note_is_made_up_for(datastore: LiveDatastore, libvirt: PrivateLibvirt) -> None:
    add_small(datastore, libvirt, "vm")
    libvirt.freeze()
    datastore.configure({"libvirt": {"require_stop_on_error": False, "enabled": False}})
    datastore.restart()
    datastore.archive("vm")
    datastore.configure({"libvirt": {"enabled": True}})
    datastore.kill()
    libvirt.thaw()
    datastore.start()
    wait_until("noted", lambda: note(libvirt, "vm"))


def test_a_domain_that_is_undefined_while_archived_keeps_its_vm(
    datastore: LiveDatastore, libvirt: PrivateLibvirt
) -> None:
    path = add_small(datastore, libvirt, "vm")
    content = image(SIZE, seed=2)
    datastore.archive("vm")
    wait_until("noted", lambda: note(libvirt, "vm"))
    xml = libvirt.virsh("dumpxml", "--inactive", "vm")
    libvirt.virsh("undefine", "vm")
    time.sleep(3)
    assert datastore.state("vm") == "placeholder"
    assert len(datastore.pins()) == 1
    datastore.cli("verify", "vm", check=0)
    libvirt.define(re.sub(r"<metadata>.*?</metadata>", "", xml, flags=re.DOTALL))
    wait_until("noted again", lambda: note(libvirt, "vm"))
    assert path.read_bytes() == content


def test_archives_are_refused_with_the_reason(datastore: LiveDatastore, libvirt: PrivateLibvirt) -> None:
    path = datastore.add_vm("lax", image(SIZE, seed=1))
    libvirt.define(libvirt.domain_xml("lax-domain", [LabDisk(path, options="")]))
    done = datastore.cli("archive", "lax", check=4)
    assert "domain lax-domain: vda without error_policy='stop'" in done.err
    found = datastore.cli("doctor").out
    assert "virsh edit lax-domain" in found
    assert "error_policy='stop' rerror_policy='stop'" in found
    datastore.configure({"libvirt": {"require_stop_on_error": False}})
    datastore.restart()
    datastore.archive("lax")

    path = datastore.add_vm("kept", image(SIZE, seed=2))
    protected = '<metadata><v:domain xmlns:v="https://vmfs-stub/domain/1"><v:protected/></v:domain></metadata>'
    libvirt.define(libvirt.domain_xml("kept", [LabDisk(path)], more=protected))
    assert "protected" in datastore.cli("archive", "kept", check=4).err

    path = datastore.add_vm("shared", image(SIZE, seed=3))
    second = f"<source file='{path.with_name('second.raw')}'/><target dev='vdb' bus='virtio'/><shareable/>"
    second = f"<disk type='file' device='disk'><driver error_policy='stop'/>{second}</disk>"
    libvirt.define(libvirt.domain_xml("shared", [LabDisk(path)], devices=second))
    assert "disk vdb is shared with other domains" in datastore.cli("archive", "shared", check=4).err


def test_a_running_vm_is_refused_by_name(datastore: LiveDatastore, libvirt: PrivateLibvirt) -> None:
    add_small(datastore, libvirt, "vm")
    libvirt.virsh("start", "vm")
    assert "VM vm is in use" in datastore.cli("archive", "vm", check=4).err
    libvirt.virsh("suspend", "vm")
    assert "VM vm is in use" in datastore.cli("archive", "vm", check=4).err
    libvirt.virsh("destroy", "vm")
    datastore.archive("vm")


def test_libvirtd_killed_and_back(datastore: LiveDatastore, libvirt: PrivateLibvirt, guest: Guest) -> None:
    add_guest(datastore, libvirt, guest, "web", *STAYS)
    add_small(datastore, libvirt, "idle")
    libvirt.virsh("start", "web")
    libvirt.wait_console("web", DONE)
    assert status(datastore).connected
    libvirt.kill()
    wait_until("it is away", lambda: not status(datastore).connected)
    assert "NOT reachable since" in datastore.cli("status").out
    assert datastore.cli("archive", "idle").code == 15
    libvirt.start()
    wait_until("it is back", lambda: status(datastore).connected)
    assert libvirt.state("web") == "running"
    assert "VM web is in use" in datastore.cli("archive", "web", check=4).err
    datastore.archive("idle")
    assert "libvirt: " in datastore.cli("status", check=0).out


def test_a_libvirt_that_nobody_named_is_noticed_when_it_comes_and_missed_when_it_has_gone(
    libvirt: PrivateLibvirt, make_datastore: MakeDatastore
) -> None:
    libvirt.stop()
    libvirt.socket.unlink(missing_ok=True)
    datastore = make_datastore(settings(libvirt, {"libvirt": {"enabled": "auto"}}))
    datastore.start()
    datastore.add_vm("plain", image(SIZE, seed=1))
    assert datastore.client.status().libvirt is None
    datastore.archive("plain")
    libvirt.start()
    wait_until("it is noticed", lambda: datastore.client.status().libvirt is not None and status(datastore).connected)
    add_small(datastore, libvirt, "guarded")
    datastore.restart()  # a sample is taken at the start, and else only now and then
    with closing(sqlite3.connect(datastore.backing / ".vmfs-stub/catalog.sqlite", timeout=10)) as catalog:
        wait_until("its domain is known", lambda: catalog.execute("SELECT domain FROM readings").fetchall())
    libvirt.stop()
    libvirt.socket.unlink(missing_ok=True)
    datastore.restart()
    assert not status(datastore).connected
    done = datastore.cli("archive", "guarded", check=15)
    assert "it was there before" in done.err
    assert datastore.state("guarded") == "resident"
    libvirt.start()
    wait_until("it is back", lambda: status(datastore).connected)
    datastore.archive("guarded")


def test_a_hanging_libvirtd_holds_up_no_command(datastore: LiveDatastore, libvirt: PrivateLibvirt) -> None:
    path = add_small(datastore, libvirt, "vm")
    datastore.archive("vm")
    wait_until("noted", lambda: note(libvirt, "vm"))
    libvirt.freeze()
    begun_s = time.monotonic()
    assert datastore.cli("archive", "vm").code == 15
    for words in (("ls",), ("recall", "vm"), ("points",), ("backup", "vm", "--no-archive")):
        datastore.cli(*words, check=0)
    assert path.read_bytes()[:4096] == image(SIZE, seed=2)[:4096]
    datastore.cli("status")
    assert not status(datastore).connected
    assert time.monotonic() - begun_s < 30
    datastore.restart()  # nor a start or an end
    assert time.monotonic() - begun_s < 40
    libvirt.thaw()
    wait_until("it is back", lambda: status(datastore).connected)
    wait_until("the note is gone", lambda: not note(libvirt, "vm"))


def test_the_memory_of_a_guest_can_lie_on_the_mount(base: Path, make_datastore: MakeDatastore, guest: Guest) -> None:
    """As `doctor` explains it: libvirt's save directory is a symbolic link; the guest goes on where it stopped."""
    (base / "libvirt").mkdir()
    libvirt = PrivateLibvirt(base / "libvirt", shared=base)
    try:
        datastore = make_datastore(SMALL_ENDS)
        datastore.start()
        (datastore.mountpoint / "saved").mkdir()
        libvirt.save_dir.symlink_to(datastore.mountpoint / "saved")
        libvirt.start()
        add_guest(datastore, libvirt, guest, "web", *STAYS)
        datastore.configure({"libvirt": {"enabled": True, "uri": libvirt.uri, "save_dir": str(libvirt.save_dir)}})
        datastore.restart()
        assert "lies on the mount" in datastore.cli("doctor").out
        libvirt.virsh("start", "web")
        libvirt.wait_console("web", DONE)
        seen = libvirt.console("web").stat().st_size
        libvirt.virsh("managedsave", "web")
        assert [path.name for path in (datastore.mountpoint / "saved").iterdir()] == ["web.save"]
        datastore.archive("web")
        rows = {row.disk: row.state for row in datastore.client.list_disks("web")}
        assert rows == {"disk.qcow2": "placeholder", "web.save": "placeholder"}
        libvirt.virsh("start", "web")
        libvirt.wait_state("web", "running")
        time.sleep(3)
        assert MARKER.encode() not in libvirt.console("web").read_bytes()[seen:]
        libvirt.virsh("destroy", "web")
    finally:
        libvirt.end()
