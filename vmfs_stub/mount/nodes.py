"""Which inodes and handles the kernel knows, and the descriptors that stand for them.

A node's number is the backing inode's (the root's is 1).  Its O_PATH descriptor keeps the inode, so that the number
is not given to another file before the kernel has forgotten it.  A descriptor may be used across an await: the
kernel holds a reference for each request in progress and forgets a node, or releases a handle, only after the last.

The tables are used on the event loop only.  Nothing here follows a name: see syscalls.open_path.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from vmfs_stub.mount.attributes import Requester
from vmfs_stub.mount.disks import OpenedDisk
from vmfs_stub.services.mount_usage import IoCount

ROOT: Final = 1
NODES_SHARE: Final = 0.5
"""Of the descriptors that this process may have, how many nodes may hold."""


@dataclass(slots=True, eq=False)
class Node:
    """One inode that the kernel knows.

    ``lookups`` is how often the kernel was told of it; ``xattr_names`` are all it has (None: not listed yet), valid
    for ``xattr_version``, which every change of an xattr raises; ``has_setid`` says that a write by somebody
    without privileges must clear set-user-id bits; ``unlinked`` that its last name was removed through the mount.
    """

    ino: int
    fd: int
    kind: int
    lookups: int = 0
    xattr_names: frozenset[bytes] | None = None
    xattr_version: int = 0
    has_setid: bool = False
    unlinked: bool = False

    @property
    def proc_path(self) -> str:
        """A path that leads to this inode itself, a symlink included, for calls that take no O_PATH descriptor."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def is_regular(self) -> bool:
        """Whether it is an ordinary file."""
        return self.kind == stat.S_IFREG

    def xattrs_changed(self) -> None:
        """Forget what is known about its xattrs, and what a lookup in progress is about to learn."""
        self.xattr_version += 1
        self.xattr_names = None


@dataclass(slots=True, eq=False)
class FileHandle:
    """One open of a regular file, by ``requester``; ``use`` counts what is done with it."""

    node: Node
    opened: OpenedDisk
    requester: Requester
    use: IoCount


@dataclass(slots=True, eq=False)
class DirectoryHandle:
    """One open of a directory: the names as they were when it was read from the start."""

    node: Node
    names: list[bytes] = field(default_factory=list)
    batch: int = 24


class NodeTable:
    """All nodes by number.  Owns their descriptors.

    ``on_crowded`` is called when there are ``crowded_at`` of them or more; who serves sets both.
    """

    def __init__(self, root_fd: int) -> None:
        """Take over ``root_fd``, an O_PATH descriptor of the backing directory."""
        self.device: Final = os.fstat(root_fd).st_dev
        self.crowded_at = sys.maxsize
        self.on_crowded: Callable[[], None] = lambda: None
        self._nodes: dict[int, Node] = {ROOT: Node(ROOT, root_fd, stat.S_IFDIR, lookups=1)}

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, ino: int) -> Node:
        """The node of that number; OSError ESTALE when the kernel was never told of it, or has forgotten it."""
        try:
            return self._nodes[ino]
        except KeyError:
            raise OSError(errno.ESTALE, "no such node") from None

    def find(self, ino: int) -> Node | None:
        """The node of that number, if there is one."""
        return self._nodes.get(ino)

    def enter(self, fd: int, st: os.stat_result) -> Node:
        """The node of an inode, made if need be; takes over ``fd``, its O_PATH descriptor.  Counts no lookup."""
        if st.st_dev != self.device or st.st_ino == ROOT:
            os.close(fd)
            raise OSError(errno.EXDEV, "on another filesystem")
        node = self._nodes.get(st.st_ino)
        if node is not None:
            os.close(fd)
            return node
        try:
            self.check_room()
        except OSError:
            os.close(fd)
            raise
        node = self._nodes[st.st_ino] = Node(st.st_ino, fd, stat.S_IFMT(st.st_mode))
        if len(self._nodes) >= self.crowded_at:
            self.on_crowded()
        return node

    def check_room(self) -> None:
        """OSError ENFILE when another node would take descriptors that disks, maps and the store may need.

        One user can have the kernel know any number of files; that must not be other users' I/O errors.
        """
        if len(self._nodes) >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] * NODES_SHARE:
            raise OSError(errno.ENFILE, "too many files are known to the kernel at once")

    def forget(self, ino: int, lookups: int) -> int | None:
        """Take back lookups; the descriptor to close when that was the last one."""
        node = self._nodes.get(ino)
        if node is None or ino == ROOT:
            return None
        node.lookups -= lookups
        if node.lookups > 0:
            return None
        del self._nodes[ino]
        return node.fd

    def drop_unused(self, node: Node) -> None:
        """Undo an ``enter`` that the kernel was not told of."""
        if node.lookups == 0 and node.ino != ROOT and self._nodes.get(node.ino) is node:
            del self._nodes[node.ino]
            os.close(node.fd)

    def close(self) -> None:
        """Close all descriptors, the root's included."""
        while self._nodes:
            os.close(self._nodes.popitem()[1].fd)


class HandleTable:
    """Open files and directories by handle number; a number is never used twice."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.files: dict[int, FileHandle] = {}
        self.directories: dict[int, DirectoryHandle] = {}

    def add_file(self, handle: FileHandle) -> int:
        """Number an open file."""
        number = next(self._numbers)
        self.files[number] = handle
        return number

    def add_directory(self, handle: DirectoryHandle) -> int:
        """Number an open directory."""
        number = next(self._numbers)
        self.directories[number] = handle
        return number
