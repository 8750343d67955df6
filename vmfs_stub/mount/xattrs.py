"""Extended attributes through the mount.

Most questions are about xattrs that are not there (`ls -l` asks two for each file), so a node keeps the names that
its inode has: a name that is not among them needs no file call.  Only absence is concluded from the names, and only
setxattr through the mount adds one, so a kept list may be too long but never too short.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from vmfs_stub.mount import entries
from vmfs_stub.mount.attributes import Requester
from vmfs_stub.mount.callers import is_in_group
from vmfs_stub.mount.nodes import ROOT, Node
from vmfs_stub.mount.private import is_private_xattr
from vmfs_stub.mount.runner import Runner

_ACCESS_ACL: Final = b"system.posix_acl_access"
_LISTED: Final = (b"user.", b"trusted.", b"system.posix_acl_")
_LISTED_WITHOUT_LABELS: Final = (*_LISTED, b"security.")


class Xattrs:
    """Xattr operations on nodes; the program's own xattrs do not exist here."""

    def __init__(self, run: Runner, *, root_fd: int) -> None:
        self._run = run
        self._listed = _LISTED if run.now("mount.top", _has_unlisted_label, root_fd) else _LISTED_WITHOUT_LABELS

    async def get(self, node: Node, name: bytes) -> bytes:
        """Value of an xattr; OSError ENODATA when there is none."""
        if is_private_xattr(name):
            raise OSError(errno.ENODATA, "no such xattr")
        names = node.xattr_names
        if names is None:
            names = await self._names(node)
        if name not in names and name.startswith(self._listed):
            raise OSError(errno.ENODATA, "no such xattr")
        return await self._run("mount.getxattr", os.getxattr, node.proc_path, name)

    async def names(self, node: Node) -> list[bytes]:
        """Names of all xattrs that the mount shows."""
        names = node.xattr_names
        if names is None:
            names = await self._names(node)
        return sorted(name for name in names if not is_private_xattr(name))

    async def set(self, node: Node, name: bytes, value: bytes, requester: Requester) -> None:
        """Set an xattr; OSError EPERM for the program's own."""
        if is_private_xattr(name):
            raise OSError(errno.EPERM, "reserved")
        if node.ino == ROOT and name.startswith(b"system."):
            # An ACL would open the backing directory itself to others.
            raise OSError(errno.EOPNOTSUPP, "not on the top directory")
        # Twice, so that a list read before or during the call is not kept.
        node.xattrs_changed()
        try:
            await self._run("mount.setxattr", os.setxattr, node.proc_path, name, value)
            if name == _ACCESS_ACL:
                await self._clear_setgid(node, requester)
        finally:
            node.xattrs_changed()

    async def remove(self, node: Node, name: bytes) -> None:
        """Remove an xattr; OSError ENODATA when there is none."""
        if is_private_xattr(name):
            raise OSError(errno.ENODATA, "no such xattr")
        node.xattrs_changed()
        try:
            await self._run("mount.removexattr", os.removexattr, node.proc_path, name)
        finally:
            node.xattrs_changed()

    async def _names(self, node: Node) -> frozenset[bytes]:
        version = node.xattr_version
        names = await self._run("mount.listxattr", entries.list_xattrs, node.fd)
        if version == node.xattr_version and len(names) <= entries.XATTR_NAMES_MAX:
            node.xattr_names = names
        return names

    async def _clear_setgid(self, node: Node, requester: Requester) -> None:
        """A new access ACL clears set-group-id for who is not in the group; the daemon's privileges hide that."""
        st = os.fstat(node.fd)
        if requester.uid and st.st_mode & stat.S_ISGID and not is_in_group(st.st_gid, requester):
            await self._run("mount.chmod", os.chmod, node.proc_path, stat.S_IMODE(st.st_mode) & ~stat.S_ISGID)


def _has_unlisted_label(root_fd: int) -> bool:
    """Whether a security module answers for labels that listxattr does not name."""
    try:
        os.getxattr(f"/proc/self/fd/{root_fd}", "security.selinux")
    except OSError:
        return False
    return b"security.selinux" not in entries.list_xattrs(root_fd)
