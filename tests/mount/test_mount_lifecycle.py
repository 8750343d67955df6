"""Mounting, unmounting, dying, and what is left when nobody serves."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plain_mount import PlainMount, names, tear_down

from vmfs_stub.mount import mountpoint as mountpoints
from vmfs_stub.mount import syscalls

MakeMount = Callable[..., PlainMount]


def errno_of(function, *args: object) -> int:  # type: ignore[no-untyped-def]
    with pytest.raises(OSError) as caught:
        function(*args)
    return caught.value.errno


@pytest.fixture
def holder() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Starts processes that keep a file open."""
    started: list[subprocess.Popen[bytes]] = []

    def hold(path: Path) -> subprocess.Popen[bytes]:
        code = "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_mountpoint_is_empty_and_unwritable_while_nothing_is_mounted(make_mount: MakeMount) -> None:
    mount = make_mount()
    (mount.mountpoint / "disk").write_text("disk")
    mount.stop()
    assert mountpoints.mounts_at(mount.mountpoint) == []
    assert names(mount.mountpoint) == []
    assert errno_of((mount.mountpoint / "disk").touch) == errno.EPERM
    assert errno_of((mount.mountpoint / "disk").mkdir) == errno.EPERM
    assert (mount.backing / "disk").read_text() == "disk"


def test_list_of_mounts_names_the_datastore(make_mount: MakeMount) -> None:
    mount = make_mount('name="images of vm"', "max_background=77")
    (found,) = mountpoints.mounts_at(mount.mountpoint)
    assert (found.kind, found.source) == ("fuse.vmfs-stub", "images of vm")
    options = Path("/proc/self/mounts").read_text()
    (line,) = (line for line in options.splitlines() if str(mount.mountpoint) in line)
    for option in ("nosuid", "nodev", "default_permissions", "allow_other"):
        assert option in line


def test_limits_reach_the_kernel(make_mount: MakeMount, base: Path) -> None:
    mount = make_mount("max_background=777", "readahead_bytes=524288")
    (found,) = mountpoints.mounts_at(mount.mountpoint)
    control = base / "control"
    control.mkdir()
    syscalls.mount(b"none", os.fsencode(control), b"fusectl", flags=0, options=b"")
    try:
        connection = control / str(found.device_minor)
        assert int((connection / "max_background").read_text()) == 777
        assert int((connection / "congestion_threshold").read_text()) == 777 * 3 // 4
    finally:
        syscalls.unmount(os.fsencode(control))
    readahead = Path(f"/sys/class/bdi/0:{found.device_minor}/read_ahead_kb")
    # Where sysfs is read-only, as in containers, the kernel's own cap stays.
    assert readahead.read_text() == ("512\n" if os.access(readahead, os.W_OK) else "128\n")


def test_dead_mount_is_replaced(make_mount: MakeMount) -> None:
    first = make_mount()
    (first.mountpoint / "file").write_text("kept")
    first.process.kill()
    first.process.wait()
    assert errno_of(os.listdir, first.mountpoint) in {errno.ENOTCONN, errno.ECONNABORTED}
    second = make_mount()
    assert second.first_answer == {"ready": True}
    assert (second.mountpoint / "file").read_text() == "kept"
    assert len(mountpoints.mounts_at(second.mountpoint)) == 1


def test_live_mount_is_refused(make_mount: MakeMount) -> None:
    first = make_mount()
    second = make_mount()
    assert second.first_answer["error"] == "InUse"  # type: ignore[index]
    assert "already mounted" in second.first_answer["message"]  # type: ignore[index]
    (first.mountpoint / "file").touch()


def test_foreign_mount_is_refused(make_mount: MakeMount, base: Path) -> None:
    (base / "mount").mkdir()
    syscalls.mount(b"tmpfs", os.fsencode(base / "mount"), b"tmpfs", flags=0, options=b"size=64k")
    mount = make_mount()
    assert mount.first_answer["error"] == "InUse"  # type: ignore[index]
    assert [each.kind for each in mountpoints.mounts_at(mount.mountpoint)] == ["tmpfs"]


def test_mountpoint_with_files_is_refused(make_mount: MakeMount, base: Path) -> None:
    (base / "mount").mkdir()
    (base / "mount/file").touch()
    mount = make_mount()
    assert mount.first_answer["error"] == "AlreadyExists"  # type: ignore[index]
    assert (base / "mount/file").exists()


