"""Making the names in a directory durable: what was made, renamed or removed there."""

from __future__ import annotations

import os


def sync_directory(fd_or_path: int | str | os.PathLike[str]) -> None:
    """Make the entries of a directory durable.  Raises OSError."""
    if isinstance(fd_or_path, int):
        os.fsync(fd_or_path)
        return
    fd = os.open(fd_or_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
