"""The immutable flag of a directory, as chattr(1) sets it: not even root can make a file in it.

A mountpoint has it, so that nothing is written below the mount while no daemon is there; mounting on it still works.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IMMUTABLE_FL = 0x10
_FLAGS = struct.Struct("=I4x")  # the kernel takes an int, whatever the request's number says


def is_immutable(directory: Path) -> bool | None:
    """Whether the flag is set; None where the filesystem has no such flags.  Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return bool(_get(fd) & _FS_IMMUTABLE_FL)
    except OSError:
        return None
    finally:
        os.close(fd)


def set_immutable(directory: Path, *, immutable: bool) -> None:
    """Set or clear the flag; raises OSError where that is not possible."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = _get(fd)
        wanted = flags | _FS_IMMUTABLE_FL if immutable else flags & ~_FS_IMMUTABLE_FL
        if wanted != flags:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, _FLAGS.pack(wanted))
    finally:
        os.close(fd)


def _get(fd: int) -> int:
    (flags,) = _FLAGS.unpack(fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(_FLAGS.size)))
    return int(flags)
