"""Files whose last name went while somebody has them open: a link in the private directory keeps each for so long.

Without it such a file would be gone with the daemon's descriptor, while the programs that have it open may live on.
The link is named after the inode's number, and means nothing once nobody can have the file open: a start that takes
over no open files sweeps all of them.  Blocking.
"""

from __future__ import annotations

import os
from pathlib import Path

from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.tree import proc_path


class Orphans:
    """The directory of such links."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, files: FileCalls, fd: int) -> None:
        """Give the open file a link here; it must still have a name.  Raises OSError."""
        link = self._path(os.fstat(fd).st_ino)
        # One of that number is left from a file that is gone: its number would not have been given away otherwise.
        files.call("orphan.clear", link.unlink, missing_ok=True)
        # With a descriptor Python calls linkat with AT_SYMLINK_FOLLOW, which follows the procfs link to the inode.
        files.call("orphan.link", os.link, proc_path(fd), link, src_dir_fd=fd)

    def drop(self, files: FileCalls, ino: int) -> None:
        """Take the link away.  Raises OSError."""
        files.call("orphan.unlink", self._path(ino).unlink)

    def sweep(self, files: FileCalls) -> int:
        """Remove every link; returns how many.  Raises OSError."""
        found = [self._directory / name for name in files.call("orphan.list", os.listdir, self._directory)]
        for path in found:
            files.call("orphan.unlink", path.unlink)
        return len(found)

    def _path(self, ino: int) -> Path:
        return self._directory / str(ino)
