"""What exists in the backing directory and not through the mount.

The private directory at the top, and every xattr of vmfs-stub: who could set one could forge a placeholder's record
and read another VM.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from vmfs_stub.core.names import PRIVATE_DIR

PRIVATE_NAME: Final = os.fsencode(PRIVATE_DIR)
_XATTR_MARK: Final = b".vmfs-stub."


def is_private_xattr(name: bytes) -> bool:
    """Whether an xattr is the program's own, in any namespace."""
    return _XATTR_MARK in name + b"."


def check_component(name: bytes) -> None:
    """Refuse what is not the name of a directory entry: OSError EINVAL."""
    if not name or name in {b".", b".."} or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "not a single name", name)
