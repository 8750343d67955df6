"""What a program does in a directory, and all that it sees by it, for comparing one directory with another."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import time
from functools import partial
from pathlib import Path

from plain_comparison import Scenario, as_user, outcome, status

from vmfs_stub.mount import syscalls

SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def files(top: Path) -> object:
    path = top / "file"
    path.write_bytes(b"hello")
    with path.open("r+b") as file:
        file.seek(10)
        file.write(b"world")
        file.flush()
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    with path.open("ab") as file:
        file.write(b"!")
    return path.read_bytes(), status(path), outcome(os.open, path, os.O_CREAT | os.O_EXCL)


@scenario
def truncation(top: Path) -> object:
    path = top / "file"
    path.write_bytes(b"x" * 10000)
    os.truncate(path, 5000)
    sizes = [path.stat().st_size]
    with path.open("r+b") as file:
        os.ftruncate(file.fileno(), 7000)
        sizes.append(path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(b"short")
    return sizes, data, path.read_bytes(), path.stat().st_size


@scenario
def modes(top: Path) -> object:
    path = top / "file"
    found = []
    for mode in (0o600, 0o4755, 0o2770, 0o000, 0o1644):
        fd = os.open(path, os.O_CREAT | os.O_WRONLY, mode)
        found.append((status(path), outcome(os.write, fd, b"x")))
        os.close(fd)
        path.chmod(0o640)
        found.append(status(path))
        path.unlink()
    return found


@scenario
def umasks(top: Path) -> object:
    found = []
    before = os.umask(0o077)
    try:
        for umask in (0o000, 0o022, 0o027, 0o077):
            os.umask(umask)
            for at, make in enumerate((os.mkdir, os.mknod)):
                make(top / f"{umask:o}-{at}", 0o666)
                found.append(status(top / f"{umask:o}-{at}"))
    finally:
        os.umask(before)
    return found


@scenario
def owners(top: Path) -> object:
    path, link = top / "file", top / "link"
    path.touch()
    path.chmod(0o6755)
    link.symlink_to("file")
    os.chown(path, 12, 34)
    os.chown(link, 56, 78, follow_symlinks=False)
    os.chown(path, -1, 99)
    return status(path), status(link)


@scenario
def times(top: Path) -> object:
    path, link = top / "file", top / "link"
    path.touch()
    link.symlink_to("file")
    os.utime(path, ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    os.utime(link, ns=(5, 1_000_000_006), follow_symlinks=False)
    os.utime(top, ns=(7_000_000_001, 8_000_000_002))
    found = [(st.st_atime_ns, st.st_mtime_ns) for st in (path.stat(), link.lstat(), top.stat())]
    os.utime(path)
    return found, abs(path.stat().st_mtime - time.time()) < 60


@scenario
def directories(top: Path) -> object:
    (top / "a").mkdir(0o750)
    (top / "a/b").mkdir()
    (top / "a/file").touch()
    found = [status(top), status(top / "a"), outcome(os.rmdir, top / "a"), outcome(os.mkdir, top / "a")]
    (top / "a/b").rmdir()
    (top / "a/file").unlink()
    found += [outcome(os.rmdir, top / "a"), outcome(os.rmdir, top / "a"), status(top)]
    return found


@scenario
def wrong_kinds(top: Path) -> object:
    (top / "directory").mkdir()
    (top / "file").touch()
    return [
        outcome(os.unlink, top / "directory"),
        outcome(os.rmdir, top / "file"),
        outcome(os.listdir, top / "file"),
        outcome(os.stat, top / "file/below"),
        outcome(os.open, top / "directory", os.O_WRONLY),
        outcome(os.readlink, top / "file"),
        outcome(os.stat, top / ("n" * 256)),
        outcome(os.mkdir, top / ("n" * 256)),
        outcome(os.stat, top / "absent"),
        outcome(os.rename, top / "directory", top / "file"),
        outcome(os.rename, top / "file", top / "directory"),
        outcome(os.rename, top / "directory", top / "directory/below"),
        outcome(os.link, top / "directory", top / "other"),
    ]


@scenario
def renames(top: Path) -> object:
    (top / "a").write_text("a")
    (top / "b").write_text("b")
    (top / "d").mkdir()
    (top / "e").mkdir()
    (top / "e/f").touch()
    at = os.open(top, os.O_PATH)

    def rename(old: bytes, new: bytes, flags: int) -> object:
        return outcome(syscalls.rename, at, old, at, new, flags=flags)

    def texts() -> list[str]:
        return sorted(f"{path.name}={path.read_text() if path.is_file() else ''}" for path in top.iterdir())

    found: list[object] = []
    for old, new, flags in (
        (b"a", b"b", syscalls.RENAME_NOREPLACE),
        (b"a", b"b", syscalls.RENAME_EXCHANGE),
        (b"a", b"d", syscalls.RENAME_EXCHANGE),
        (b"a", b"c", syscalls.RENAME_NOREPLACE),
        (b"b", b"c", 0),
        (b"c", b"c", 0),
        (b"c", b"absent", syscalls.RENAME_EXCHANGE),
        (b"absent", b"c", 0),
        (b"c", b"d/g", 0),
        (b"c", b"e/g", 0),
        (b"d", b"e", 0),
    ):
        found.append(rename(old, new, flags))
        found.append(texts())
    os.close(at)
    return found


@scenario
def hard_links(top: Path) -> object:
    (top / "a").write_text("a")
    os.link(top / "a", top / "b")
    (top / "s").symlink_to("nowhere")
    os.link(top / "s", top / "t", follow_symlinks=False)
    found = [status(top / "a"), (top / "a").samefile(top / "b"), status(top / "t"), str((top / "t").readlink())]
    (top / "a").unlink()
    found += [status(top / "b"), (top / "b").read_text(), outcome(os.link, top / "b", top / "t")]
    os.link(top / "b", top / "c")
    (top / "b").rename(top / "c")
    return found, sorted(path.name for path in top.iterdir())


@scenario
def symbolic_links(top: Path) -> object:
    (top / "file").write_text("text")
    found: list[object] = []
    for name, target in (("a", "file"), ("b", "absent"), ("c", "../" * 3 + "x"), ("d", "/"), ("e", "n" * 4000)):
        (top / name).symlink_to(target)
        found += [str((top / name).readlink()), status(top / name)]
    return found, (top / "a").read_text(), outcome(os.stat, top / "b"), outcome(os.chmod, top / "b", 0o600)


@scenario
def open_and_unlinked(top: Path) -> object:
    path = top / "file"
    with path.open("w+b") as file:
        file.write(b"before")
        file.flush()
        path.unlink()
        file.write(b" after")
        file.flush()
        file.seek(0)
        return file.read(), status(file.fileno()), path.exists()


@scenario
def replaced_while_open(top: Path) -> object:
    (top / "a").write_bytes(b"old")
    (top / "b").write_bytes(b"new")
    with (top / "a").open("rb") as file:
        (top / "b").rename(top / "a")
        return file.read(), (top / "a").read_bytes(), status(file.fileno())


@scenario
def special_files(top: Path) -> object:
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as sock:
        at = os.open(top, os.O_PATH)
        sock.bind(f"/proc/self/fd/{at}/s")
        os.close(at)
        found = sorted((path.name, status(path)) for path in top.iterdir())
        sock.listen()
        with socket.socket(socket.AF_UNIX) as other:
            at = os.open(top, os.O_PATH)
            other.connect(f"/proc/self/fd/{at}/s")
            os.close(at)
    return found


@scenario
def xattrs(top: Path) -> object:
    path, link = top / "file", top / "link"
    path.touch()
    link.symlink_to("file")
    found: list[object] = [os.listxattr(path), outcome(os.getxattr, path, "user.a")]
    for name, value, flags in (
        ("user.a", b"1", os.XATTR_REPLACE),
        ("user.a", b"1", os.XATTR_CREATE),
        ("user.a", b"2", os.XATTR_CREATE),
        ("user.a", b"", os.XATTR_REPLACE),
        ("trusted.b", b"x" * 3000, 0),
        ("security.c", b"\0\xff", 0),
        ("nonsense.d", b"", 0),
        ("user.e", b"x" * 70000, 0),
    ):
        found.append(outcome(os.setxattr, path, name, value, flags))
        found.append([(each, os.getxattr(path, each)) for each in sorted(os.listxattr(path))])
    found += [
        outcome(os.removexattr, path, "user.a"),
        outcome(os.removexattr, path, "user.a"),
        outcome(os.getxattr, path, "user.a"),
        outcome(os.setxattr, link, "user.a", b"", follow_symlinks=False),
        outcome(os.setxattr, link, "trusted.a", b"1", follow_symlinks=False),
        outcome(os.getxattr, link, "trusted.a", follow_symlinks=False),
        outcome(os.getxattr, path, "trusted.a"),
    ]
    return found


@scenario
def acls(top: Path) -> object:
    """A default ACL is inherited and replaces the umask; chmod changes the mask; an ACL grants and denies."""
    ids = ctypes.c_uint32(-1).value
    acl = b"\x02\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, bits, who in ((1, 7, ids), (2, 6, 1234), (4, 0, ids), (16, 6, ids), (32, 0, ids))
    )
    before = os.umask(0o077)
    try:
        (top / "file").write_text("text")
        os.setxattr(top / "file", "system.posix_acl_access", acl)
        (top / "directory").mkdir(0o755)
        os.setxattr(top / "directory", "system.posix_acl_default", acl)
        (top / "directory").chmod(0o777)
        (top / "directory/file").touch(0o664)
        (top / "directory/below").mkdir(0o771)
        os.mknod(top / "directory/node", 0o4755)
    finally:
        os.umask(before)
    paths = ("file", "directory", "directory/file", "directory/below", "directory/node")
    names = ("system.posix_acl_access", "system.posix_acl_default")
    found: list[object] = [
        (status(top / path), [outcome(os.getxattr, top / path, name) for name in names]) for path in paths
    ]
    for uid, gid in ((1234, 1000), (1000, 0), (1000, 1000)):
        found.append(as_user(lambda: outcome((top / "file").read_text), uid=uid, gid=gid))
        found.append(as_user(lambda: outcome((top / "file").write_text, "text"), uid=uid, gid=gid))
    (top / "file").chmod(0o600)
    found += [os.getxattr(top / "file", "system.posix_acl_access"), status(top / "file")]
    found.append(as_user(lambda: outcome((top / "file").read_text), uid=1234))
    os.removexattr(top / "file", "system.posix_acl_access")
    found.append(outcome(os.getxattr, top / "file", "system.posix_acl_access"))
    return found


@scenario
def inherited_group(top: Path) -> object:
    (top / "setgid").mkdir()
    os.chown(top / "setgid", 0, 4321)
    (top / "setgid").chmod(0o2777)

    def make() -> None:
        os.umask(0o022)
        (top / "setgid/directory").mkdir()
        (top / "setgid/file").touch()
        os.mkfifo(top / "setgid/fifo", 0o2770)
        os.close(os.open(top / "setgid/program", os.O_CREAT | os.O_WRONLY, 0o2775))
        (top / "setgid/link").symlink_to("file")

    as_user(make)
    return sorted((path.name, status(path)) for path in (top / "setgid").iterdir())


@scenario
def set_id_bits(top: Path) -> object:
    """Writing, truncating and giving away take set-id bits, unless root does the first two."""
    found: list[object] = []
    path = top / "file"
    path.write_bytes(b"x" * 100)

    def write() -> None:
        with path.open("r+b") as file:
            file.write(b"y")

    for mode in (0o6777, 0o2766, 0o4766):
        truncate = partial(os.truncate, path, 60)
        for act in (write, truncate, partial(as_user, write), partial(as_user, truncate)):
            path.chmod(mode)
            act()
            found.append(oct(path.stat().st_mode))
    path.chmod(0o6777)
    os.chown(path, 1, 1)
    found.append(status(path))
    os.setxattr(path, "security.capability", bytes.fromhex("0100000200000000000000000000000000000000"))
    write()
    found.append(outcome(os.getxattr, path, "security.capability"))
    return found


@scenario
def permissions(top: Path) -> object:
    """Another user and a member of the group, against modes of files and directories."""
    found: list[object] = []
    for mode in (0o600, 0o640, 0o644, 0o660, 0o066, 0o000):
        path = top / f"{mode:o}"
        path.write_text("text")
        os.chown(path, 0, 2000)
        path.chmod(mode)
        for groups in ((), (2000,)):
            found.append((mode, groups, as_user(partial(outcome, path.read_text), groups=groups)))
            found.append(as_user(partial(outcome, path.write_text, "text"), groups=groups))
            found.append([as_user(partial(os.access, path, kind), groups=groups) for kind in (1, 2, 4)])
    (top / "closed").mkdir(0o700)
    (top / "closed/file").touch()
    (top / "sticky").mkdir()
    (top / "sticky").chmod(0o1777)
    (top / "sticky/file").touch()
    found += [
        as_user(partial(outcome, act, path))
        for path in (top / "closed/file", top / "sticky/file", top / "600", top / "sticky")
        for act in (os.unlink, status, os.rmdir, os.utime, partial(os.chmod, mode=0o777))
    ]
    found.append(as_user(lambda: outcome(os.mkdir, top / "new")))
    found.append(as_user(lambda: outcome(os.mkdir, top / "sticky/new", 0o777)))
    found.append(as_user(lambda: outcome(os.chown, top / "sticky/new", 1001, -1)))
    found.append(as_user(lambda: outcome(os.setxattr, top / "sticky/new", "trusted.x", b"")))
    found.append(status(top / "sticky/new"))
    return found


@scenario
def big_reads_and_writes(top: Path) -> object:
    path = top / "file"
    data = os.urandom(1 << 20) * 3
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    written = [os.pwrite(fd, data, 12345), os.pwritev(fd, [data[:5], data[5:4096]], 1)]
    found = os.pread(fd, len(data), 12345) == data, os.pread(fd, 100, len(data) + 12345 - 7) == data[-7:]
    os.close(fd)
    return written, found, path.stat().st_size, outcome(os.statvfs, path) != 0


@scenario
def holes(top: Path) -> object:
    path = top / "file"
    with path.open("wb") as file:
        file.seek(1 << 40)
        file.write(b"end")
    with path.open("rb") as file:
        return file.read(10), file.seek(1 << 40), file.read(), path.stat().st_size
