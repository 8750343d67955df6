"""What a file, a filesystem, a mount and a boot *are*, beyond their names.

A placeholder record holds these, so that a copied record is not taken for the original, and a volatile map is not used
after a reboot.  Linux only; blocking, but nothing here waits for a disk.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INIT_ROOT = "/proc/1/root"
"""The tree as process 1 sees it."""

_FS_IOC_GETVERSION = 0x80087601
_FS_IOC_GETFSUUID = 0x80111500
_AT_EMPTY_PATH = 0x1000
_STATX_MNT_ID = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_STATX_MNT_ID_OFFSET = 0x90
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class InodeIdentity:
    """One inode for as long as it lives: hex UUID of its filesystem, inode number, inode generation.

    The generation is 0 on filesystems that have none.
    """

    filesystem: str
    ino: int
    generation: int


@dataclass(frozen=True, slots=True)
class BootIdentity:
    """One mount of the backing filesystem in one boot; volatile maps are void in any other."""

    boot_id: str
    mount_id: int


def inode_identity(fd: int) -> InodeIdentity:
    """Identity of the open file ``fd`` (not O_PATH).  Raises OSError."""
    return InodeIdentity(filesystem_id(fd), os.fstat(fd).st_ino, inode_generation(fd))


def inode_generation(fd: int) -> int:
    """Generation of the inode, or 0 where the filesystem has none."""
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETVERSION, buffer)
    except OSError:
        return 0
    return int(struct.unpack_from("<I", buffer)[0])


def filesystem_id(fd: int) -> str:
    """Hex UUID of the filesystem; where there is none or the kernel does not tell it (before 6.9), its statfs id."""
    buffer = bytearray(17)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFSUUID, buffer)
    except OSError:
        buffer[0] = 0
    uuid = bytes(buffer[1 : 1 + buffer[0]])
    return uuid.hex() if any(uuid) else f"fsid-{os.fstatvfs(fd).f_fsid:016x}"


def boot_identity(directory_fd: int) -> BootIdentity:
    """The current boot and the mount through which ``directory_fd`` was opened."""
    with _as_seen_by_init(directory_fd) as fd:
        return BootIdentity(boot_id(), _mount_id(fd))


def boot_id() -> str:
    """The current boot: 32 hex digits, which no other boot of any machine has."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")


@contextmanager
def _as_seen_by_init(directory_fd: int) -> Iterator[int]:
    """The same directory in the mount namespace of process 1, where it is there; else the descriptor itself.

    A service manager may start the daemon in a mount namespace of its own, a new one each time: the filesystem is the
    same mount all the while.
    """
    path, st = Path(f"/proc/self/fd/{directory_fd}").readlink(), os.fstat(directory_fd)
    try:
        fd = os.open(f"{INIT_ROOT}{path}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield directory_fd
        return
    try:
        seen = os.fstat(fd)
        yield fd if (seen.st_dev, seen.st_ino) == (st.st_dev, st.st_ino) else directory_fd
    finally:
        os.close(fd)


def _mount_id(fd: int) -> int:
    # The unique id (Linux 6.8) is never used again; the older one may be, which only keeps a map that could be void.
    buffer = ctypes.create_string_buffer(256)
    wanted = _STATX_MNT_ID | _STATX_MNT_ID_UNIQUE
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, wanted, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(struct.unpack_from("<Q", buffer.raw, _STATX_MNT_ID_OFFSET)[0])
