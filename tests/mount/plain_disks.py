"""Disks without placeholders: real files, and knobs that a test turns by naming a file.

``blocked*`` blocks every read until ``PlainDisks.unblocked`` is set; ``bug*`` raises a programming error on read;
``raise-<Name>`` raises that failure of core.errors on read.  Each disk is one descriptor for all opens of an inode.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import trio

from vmfs_stub.core import errors
from vmfs_stub.mount import syscalls
from vmfs_stub.services.disk import Caller

P = ParamSpec("P")
T = TypeVar("T")


def name_of(fd: int) -> str:
    return Path(f"/proc/self/fd/{fd}").readlink().name


class PlainThreads:
    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(16)

    async def files(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await trio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._limiter)


class PlainDisk:
    def __init__(self, disks: PlainDisks, fd: int) -> None:
        self._disks = disks
        self.fd = fd
        self.ino = os.fstat(fd).st_ino
        self.opens = 0
        self.name = name_of(fd)

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        if self.name.startswith(("blocked", "bug", "raise-")):
            await self._disks.obey(self.name)
        buffer = bytearray(size)
        try:
            count = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
            if count == size:
                return buffer
        except BlockingIOError:
            pass
        return await self._disks.threads.files(os.pread, self.fd, size, offset)

    async def write(self, offset: int, data: bytes) -> int:
        return await self._disks.threads.files(os.pwrite, self.fd, data, offset)

    async def truncate(self, size: int) -> None:
        await self._disks.threads.files(os.ftruncate, self.fd, size)

    async def sync(self, *, data_only: bool) -> None:
        await self._disks.threads.files(os.fdatasync if data_only else os.fsync, self.fd)

    def fstat(self) -> os.stat_result:
        return os.fstat(self.fd)


class PlainOverride:
    def __init__(self, blocks: int, mtime_ns: int) -> None:
        self.blocks = blocks
        self.mtime_ns = mtime_ns


class PlainDisks:
    """``events`` lists what the mount asked for; ``overrides`` by inode is what stat_override answers."""

    def __init__(self, threads: PlainThreads) -> None:
        self.threads = threads
        self.unblocked = trio.Event()
        self.blocked = 0
        self.events: list[str] = []
        self.callers: list[Caller] = []
        self.overrides: dict[int, PlainOverride] = {}
        self.open_disks: dict[int, PlainDisk] = {}

    async def obey(self, name: str) -> None:
        if name.startswith("blocked") and not self.unblocked.is_set():
            self.blocked += 1
            try:
                await self.unblocked.wait()
            finally:
                self.blocked -= 1
        elif name.startswith("bug"):
            raise ZeroDivisionError("planted")
        elif name.startswith("raise-"):
            raise getattr(errors, name.removeprefix("raise-"))("planted")

    async def open(self, path_fd: int, *, writable: bool, caller: Caller) -> PlainDisk:
        self.callers.append(caller)
        ino = os.fstat(path_fd).st_ino
        disk = self.open_disks.get(ino)
        if disk is None:
            fd = await self.threads.files(os.open, f"/proc/self/fd/{path_fd}", os.O_RDWR | os.O_CLOEXEC)
            disk = self.open_disks.setdefault(ino, PlainDisk(self, fd))
            if disk.fd != fd:
                os.close(fd)
        disk.opens += 1
        return disk

    async def release(self, disk: PlainDisk) -> None:
        disk.opens -= 1
        if disk.opens == 0:
            del self.open_disks[disk.ino]
            os.close(disk.fd)

    def stat_override(self, st: os.stat_result) -> PlainOverride | None:
        return self.overrides.get(st.st_ino)

    async def truncate(self, path_fd: int, size: int) -> None:
        await self.threads.files(os.truncate, f"/proc/self/fd/{path_fd}", size)

    async def set_times(self, path_fd: int, *, atime_ns: int | None, mtime_ns: int | None) -> None:
        syscalls.change_times(path_fd, atime_ns=atime_ns, mtime_ns=mtime_ns)

    async def removing(self, path_fd: int) -> bool:
        self.events.append(f"removing {name_of(path_fd)}")
        return os.fstat(path_fd).st_nlink == 1

    async def removed(self, path_fd: int) -> None:
        self.events.append(f"removed nlink={os.fstat(path_fd).st_nlink}")
