"""What is compared between a mount and a plain directory: outcomes of calls, by any user, and the state of files."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Scenario = Callable[[Path], object]
"""Does things in an empty directory and returns all that it saw."""


def status(path: Path | int) -> tuple[int, ...]:
    """What stat tells, without numbers and times, which no two directories share."""
    st = os.lstat(path) if isinstance(path, Path) else os.fstat(path)
    return (st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_size, st.st_rdev)


def outcome(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """What it returns, or the errno it fails with."""
    try:
        return function(*args, **kwargs)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Within the block calls are made with this user's effective ids and no others' groups; as root on exit.

    Quicker than `as_user`, but the process could become root again at any time, and its real user stays root.
    """
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def as_user(function: Callable[[], T], *, uid: int = 1000, gid: int = 1000, groups: tuple[int, ...] = ()) -> T:
    """Call in a child process of another user; an exception comes back as itself."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
            try:
                result = (True, function())
            except BaseException as exc:
                result = (False, exc)
            os.write(writer, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    done, value = pickle.loads(data)
    if not done:
        raise value
    return value
