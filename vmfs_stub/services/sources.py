"""The files of one VM, reserved for a backup: the VM is the one meant, nobody has them open, their data is synced.

Or kept open for the backup of a VM that is in use: guests may have them open, and who does writes through the mount.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from vmfs_stub.core.errors import Abandoned, InUse, PrimaryIOError
from vmfs_stub.core.ids import PlaceholderId, PointId
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.identity import read_vm_id
from vmfs_stub.inventory.vm import Vm, VmFile
from vmfs_stub.primary.durable_map import map_bytes
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.disk import Disk
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.reservation import Reservation, end_watch, watch_lease
from vmfs_stub.services.stored_files import other_entries, public_xattrs, with_files_of
from vmfs_stub.services.threads import Threads

MAP_BYTES_CHEAP = 1 << 20
"""A map of this size (of a disk of 15 GiB) is never a reason against a placeholder."""


@dataclass(frozen=True, slots=True)
class Source:
    """One reserved file, and what it looked like when it was reserved; ``names`` are relative to the VM.

    ``placeholder_id`` is that of the placeholder that it is to become; None when it stays as it is.  ``is_apt`` when an
    archive makes one of it.
    """

    file: VmFile
    names: tuple[str, ...]
    reservation: Reservation
    st: os.stat_result
    mtime_ns: int
    xattrs: dict[str, bytes]
    is_apt: bool
    placeholder_id: PlaceholderId | None

    @property
    def disk(self) -> Disk:
        return self.reservation.disk


@dataclass(frozen=True, slots=True)
class KeptSource:
    """One file that is open for a backup, and may be used by guests; ``names`` are relative to the VM."""

    file: VmFile
    names: tuple[str, ...]
    disk: Disk
    xattrs: dict[str, bytes]


class Sources:
    """Reserves the files of VMs, and sees that they are still those that were reserved."""

    def __init__(
        self, *, files: FileCalls, threads: Threads, disks: Disks, backing: Path, placeholder_bytes_min: int
    ) -> None:
        self._files = files
        self._threads = threads
        self._disks = disks
        self._backing = backing
        self.placeholder_bytes_min = placeholder_bytes_min

    async def as_it_is(self, vm: Vm) -> Vm:
        """The VM with the files that its directory has now: it was found when the job began, perhaps hours ago.

        Raises Abandoned, PrimaryIOError.
        """
        return await self._threads.files(self._as_it_is, vm) if vm.is_directory else vm

    def _as_it_is(self, vm: Vm) -> Vm:
        self._check_still_same_vm(vm)
        return with_files_of(vm, other_entries(self._backing, vm, files=self._files))

    async def reserve(self, vm: Vm, scope: trio.CancelScope, stack: AsyncExitStack, *, archive: bool) -> list[Source]:
        """Reserve every file of ``vm`` until ``stack`` ends; ``scope`` is cancelled when an open wins.

        Raises InUse, Abandoned (the VM is not what it was when the job began), PrimaryError.
        """
        sources = []
        backing_fd = await self._threads.files(self._open_backing, vm)
        try:
            await self._threads.files(self._check_same_vm, vm, backing_fd)
            for files in _by_inode(vm.files):
                file = files[0]
                path_fd = await self._threads.files(
                    self._files.call, "archive.open", open_beneath, backing_fd, file.path
                )
                try:
                    _check_same_file(vm, file, path_fd)
                    reservation = await stack.enter_async_context(self._disks.reserve(path_fd, scope))
                finally:
                    os.close(path_fd)
                placeholder = reservation.disk.placeholder
                if placeholder is not None:
                    await placeholder.sync()
                else:
                    await self._sync(reservation.disk)
                sources.append(await self._threads.files(self._source, files, reservation, archive))
        except OSError as exc:
            raise PrimaryIOError(f"VM {vm.name}: cannot open its files: {exc}") from exc
        finally:
            os.close(backing_fd)
        return sources

    async def keep(self, vm: Vm, stack: AsyncExitStack) -> list[KeptSource]:
        """Open every file of ``vm``, which may be in use, until ``stack`` ends.

        Raises InUse (somebody has one open, but not through the mount; or another job), Abandoned, PrimaryError.
        """
        kept: list[KeptSource] = []
        backing_fd = await self._threads.files(self._open_backing, vm)
        try:
            await self._threads.files(self._check_same_vm, vm, backing_fd)
            for files in _by_inode(vm.files):
                path_fd = await self._threads.files(
                    self._files.call, "archive.open", open_beneath, backing_fd, files[0].path
                )
                try:
                    _check_same_file(vm, files[0], path_fd)
                    disk = await self._disks.keep_beside(path_fd)
                finally:
                    os.close(path_fd)
                stack.push_async_callback(self._disks.let_go, disk)
                if disk.is_backed_up:
                    raise InUse(f"{disk.label} is being backed up by another job")
                disk.is_backed_up = True
                stack.callback(setattr, disk, "is_backed_up", False)
                watch_lease(self._files, disk)
                stack.callback(end_watch, disk)
                xattrs = await self._threads.files(public_xattrs, disk.fd, files=self._files)
                kept.append(KeptSource(files[0], tuple(file.relative for file in files), disk, xattrs))
        except OSError as exc:
            raise PrimaryIOError(f"VM {vm.name}: cannot open its files: {exc}") from exc
        finally:
            os.close(backing_fd)
        return kept

    def points(self, vm: Vm, sources: Sequence[Source | KeptSource]) -> set[PointId | None]:
        """Of which restore points of this VM the files are placeholders now; None for those that are none of it."""
        known = [self._disks.placeholders.get(source.disk.ino) for source in sources]
        records = [None if each is None else each.record for each in known]
        return {r.point_id if r is not None and r.vm_id == vm.id else None for r in records}

    async def check_still_same_vm(self, vm: Vm) -> None:
        """See that the VM is where it was.  Raises Abandoned, PrimaryIOError."""
        await self._threads.files(self._check_still_same_vm, vm)

    async def sync(self, disk: Disk) -> None:
        """Make the data of an ordinary file durable.  Raises OSError."""
        await self._sync(disk)

    async def _sync(self, disk: Disk) -> None:
        try:
            await self._threads.files(self._files.call, "archive.sync", os.fdatasync, disk.fd)
        except OSError:
            await disk.changes.doubt()
            raise

    def _source(self, files: Sequence[VmFile], reservation: Reservation, archive: bool) -> Source:
        disk = reservation.disk
        st = disk.fstat()
        mtime_ns = st.st_mtime_ns if disk.placeholder is None else disk.placeholder.mtime_ns
        is_worth_it = is_worth_placeholder(st.st_size, st.st_blocks * 512, bytes_min=self.placeholder_bytes_min)
        is_apt = disk.placeholder is not None or is_worth_it
        placeholder_id = PlaceholderId(secrets.token_hex(16)) if archive and is_apt else None
        names = tuple(file.relative for file in files)
        xattrs = public_xattrs(disk.fd, files=self._files)
        return Source(files[0], names, reservation, st, mtime_ns, xattrs, is_apt, placeholder_id)

    async def check_unchanged(self, vm: Vm, sources: Sequence[Source]) -> None:
        """See that nobody has opened a file since, and that the VM is where it was, with the files that it had.

        Raises Abandoned, PrimaryIOError.
        """
        for source in sources:
            if not source.reservation.is_intact:
                raise Abandoned(f"VM {vm.name}: {source.file.path} was opened during the backup; nothing was changed")
        await self._threads.files(self._check_still_same_vm, vm)
        if vm.is_directory:
            found = await self._threads.files(other_entries, self._backing, vm, files=self._files)
            if not found.has_files(vm):
                raise Abandoned(f"VM {vm.name}: files of it were made, renamed or removed meanwhile; run it again")

    def _check_still_same_vm(self, vm: Vm) -> None:
        backing_fd = self._open_backing(vm)
        try:
            self._check_same_vm(vm, backing_fd)
        finally:
            os.close(backing_fd)

    def _open_backing(self, vm: Vm) -> int:
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            return self._files.call("archive.backing", os.open, self._backing, flags)
        except OSError as exc:
            raise PrimaryIOError(f"VM {vm.name}: cannot open the backing directory: {exc.strerror}") from exc

    def _check_same_vm(self, vm: Vm, backing_fd: int) -> None:
        """See that the VM is where it was found: its users can rename it, and put another one in its place.

        Raises Abandoned, PrimaryIOError.
        """
        for top in vm.tops:
            try:
                path_fd = self._files.call("archive.look", open_beneath, backing_fd, top)
            except OSError as exc:
                if exc.errno in (errno.ENOENT, errno.ENOTDIR):
                    raise Abandoned(f"VM {vm.name} was renamed or removed since the job began; run it again") from exc
                raise PrimaryIOError(f"VM {vm.name}: cannot look whether it is still there: {exc.strerror}") from exc
            try:
                if read_vm_id(path_fd, files=self._files) != vm.id:
                    raise Abandoned(f"VM {vm.name}: another VM has its name since the job began; run it again")
            finally:
                os.close(path_fd)


def is_worth_placeholder(size: int, occupied_bytes: int, *, bytes_min: int) -> bool:
    """Whether a placeholder saves more than it costs: a huge file of holes needs a map and has nothing to give.

    The file has ``size`` bytes, which take ``occupied_bytes``; below ``bytes_min`` none is made.
    """
    cost_bytes = map_bytes(size)
    return size >= bytes_min and (cost_bytes <= MAP_BYTES_CHEAP or cost_bytes <= occupied_bytes)


def _check_same_file(vm: Vm, file: VmFile, path_fd: int) -> None:
    if os.fstat(path_fd).st_ino != file.ino:
        raise Abandoned(f"VM {vm.name}: {printable(file.path)} was replaced since the job began; run it again")


def _by_inode(files: Sequence[VmFile]) -> list[list[VmFile]]:
    """The files of a VM, those that are names of one inode together."""
    found: dict[int, list[VmFile]] = {}
    for file in files:
        found.setdefault(file.ino, []).append(file)
    return list(found.values())
