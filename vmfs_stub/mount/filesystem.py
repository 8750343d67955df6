"""The filesystem's operations, without pyfuse3: what a request does to the backing directory.

Invariants: every name is one component, opened relative to its directory's descriptor, so nothing leads out of the
backing directory; the private directory and the program's xattrs do not exist here; a regular file's bytes, size and
times go through Disks and nothing else.  Failures are OSError or VmfsStubError.

Permissions are the kernel's work (default_permissions, with POSIX ACLs): it has checked them before a request comes.
Must not know how requests arrive, and never touches the mount itself.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from vmfs_stub.mount import entries, syscalls
from vmfs_stub.mount.attributes import Attributes, Change, Requester
from vmfs_stub.mount.callers import identify, is_in_group
from vmfs_stub.mount.disks import Disks, DiskT, FileCalls, FileThreads, PathDisks, opener
from vmfs_stub.mount.inodes import SETID, Inodes
from vmfs_stub.mount.listing import Emit, read_directory
from vmfs_stub.mount.nodes import ROOT, DirectoryHandle, FileHandle, HandleTable, Node
from vmfs_stub.mount.runner import Runner
from vmfs_stub.mount.settings import MountSettings
from vmfs_stub.mount.xattrs import Xattrs
from vmfs_stub.services.mount_usage import MountUsage

_REMOVED_TIMEOUT_S: Final = 30


class Filesystem:
    """Operations on one backing directory.

    ``inodes`` and ``handles`` are what the kernel knows.  ``attributes_changed`` is called with a node number when
    attributes change in a way that the kernel does not expect; who serves sets it.
    """

    def __init__(
        self,
        backing: Path,
        *,
        disks: Disks[DiskT],
        threads: FileThreads,
        files: FileCalls,
        settings: MountSettings,
        usage: MountUsage | None = None,
    ) -> None:
        """Open the backing directory, whose private directory must exist by now if there is to be one.

        ``usage`` is told of what hypervisors do with the disks.
        """
        self._usage = usage or MountUsage(())
        self._disks: PathDisks = disks
        self._open_disk = opener(disks)
        self._run = Runner(threads, files)
        self.inodes = Inodes(backing, disks=disks, run=self._run, settings=settings)
        self.handles = HandleTable()
        self.attributes_changed: Callable[[int], None] = lambda _ino: None
        try:
            self._xattrs = Xattrs(self._run, root_fd=self.inodes.root_fd)
        except BaseException:
            self.inodes.nodes.close()
            raise
        self._node = self.inodes.nodes.__getitem__

    async def aclose(self) -> None:
        """Release what is still open and close all descriptors; no request may be in progress."""
        with trio.CancelScope(shield=True):
            while self.handles.files:
                await self.release(next(iter(self.handles.files)))
        self.inodes.nodes.close()

    # Names

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """Find a name and count the lookup; OSError ENOENT when there is none."""
        return self.inodes.known(await self.inodes.find(self._node(parent), name))

    async def mkdir(self, parent: int, name: bytes, mode: int, owner: Requester) -> Attributes:
        """Make a directory."""
        directory = self.inodes.directory_for_new_inode(parent, name)
        return self.inodes.known(
            await self._run("mount.mkdir", entries.make_directory, directory.fd, name, mode, owner)
        )

    async def mknod(self, parent: int, name: bytes, mode: int, device: int, owner: Requester) -> Attributes:
        """Make a file, FIFO, socket or device."""
        directory = self.inodes.directory_for_new_inode(parent, name)
        return self.inodes.known(
            await self._run("mount.mknod", entries.make_node, directory.fd, name, mode, device, owner)
        )

    async def symlink(self, parent: int, name: bytes, target: bytes, owner: Requester) -> Attributes:
        """Make a symbolic link; its target is text, which only the kernel follows, through the mount."""
        directory = self.inodes.directory_for_new_inode(parent, name)
        return self.inodes.known(
            await self._run("mount.symlink", entries.make_symlink, directory.fd, name, target, owner)
        )

    async def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        """Give an inode another name."""
        node, directory = self._node(ino), self.inodes.directory_for_new(parent, name)
        # With a directory descriptor Python calls linkat with AT_SYMLINK_FOLLOW, which follows the procfs link to
        # the inode itself, and no further.
        await self._run("mount.link", os.link, node.proc_path, name, dst_dir_fd=directory.fd)
        node.unlinked = False
        node.lookups += 1
        return self.inodes.attributes(node)

    async def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link."""
        return await self._run("mount.readlink", os.readlink, b"", dir_fd=self._node(ino).fd)

    async def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name of what is not a directory."""
        directory = self._node(parent)
        async with self._named(directory, name) as target, self._removal(target):
            await self._run("mount.unlink", os.unlink, name, dir_fd=directory.fd)

    async def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        directory = self._node(parent)
        async with self._named(directory, name):
            await self._run("mount.rmdir", os.rmdir, name, dir_fd=directory.fd)

    async def rename(self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, *, flags: int) -> None:
        """Rename; ``flags`` are 0, RENAME_NOREPLACE or RENAME_EXCHANGE."""
        old_directory, new_directory = self._node(old_parent), self.inodes.directory_for_new(new_parent, new_name)
        if flags & ~(syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "unknown flags")

        async def do() -> None:
            await self._run(
                "mount.rename", syscalls.rename, old_directory.fd, old_name, new_directory.fd, new_name, flags=flags
            )

        async with self._named(old_directory, old_name) as source:
            try:
                replaced = await self.inodes.find(new_directory, new_name)
            except FileNotFoundError:
                await do()
                return
            try:
                if flags or replaced.st.st_ino == source.st.st_ino:
                    await do()
                else:
                    async with self._removal(replaced):
                        await do()
            finally:
                await self.inodes.close_descriptors([replaced.fd])

    # Attributes

    async def getattr(self, ino: int) -> Attributes:
        """Attributes of a node."""
        return self.inodes.attributes(self._node(ino))

    async def setattr(self, ino: int, change: Change, requester: Requester) -> Attributes:
        """Change attributes: size first, which may fail; owner before mode, since it clears set-id bits."""
        node = self._node(ino)
        if change.size is not None:
            await self._truncate(node, change.size, change.handle)
            if node.has_setid:
                await self._clear_setid(node, requester)
        if node.ino == ROOT:
            await self.inodes.change_top(mode=change.mode, uid=change.uid, gid=change.gid)
            change = replace(change, mode=None, uid=None, gid=None)
        if change.uid is not None or change.gid is not None or self._is_touch(node, change, requester):
            uid, gid = (-1 if each is None else each for each in (change.uid, change.gid))
            if node.has_setid:
                await self._clear_setid(node, requester)
            await self._run("mount.chown", syscalls.change_owner, node.fd, uid=uid, gid=gid)
        if change.mode is not None:
            await self._run("mount.chmod", os.chmod, node.proc_path, stat.S_IMODE(change.mode))
        if change.atime_ns is not None or change.mtime_ns is not None:
            if node.is_regular:
                await self._disks.set_times(node.fd, atime_ns=change.atime_ns, mtime_ns=change.mtime_ns)
            else:
                await self._run(
                    "mount.utimens",
                    syscalls.change_times,
                    node.fd,
                    atime_ns=change.atime_ns,
                    mtime_ns=change.mtime_ns,
                )
        return self.inodes.attributes(node)

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        """Value of an xattr."""
        return await self._xattrs.get(self._node(ino), name)

    async def listxattr(self, ino: int) -> list[bytes]:
        """Names of the xattrs."""
        return await self._xattrs.names(self._node(ino))

    async def setxattr(self, ino: int, name: bytes, value: bytes, requester: Requester) -> None:
        """Set an xattr."""
        await self._xattrs.set(self._node(ino), name, value, requester)

    async def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an xattr."""
        await self._xattrs.remove(self._node(ino), name)

    async def statfs(self) -> os.statvfs_result:
        """Space of the backing filesystem."""
        return await self._run("mount.statfs", os.fstatvfs, self.inodes.root_fd)

    # Files

    async def open(self, ino: int, flags: int, requester: Requester) -> int:
        """Open a regular file; the number of the handle."""
        node = self._node(ino)
        if not node.is_regular:
            raise OSError(errno.ENXIO, "not a regular file")
        caller = identify(pid=requester.pid, uid=requester.uid)
        opened = await self._open_disk(node.fd, flags & os.O_ACCMODE != os.O_RDONLY, caller)
        return self.handles.add_file(FileHandle(node, opened, requester, self._usage.opened(node.ino, caller)))

    async def create(self, parent: int, name: bytes, mode: int, flags: int, owner: Requester) -> tuple[int, Attributes]:
        """Make and open a regular file: handle and attributes, one lookup counted.

        The kernel asks for this when it believes that there is no such name.  Should there be one after all, it must
        look again and check permissions before it may be opened: ESTALE makes it do so.
        """
        directory = self.inodes.directory_for_new_inode(parent, name)
        kind_mode = stat.S_IFREG | stat.S_IMODE(mode)
        try:
            made = await self._run("mount.create", entries.make_node, directory.fd, name, kind_mode, 0, owner)
        except FileExistsError as exc:
            raise OSError(errno.EEXIST if flags & os.O_EXCL else errno.ESTALE, "exists") from exc
        attributes = self.inodes.known(made)
        try:
            return await self.open(attributes.ino, flags, owner), attributes
        except BaseException:
            fd = self.inodes.forget(attributes.ino, 1)
            if fd is not None:
                os.close(fd)
            raise

    async def read(self, handle: int, offset: int, size: int) -> bytes | bytearray:
        """Read; short only at end of file."""
        file = self.handles.files[handle]
        file.use.requests += 1
        data = await file.opened.disk.read(offset, size)
        file.use.read_bytes += len(data)
        return data

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        """Write all of ``data``."""
        file = self.handles.files[handle]
        file.use.requests += 1
        written = await file.opened.disk.write(offset, data)
        file.use.written_bytes += written
        if file.node.has_setid:
            await self._clear_setid(file.node, file.requester)
        return written

    async def fsync(self, handle: int, *, data_only: bool) -> None:
        """Make durable what was written."""
        await self.handles.files[handle].opened.disk.sync(data_only=data_only)

    async def release(self, handle: int) -> None:
        """Close a file."""
        file = self.handles.files.pop(handle)
        try:
            await file.opened.release()
        finally:
            self._usage.closed(file.node.ino, file.use)

    # Directories

    async def opendir(self, ino: int) -> int:
        """Open a directory; the number of the handle."""
        return self.handles.add_directory(DirectoryHandle(self._node(ino)))

    async def readdir(self, handle: int, offset: int, emit: Emit) -> None:
        """Give entries to ``emit`` until it answers False or there are no more; see listing."""
        await read_directory(self.inodes, self._run, self.handles.directories[handle], offset, emit)

    async def releasedir(self, handle: int) -> None:
        """Close a directory."""
        del self.handles.directories[handle]

    async def fsyncdir(self, handle: int) -> None:
        """Make durable what changed in a directory."""
        await self._run("mount.fsyncdir", entries.sync_directory, self.handles.directories[handle].node.fd)

    # Inside

    @asynccontextmanager
    async def _named(self, directory: Node, name: bytes) -> AsyncIterator[entries.Entry]:
        """What a name refers to now; the kernel holds the directory's lock, so it stays so."""
        entry = await self.inodes.find(directory, name)
        try:
            yield entry
        finally:
            await self.inodes.close_descriptors([entry.fd])

    @asynccontextmanager
    async def _removal(self, target: entries.Entry) -> AsyncIterator[None]:
        """Tell Disks before and after a name of a regular file goes: which is the last, they decide."""
        if not stat.S_ISREG(target.st.st_mode):
            yield
            return
        ino = target.st.st_ino
        is_last = await self._disks.removing(target.fd)
        try:
            yield
            node = self.inodes.nodes.find(ino)
            if node is not None and is_last:
                node.unlinked = True
        finally:
            with trio.move_on_after(_REMOVED_TIMEOUT_S, shield=True):
                await self._disks.removed(target.fd)

    async def _truncate(self, node: Node, size: int, handle: int | None) -> None:
        file = None if handle is None else self.handles.files.get(handle)
        if file is not None:
            await file.opened.disk.truncate(size)
        else:
            await self._disks.truncate(node.fd, size)

    def _is_touch(self, node: Node, change: Change, requester: Requester) -> bool:
        """Whether this is chown to nobody, which moves ctime and clears set-id bits.

        The kernel asks for the same nothing before a write clears set-id bits, and checks no owner then.  So for who
        may not change the mode nothing is done: the write that follows clears them, and chown has no business to.
        """
        return change.is_empty and (not node.has_setid or requester.uid in {0, os.fstat(node.fd).st_uid})

    async def _clear_setid(self, node: Node, requester: Requester) -> None:
        """Take set-id bits from a file that somebody without privileges changed, as the kernel does elsewhere.

        The daemon writes as root, so the backing filesystem leaves them.
        """
        if requester.uid == 0:
            return
        st = os.fstat(node.fd)
        kept = st.st_mode & ~stat.S_ISUID
        if st.st_mode & stat.S_IXGRP or not is_in_group(st.st_gid, requester):
            kept &= ~stat.S_ISGID
        node.has_setid = kept & SETID != 0
        if kept != st.st_mode:
            await self._run("mount.chmod", os.chmod, node.proc_path, stat.S_IMODE(kept))
            self.attributes_changed(node.ino)
