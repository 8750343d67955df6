"""From a name to a node: finding, entering into the table, describing, forgetting.

The private directory is not found here, by whatever name; what is on another filesystem neither.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

import trio

from vmfs_stub.core.names import TOP_MODE_XATTR
from vmfs_stub.mount import entries, syscalls
from vmfs_stub.mount.attributes import Attributes
from vmfs_stub.mount.disks import PathDisks
from vmfs_stub.mount.nodes import ROOT, Node, NodeTable
from vmfs_stub.mount.private import PRIVATE_NAME, check_component
from vmfs_stub.mount.runner import Runner
from vmfs_stub.mount.settings import MountSettings

SETID: Final = stat.S_ISUID | stat.S_ISGID
TOP_MODE: Final = 0o755
"""Mode of the top directory until somebody changes it: hypervisors' users must get at their disks."""


class Inodes:
    """The inodes of one backing directory as the kernel knows them; ``nodes`` is the table of them."""

    def __init__(self, backing: Path, *, disks: PathDisks, run: Runner, settings: MountSettings) -> None:
        """Open the backing directory, whose private directory must exist by now if there is to be one."""
        self.root_fd = run.now("mount.top", os.open, backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.nodes = NodeTable(self.root_fd)
        self._disks = disks
        self._run = run
        self._settings = settings
        try:
            self._private_ino = run.now("mount.top", _inode_number, self.root_fd, PRIVATE_NAME)
            self._top_mode = run.now("mount.top", read_top_mode, self.root_fd)
        except BaseException:
            self.nodes.close()
            raise

    async def find(self, directory: Node, name: bytes) -> entries.Entry:
        """Find a name, on the event loop when the kernel's name cache knows it, which takes no disk access."""
        check_component(name)
        if directory.ino == ROOT and name == PRIVATE_NAME:
            raise FileNotFoundError(errno.ENOENT, "no such name")
        try:
            fd = syscalls.open_path_cached(directory.fd, name)
        except BlockingIOError:
            entry = await self._run("mount.lookup", entries.open_entry, directory.fd, name)
        else:
            entry = entries.Entry(fd, os.fstat(fd), None)
        if self.is_private(entry):
            os.close(entry.fd)
            raise FileNotFoundError(errno.ENOENT, "no such name")
        return entry

    def is_private(self, entry: entries.Entry) -> bool:
        """Whether it is the private directory; in a directory that ignores case it has other names too."""
        return entry.st.st_ino == self._private_ino and entry.st.st_dev == self.nodes.device

    def directory_for_new_inode(self, parent: int, name: bytes) -> Node:
        """The directory for a new name of a new inode, which will be entered; raises as `directory_for_new`, ENFILE."""
        self.nodes.check_room()
        return self.directory_for_new(parent, name)

    def directory_for_new(self, parent: int, name: bytes) -> Node:
        """The directory for a new name; OSError EPERM for the one that is reserved."""
        check_component(name)
        if parent == ROOT and name == PRIVATE_NAME:
            raise OSError(errno.EPERM, "reserved for vmfs-stub", name)
        return self.nodes[parent]

    def known(self, entry: entries.Entry) -> Attributes:
        """Enter what was found into the table, taking over its descriptor, and count a lookup."""
        node = self.enter(entry)
        node.lookups += 1
        return self.attributes(node, entry.st)

    def enter(self, entry: entries.Entry) -> Node:
        """Enter what was found into the table, taking over its descriptor, without counting a lookup."""
        node = self.nodes.enter(entry.fd, entry.st)
        if node.lookups == 0:
            node.xattr_names = entry.xattr_names
        return node

    def attributes(self, node: Node, st: os.stat_result | None = None) -> Attributes:
        """What the kernel is told of a node, from ``st`` or from its status now.

        On the event loop: the descriptor holds the inode in memory, so nothing is read from a disk.
        """
        if st is None:
            st = os.fstat(node.fd)
        timeout_s = self._settings.attr_timeout_s
        mode, nlink, blocks, mtime_ns = st.st_mode, st.st_nlink, st.st_blocks, st.st_mtime_ns
        if node.is_regular:
            node.has_setid = st.st_mode & SETID != 0
            override = self._disks.stat_override(st)
            if override is not None:
                blocks, mtime_ns = override.blocks, override.mtime_ns
                timeout_s = self._settings.placeholder_attr_timeout_s
            if node.unlinked:
                nlink = 0
        elif node.ino == ROOT:
            mode = stat.S_IFDIR | self._top_mode
            if self._private_ino is not None and nlink > 2:
                nlink -= 1
        return Attributes(node.ino, st, mode, nlink, blocks, mtime_ns, timeout_s, self._settings.attr_timeout_s)

    async def change_top(self, *, mode: int | None, uid: int | None, gid: int | None) -> None:
        """Change what the top directory shows; the backing directory stays closed to all but root.

        Raises OSError: EPERM for another owner, who could then open the backing directory itself.
        """
        st = os.fstat(self.root_fd)
        if (st.st_uid if uid is None else uid, st.st_gid if gid is None else gid) != (st.st_uid, st.st_gid):
            raise OSError(errno.EPERM, "the top directory belongs to root")
        if mode is not None:
            wanted = stat.S_IMODE(mode)
            path = f"/proc/self/fd/{self.root_fd}"
            await self._run("mount.top_mode", os.setxattr, path, TOP_MODE_XATTR, f"{wanted:o}".encode())
            self._top_mode = wanted

    def forget(self, ino: int, lookups: int) -> int | None:
        """Take back lookups; the descriptor to close (by ``close_descriptors``) when those were the last."""
        return self.nodes.forget(ino, lookups)

    async def close_descriptors(self, fds: list[int]) -> None:
        """Close descriptors, whoever is cancelled.

        The last close of an unlinked file frees its blocks, which takes long for a disk image: in a thread.
        """
        slow = []
        for fd in fds:
            if os.fstat(fd).st_nlink == 0:
                slow.append(fd)
            else:
                os.close(fd)
        if slow:
            with trio.CancelScope(shield=True):
                for fd in slow:
                    await self._run("mount.close", os.close, fd)


def _inode_number(parent_fd: int, name: bytes) -> int | None:
    try:
        return os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None


def read_top_mode(root_fd: int) -> int:
    """What the top directory shows; the default where the attribute is missing or no mode."""
    try:
        mode = int(os.getxattr(f"/proc/self/fd/{root_fd}", TOP_MODE_XATTR), 8)
    except (OSError, ValueError):
        return TOP_MODE
    return mode if 0 <= mode <= 0o7777 else TOP_MODE
