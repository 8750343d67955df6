"""Blocking calls on directory entries: find, list, make.

Each takes a directory's descriptor and single names; none follows a link.  They run in worker threads and know no
nodes, handles or disks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vmfs_stub.mount import syscalls
from vmfs_stub.mount.attributes import Requester

XATTR_NAMES_MAX: Final = 64
"""More names than this are not kept for a node."""

_DEFAULT_ACL: Final = "system.posix_acl_default"


class Entry(NamedTuple):
    """An object that was found or made: its O_PATH descriptor, owned by whoever holds this, and its status."""

    fd: int
    st: os.stat_result
    xattr_names: frozenset[bytes] | None


def open_entry(parent_fd: int, name: bytes) -> Entry:
    """Find ``name``; OSError EXDEV when another filesystem is mounted there."""
    fd = syscalls.open_path(parent_fd, name)
    try:
        return Entry(fd, os.fstat(fd), kept_xattr_names(fd))
    except BaseException:
        os.close(fd)
        raise


def open_entries(parent_fd: int, names: Iterable[bytes]) -> list[Entry | None]:
    """Find several; None for what is gone by now or on another filesystem."""
    found: list[Entry | None] = []
    for name in names:
        try:
            found.append(open_entry(parent_fd, name))
        except OSError as exc:
            if exc.errno not in {errno.ENOENT, errno.EXDEV}:
                for entry in found:
                    if entry is not None:
                        os.close(entry.fd)
                raise
            found.append(None)
    return found


def list_names(directory_fd: int) -> list[bytes]:
    """All names of a directory, without ``.`` and ``..``."""
    with _opened(directory_fd) as fd:
        return [os.fsencode(name) for name in os.listdir(fd)]  # noqa: PTH208 - a Path cannot be a descriptor


def sync_directory(directory_fd: int) -> None:
    """Make durable what was made, renamed and removed in it."""
    with _opened(directory_fd) as fd:
        os.fsync(fd)


def list_xattrs(path_fd: int) -> frozenset[bytes]:
    """Names of all xattrs, the program's own included."""
    try:
        return frozenset(os.fsencode(name) for name in os.listxattr(f"/proc/self/fd/{path_fd}"))
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        return frozenset()


def kept_xattr_names(path_fd: int) -> frozenset[bytes] | None:
    """Names of all xattrs if they are few enough to be remembered and can be listed, else None."""
    try:
        names = list_xattrs(path_fd)
    except OSError:
        return None
    return names if len(names) <= XATTR_NAMES_MAX else None


def make_directory(parent_fd: int, name: bytes, mode: int, owner: Requester) -> Entry:
    """mkdir on behalf of ``owner``."""
    return _make(parent_fd, name, mode, owner, lambda bits: os.mkdir(name, bits, dir_fd=parent_fd), os.rmdir)


def make_node(parent_fd: int, name: bytes, mode: int, device: int, owner: Requester) -> Entry:
    """mknod on behalf of ``owner``: an empty file, FIFO, socket or device by the type bits of ``mode``."""
    kind = stat.S_IFMT(mode)
    return _make(
        parent_fd, name, mode, owner, lambda bits: os.mknod(name, kind | bits, device, dir_fd=parent_fd), os.unlink
    )


def make_symlink(parent_fd: int, name: bytes, target: bytes, owner: Requester) -> Entry:
    """symlink on behalf of ``owner``."""
    return _make(parent_fd, name, None, owner, lambda _bits: os.symlink(target, name, dir_fd=parent_fd), os.unlink)


def _make(
    parent_fd: int,
    name: bytes,
    mode: int | None,
    owner: Requester,
    make: Callable[[int], None],
    remove: Callable[..., None],
) -> Entry:
    """Make it as root without set-id bits, then give it away, then set what the kernel took from the mode.

    With a default ACL on the parent the umask does not count, and the kernel masks the mode while making.
    """
    inherits_acl = mode is not None and _has_default_acl(parent_fd)
    umask = 0 if inherits_acl else owner.umask
    make(0 if mode is None else mode & 0o777 & ~umask)
    fd = -1
    try:
        fd = syscalls.open_path(parent_fd, name)
        made = os.fstat(fd)
        gid = -1 if os.fstat(parent_fd).st_mode & stat.S_ISGID else owner.gid
        if owner.uid != made.st_uid or gid not in {-1, made.st_gid}:
            syscalls.change_owner(fd, uid=owner.uid, gid=gid)
        if mode is not None:
            bits = made.st_mode & 0o777 if inherits_acl else mode & 0o777 & ~umask
            bits |= (mode & 0o7000) | (made.st_mode & stat.S_ISGID)
            if bits != stat.S_IMODE(os.fstat(fd).st_mode):
                Path(f"/proc/self/fd/{fd}").chmod(bits)
        return Entry(fd, os.fstat(fd), kept_xattr_names(fd))
    except BaseException:
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(OSError):
            remove(name, dir_fd=parent_fd)
        raise


def _has_default_acl(directory_fd: int) -> bool:
    try:
        os.getxattr(f"/proc/self/fd/{directory_fd}", _DEFAULT_ACL)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _opened(directory_fd: int) -> Iterator[int]:
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)
