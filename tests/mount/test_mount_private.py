"""The private directory and the program's xattrs do not exist through the mount, whatever is tried."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from plain_mount import PlainMount, names

from vmfs_stub.mount import syscalls

PRIVATE = ".vmfs-stub"


@pytest.fixture
def top(mounted: PlainMount) -> Iterator[Path]:
    (mounted.backing / PRIVATE / "secret").write_text("secret")
    (mounted.mountpoint / "file").write_text("text")
    os.setxattr(mounted.backing / "file", "trusted.vmfs-stub.placeholder", b"{}")
    os.setxattr(mounted.backing / "file", "user.vmfs-stub.x", b"1")
    os.setxattr(mounted.mountpoint / "file", "user.shown", b"1")
    yield mounted.mountpoint
    assert (mounted.backing / PRIVATE / "secret").read_text() == "secret"
    assert names(mounted.backing / PRIVATE) == ["secret"]
    (mounted.mountpoint / "file").unlink()
    assert mounted.command("bugs") == {}


def refusal(function, *args: object, **kwargs: object) -> int:  # type: ignore[no-untyped-def]
    with pytest.raises(OSError) as caught:
        function(*args, **kwargs)
    return caught.value.errno


def test_private_directory_is_not_there(top: Path, mounted: PlainMount) -> None:
    assert PRIVATE in names(mounted.backing)
    assert PRIVATE not in names(top)
    for act in (os.stat, names, os.rmdir, os.unlink, os.readlink, os.listxattr, lambda path: os.open(path, 0)):
        assert refusal(act, top / PRIVATE) == errno.ENOENT
        assert refusal(act, top / PRIVATE / "secret") == errno.ENOENT
        assert refusal(act, f"{top}/./{PRIVATE}/../{PRIVATE}") == errno.ENOENT
    assert top.stat().st_nlink == mounted.backing.stat().st_nlink - 1


def test_nothing_can_be_made_moved_or_linked_to_that_name(top: Path) -> None:
    (top / "directory").mkdir()
    (top / "directory" / PRIVATE).mkdir()  # only the top one is reserved
    (top / "directory" / PRIVATE).rmdir()
    assert refusal(os.mkdir, top / PRIVATE) == errno.EPERM
    assert refusal(os.open, top / PRIVATE, os.O_CREAT | os.O_WRONLY) == errno.EPERM
    assert refusal(os.mknod, top / PRIVATE) == errno.EPERM
    assert refusal(os.mkfifo, top / PRIVATE) == errno.EPERM
    assert refusal(os.symlink, "file", top / PRIVATE) == errno.EPERM
    assert refusal(os.link, top / "file", top / PRIVATE) == errno.EPERM
    at = os.open(top, os.O_PATH)
    name, file = PRIVATE.encode(), b"file"
    for flags in (0, syscalls.RENAME_NOREPLACE):
        assert refusal(syscalls.rename, at, file, at, name, flags=flags) == errno.EPERM
        assert refusal(syscalls.rename, at, b"directory", at, name, flags=flags) == errno.EPERM
        assert refusal(syscalls.rename, at, name, at, b"stolen", flags=flags) == errno.ENOENT
    for old, new in ((name, file), (file, name)):
        assert refusal(syscalls.rename, at, old, at, new, flags=syscalls.RENAME_EXCHANGE) == errno.ENOENT
    os.close(at)
    (top / "directory").rmdir()


def test_private_directory_cannot_be_reached_by_number(top: Path, mounted: PlainMount) -> None:
    """The kernel never asks for a number that it was not told; open_by_handle_at would be the way to try."""
    assert (mounted.backing / PRIVATE).stat().st_ino not in {entry.inode() for entry in os.scandir(top)}


def test_private_xattrs_are_not_there(top: Path, mounted: PlainMount) -> None:
    path = top / "file"
    assert os.listxattr(path) == ["user.shown"]
    for name in ("trusted.vmfs-stub.placeholder", "user.vmfs-stub.x", "trusted.vmfs-stub.vm", "user.vmfs-stub"):
        assert refusal(os.getxattr, path, name) == errno.ENODATA
        assert refusal(os.removexattr, path, name) == errno.ENODATA
        assert refusal(os.setxattr, path, name, b"forged") == errno.EPERM
        assert refusal(os.setxattr, path, name, b"forged", os.XATTR_CREATE) == errno.EPERM
        assert refusal(os.setxattr, path, name, b"forged", os.XATTR_REPLACE) == errno.ENODATA
        assert refusal(os.setxattr, top, name, b"forged") == errno.EPERM
    assert os.getxattr(mounted.backing / "file", "trusted.vmfs-stub.placeholder") == b"{}"
    os.setxattr(path, "user.vmfs-stubborn", b"not ours")
    assert os.getxattr(path, "user.vmfs-stubborn") == b"not ours"
    os.removexattr(path, "user.vmfs-stubborn")
    assert os.listxattr(path) == ["user.shown"]


def test_a_copy_does_not_carry_them(top: Path, mounted: PlainMount) -> None:
    (top / "copy").write_bytes((top / "file").read_bytes())
    for name in os.listxattr(top / "file"):
        os.setxattr(top / "copy", name, os.getxattr(top / "file", name))
    assert os.listxattr(mounted.backing / "copy") == ["user.shown"]
    (top / "copy").unlink()


@pytest.mark.parametrize("cached", [False, True])
def test_links_do_not_lead_out(top: Path, mounted: PlainMount, cached: bool) -> None:
    """A link's target is looked up by the kernel, through the mount: never by the daemon in the backing directory."""
    outside = mounted.base / "outside"
    outside.write_text("outside")
    (mounted.backing / "relative").symlink_to("../outside")
    (mounted.backing / "inward").symlink_to(".vmfs-stub/secret")
    (mounted.backing / "up").symlink_to("..")
    try:
        for _ in range(2 if cached else 1):
            # The mountpoint's parent is `base`, as the backing directory's: through the mount, that is where it leads.
            assert (top / "relative").resolve() == outside
            assert refusal(os.stat, top / "inward") == errno.ENOENT
            assert (top / "up").resolve() == mounted.base
            assert os.lstat(top / "relative").st_size == len("../outside")
    finally:
        for name in ("relative", "inward", "up"):
            (mounted.backing / name).unlink()
        outside.unlink()


def test_another_filesystem_inside_is_not_visible(top: Path, mounted: PlainMount) -> None:
    inside = mounted.backing / "inside"
    inside.mkdir()
    syscalls.mount(b"tmpfs", os.fsencode(inside), b"tmpfs", flags=0, options=b"size=64k")
    try:
        (inside / "file").touch()
        assert refusal(os.stat, top / "inside") == errno.EXDEV
        assert refusal(os.stat, top / "inside/file") == errno.EXDEV
        assert "inside" not in names(top)
    finally:
        syscalls.unmount(os.fsencode(inside))
        inside.rmdir()
