"""What programs do in a directory, through the real daemon: times, links, names, mappings, space."""

from __future__ import annotations

import mmap
import os
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from places import Places
from plain_comparison import Scenario, acting_as, outcome, status
from plain_scenarios import SCENARIOS as PLAIN_SCENARIOS

from vmfs_stub.mount import syscalls

USER = 1000
TICK_S = 0.012
"""Longer than the clock of file times takes to move on."""
OLD_NS = (1_000_000_000_000_000_001, 1_000_000_000_000_000_002)
SPACE = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")
SCENARIOS: dict[str, Scenario] = dict(PLAIN_SCENARIOS)


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def times(path: Path) -> tuple[int, int]:
    st = path.lstat()
    return st.st_mtime_ns, st.st_ctime_ns


def plant_times(top: Path) -> None:
    """A tree in which everything was modified long ago."""
    for name in ("a", "b"):
        (top / name).mkdir()
        (top / name / "file").write_text("text")
        (top / name / "directory").mkdir()
        (top / name / "link").symlink_to("file")
    for path in (*top.rglob("*"), top):
        os.utime(path, ns=OLD_NS, follow_symlinks=False)


def write_into(path: Path, flags: int, content: bytes = b"x") -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    os.write(fd, content)
    os.close(fd)


def write_by_mapping(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0] = 65
        mapping.flush()


def exchange(top: Path, old: bytes, new: bytes) -> None:
    at = os.open(top, os.O_PATH)
    syscalls.rename(at, old, at, new, flags=syscalls.RENAME_EXCHANGE)
    os.close(at)


MOVING_TIMES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda top: None,
    "open": lambda top: write_into(top / "a/file", 0, b""),
    "write": lambda top: write_into(top / "a/file", 0),
    "append": lambda top: write_into(top / "a/file", os.O_APPEND),
    "mapping": lambda top: write_by_mapping(top / "a/file"),
    "cut at open": lambda top: write_into(top / "a/file", os.O_TRUNC, b""),
    "cut": lambda top: os.truncate(top / "a/file", 1),
    "truncate to the same size": lambda top: os.truncate(top / "a/file", 4),
    "chmod": lambda top: (top / "a/file").chmod(0o600),
    "chown": lambda top: os.chown(top / "a/file", 1, -1),
    "chown of a link": lambda top: os.lchown(top / "a/link", 1, -1),
    "chown to nobody": lambda top: os.chown(top / "a/file", -1, -1),
    "chown of a directory to nobody": lambda top: os.chown(top / "a/directory", -1, -1),
    "utime": lambda top: os.utime(top / "a/file"),
    "utime to what it is": lambda top: os.utime(top / "a/file", ns=OLD_NS),
    "link": lambda top: os.link(top / "a/file", top / "b/new"),
    "unlink": lambda top: (top / "a/file").unlink(),
    "unlink of a link": lambda top: (top / "a/link").unlink(),
    "rename": lambda top: (top / "a/file").rename(top / "a/new"),
    "rename over": lambda top: (top / "a/file").rename(top / "b/file"),
    "rename of a directory": lambda top: (top / "a/directory").rename(top / "b/new"),
    "exchange": lambda top: exchange(top, b"a/file", b"b/file"),
    "mkdir": lambda top: (top / "a/new").mkdir(),
    "rmdir": lambda top: (top / "a/directory").rmdir(),
    "create": lambda top: (top / "a/new").touch(),
    "mkfifo": lambda top: os.mkfifo(top / "a/new"),
    "symlink": lambda top: (top / "a/new").symlink_to("x"),
    "setxattr": lambda top: os.setxattr(top / "a/file", "user.x", b"1"),
    "failed rmdir": lambda top: outcome((top / "a").rmdir),
    "failed create": lambda top: outcome(os.open, top / "a/file", os.O_CREAT | os.O_EXCL),
}


