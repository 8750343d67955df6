"""The parts of the mount that need none: tables, bytes on the wire, names."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio

from vmfs_stub.core import errors
from vmfs_stub.core.names import TOP_MODE_XATTR
from vmfs_stub.mount import handshake, mountpoint, serving, syscalls
from vmfs_stub.mount.errno_table import ERRNO_BY_TYPE, data_errno, errno_of
from vmfs_stub.mount.fuse import Faults, FuseOperations
from vmfs_stub.mount.inodes import read_top_mode
from vmfs_stub.mount.nodes import ROOT, NodeTable
from vmfs_stub.mount.private import check_component, is_private_xattr
from vmfs_stub.mount.settings import MountSettings


def leaves(kind: type[errors.VmfsStubError]) -> Iterator[type[errors.VmfsStubError]]:
    below = kind.__subclasses__()
    if not below:
        yield kind
    for each in below:
        yield from leaves(each)


@pytest.mark.parametrize("leaf", [each for each in leaves(errors.VmfsStubError) if each.__module__ == errors.__name__])
def test_every_failure_has_an_errno(leaf: type[errors.VmfsStubError]) -> None:
    assert errno_of(leaf("planted")) in errno.errorcode


def test_a_failure_without_an_errno_is_noticed() -> None:
    class Unknown(errors.VmfsStubError):
        pass

    assert errno_of(Unknown()) is None
    del Unknown
    assert errors.VmfsStubError not in ERRNO_BY_TYPE


def test_absent_data_is_never_reported_as_not_found() -> None:
    for kind in (errors.IntegrityError, errors.StoreError, errors.RecallError, errors.UnknownFormat):
        assert {errno_of(leaf("")) for leaf in leaves(kind)} == {errno.EIO}
    assert data_errno(errno.ENOENT) == errno.EIO
    assert data_errno(errno.ENOSPC) == errno.ENOSPC


def test_a_failed_recall_is_not_logged_for_each_read(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    for failure in (errors.RecallTimeout("x"), errors.StoreUnavailable("x"), errors.CorruptFrame("x")):
        assert faults.answer("read", failure, is_data=True).errno == errno.EIO
    assert caplog.records == []
    assert faults.errors["read", errno.EIO] == 3
    faults.answer("read", errors.MapFrozen("planted"), is_data=True)
    assert [record.getMessage() for record in caplog.records] == ["read failed: planted"]


def test_cause_of_a_primary_failure_is_told_where_it_helps() -> None:
    def failed(code: int) -> errors.PrimaryIOError:
        failure = errors.PrimaryIOError("")
        failure.__cause__ = OSError(code, "")
        return failure

    assert errno_of(failed(errno.EDQUOT)) == errno.EDQUOT
    assert errno_of(failed(errno.ENOENT)) == errno.EIO
    assert errno_of(errors.PrimaryIOError("")) == errno.EIO


def test_errno_of_others() -> None:
    assert errno_of(OSError(errno.EXDEV, "")) == errno.EXDEV
    assert errno_of(OSError("no number")) == errno.EIO
    assert errno_of(ZeroDivisionError()) is None
    assert errno_of(ExceptionGroup("", [errors.NoSpace(), OSError(errno.ENOSPC, "")])) == errno.ENOSPC
    assert errno_of(ExceptionGroup("", [errors.NoSpace(), errors.InUse()])) is None
    assert errno_of(ExceptionGroup("", [errors.NoSpace(), KeyError()])) is None


def init_request(*, minor: int = 41, flags: int = (1 << 64) - 1, opcode: int = 26, major: int = 7) -> bytes:
    header = struct.pack("=IIQQIIII", 104, opcode, 77, 0, 0, 0, 0, 0)
    return header + struct.pack("=IIIII44x", major, minor, 131072, flags & 0xFFFFFFFF, flags >> 32)


def test_init_is_answered_with_our_limits() -> None:
    settings = MountSettings(max_background=1024, max_write_bytes=1 << 20)
    answer = handshake.answer_init(handshake.parse_init(init_request()), settings)
    length, error, unique = struct.unpack_from("=IiQ", answer)
    assert (length, error, unique) == (len(answer), 0, 77)
    assert len(answer) == 16 + 64
    major, minor, readahead, flags, background, threshold, write, gran, pages, _map, flags2 = struct.unpack_from(
        "=IIIIHHIIHHI", answer, 16
    )
    assert (major, minor, readahead) == (7, 38, 131072)
    assert (background, threshold, write, gran, pages) == (1024, 768, 1 << 20, 1, 256)
    flags |= flags2 << 32
    assert flags == handshake.WANTED
    for unwanted in (1 << 3, 1 << 4, 1 << 12, 1 << 14, 1 << 16, 1 << 1, 1 << 10):
        assert not flags & unwanted


def test_init_asks_for_nothing_that_is_not_offered() -> None:
    offered = sum(handshake.REQUIRED.values())
    answer = handshake.answer_init(handshake.parse_init(init_request(flags=offered)), MountSettings())
    assert struct.unpack_from("=I", answer, 16 + 12) == (offered,)


@pytest.mark.parametrize(
    "request_bytes",
    [
        init_request(minor=30),
        init_request(major=8),
        init_request(opcode=1),
        init_request()[:40],
        b"",
        *(init_request(flags=~bit & ((1 << 64) - 1)) for bit in handshake.REQUIRED.values()),
    ],
)
def test_init_of_an_old_kernel_is_refused(request_bytes: bytes) -> None:
    with pytest.raises(errors.Unsupported):
        handshake.parse_init(request_bytes)


def test_more_than_libfuse_can_read_is_not_promised() -> None:
    answer = handshake.answer_init(handshake.parse_init(init_request()), MountSettings(max_write_bytes=8 << 20))
    assert struct.unpack_from("=I", answer, 16 + 20) == (1 << 20,)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"../x", b"a\0b"])
def test_what_is_not_one_name_is_refused(name: bytes) -> None:
    with pytest.raises(OSError) as caught:
        check_component(name)
    assert caught.value.errno == errno.EINVAL


def test_dots_within_a_name_are_fine() -> None:
    for name in (b"...", b".a", b"a..", b"\xff", b"a b"):
        check_component(name)


def test_private_xattrs() -> None:
    for name in (b"trusted.vmfs-stub.placeholder", b"user.vmfs-stub.x", b"user.vmfs-stub", b"security.x.vmfs-stub.y"):
        assert is_private_xattr(name)
    for name in (b"user.vmfs-stubborn", b"trusted.overlay.opaque", b"vmfs-stub.x", b"system.posix_acl_access"):
        assert not is_private_xattr(name)


def test_mount_list_is_read_with_its_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        b"65 27 0:41 / /srv/two\\040words rw,nosuid - fuse.vmfs-stub my\\040images rw,user_id=0\n"
        b"66 27 0:42 / /srv/two rw shared:1 master:2 - ext4 /dev/vda rw\n"
        b"67 65 0:43 / /srv/two\\040words rw - tmpfs none rw\n"
    )
    monkeypatch.setattr(Path, "read_bytes", lambda _self: lines)
    assert mountpoint.mounts_at(Path("/srv/two words")) == [
        mountpoint.Mounted(65, Path("/srv/two words"), "fuse.vmfs-stub", "my images", 41),
        mountpoint.Mounted(67, Path("/srv/two words"), "tmpfs", "none", 43),
    ]
    assert mountpoint.mounts_at(Path("/srv")) == []


@pytest.fixture
def table(tmp_path: Path) -> Iterator[NodeTable]:
    table = NodeTable(os.open(tmp_path, os.O_PATH))
    yield table
    table.close()


def test_node_lives_until_its_last_lookup_is_forgotten(table: NodeTable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def enter() -> int:
        fd = syscalls.open_path(table[ROOT].fd, b"file")
        node = table.enter(fd, os.fstat(fd))
        node.lookups += 1
        return node.ino

    ino = enter()
    assert enter() == ino
    assert len(table) == 2
    assert table.forget(ino, 1) is None
    fd = table.forget(ino, 1)
    assert fd is not None
    os.close(fd)
    with pytest.raises(OSError) as caught:
        table[ino]
    assert caught.value.errno == errno.ESTALE
    assert table.forget(ino, 1) is None
    assert table.forget(ROOT, 1) is None


def test_names_are_opened_without_following(table: NodeTable, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/up").symlink_to("..")
    fd = syscalls.open_path(table[ROOT].fd, b"link")
    assert os.readlink(b"", dir_fd=fd) == b"/etc/passwd"
    os.close(fd)
    for name, code in (
        (b"..", errno.EXDEV),
        (b"../x", errno.EXDEV),
        (b"/etc/passwd", errno.EXDEV),
        (b"directory/up/../..", errno.EXDEV),
        (b"link/x", errno.EXDEV),
        (b"absent", errno.ENOENT),
    ):
        for function in (syscalls.open_path, syscalls.open_path_cached):
            with pytest.raises(OSError) as caught:
                function(table[ROOT].fd, name)
            assert caught.value.errno in {code, errno.EAGAIN}


def test_times_can_be_set_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.utime(path, ns=(1, 2))
    fd = os.open(path, os.O_PATH)
    syscalls.change_times(fd, atime_ns=None, mtime_ns=3_000_000_004)
    syscalls.change_times(fd, atime_ns=-1, mtime_ns=None)
    os.close(fd)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (-1, 3_000_000_004)


async def test_a_request_that_is_taken_back_does_not_end_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [BlockingIOError(errno.EAGAIN, ""), BlockingIOError(errno.EAGAIN, ""), None]

    async def session_loop(*_args: object) -> None:
        await trio.lowlevel.checkpoint()
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(pyfuse3, "_session_loop", session_loop)
    serving._survive_vanished_requests()
    serving._survive_vanished_requests()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3._session_loop, nursery, 1, 2)
    assert outcomes == []


async def test_other_failures_of_a_read_do_end_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    async def session_loop(*_args: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(pyfuse3, "_session_loop", session_loop)
    serving._survive_vanished_requests()
    with pytest.raises(OSError):
        await pyfuse3._session_loop(None, 1, 2)


async def test_a_mount_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(mountpoint, "prepare", lambda _path: release.wait(30))
    try:
        with pytest.raises(errors.InUse, match="does not answer"):
            await serving._prepare(Path("/nowhere"), 0.05)
    finally:
        release.set()


def test_cancellation_passes_the_error_boundary() -> None:
    """Swallowing it would keep a cancelled request going; only ordinary exceptions are answered."""

    class Slow:
        async def read(self, *_args: object) -> bytes:
            await trio.sleep_forever()
            return b""

    async def main() -> None:
        operations = FuseOperations(Slow(), negative_timeout_s=1, on_init=lambda: None)  # type: ignore[arg-type]
        with trio.CancelScope() as scope:
            scope.cancel()
            await operations.read(1, 0, 1)
        assert scope.cancelled_caught

    trio.run(main)


@pytest.mark.parametrize("raw", [b"", b"x", b"-7", b"10000", b"7" * 500, b"9"])
def test_a_mode_that_is_none_is_the_default(tmp_path: Path, raw: bytes) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        default = read_top_mode(fd)
        os.setxattr(fd, TOP_MODE_XATTR, b"1750")
        assert read_top_mode(fd) == 0o1750
        os.setxattr(fd, TOP_MODE_XATTR, raw)
        assert read_top_mode(fd) == default
    finally:
        os.close(fd)
