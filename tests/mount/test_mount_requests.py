"""What goes wrong, what waits and what is cached: one request does not harm another."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plain_comparison import as_user
from plain_mount import PlainMount, names

from vmfs_stub.core import errors
from vmfs_stub.mount.errno_table import errno_of

MakeMount = Callable[..., PlainMount]


def failure(function, *args: object) -> int:  # type: ignore[no-untyped-def]
    with pytest.raises(OSError) as caught:
        function(*args)
    assert caught.value.errno is not None
    return caught.value.errno


def test_programming_error_is_eio_and_the_mount_lives(mounted: PlainMount) -> None:
    top = mounted.mountpoint
    (top / "bug").write_text("text")
    for _ in range(3):
        assert failure((top / "bug").read_text) == errno.EIO
    assert mounted.command("bugs") == {"read": 3}
    mounted.command("plant mount.mkdir 0")
    assert failure((top / "new").mkdir) == errno.EIO
    (top / "new").mkdir()
    assert mounted.command("bugs") == {"read": 3, "mkdir": 1}
    log = mounted.log.read_text()
    assert "ZeroDivisionError: planted" in log
    assert "Traceback" in log
    assert (top / "bug").stat().st_size == 4


@pytest.mark.parametrize("kind", [errors.RecallTimeout, errors.CorruptFrame, errors.NoSpace, errors.ObjectMissing])
def test_failures_of_a_read_become_their_errno(mounted: PlainMount, kind: type[errors.VmfsStubError]) -> None:
    path = mounted.mountpoint / f"raise-{kind.__name__}"
    path.write_text("text")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    assert failure(os.preadv, fd, [mmap.mmap(-1, 4096)], 0) == errno_of(kind())
    os.close(fd)


@pytest.mark.parametrize(
    ("site", "act"),
    [
        ("mount.mkdir", lambda top: (top / "d").mkdir()),
        ("mount.create", lambda top: (top / "f").touch()),
        ("mount.symlink", lambda top: (top / "s").symlink_to("x")),
        ("mount.mknod", lambda top: os.mkfifo(top / "p")),
        ("mount.unlink", lambda top: (top / "old").unlink()),
        ("mount.rename", lambda top: (top / "old").rename(top / "new")),
        ("mount.rename", lambda top: (top / "old").rename(top / "other")),
        ("mount.link", lambda top: os.link(top / "old", top / "l")),
        ("mount.chmod", lambda top: (top / "old").chmod(0o600)),
        ("mount.chown", lambda top: os.chown(top / "old", 1, 1)),
        ("mount.setxattr", lambda top: os.setxattr(top / "old", "user.x", b"")),
        ("mount.statfs", os.statvfs),
    ],
)
def test_failed_file_call_changes_nothing(
    mounted: PlainMount, site: str, act: Callable[[Path], object], request: pytest.FixtureRequest
) -> None:
    top = mounted.mountpoint / request.node.name.replace("/", "-")
    top.mkdir()
    for name in ("old", "other"):
        (top / name).write_text(name)
    before = [(path.name, path.lstat()) for path in sorted(top.iterdir())]
    mounted.command(f"plant {site} {errno.EDQUOT}")
    assert failure(act, top) == errno.EDQUOT
    assert [(path.name, path.lstat()) for path in sorted(top.iterdir())] == before
    act(top)


def test_removal_of_a_file_s_name_is_announced(make_mount: MakeMount) -> None:
    mount = make_mount()
    top = mount.mountpoint
    for name in ("a", "b", "c", "d"):
        (top / name).touch()
    (top / "directory").mkdir()
    os.link(top / "a", top / "a2")
    assert mount.command("events") == []
    (top / "a2").unlink()
    (top / "directory").rmdir()
    assert mount.command("events") == ["removing a2", "removed nlink=1"]
    (top / "a").unlink()
    assert mount.command("events")[2:] == ["removing a", "removed nlink=0"]  # type: ignore[index]
    (top / "b").rename(top / "c")
    assert mount.command("events")[4:] == ["removing c", "removed nlink=0"]  # type: ignore[index]
    mount.command(f"plant mount.unlink {errno.EIO}")
    assert failure((top / "d").unlink) == errno.EIO
    assert mount.command("events")[6:] == ["removing d", "removed nlink=1"]  # type: ignore[index]


def test_open_is_attributed_to_its_caller(make_mount: MakeMount) -> None:
    mount = make_mount()
    path = mount.mountpoint / "file"
    path.write_text("x")
    path.chmod(0o666)
    as_user(path.read_text)
    process = subprocess.run(["cat", str(path)], check=True, capture_output=True)
    assert process.stdout == b"x"
    own, other, cat = mount.command("callers")  # type: ignore[misc]
    assert own[:3] == [os.getpid(), 0, str(Path("/proc/self/exe").readlink())]
    assert other[1] == 1000
    assert other[2] == own[2]
    assert Path(cat[2]).name in {"cat", "coreutils", "busybox"}
    assert own[3].startswith("/")


def test_placeholder_reports_its_own_blocks_and_mtime(make_mount: MakeMount) -> None:
    mount = make_mount()
    path = mount.mountpoint / "file"
    path.write_text("x")
    before = path.stat()
    mount.command(f"override {before.st_ino} 1 1234567890123456789")
    after = path.stat()
    assert (after.st_blocks, after.st_mtime_ns) == (1, 1234567890123456789)
    assert (after.st_size, after.st_ino, after.st_atime_ns) == (before.st_size, before.st_ino, before.st_atime_ns)


def test_open_and_unlinked_file_is_really_freed(make_mount: MakeMount) -> None:
    mount = make_mount()
    path = mount.mountpoint / "big"
    with path.open("w+b") as file:
        file.write(b"x" * (8 << 20))
        file.flush()
        path.unlink()
        assert os.fstat(file.fileno()).st_nlink == 0
        file.seek(0)
        assert len(file.read()) == 8 << 20
    until(lambda: mount.command("open") == 0 and mount.command("nodes") == 1)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def blocked_readers(mount: PlainMount, count: int) -> Iterator[list[threading.Thread]]:
    """Threads that wait for a read of blocks that are not there."""
    files = [mount.mountpoint / f"blocked{number}" for number in range(count)]
    for file in files:
        file.write_bytes(b"x" * 4096)

    def read(file: Path) -> None:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        with contextlib.suppress(OSError):
            os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
        with contextlib.suppress(OSError):
            os.close(fd)

    threads = [threading.Thread(target=read, args=(file,)) for file in files]
    try:
        for thread in threads:
            thread.start()
        until(lambda: mount.command("blocked") == count)
        yield threads
    finally:
        mount.command("unblock")
        for thread in threads:
            thread.join(timeout=20)
            assert not thread.is_alive()


def test_200_waiting_reads_do_not_slow_others(make_mount: MakeMount) -> None:
    mount = make_mount()
    with blocked_readers(mount, 200):
        started = time.monotonic()
        for number in range(50):
            path = mount.mountpoint / f"other{number}"
            path.write_bytes(b"y" * 5000)
            assert path.stat().st_size == 5000
            assert path.read_bytes() == b"y" * 5000
        assert len(names(mount.mountpoint)) == 250
        for _ in range(50):
            os.statvfs(mount.mountpoint)
        assert time.monotonic() - started < 3
        assert mount.command("blocked") == 200


def test_waiting_background_reads_do_not_stop_others(make_mount: MakeMount) -> None:
    """Asynchronous reads count against max_background, 12 by default: read-ahead of 60 files would exhaust it."""
    mount = make_mount()
    for number in range(60):
        (mount.backing / f"blocked{number}").write_bytes(b"x" * 65536)
    (mount.backing / "free").write_bytes(b"y" * 300_000)
    readers = [subprocess.Popen(["cat", str(mount.mountpoint / f"blocked{number}")], stdout=-1) for number in range(60)]
    try:
        until(lambda: int(mount.command("blocked")) >= 60)  # type: ignore[call-overload]
        assert (mount.mountpoint / "free").read_bytes() == b"y" * 300_000
    finally:
        mount.command("unblock")
        assert {len(reader.communicate(timeout=20)[0]) for reader in readers} == {65536}


def test_one_mebibyte_requests(make_mount: MakeMount) -> None:
    """Direct writes and reads of 1 MiB arrive whole, none is cut or lost by a buffer that is too small."""
    mount = make_mount()
    buffer = mmap.mmap(-1, 4 << 20)
    buffer[:] = os.urandom(1 << 20) * 4
    fd = os.open(mount.mountpoint / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    calls = (
        subprocess.Popen(
            [
                "strace",
                "-f",
                "-qq",
                "-e",
                "trace=pwrite64",
                "-o",
                str(mount.base / "calls"),
                "-p",
                str(mount.process.pid),
            ],
            stderr=subprocess.PIPE,
        )
        if has_strace()
        else None
    )
    if calls is not None:
        until(lambda: "TracerPid:\t0\n" not in Path(f"/proc/{mount.process.pid}/status").read_text())
    assert os.pwritev(fd, [buffer], 0) == 4 << 20
    if calls is not None:
        calls.terminate()
        calls.communicate()
        assert (mount.base / "calls").read_text().count(" = 1048576") == 4
    back = mmap.mmap(-1, 4 << 20)
    assert os.preadv(fd, [back], 0) == 4 << 20
    assert back[:] == buffer[:]
    os.close(fd)
    assert (mount.backing / "file").read_bytes() == buffer[:]


def has_strace() -> bool:
    return any((Path(directory) / "strace").exists() for directory in os.get_exec_path())


@pytest.mark.parametrize("size", [512, 4096, 65536])
def test_direct_io_and_page_cache_agree(mounted: PlainMount, size: int) -> None:
    path = mounted.mountpoint / f"direct{size}"
    block = mmap.mmap(-1, size)
    block[:] = os.urandom(size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    assert os.pwritev(fd, [block], 0) == size
    assert path.read_bytes() == block[:]
    with path.open("r+b") as file:
        file.write(b"changed")
    assert os.preadv(fd, [block], 0) == size
    assert block[:7] == b"changed"
    os.close(fd)


def test_mapped_file(mounted: PlainMount) -> None:
    path = mounted.mountpoint / "mapped"
    path.write_bytes(bytes(10_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 10_000) as mapped:
        mapped[5000:5003] = b"abc"
        mapped.flush()
    assert (mounted.backing / "mapped").read_bytes()[5000:5003] == b"abc"


def test_two_openers_see_each_other(mounted: PlainMount) -> None:
    path = mounted.mountpoint / "shared"
    with path.open("wb", buffering=0) as writer, path.open("rb", buffering=0) as reader:
        for number in range(20):
            writer.write(b"%03d" % number)
            assert reader.read() == b"%03d" % number


def test_directory_that_changes_while_it_is_read(mounted: PlainMount) -> None:
    """What is there all the time is shown exactly once; what is gone is skipped."""
    top = mounted.mountpoint / "changing"
    top.mkdir()
    stay = {f"stay-{number:04}" for number in range(700)}
    for name in stay | {f"go-{number:04}" for number in range(700)}:
        (top / name).touch()
    seen: list[str] = []
    with os.scandir(top) as entries:
        for at, entry in enumerate(entries):
            seen.append(entry.name)
            if at % 7 == 0 and at // 7 < 100:
                (top / f"go-{699 - at // 7:04}").unlink(missing_ok=True)
                (top / f"new-{at}").touch()
    assert len(seen) == len(set(seen))
    assert stay <= set(seen)
    assert set(names(top)) == set(os.listdir(mounted.backing / "changing"))  # noqa: PTH208


def test_rewinding_a_directory_shows_what_is_new(mounted: PlainMount) -> None:
    top = mounted.mountpoint / "rewound"
    top.mkdir()
    (top / "old").touch()
    fd = os.open(top, os.O_RDONLY)
    assert os.listdir(fd) == ["old"]  # noqa: PTH208
    (top / "new").touch()
    assert sorted(os.listdir(fd)) == ["new", "old"]  # noqa: PTH208
    os.close(fd)
    listed = subprocess.run(["ls", "-a", str(top)], capture_output=True, check=True, text=True).stdout
    assert listed.split() == [".", "..", "new", "old"]


def test_absent_names_are_remembered_until_made(mounted: PlainMount) -> None:
    path = mounted.mountpoint / "absent"
    for _ in range(3):
        assert not path.exists()
    path.touch()
    assert path.exists()
    path.unlink()
    assert not path.exists()
    path.mkdir()
    assert path.is_dir()


def test_absent_xattrs_are_remembered_until_set(mounted: PlainMount) -> None:
    path = mounted.mountpoint / "attributed"
    path.touch()
    for number in range(3):
        assert failure(os.getxattr, path, "user.a") == errno.ENODATA
        os.setxattr(path, "user.a", b"%d" % number)
        assert os.getxattr(path, "user.a") == b"%d" % number
        os.removexattr(path, "user.a")
    for number in range(70):
        os.setxattr(path, f"user.{number}", b"")
    assert len(os.listxattr(path)) == 70
    assert failure(os.getxattr, path, "user.a") == errno.ENODATA


def test_many_processes_at_once(mounted: PlainMount) -> None:
    """Names made, renamed and removed by several programs: nothing is lost, nothing unexpected fails."""
    top = mounted.mountpoint / "crowd"
    top.mkdir()
    code = (
        "import os, sys\n"
        "top, me = sys.argv[1:]\n"
        "for n in range(60):\n"
        "    a, b = f'{top}/{me}-{n}', f'{top}/{me}-{n}-done'\n"
        "    open(a, 'w').write(me); os.rename(a, b); os.link(b, a); os.unlink(b)\n"
        "    os.setxattr(a, 'user.x', b'1'); os.listdir(top); assert open(a).read() == me\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(top), str(number)]) for number in range(6)]
    assert [worker.wait(timeout=60) for worker in workers] == [0] * 6
    assert len(names(top)) == 360
    assert {path.stat().st_nlink for path in top.iterdir()} == {1}
    assert "Traceback" not in mounted.log.read_text().replace("ZeroDivisionError: planted", "").partition("crowd")[2]


def test_locks_of_two_programs_exclude_each_other(mounted: PlainMount) -> None:
    path = mounted.mountpoint / "locked"
    path.touch()
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, str(path)]
    assert subprocess.run(command, check=False).returncode == 0
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert subprocess.run(command, check=False, capture_output=True).returncode != 0
