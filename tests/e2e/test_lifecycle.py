"""One datastore from mount to unmount: what operators do, and what programs see meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from live_datastore import (
    CHUNK,
    MIB,
    QUIET,
    SMALL_ENDS,
    Hold,
    MakeDatastore,
    forget_pages,
    image,
    merged,
    noise,
    wait_until,
)

from vmfs_stub.mount import mountpoint as mountpoints

SIZE = 8 * MIB
SLOW_UNMOUNT = """
import time
from vmfs_stub.cli.main import main
from vmfs_stub.mount import mountpoint
unmount = mountpoint.unmount
def slow(path):
    unmount(path)
    time.sleep(5)
mountpoint.unmount = slow
main()
"""
"""A daemon whose mount has ended long before the kernel has let go of all pages of its large disks."""


def errno_of(function, *args: object) -> int:  # type: ignore[no-untyped-def]
    with pytest.raises(OSError) as caught:
        function(*args)
    return caught.value.errno


def test_mountpoint_is_empty_and_unwritable_while_not_mounted(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    assert list(datastore.mountpoint.iterdir()) == []
    assert errno_of((datastore.mountpoint / "disk").touch) == errno.EPERM
    datastore.start()
    datastore.add_vm("vm", b"disk")
    datastore.stop()
    assert list(datastore.mountpoint.iterdir()) == []
    assert errno_of((datastore.mountpoint / "vm").mkdir) == errno.EPERM
    assert datastore.cli("status").code == 7
    assert datastore.cli("ls").code == 7


def test_a_start_replaces_the_mount_of_a_killed_daemon(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    content = noise(SIZE, seed=1)
    disk = datastore.add_vm("vm", content)
    datastore.archive("vm")
    datastore.kill()
    assert errno_of(os.listdir, datastore.mountpoint) in {errno.ENOTCONN, errno.ECONNABORTED}
    assert datastore.cli("status").code == 7
    datastore.start()
    assert len(mountpoints.mounts_at(datastore.mountpoint)) == 1
    assert disk.read_bytes() == content


def test_force_removes_the_mount_of_a_killed_daemon(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    datastore.kill()
    assert datastore.cli("unmount").code == 7
    datastore.cli("unmount", "--force", check=0)
    assert mountpoints.mounts_at(datastore.mountpoint) == []


def test_unmount_is_refused_while_a_disk_is_open(make_datastore: MakeDatastore, hold: Hold) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    content = noise(SIZE, seed=2)
    disk = datastore.add_vm("vm", content)
    datastore.archive("vm")
    holder = hold(disk, "rw")
    refused = datastore.cli("unmount", check=4)
    assert "VM vm" in refused.err
    assert disk.read_bytes() == content
    holder.let_go()
    wait_until("the disk is closed", lambda: datastore.client.status().mount.open_disks == 0)
    datastore.stop()


def test_force_unmounts_while_a_disk_is_open_and_loses_nothing(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    content = bytearray(noise(SIZE, seed=3))
    disk = datastore.add_vm("vm", bytes(content))
    datastore.archive("vm")
    fd = os.open(disk, os.O_RDWR)
    os.pwrite(fd, b"written", 5 * MIB + 1)
    content[5 * MIB + 1 : 5 * MIB + 8] = b"written"
    datastore.cli("unmount", "--force", check=0)
    assert datastore.daemon is not None
    assert datastore.daemon.wait(timeout=30) == 0
    assert errno_of(os.fsync, fd) in {errno.ENOTCONN, errno.ECONNABORTED}
    assert errno_of(os.close, fd) in {errno.ENOTCONN, errno.ECONNABORTED}
    datastore.start()
    assert disk.read_bytes() == content
    assert datastore.cli("status").code == 0


def test_unmount_ends_the_daemon_though_another_mount_namespace_keeps_a_copy(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("web", noise(SIZE, seed=1))
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo made; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as elsewhere:
        assert elsewhere.stdout is not None
        assert elsewhere.stdout.readline() == b"made\n"
        datastore.stop()
        copy = Path(f"/proc/{elsewhere.pid}/root") / disk.relative_to("/")
        assert errno_of(copy.read_bytes) == errno.ENOTCONN
        datastore.start()
        assert disk.read_bytes() == noise(SIZE, seed=1)
        datastore.stop()
        elsewhere.communicate()


def test_unmount_has_its_answer_however_long_the_kernel_takes(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start(program=("-c", SLOW_UNMOUNT))
    datastore.stop()


def test_hold_refuses_recalls_until_unhold(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    content = noise(SIZE, seed=4)
    disk = datastore.add_vm("vm", content)
    other = datastore.add_vm("resident", b"resident")
    datastore.archive("vm")
    datastore.cli("hold", check=0)
    assert datastore.client.status().daemon.held
    started = time.monotonic()
    assert errno_of(disk.read_bytes) == errno.EIO
    assert time.monotonic() - started < 5
    assert "recalls are held" in datastore.cli("recall", "vm", check=4).err
    with disk.open("r+b") as file:
        file.write(bytes(4096))
    assert other.read_bytes() == b"resident"
    datastore.cli("unhold", check=0)
    forget_pages(disk)
    assert disk.read_bytes() == bytes(4096) + content[4096:]


def test_hydration_goes_on_after_a_restart(make_datastore: MakeDatastore) -> None:
    limited = merged(SMALL_ENDS, {"hydration": {"bytes_per_s_max": "4 MiB"}})
    datastore = make_datastore(limited)
    datastore.start()
    content = image(3 * SIZE, seed=5)
    disk = datastore.add_vm("vm", content)
    datastore.archive("vm")
    with disk.open("rb") as file:
        assert file.read(CHUNK) == content[:CHUNK]
    wait_until("it is hydrating", lambda: datastore.state("vm") == "recalling")
    datastore.crash()
    assert datastore.state("vm") != "resident"
    datastore.configure({"hydration": {"bytes_per_s_max": 0}})
    datastore.restart()
    wait_until("all of it is back", lambda: datastore.state("vm") == "resident")
    wait_until("its pin is gone", lambda: not datastore.pins())
    wait_until("its maps are gone", lambda: not datastore.durable_maps() + datastore.volatile_maps())
    datastore.assert_nothing_left(datastore.backing_of(disk))
    assert datastore.backing_of(disk).read_bytes() == content


def test_first_read_brings_the_whole_disk_back_in_the_background(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(SMALL_ENDS)
    datastore.start()
    content = image(SIZE, seed=6)
    disk = datastore.add_vm("vm", content)
    mtime_ns = disk.stat().st_mtime_ns
    datastore.archive("vm")
    assert disk.stat().st_mtime_ns == mtime_ns
    with disk.open("rb") as file:
        assert file.read(1) == content[:1]
    wait_until("all of it is back", lambda: datastore.state("vm") == "resident")
    assert disk.read_bytes() == content
    assert datastore.backing_of(disk).stat().st_mtime_ns == mtime_ns


def test_floor_of_free_space_refuses_recall_but_not_reads(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(merged(SMALL_ENDS, {"primary": {"free_floor_percent": 99.9}}))
    datastore.start()
    content = noise(SIZE, seed=7)
    disk = datastore.add_vm("vm", content)
    datastore.archive("vm")
    refused = datastore.cli("recall", "vm", check=9)
    assert "VM vm" in refused.err
    assert "free_floor_percent" in refused.err
    assert disk.read_bytes() == content


@pytest.mark.parametrize("mounted", [True, False], ids=["closed", "after-restart"])
def test_removing_a_placeholder_removes_pin_and_maps(make_datastore: MakeDatastore, mounted: bool) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", noise(SIZE, seed=8))
    datastore.archive("vm")
    assert (len(datastore.pins()), len(datastore.durable_maps())) == (1, 1)
    if not mounted:
        datastore.restart()
    disk.unlink()
    wait_until("its pin is gone", lambda: not datastore.pins())
    wait_until("its maps are gone", lambda: not datastore.durable_maps() + datastore.volatile_maps())
    assert datastore.cli("status").code == 0
    datastore.crash()
    assert datastore.cli("status").code == 0


def test_removed_placeholder_can_be_read_until_it_is_closed(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    content = noise(SIZE, seed=9)
    disk = datastore.add_vm("vm", content)
    datastore.archive("vm")
    with disk.open("r+b") as file:
        disk.unlink()
        file.write(b"still")
        file.seek(0)
        assert file.read() == b"still" + content[5:]
        assert datastore.pins()
    wait_until("its pin is gone", lambda: not datastore.pins())
    wait_until("its maps are gone", lambda: not datastore.durable_maps() + datastore.volatile_maps())


def test_files_that_are_open_outlive_their_name_and_the_daemon(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    content = noise(SIZE, seed=21)
    placeholder, plain = datastore.add_vm("vm", content), datastore.add_vm("vm", b"plain", disk="plain.raw")
    closed = datastore.add_vm("vm", b"closed", disk="closed.raw")
    datastore.archive("vm")
    orphans = datastore.backing / ".vmfs-stub" / "orphans"
    opened = [os.open(path, os.O_RDWR) for path in (placeholder, plain, plain)]
    try:
        placeholder.unlink()
        plain.unlink()
        closed.unlink()
        assert [os.fstat(fd).st_nlink for fd in opened] == [0, 0, 0]
        assert len(list(orphans.iterdir())) == 2
        os.pwrite(opened[1], b"still there", 0)
        datastore.kill()
        assert sorted(path.stat().st_size for path in orphans.iterdir()) == [len(b"still there"), SIZE]
        assert b"still there" in [path.read_bytes() for path in orphans.iterdir()]
    finally:
        for fd in opened:
            with contextlib.suppress(OSError):  # the mount may be dead by now
                os.close(fd)
    datastore.start()
    assert not list(orphans.iterdir())
    wait_until("its pin is gone", lambda: not datastore.pins())
    wait_until("its maps are gone", lambda: not datastore.durable_maps() + datastore.volatile_maps())
    assert datastore.cli("status").code == 0


def test_the_last_release_of_a_file_without_a_name_frees_it(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", b"content")
    replacement = datastore.add_vm("vm", b"replacement", disk="new.raw")
    orphans = datastore.backing / ".vmfs-stub" / "orphans"
    with disk.open("rb") as first, disk.open("rb") as second:
        replacement.rename(disk)
        assert first.read() == b"content"
        first.close()
        assert len(list(orphans.iterdir())) == 1
        assert second.read() == b"content"
    wait_until("its space is free", lambda: not list(orphans.iterdir()))
    assert (disk.read_bytes(), disk.stat().st_nlink) == (b"replacement", 1)


def test_a_file_that_kept_its_name_survives_the_sweep(make_datastore: MakeDatastore) -> None:
    """As after a crash between the orphan's link and the removal of the name."""
    datastore = make_datastore(QUIET)
    datastore.start()
    content = noise(SIZE, seed=22)
    disk = datastore.add_vm("vm", content)
    datastore.archive("vm")
    datastore.kill()
    backing = datastore.backing / "vm" / disk.name
    (datastore.backing / ".vmfs-stub" / "orphans" / str(backing.stat().st_ino)).hardlink_to(backing)
    datastore.start()
    assert backing.stat().st_nlink == 1
    assert disk.read_bytes() == content


