"""System calls that Python's os module does not offer.

Each raises OSError as os functions do.  Linux only, 64 bit; openat2 with RESOLVE_CACHED needs kernel 5.12.  Knows
nothing of FUSE requests, nodes or disks.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import Final

MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_REMOUNT: Final = 0x20
MNT_FORCE: Final = 0x1
MNT_DETACH: Final = 0x2
RENAME_NOREPLACE: Final = 0x1
RENAME_EXCHANGE: Final = 0x2

_AT_EMPTY_PATH: Final = 0x1000
_UTIME_OMIT: Final = (1 << 30) - 2
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_XDEV: Final = 0x01
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_BENEATH: Final = 0x08
_RESOLVE_CACHED: Final = 0x20
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_IMMUTABLE_FL: Final = 0x10
_INODE_FLAGS: Final = struct.Struct("=I4x")  # the kernel takes an int, whatever the request's number says

_libc = ctypes.CDLL(None, use_errno=True)
# Keeps the GIL: for calls that cannot sleep, so that they never wait for another thread to hand the GIL back.
_libc_brief = ctypes.PyDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64))


_PATH_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_BENEATH: Final = _RESOLVE_BENEATH | _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS
_HOW: Final = _OpenHow(_PATH_FLAGS, 0, _BENEATH)
_HOW_CACHED: Final = _OpenHow(_PATH_FLAGS, 0, _BENEATH | _RESOLVE_CACHED)
_HOW_SIZE: Final = ctypes.c_size_t(ctypes.sizeof(_OpenHow))

_openat2 = _libc.syscall
_openat2_brief = _libc_brief.syscall
for _call in (_openat2, _openat2_brief):
    _call.restype = ctypes.c_long
    _call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_OpenHow), ctypes.c_size_t)


def _raise(*names: bytes) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), *names[:1])


def open_path(parent_fd: int, name: bytes) -> int:
    """Open ``name`` in a directory as an O_PATH descriptor, without following a link or crossing a mount (EXDEV)."""
    fd: int = _openat2(_SYS_OPENAT2, parent_fd, name, _HOW, _HOW_SIZE)
    if fd < 0:
        raise _raise(name)
    return fd


def open_path_cached(parent_fd: int, name: bytes) -> int:
    """Like open_path, but from the kernel's name cache alone: never sleeps; BlockingIOError when it does not know."""
    fd: int = _openat2_brief(_SYS_OPENAT2, parent_fd, name, _HOW_CACHED, _HOW_SIZE)
    if fd < 0:
        raise _raise(name)
    return fd


def rename(old_parent_fd: int, old_name: bytes, new_parent_fd: int, new_name: bytes, *, flags: int) -> None:
    """Rename with RENAME_* ``flags``."""
    if _libc.renameat2(old_parent_fd, old_name, new_parent_fd, new_name, ctypes.c_uint(flags)) != 0:
        raise _raise(old_name)


def change_owner(path_fd: int, *, uid: int, gid: int) -> None:
    """Set the owner of what an O_PATH descriptor refers to, a symlink included; -1 leaves one as it is."""
    if _libc.fchownat(path_fd, b"", ctypes.c_uint(uid & 0xFFFFFFFF), ctypes.c_uint(gid & 0xFFFFFFFF), _AT_EMPTY_PATH):
        raise _raise()


def change_times(path_fd: int, *, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set the times of what an O_PATH descriptor refers to, a symlink included; None leaves one as it is."""
    times = (_Timespec * 2)(_timespec(atime_ns), _timespec(mtime_ns))
    if _libc.utimensat(path_fd, b"", times, _AT_EMPTY_PATH) != 0:
        raise _raise()


def _timespec(time_ns: int | None) -> _Timespec:
    if time_ns is None:
        return _Timespec(0, _UTIME_OMIT)
    return _Timespec(*divmod(time_ns, 1_000_000_000))


def mount(source: bytes, target: bytes, kind: bytes, *, flags: int, options: bytes) -> None:
    """mount(2)."""
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), options) != 0:
        raise _raise(target)


def unmount(target: bytes, *, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(target, flags) != 0:
        raise _raise(target)


def is_immutable(directory_fd: int) -> bool:
    """Whether FS_IMMUTABLE_FL is set."""
    return bool(_inode_flags(directory_fd) & _FS_IMMUTABLE_FL)


def set_immutable(directory_fd: int, *, immutable: bool) -> None:
    """Set or clear FS_IMMUTABLE_FL: not even root can make a file in such a directory."""
    flags = _inode_flags(directory_fd)
    wanted = flags | _FS_IMMUTABLE_FL if immutable else flags & ~_FS_IMMUTABLE_FL
    if wanted != flags:
        fcntl.ioctl(directory_fd, _FS_IOC_SETFLAGS, _INODE_FLAGS.pack(wanted))


def _inode_flags(fd: int) -> int:
    (flags,) = _INODE_FLAGS.unpack(fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(_INODE_FLAGS.size)))
    return int(flags)