def test_mountpoint_that_is_a_file_is_refused(make_mount: MakeMount, base: Path) -> None:
    mount = make_mount()
    mount.stop()
    tear_down(mount.mountpoint)
    mount.mountpoint.rmdir()
    mount.mountpoint.touch()
    code = "import sys, pathlib; from vmfs_stub.mount import mountpoint as m; m.prepare(pathlib.Path(sys.argv[1]))"
    process = subprocess.run([sys.executable, "-c", code, str(mount.mountpoint)], capture_output=True, check=False)
    assert b"ConfigError" in process.stderr
    mount.mountpoint.unlink()
    mount.mountpoint.mkdir()


def test_unmount_from_outside_ends_serving(make_mount: MakeMount) -> None:
    mount = make_mount()
    syscalls.unmount(os.fsencode(mount.mountpoint))
    assert mount.receive() == {"ended": True}
    assert mount.process.wait(timeout=10) == 0


def test_unmount_refuses_while_a_file_is_open(
    make_mount: MakeMount, holder: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    mount = make_mount()
    (mount.mountpoint / "file").touch()
    process = holder(mount.mountpoint / "file")
    assert mount.command("unmount") == "InUse"
    (mount.mountpoint / "file").write_text("still served")
    process.communicate()
    assert mount.command("unmount") == {"ended": True}


def test_forced_unmount_fails_open_files(make_mount: MakeMount) -> None:
    mount = make_mount()
    (mount.mountpoint / "file").write_text("text")
    fd = os.open(mount.mountpoint / "file", os.O_RDWR)
    assert mount.command("unmount force") == {"ended": True}
    for act in (os.fsync, os.close):
        assert errno_of(act, fd) in {errno.ENOTCONN, errno.ECONNABORTED}
    assert names(mount.mountpoint) == []


@pytest.mark.parametrize("ending", ["end", "kill"])
def test_waiting_reader_is_answered_when_the_daemon_ends(make_mount: MakeMount, ending: str) -> None:
    mount = make_mount("shutdown_grace_s=0.5")
    (mount.backing / "blocked").write_bytes(b"x" * 4096)
    reader = subprocess.Popen(
        ["cat", str(mount.mountpoint / "blocked")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not mount.command("blocked"):
        time.sleep(0.01)
    if ending == "end":
        mount.stop()
        assert mount.process.returncode == 0
    else:
        mount.process.kill()
    output, errors = reader.communicate(timeout=10)
    assert reader.returncode != 0
    assert output == b""
    assert errors


def test_killed_reader_does_not_end_the_mount(make_mount: MakeMount) -> None:
    mount = make_mount()
    (mount.backing / "blocked").write_bytes(b"x" * 4096)
    killed = []
    for _ in range(20):
        readers = [subprocess.Popen(["cat", str(mount.mountpoint / "blocked")]) for _ in range(5)]
        for reader in readers:
            reader.send_signal(signal.SIGKILL)
        killed += readers
    mount.command("unblock")
    assert {reader.wait(timeout=10) for reader in killed} == {-signal.SIGKILL}
    (mount.mountpoint / "after").write_text("after")
    assert mount.command("bugs") == {}


def test_everything_is_released_in_the_end(make_mount: MakeMount) -> None:
    mount = make_mount()
    for number in range(300):
        (mount.mountpoint / f"{number}").write_text("x")
    assert len(names(mount.mountpoint)) == 300
    assert mount.command("nodes") == 301
    for number in range(300):
        (mount.mountpoint / f"{number}").unlink()
    deadline = time.monotonic() + 10
    while mount.command("nodes") != 1 or mount.command("open") != 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    descriptors = names(Path(f"/proc/{mount.process.pid}/fd"))
    assert len(descriptors) < 60


def wait_nodes_below(mount: PlainMount, count: int) -> None:
    deadline = time.monotonic() + 10
    while int(str(mount.command("nodes"))) >= count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_kernel_forgets_what_nobody_uses_when_there_are_too_many(make_mount: MakeMount) -> None:
    mount = make_mount("nodes_wanted_max=200")
    top = mount.mountpoint / "many"
    top.mkdir()
    (top / "open").write_text("open")
    (top / "below").mkdir()
    at = os.open(top / "below", os.O_RDONLY)
    with (top / "open").open("r+") as file:
        for number in range(800):
            (top / f"file{number}").touch()
            if number % 200 == 199:
                wait_nodes_below(mount, 200)
        assert file.read() == "open"
        assert (top / "open").stat().st_ino == os.fstat(file.fileno()).st_ino
        assert Path(f"/proc/self/fd/{file.fileno()}").readlink() == top / "open"
        assert os.fstat(at).st_ino == (top / "below").stat().st_ino
    os.close(at)
    assert len(names(top)) == 802
    assert mount.command("bugs") == {}
    assert "forgetting them failed" not in mount.stop()
