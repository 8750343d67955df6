"""What is mounted where; a mount whose daemon is stuck is never called into without a limit."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import re
import threading
from dataclasses import dataclass
from pathlib import Path

_ANSWER_S = 2.0
_MNT_DETACH = 2
_MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: where, and of which type."""

    mountpoint: Path
    kind: str


def mounts() -> list[Mount]:
    """All mounts of this process's namespace, the topmost of a mountpoint last."""
    found = []
    for line in _MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        path = _OCTAL.sub(lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        found.append(Mount(Path(path), after.split(" ")[0]))
    return found


def is_mounted(path: Path) -> bool:
    """Whether a FUSE filesystem is what one sees at ``path``."""
    here = [mount for mount in mounts() if mount.mountpoint == path]
    return bool(here) and here[-1].kind.startswith("fuse")


def is_dead(path: Path) -> bool:
    """Whether the FUSE mount at ``path`` has lost its daemon: every call into it fails with ENOTCONN.

    A mount whose daemon lives but does not answer is not dead; asking it is given up after a while.
    """
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            os.statvfs(path)  # never answered from a cache
        except OSError as exc:
            answers.put(exc.errno in (errno.ENOTCONN, errno.ECONNABORTED))
        else:
            answers.put(False)

    threading.Thread(target=ask, name="statvfs of the mount", daemon=True).start()
    try:
        return answers.get(timeout=_ANSWER_S)
    except queue.Empty:
        return False


def mount_of(path: Path) -> Mount:
    """The mount that ``path`` (absolute, no symlinks) lies on; of unknown type in a chroot that is no mount."""
    return max(
        (mount for mount in mounts() if path.is_relative_to(mount.mountpoint)),
        key=lambda mount: len(mount.mountpoint.parts),
        default=Mount(Path("/"), "unknown"),
    )


def detach(path: Path) -> None:
    """umount2(2) with MNT_DETACH; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
