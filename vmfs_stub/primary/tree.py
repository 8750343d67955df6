"""Reaching files below the backing directory without ever leaving it.

Each component is opened by itself, relative to the one before and without following symbolic links, so that no link and
no `..` leads out, and no path is too long for a call, whatever a guest's user puts there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Generator
from dataclasses import dataclass

from vmfs_stub.core.sites import PLAIN, FileCalls

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_LIST_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

DEPTH_MAX = 256
"""Directories inside each other that `walk` follows; it holds a descriptor of each."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something found by `walk`: its path from where that began, an O_PATH descriptor, and its stat.

    The descriptor is the walk's, and is closed when the next entry is asked for.
    """

    path: str
    path_fd: int
    st: os.stat_result


OnError = Callable[[str, OSError], None]
"""Gets the path of what could not be looked at, or into, and why."""


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


def reopen(path_fd: int, flags: int) -> int:
    """Open the very file of an O_PATH descriptor, whatever its path is now.  Raises OSError."""
    return os.open(proc_path(path_fd), flags | os.O_CLOEXEC)


def proc_path(path_fd: int) -> str:
    """A path to the file of an O_PATH descriptor, for calls that take no such descriptor, as those on xattrs."""
    return f"/proc/self/fd/{path_fd}"


def walk(
    top_fd: int, on_error: OnError, *, site: str, files: FileCalls = PLAIN, skipped: str = ""
) -> Generator[Entry, None, None]:
    """Everything below a directory, each directory before what is in it, names in order.

    Symbolic links are not followed, other filesystems not entered, and ``skipped`` (a name at the top) is left out.
    What cannot be read is passed to ``on_error`` and left out, also when it vanished.  Whoever does not walk to the end
    closes it.  Raises OSError when the top itself cannot be read.
    """
    device = os.fstat(top_fd).st_dev
    levels = [_Level("", files.call(site, os.open, ".", _LIST_FLAGS, dir_fd=top_fd))]
    try:
        levels[0].names = files.call(site, _names, levels[0].fd, skipped)
        while levels:
            level = levels[-1]
            if not level.names:
                os.close(levels.pop().fd)
                continue
            name = level.names.pop()
            path = f"{level.prefix}{name}"
            try:
                path_fd = files.call(site, os.open, name, _PATH_FLAGS, dir_fd=level.fd)
            except OSError as exc:
                on_error(path, exc)
                continue
            try:
                st = os.fstat(path_fd)
                if st.st_dev != device:
                    continue
                yield Entry(path, path_fd, st)
                if stat.S_ISDIR(st.st_mode):
                    _descend(levels, path, path_fd, on_error, files=files, site=site)
            finally:
                os.close(path_fd)
    finally:
        for level in levels:
            os.close(level.fd)


class _Level:
    """A directory that is being walked: its descriptor and the names that are still to come, last first."""

    def __init__(self, prefix: str, fd: int) -> None:
        self.prefix = prefix
        self.fd = fd
        self.names: list[str] = []


def _names(fd: int, skipped: str = "") -> list[str]:
    with os.scandir(fd) as entries:
        return sorted((entry.name for entry in entries if entry.name != skipped), reverse=True)


def _descend(levels: list[_Level], path: str, path_fd: int, on_error: OnError, *, files: FileCalls, site: str) -> None:
    if len(levels) > DEPTH_MAX:
        on_error(path, OSError(errno.ELOOP, f"directories are nested deeper than {DEPTH_MAX}"))
        return
    try:
        below = _Level(f"{path}/", files.call(site, os.open, ".", _LIST_FLAGS, dir_fd=path_fd))
        levels.append(below)
        below.names = files.call(site, _names, below.fd)
    except OSError as exc:
        on_error(path, exc)
