"""Reaching a file below the backing directory without ever leaving it.

Each component is opened by itself, relative to the one before and without following symbolic links, so that no link and
no `..` leads out, whatever a guest's user puts there.
"""

from __future__ import annotations

import errno
import os

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_beneath(directory_fd: int, path: str) -> int:
    """An O_PATH descriptor of ``path``, relative to ``directory_fd``.  Raises OSError."""
    names = path.split("/")
    if not path or any(name in ("", ".", "..") for name in names):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    fd = os.dup(directory_fd)
    for name in names:
        try:
            below = os.open(name, _PATH_FLAGS, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd
