"""An image directory that becomes a datastore where it is, with its domains defined, and an image directory again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_datastore import MIB, SMALL_ENDS, Hold, LiveDatastore, image, merged, wait_until

from scripts.lab.datastore import copy_sparse
from scripts.lab.guest import MARKER, Guest
from scripts.lab.private_libvirt import LabDisk, PrivateLibvirt
from vmfs_stub.core.names import XATTR_PREFIX
from vmfs_stub.mount.mountpoint import is_immutable, is_mounted

CONTENTS = {"one.raw": image(12 * MIB, seed=1), "sub/two.raw": image(9 * MIB, seed=2)}


@pytest.fixture
def place(base: Path) -> Iterator[LiveDatastore]:
    """A directory of images that is no datastore yet, where one would have its mountpoint."""
    made = LiveDatastore(base)
    made.mountpoint, made.backing = base / "images", base / "images.vmfs-stub"
    for name, content in CONTENTS.items():
        (made.mountpoint / name).parent.mkdir(exist_ok=True)
        (made.mountpoint / name).write_bytes(content)
    made.mountpoint.chmod(0o711)
    yield made
    if is_mounted(made.mountpoint):
        made.cli("unmount", "--force")
    made.tear_down()


def words(place: LiveDatastore, libvirt: str = "none") -> list[str | Path]:
    where = ["--in-place", place.mountpoint, "--store", place.store_url, "--runtime-dir", place.runtime]
    return ["init", *where, "--libvirt", libvirt]


def assert_plain(place: LiveDatastore, *, made: bool = False) -> None:
    """It is the directory that it was."""
    assert not is_mounted(place.mountpoint)
    assert not place.backing.exists()
    assert place.config.exists() is made
    assert not is_immutable(place.mountpoint)
    assert place.mountpoint.stat().st_mode & 0o7777 == 0o711
    for name, content in CONTENTS.items():
        assert (place.mountpoint / name).read_bytes() == content
    for path in (place.mountpoint, *place.mountpoint.rglob("*")):
        assert [name for name in os.listxattr(path) if name.startswith(XATTR_PREFIX)] == []


def test_there_and_back(place: LiveDatastore) -> None:
    said = place.cli(*words(place), check=0).out
    assert "leave" in said
    assert is_mounted(place.mountpoint)
    assert place.mountpoint.stat().st_mode & 0o7777 == 0o711
    assert place.backing.stat().st_mode & 0o7777 == 0o700
    for name, content in CONTENTS.items():
        assert (place.mountpoint / name).read_bytes() == content
    place.archive("one", "sub")
    assert place.state("one") == "placeholder"
    place.cli("leave", check=0)
    assert_plain(place, made=True)


@pytest.mark.parametrize("mode", ["r", "rw", "map"])
def test_an_open_file_is_refused_and_nothing_has_changed(place: LiveDatastore, hold: Hold, mode: str) -> None:
    holder = hold(place.mountpoint / "sub/two.raw", mode)
    done = place.cli(*words(place), check=4)
    assert "two.raw is open" in done.err
    holder.let_go()
    assert_plain(place)


def test_what_fails_late_is_undone(place: LiveDatastore) -> None:
    """Somebody opens a file at the very last moment."""
    program = """
import sys
from pathlib import Path
from vmfs_stub.cli import in_place
from vmfs_stub.cli.main import main
refuse = in_place._refuse_open_files
def late(directory):
    held = open(next(directory.rglob("two.raw"))) if directory.name.endswith(".vmfs-stub") else None
    refuse(directory)
in_place._refuse_open_files = late
main()
"""
    path = place.base / "late.py"
    path.write_text(program)

    command = [sys.executable, str(path), "--config", str(place.config), *map(str, words(place))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "two.raw is open" in done.stderr) == (4, True), done
    assert_plain(place)


def test_what_cannot_be_is_refused(place: LiveDatastore) -> None:
    place.backing.mkdir()
    assert "exists already" in place.cli(*words(place), check=4).err
    place.backing.rmdir()
    assert place.cli(*words(place), "--mountpoint", place.base / "elsewhere", check=2)
    store = (place.mountpoint / "store").as_uri()
    assert place.cli("init", "--in-place", place.mountpoint, "--store", store, check=2)
    assert place.cli("init", "--store", place.store_url, check=2)
    assert_plain(place)


def test_a_directory_of_defined_domains(libvirt: PrivateLibvirt, place: LiveDatastore, guest: Guest) -> None:
    disk = place.mountpoint / "web.qcow2"
    copy_sparse(guest.qcow2, disk)
    libvirt.define(libvirt.domain_xml("web", [LabDisk(disk, "qcow2")], guest=guest))
    stays = libvirt.domain_xml("stays", [LabDisk(place.mountpoint / "one.raw")])
    libvirt.define(stays)
    pool = f"<pool type='dir'><name>images</name><target><path>{place.mountpoint}</path></target></pool>"
    (place.base / "pool.xml").write_text(pool)
    libvirt.virsh("pool-define", place.base / "pool.xml")
    libvirt.virsh("pool-start", "images")
    before = libvirt.virsh("dumpxml", "--inactive", "web")

    libvirt.virsh("start", "stays")
    assert "domain stays is running" in place.cli(*words(place, libvirt.uri), check=4).err
    libvirt.virsh("managedsave", "stays")
    assert "domain stays has a managed save" in place.cli(*words(place, libvirt.uri), check=4).err
    libvirt.virsh("managedsave-remove", "stays")
    (place.mountpoint / "one.raw").write_bytes(CONTENTS["one.raw"])
    libvirt.freeze()
    assert place.cli(*words(place, libvirt.uri)).code == 15
    libvirt.thaw()
    disk_moved = disk.rename(place.base / "web.qcow2")
    assert_plain(place)
    disk_moved.rename(disk)

    place.cli(*words(place, libvirt.uri), check=0)
    assert libvirt.virsh("dumpxml", "--inactive", "web") == before
    assert "images" in libvirt.virsh("pool-list")
    libvirt.virsh("pool-refresh", "images")
    assert "web.qcow2" in libvirt.virsh("vol-list", "images")
    status = place.client.status().libvirt
    assert status is not None
    assert status.connected
    text = place.config.read_text()
    place.configure(merged(SMALL_ENDS, {}))
    assert f'uri = "{libvirt.uri}"' in text
    libvirt.virsh("start", "web")
    libvirt.wait_console("web", MARKER)
    libvirt.wait_state("web", "shut off")
    place.archive("web")
    wait_until("noted", lambda: "<vmfs-archive:archived" in libvirt.virsh("dumpxml", "web"))
    libvirt.virsh("start", "web")
    seen = libvirt.console("web").stat().st_size
    libvirt.wait_console("web", MARKER, since=seen)
    libvirt.wait_state("web", "shut off")
    place.cli("leave", check=0)
    after = libvirt.virsh("dumpxml", "--inactive", "web")
    assert re.sub(r"\s+<metadata>.*?</metadata>|\s+<metadata/>", "", after, flags=re.DOTALL) == before
    libvirt.virsh("start", "web")
    libvirt.wait_state("web", "shut off", deadline_s=120)
