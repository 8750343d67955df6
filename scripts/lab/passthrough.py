"""The least that a pyfuse3 filesystem does to show a directory: the baseline of what the mount costs.

It answers every request at once on the event loop, and keeps nothing but a path for each inode; readable only.
Usage: python -m scripts.lab.passthrough SOURCE MOUNTPOINT; ends when it is unmounted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import pyfuse3
import trio

_TIMEOUT_S = 3600.0


class Passthrough(pyfuse3.Operations):
    """Paths by inode number, of whatever was looked up."""

    enable_writeback_cache = False

    def __init__(self, source: str) -> None:
        super().__init__()
        self._paths: dict[int, str] = {pyfuse3.ROOT_INODE: source}
        self._listings: dict[int, tuple[str, list[str]]] = {}

    def _attributes(self, path: str) -> pyfuse3.EntryAttributes:
        try:
            st = os.lstat(path)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from exc
        entry = pyfuse3.EntryAttributes()
        entry.attr_timeout = entry.entry_timeout = _TIMEOUT_S
        for name in ("ino", "mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks"):
            setattr(entry, f"st_{name}", getattr(st, f"st_{name}"))
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
        self._paths.setdefault(st.st_ino, path)
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(os.path.join(self._paths[parent_inode], os.fsdecode(name)))

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(self._paths[inode])

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for inode, _ in inode_list:
            if inode != pyfuse3.ROOT_INODE:
                self._paths.pop(inode, None)

    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        try:
            return os.getxattr(self._paths[inode], name, follow_symlinks=False)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from exc

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        path = self._paths[inode]
        self._listings[inode] = (path, sorted(os.listdir(path)))  # noqa: PTH208 - names, not paths
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        path, names = self._listings[fh]
        for number in range(start_id, len(names)):
            entry = self._attributes(os.path.join(path, names[number]))
            if not pyfuse3.readdir_reply(token, os.fsencode(names[number]), entry, number + 1):
                return

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self._listings.pop(fh, None)


def main() -> None:
    """Serve until unmounted."""
    source, mountpoint = sys.argv[1:]
    options = set(pyfuse3.default_options) | {"fsname=passthrough", "default_permissions"}
    pyfuse3.init(Passthrough(source), mountpoint, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