def moved_times(act: Callable[[Path], object], top: Path) -> object:
    """Which of mtime and ctime an operation moves, of everything there is afterwards."""
    plant_times(top)
    time.sleep(TICK_S)
    before = {path.lstat().st_ino: times(path) for path in (top, *top.rglob("*"))}
    act(top)
    after = {path.relative_to(top): (path.lstat().st_ino, times(path)) for path in (top, *top.rglob("*"))}
    return {
        str(name): "new" if ino not in before else [one != other for one, other in zip(before[ino], now, strict=True)]
        for name, (ino, now) in sorted(after.items())
    }


@pytest.mark.parametrize("name", MOVING_TIMES)
def test_the_same_times_move(places: Places, name: str) -> None:
    mounted, plain = places.results(f"times of {name}", partial(moved_times, MOVING_TIMES[name]))
    assert mounted == plain


def read_by_mapping(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert mapping[0] == ord("t")


def read_directly(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as memory:
        os.preadv(fd, [memory], 0)
    os.close(fd)


@scenario
def access_times(top: Path) -> object:
    """What reading moves where atime is older than mtime, which is what `relatime` keeps up to date."""
    acts: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("file", Path.read_bytes),
        ("file", read_by_mapping),
        ("file", read_directly),
        ("file", lambda path: os.close(os.open(path, os.O_RDONLY))),
        ("file", Path.stat),
        ("directory", lambda path: list(path.iterdir())),
        ("directory", lambda path: os.access(path / "x", os.F_OK)),
        ("link", Path.readlink),
    )
    found: list[object] = []
    for number, (name, act) in enumerate(acts):
        path = top / f"{name}{number}"
        if name == "file":
            path.write_text("text")
        elif name == "directory":
            path.mkdir()
        else:
            path.symlink_to("file0")
        os.utime(path, ns=OLD_NS, follow_symlinks=False)
        os.posix_fadvise(fd := os.open(top / "file0", os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        act(path)
        st = path.lstat()
        found.append((name, number, st.st_atime_ns != OLD_NS[0], st.st_mtime_ns == OLD_NS[1]))
    return found


@scenario
def chosen_times(top: Path) -> object:
    """Nanoseconds, before 1970, far beyond 2038, only one of both, and what one may not set."""
    path, link, directory = top / "file", top / "link", top / "directory"
    path.write_text("x")
    link.symlink_to("file")
    directory.mkdir()
    found: list[object] = []
    for ns in (
        (1, 2),
        (-1, -1_500_000_001),
        (-2_147_483_648 * 10**9, 4_294_967_296 * 10**9 + 7),
        (15_032_385_535 * 10**9, 15_032_385_536 * 10**9),
        (10**12 * 10**9, -(10**12) * 10**9),
        (999_999_999, 1_999_999_999),
    ):
        for each in (path, link, directory):
            got = outcome(os.utime, each, ns=ns, follow_symlinks=False)
            st = each.lstat()
            found.append((str(each.name), ns, got, st.st_atime_ns, st.st_mtime_ns))
    fd = os.open(path, os.O_PATH)
    for at, mt in ((5, None), (None, 6), (None, None)):
        syscalls.change_times(fd, atime_ns=at, mtime_ns=mt)
        found.append((path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.close(fd)
    os.utime(path)
    found.append([abs(each - time.time()) < 30 for each in (path.stat().st_atime, path.stat().st_mtime)])
    path.chmod(0o666)
    with acting_as(USER):
        found += [outcome(os.utime, path, ns=(5, 6)), outcome(os.utime, path)]
    path.chmod(0o644)
    with acting_as(USER):
        found += [outcome(os.utime, path), outcome(os.utime, directory)]
    return found


@scenario
def link_counts(top: Path) -> object:
    """Of files by many names, of directories with directories, and of what is open without any name."""
    path = top / "file"
    path.write_text("x")
    fd = os.open(path, os.O_RDWR)
    found: list[object] = []
    for number in range(40):
        os.link(path, top / f"link{number}")
        found.append((status(fd)[1], status(path)[1]))
    for number in range(40):
        (top / f"link{number}").unlink()
        found.append(status(fd)[1])
    os.link(path, top / "other")
    path.unlink()
    found.append(status(fd)[1])
    (top / "empty").touch()
    (top / "empty").rename(top / "other")
    found.append(status(fd))
    found += [os.pread(fd, 9, 0), os.pwrite(fd, b"yz", 3), os.ftruncate(fd, 4), os.pread(fd, 9, 0), status(fd)]
    found += [outcome(os.fsync, fd), outcome(os.fchmod, fd, 0o600), status(fd)]
    found.append(outcome(os.link, f"/proc/self/fd/{fd}", top / "again", follow_symlinks=True))
    os.close(fd)
    for number in range(10):
        (top / f"directory{number}").mkdir()
        (top / f"directory{number}/below").mkdir()
        found.append((status(top)[1], status(top / f"directory{number}")[1]))
    (top / "directory0/below").rename(top / "directory1/moved")
    found += [status(top / "directory0")[1], status(top / "directory1")[1]]
    held = os.open(top / "directory0", os.O_RDONLY)
    (top / "directory0").rmdir()
    found += [status(held)[1], outcome(os.listdir, held), outcome(os.mkdir, "x", dir_fd=held)]
    os.close(held)
    return found


@scenario
def any_names(top: Path) -> object:
    """Every byte but two, 255 of them, and what is no text in any encoding."""
    raw = os.fsencode(top)
    names = [bytes([number]) * 255 for number in range(1, 256) if number not in b"/"]
    names += [b"\xff\xfe\x80", b"a\nb", b" ", b"...", b"-rf", b"\\", b"caf\xe9", "café".encode(), "cafe\u0301".encode()]
    names.remove(b"." * 255)
    for name in names:
        with open(raw + b"/" + name, "wb") as file:  # noqa: PTH123 - a Path holds text
            file.write(name[:1])
    listed = sorted(os.listdir(raw))  # noqa: PTH208
    contents = []
    for name in listed:
        with open(raw + b"/" + name, "rb") as file:  # noqa: PTH123
            contents.append(file.read())
    os.rename(raw + b"/" + b"\xff" * 255, raw + b"/" + b"\xfe\xff" * 127)  # noqa: PTH104
    return listed, contents, sorted(os.listdir(raw)), outcome(os.stat, raw + b"/" + b"\xff" * 256)  # noqa: PTH208


@scenario
def shared_mappings(top: Path) -> object:
    """What one writes into a mapping, others see: by mapping, by reading, and by O_DIRECT after msync."""
    path = top / "file"
    path.write_bytes(b"x" * 20_000)
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with path.open("r+b") as one, path.open("r+b") as two:
        first, second = mmap.mmap(one.fileno(), 0), mmap.mmap(two.fileno(), 0)
        first[5000:5005] = b"first"
        found: list[object] = [second[4990:5010], os.pread(two.fileno(), 20, 4990)]
        os.pwrite(two.fileno(), b"second", 9000)
        found.append(first[8990:9010])
        first.flush()
        with mmap.mmap(-1, 24_576) as memory:
            count = os.preadv(direct, [memory], 0)
            found += [count, memory[:count]]
            memory[:4096] = b"d" * 4096
            fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
            found.append(os.pwritev(fd, [memoryview(memory)[:4096]], 4096))
            os.close(fd)
        found += [first[4090:4100], second[8186:8196], path.read_bytes()]
        os.ftruncate(one.fileno(), 10_000)
        os.ftruncate(one.fileno(), 20_000)
        found.append(second[9990:10_010])
        first.close()
        second.close()
    os.close(direct)
    private = path.open("rb")
    with private, mmap.mmap(private.fileno(), 0, access=mmap.ACCESS_COPY) as copy:
        copy[0:3] = b"not"
        found.append(path.read_bytes()[:3])
    return found


@scenario
def sparse_files(top: Path) -> object:
    """Holes take no room, read as zeros, and vanish where they are written."""
    path = top / "file"
    found: list[object] = []
    with path.open("w+b") as file:
        fd = file.fileno()
        # Four blocks: ext4 notes a fifth that lies apart in a block of its own, which st_blocks would count or not.
        for offset in (1 << 20, (1 << 33) + 5, (1 << 40) - 3):
            os.pwrite(fd, b"data", offset)
            os.fsync(fd)
            found.append((os.fstat(fd).st_size, os.fstat(fd).st_blocks))
        os.ftruncate(fd, 1 << 41)
        found.append((os.fstat(fd).st_size, os.fstat(fd).st_blocks, os.pread(fd, 30, (1 << 40) - 10)))
        os.ftruncate(fd, (1 << 20) + 2)
        os.ftruncate(fd, 1 << 21)
        found.append((os.pread(fd, 10, (1 << 20) - 3), outcome(os.pwrite, fd, b"x", (1 << 63) - 1)))
        found += [outcome(os.ftruncate, fd, 1 << 45), outcome(os.pread, fd, 1, 1 << 45), os.fstat(fd).st_size]
    return found


@scenario
def open_modes(top: Path) -> object:
    """What a descriptor may do depends on how it was opened."""
    path = top / "file"
    path.write_text("text")
    found: list[object] = []
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_PATH):
        fd = os.open(path, flags)
        found += [
            outcome(os.read, fd, 1),
            outcome(os.write, fd, b"w"),
            outcome(os.pwrite, fd, b"p", 1),
            outcome(os.ftruncate, fd, 3),
            outcome(os.fsync, fd),
            outcome(os.fchmod, fd, 0o600),
            outcome(os.lseek, fd, 1, os.SEEK_END),
            outcome(os.lseek, fd, -1, os.SEEK_SET),
            path.read_bytes(),
        ]
        os.close(fd)
    fd = os.open(top, os.O_RDONLY)
    found += [outcome(os.read, fd, 1), outcome(os.ftruncate, fd, 0), outcome(os.fsync, fd), outcome(os.fdatasync, fd)]
    os.close(fd)
    return found


@scenario
def owners_and_groups(top: Path) -> object:
    """Who may give away what, and which bits go by it."""
    found: list[object] = []
    for mode in (0o6755, 0o2745, 0o4644, 0o755):
        for uid, gid in ((-1, USER), (USER, -1), (-1, -1), (USER, 4321), (0, -1), (1234, 1234)):
            for caller in (0, USER, USER + 1):
                if (uid, gid, caller) == (-1, -1, USER + 1) and mode != 0o755:
                    continue  # docs/SEMANTICS.md: this one succeeds and does nothing
                path = top / f"{mode:o} {uid} {gid} {caller}"
                path.touch()
                os.chown(path, USER, 4321)
                path.chmod(mode)
                with acting_as(caller):
                    got = outcome(os.chown, path, uid, gid)
                found.append((path.name, got, status(path)))
    return found


@scenario
def set_id_bits_of_modes(top: Path) -> object:
    """chmod by root, by the owner in and outside the group, and on directories."""
    found: list[object] = []
    for kind in ("file", "directory"):
        for group in (USER, 4321):
            for caller in (0, USER, USER + 1):
                path = top / f"{kind} {group} {caller}"
                path.mkdir() if kind == "directory" else path.touch()
                os.chown(path, USER, group)
                for mode in (0o6777, 0o2755, 0o1777, 0o4700, 0o7000):
                    with acting_as(caller):
                        got = outcome(path.chmod, mode)
                    found.append((path.name, got, stat.filemode(path.stat().st_mode)))
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_as_in_a_plain_directory(places: Places, name: str) -> None:
    mounted, plain = places.results(name, SCENARIOS[name])
    assert mounted == plain
    places.assert_no_bugs()


def test_statfs_tells_of_the_backing_filesystem(places: Places) -> None:
    def told(path: Path) -> tuple[int, ...]:
        found = os.statvfs(path)
        return tuple(getattr(found, name) for name in SPACE)

    for _ in range(1000):  # others write to that filesystem too: between two equal answers lies a moment of quiet
        before, mounted, after = told(places.plain), told(places.mounted), told(places.plain)
        if before == after:
            assert mounted == before
            return
    pytest.fail("the filesystem was never quiet")
