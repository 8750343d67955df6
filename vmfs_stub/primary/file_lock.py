"""Lock files: an exclusive flock that belongs to one open file, and is gone with its last descriptor.

It excludes processes of one kernel.  Whether it reaches another host depends on the filesystem: see `serving_mark`.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def open_lock(path: Path) -> int:
    """A descriptor of the lock file at ``path``, made if it is missing; `try_lock` locks it.  Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def try_lock(fd: int) -> bool:
    """Whether nobody else has it; from then on this open file has, until all its descriptors are closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
