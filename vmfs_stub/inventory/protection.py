"""Whether an operator has said that a VM is never to be archived: an extended attribute of its top entry.

It lies on the file or directory itself, so that it survives a rename and the loss of the catalog; whatever its value,
it protects, and one that came with a copy does, too.  Works on O_PATH descriptors only, as `identity`.
"""

from __future__ import annotations

import errno
import os

from vmfs_stub.core.errors import PrimaryIOError
from vmfs_stub.core.names import PROTECTED_XATTR
from vmfs_stub.core.sites import PLAIN, FileCalls

_VALUE = b"1"


def is_protected(path_fd: int, *, files: FileCalls = PLAIN) -> bool:
    """Whether the entry is protected.  Raises PrimaryIOError."""
    try:
        files.call("inventory.protected", os.getxattr, f"/proc/self/fd/{path_fd}", PROTECTED_XATTR)
    except OSError as exc:
        if exc.errno == errno.ENODATA:
            return False
        raise PrimaryIOError(
            f"whether it is protected cannot be read, the attribute {PROTECTED_XATTR}: {exc.strerror}"
        ) from exc
    return True


def set_protected(path_fd: int, protected: bool, *, files: FileCalls = PLAIN) -> None:
    """Protect an entry, or no longer; not durable before the filesystem is synced.  Raises PrimaryIOError."""
    path = f"/proc/self/fd/{path_fd}"
    try:
        if protected:
            files.call("inventory.protect", os.setxattr, path, PROTECTED_XATTR, _VALUE)
        else:
            files.call("inventory.unprotect", os.removexattr, path, PROTECTED_XATTR)
    except OSError as exc:
        if exc.errno != errno.ENODATA:
            raise PrimaryIOError(f"cannot change the attribute {PROTECTED_XATTR}: {exc.strerror}") from exc