def test_placeholder_that_is_replaced_by_a_rename_ends(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", noise(SIZE, seed=10))
    datastore.archive("vm")
    fresh = datastore.add_vm("vm", b"fresh", disk="fresh.raw")
    fresh.rename(disk)
    wait_until("its pin is gone", lambda: not datastore.pins())
    assert disk.read_bytes() == b"fresh"
    wait_until("its maps are gone", lambda: not datastore.durable_maps() + datastore.volatile_maps())


def test_renamed_and_linked_placeholders_are_the_same_placeholder(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    content = bytearray(noise(SIZE, seed=11))
    disk = datastore.add_vm("vm", bytes(content))
    datastore.archive("vm")
    linked = datastore.mountpoint / "linked.raw"
    linked.hardlink_to(disk)
    moved = datastore.mountpoint / "other/moved.raw"
    moved.parent.mkdir()
    disk.rename(moved)
    with linked.open("r+b") as file:
        file.seek(CHUNK + 10)
        file.write(b"by another name")
    content[CHUNK + 10 : CHUNK + 25] = b"by another name"
    datastore.crash()
    assert {row["state"] for row in datastore.rows()} == {"placeholder"}
    linked.unlink()
    assert datastore.pins()
    assert moved.read_bytes() == content
    assert datastore.cli("status").code == 0


def test_copy_of_a_placeholder_through_the_mount_is_an_ordinary_file(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    content = image(SIZE, seed=12)
    disk = datastore.add_vm("vm", content)
    os.setxattr(disk, "user.note", b"kept")
    datastore.archive("vm")
    copy = datastore.mountpoint / "copy.raw"
    copy.write_bytes(disk.read_bytes())
    assert os.listxattr(disk) == ["user.note"]
    assert copy.read_bytes() == content
    assert datastore.state("copy") == "resident"


def test_json_of_ls_status_and_points(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    disk = datastore.add_vm("vm", noise(SIZE, seed=13))
    datastore.add_vm("other", b"small")
    before = time.time()
    datastore.archive("vm")
    with disk.open("rb") as file:
        file.read(CHUNK)

    other, row = sorted(datastore.rows(), key=lambda row: str(row["vm"]))
    assert set(row) == {
        "vm", "disk", "path", "state", "size_bytes", "resident_bytes", "restore_points", "protected", "last_access"
    }  # fmt: skip
    assert (row["vm"], row["disk"], row["path"]) == ("vm", "disk.raw", str(disk))
    assert (row["state"], row["size_bytes"], row["restore_points"]) == ("placeholder", SIZE, 1)
    assert isinstance(row["resident_bytes"], int)
    assert CHUNK <= row["resident_bytes"] <= 2 * MIB
    assert isinstance(row["last_access"], float)
    assert before <= row["last_access"] <= time.time()
    assert (other["state"], other["restore_points"], other["size_bytes"]) == ("resident", 0, 5)

    status = json.loads(datastore.cli("status", "--json", check=0).out)
    assert datastore.daemon is not None
    assert status["healthy"] is True
    assert status["daemon"]["pid"] == datastore.daemon.pid
    assert status["daemon"]["recalled_on_demand_bytes"] >= CHUNK
    assert status["mount"]["mounted"] is True
    assert status["mount"]["mountpoint"] == str(datastore.mountpoint)
    assert status["store"]["reachable"] is True
    assert (status["jobs"], status["recalls"], status["findings"]) == ([], [], [])

    (point,) = json.loads(datastore.cli("points", "vm", "--json", check=0).out)
    assert (point["vm"], point["size_bytes"], point["files"], point["damaged"]) == ("vm", SIZE, 1, None)
    assert before <= point["created"] <= time.time()
    assert datastore.cli("points", "nobody").code == 3


def test_restore_points_add_up_and_each_can_be_restored(make_datastore: MakeDatastore, base: Path) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    contents = [bytearray(image(SIZE, seed=14))]
    disk = datastore.add_vm("vm", bytes(contents[0]))
    datastore.archive("vm")
    for number in (1, 2):
        changed = bytearray(contents[-1])
        changed[number * MIB : number * MIB + 5000] = noise(5000, seed=number)
        with disk.open("r+b") as file:
            file.seek(number * MIB)
            file.write(changed[number * MIB : number * MIB + 5000])
        contents.append(changed)
        datastore.archive("vm")
    points = [row["point"] for row in json.loads(datastore.cli("points", "vm", "--json", check=0).out)]
    assert len(points) == len(datastore.durable_maps()) + 2 == 3
    for number, point in enumerate(points):
        target = base / f"restored{number}"
        datastore.cli("restore", f"vm@{point}", "--to", target, check=0)
        assert (target / "disk.raw").read_bytes() == contents[number]
    datastore.cli("verify", check=0)
    assert disk.read_bytes() == contents[-1]
