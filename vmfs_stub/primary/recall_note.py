"""When a file that was a placeholder became an ordinary one: what was recalled lately is not archived again at once.

An extended attribute of the file, so that it survives the loss of the catalog and a rename.  A file without it was
never a placeholder, as far as anybody knows.  Layout: docs/FORMAT.md.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import time

from vmfs_stub.core.names import RECALLED_XATTR
from vmfs_stub.primary.files import FileCalls

_DIGITS = re.compile(rb"[0-9]{1,19}")

log = logging.getLogger(__name__)


def note_recalled(files: FileCalls, fd: int, *, label: str) -> None:
    """Note that all of a file is back; durable with the file's next sync.

    No room for it is no reason to leave a placeholder unfinished: then it is archived again somewhat too early.
    """
    try:
        files.call("graduate.note", os.setxattr, fd, RECALLED_XATTR, str(time.time_ns()).encode())
    except OSError as exc:
        log.warning("%s: that it was recalled now could not be noted: %s", label, exc.strerror)


def recalled_s(files: FileCalls, path_fd: int) -> float | None:
    """When a file (O_PATH) became an ordinary one, seconds since the epoch; None when it never was a placeholder.

    For ever from now where the note cannot be understood: such a file stays.  Raises OSError.
    """
    try:
        raw = files.call("facts.recalled", os.getxattr, f"/proc/self/fd/{path_fd}", RECALLED_XATTR)
    except OSError as exc:
        if exc.errno == errno.ENODATA:
            return None
        raise
    return int(raw) / 1e9 if _DIGITS.fullmatch(raw) else math.inf
