"""What programs do through the mount, by path: the filesystem's operations without FUSE, called as the kernel would."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tests.datastore_harness import Services
from tests.model.contents import Contents
from vmfs_stub.mount.attributes import Change, Requester
from vmfs_stub.mount.filesystem import Filesystem
from vmfs_stub.mount.nodes import ROOT
from vmfs_stub.mount.settings import MountSettings
from vmfs_stub.services.disk import Disk

REQUESTER = Requester(pid=1, uid=0, gid=0)


@dataclass(eq=False)
class Handle:
    """An open file: the number of the handle and of the inode, what the daemon has for it, what it must hold."""

    number: int
    ino: int
    disk: Disk
    contents: Contents


class Guest:
    """Programs that use the datastore in one life of its daemon.  Methods raise OSError and VmfsStubError."""

    def __init__(self, services: Services) -> None:
        self._fs = Filesystem(
            services.rig.backing,
            disks=services.disks,
            threads=services.threads,
            files=services.files,
            settings=MountSettings(),
        )
        self._directories: dict[str, int] = {}
        self.handles: list[Handle] = []

    async def end(self) -> None:
        """Everything is closed, as at the end of the mount."""
        for handle in self.handles.copy():
            await self.close(handle)
        await self._fs.aclose()

    def drop(self) -> None:
        """The daemon was killed."""
        self._fs.inodes.nodes.close()

    # Files

    async def open(self, path: str, contents: Contents) -> Handle:
        ino = await self._look_up(path)
        try:
            number = await self._fs.open(ino, os.O_RDWR, REQUESTER)
        except BaseException:
            await self._forget(ino)
            raise
        return self._opened(number, ino, contents)

    async def create(self, path: str, contents: Contents) -> Handle:
        directory, name = await self._parent(path)
        number, attributes = await self._fs.create(directory, name, 0o600, os.O_RDWR | os.O_EXCL, REQUESTER)
        return self._opened(number, attributes.ino, contents)

    def _opened(self, number: int, ino: int, contents: Contents) -> Handle:
        disk = self._fs.handles.files[number].opened.disk
        assert isinstance(disk, Disk)
        handle = Handle(number, ino, disk, contents)
        self.handles.append(handle)
        return handle

    async def close(self, handle: Handle) -> None:
        self.handles.remove(handle)
        await self._fs.release(handle.number)
        await self._forget(handle.ino)

    async def read(self, handle: Handle, offset: int, size: int) -> bytes:
        return bytes(await self._fs.read(handle.number, offset, size))

    async def write(self, handle: Handle, offset: int, data: bytes) -> None:
        if await self._fs.write(handle.number, offset, data) != len(data):
            raise AssertionError("a short write")

    async def sync(self, handle: Handle, *, data_only: bool) -> None:
        await self._fs.fsync(handle.number, data_only=data_only)

    async def truncate(self, path: str | Handle, size: int) -> None:
        await self._change(path, size=size)

    async def set_mtime(self, path: str | Handle, mtime_ns: int) -> None:
        await self._change(path, mtime_ns=mtime_ns)

    async def _change(self, path: str | Handle, *, size: int | None = None, mtime_ns: int | None = None) -> None:
        if isinstance(path, Handle):
            change = Change(size=size, mtime_ns=mtime_ns, handle=path.number)
            await self._fs.setattr(path.ino, change, REQUESTER)
            return
        ino = await self._look_up(path)
        try:
            await self._fs.setattr(ino, Change(size=size, mtime_ns=mtime_ns), REQUESTER)
        finally:
            await self._forget(ino)

    # Names

    async def unlink(self, path: str) -> None:
        await self._fs.unlink(*await self._parent(path))

    async def rename(self, old: str, new: str, *, flags: int = 0) -> None:
        (old_directory, old_name), (new_directory, new_name) = await self._parent(old), await self._parent(new)
        await self._fs.rename(old_directory, old_name, new_directory, new_name, flags=flags)

    async def link(self, old: str, new: str) -> None:
        ino = await self._look_up(old)
        try:
            await self._fs.link(ino, *await self._parent(new))
            await self._forget(ino)
        finally:
            await self._forget(ino)

    async def sync_directory(self, path: str) -> None:
        handle = await self._fs.opendir(await self._directory(path))
        await self._fs.fsyncdir(handle)
        await self._fs.releasedir(handle)

    # Inside

    async def _directory(self, path: str) -> int:
        if path not in self._directories:
            self._directories[path] = (await self._fs.lookup(ROOT, os.fsencode(path))).ino
        return self._directories[path]

    async def _parent(self, path: str) -> tuple[int, bytes]:
        directory, _, name = path.rpartition("/")
        return await self._directory(directory), os.fsencode(name)

    async def _look_up(self, path: str) -> int:
        return (await self._fs.lookup(*await self._parent(path))).ino

    async def _forget(self, ino: int) -> None:
        fd = self._fs.inodes.forget(ino, 1)
        if fd is not None:
            await self._fs.inodes.close_descriptors([fd])
