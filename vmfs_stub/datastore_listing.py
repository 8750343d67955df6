"""Which VMs and disks a datastore has, in which state they are, and who opened them last."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.messages import DiskRow, DiskState
from vmfs_stub.core.errors import VmfsStubError
from vmfs_stub.core.ids import VmId
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import Scan, UnreadVm, Vm, VmFile
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.disk import Caller, Disk
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

ACCESS_INTERVAL_S = 10.0
"""How often accesses go into the catalog."""
POINT_COUNT_WAIT_S = 2.0
"""How long `ls` waits for the store to count restore points; after that it shows what it knew before."""


class Listing:
    """What `ls` shows; ``unread`` is what looks like a VM and could not be read when it was last looked for.

    ``backing_fd`` is the backing directory, and stays the caller's.
    """

    def __init__(
        self,
        *,
        config: Config,
        threads: Threads,
        inventory: DirectoryInventory,
        catalog: Catalog,
        store: Store,
        services: DiskServices,
        backing_fd: int,
    ) -> None:
        self._mountpoint = config.datastore.mountpoint
        self._threads = threads
        self._inventory = inventory
        self._catalog = catalog
        self._store = store
        self._disks = services.disks
        self._recall = services.recall
        self._hydration = services.hydration
        self._files = services.files
        self._backing_fd = backing_fd
        self._point_counts: dict[VmId, int] = {}
        self._accessed: dict[int, tuple[Caller, float]] = {}
        self.unread: tuple[UnreadVm, ...] = ()

    async def disks(self, vm: str | None) -> list[DiskRow]:
        """One row per disk, of all VMs or of the one named; raises VmNotFound, AmbiguousName."""
        scan = await self.scan()
        vms = scan.vms if vm is None else [scan.find(vm)]
        await self._count_points()
        accesses: dict[tuple[VmId, str], float] = {}
        with only_warned("the last accesses could not be read"):
            accesses = await self._threads.files(self._catalog.last_accesses)
        return await self._threads.files(self._rows, vms, accesses)

    async def scan(self) -> Scan:
        """All VMs; those that cannot be read are told of once.  Raises PrimaryIOError."""
        scan = await self._threads.files(self._inventory.scan)
        for unread in scan.unread:
            if unread.path not in {known.path for known in self.unread}:
                log.warning("%s", unread.error)
        self.unread = scan.unread
        with only_warned("the VMs could not be recorded"):
            seen = [(vm.id, vm.name) for vm in scan.vms]
            await self._threads.files(self._catalog.see_vms, seen, now=time.time())
        return scan

    async def _count_points(self) -> None:
        with trio.move_on_after(POINT_COUNT_WAIT_S):
            try:
                self._point_counts = await self._threads.store(self._store.point_counts)
            except VmfsStubError as exc:
                log.warning("restore points could not be counted: %s", exc)

    def _rows(self, vms: Sequence[Vm], accesses: dict[tuple[VmId, str], float]) -> list[DiskRow]:
        rows = []
        for vm in vms:
            for file in vm.files:
                try:
                    st = self._stat(file)
                except OSError as exc:
                    if not isinstance(exc, FileNotFoundError):
                        log.warning("%s cannot be listed: %s", disk_label(file.path), exc.strerror)
                    continue
                pending = self._accessed.get(st.st_ino)
                last = max(accesses.get((vm.id, printable(file.relative)), 0.0), pending[1] if pending else 0.0)
                rows.append(
                    DiskRow(
                        vm=vm.name,
                        disk=file.relative,
                        path=str(self._mountpoint / file.path),
                        state=self.state(st.st_ino),
                        size_bytes=st.st_size,
                        resident_bytes=min(st.st_size, st.st_blocks * 512),
                        restore_points=self._point_counts.get(vm.id, 0),
                        last_access=last or None,
                        protected=vm.is_protected,
                    )
                )
        return rows

    def _stat(self, file: VmFile) -> os.stat_result:
        path_fd = self._files.call("list.open", open_beneath, self._backing_fd, file.path)
        try:
            return os.fstat(path_fd)
        finally:
            os.close(path_fd)

    def state(self, ino: int) -> DiskState:
        """Of the disk with that inode."""
        if self._disks.placeholders.get(ino) is None:
            return "resident"
        disk = self._disks.get(ino)
        placeholder = None if disk is None else disk.placeholder
        busy = self._hydration.is_hydrating(ino) or (placeholder is not None and self._recall.is_recalling(placeholder))
        return "recalling" if busy else "placeholder"

    def saved_bytes(self, vms: Sequence[Vm]) -> int:
        """What placeholders would take on primary and do not; blocks.  What cannot be looked at counts for nothing."""
        saved = 0
        for vm in vms:
            for file in vm.files:
                if self._disks.placeholders.get(file.ino) is not None:
                    with suppress(OSError):
                        st = self._stat(file)
                        saved += max(0, st.st_size - st.st_blocks * 512)
        return saved

    async def backed_up(self, vm_id: VmId) -> None:
        """A restore point of a VM was made."""
        with only_warned("a backup could not be recorded"):
            await self._threads.files(self._catalog.record_point, vm_id, time.time())

    async def adopted(self, vm_id: VmId, name: str, *, created_s: float) -> None:
        """A VM of the store is here now, as placeholders of a restore point that was made then."""
        now_s = time.time()

        def record() -> None:
            self._catalog.see_vms([(vm_id, name)], now=now_s)
            self._catalog.record_point(vm_id, created_s)

        with only_warned("an adoption could not be recorded"):
            await self._threads.files(record)

    def opened(self, disk: Disk, caller: Caller) -> None:
        """Somebody opens a disk."""
        self._accessed[disk.ino] = (caller, time.time())

    async def record_accesses(self) -> None:
        """Write to the catalog, now and then, who opened which disk."""
        while True:
            await trio.sleep(ACCESS_INTERVAL_S)
            accessed, self._accessed = self._accessed, {}
            if accessed:
                with only_warned("accesses could not be recorded"):
                    await self._threads.files(self._record, (await self.scan()).vms, accessed)

    def _record(self, vms: Sequence[Vm], accessed: dict[int, tuple[Caller, float]]) -> None:
        for vm in vms:
            for file in vm.files:
                if file.ino in accessed:
                    caller, at = accessed[file.ino]
                    executable, uid = caller.executable, caller.uid
                    self._catalog.record_access(vm.id, file.relative, executable=executable, uid=uid, now=at)


@contextmanager
def only_warned(what: str) -> Iterator[None]:
    """History is worth a warning, never a failed command."""
    try:
        yield
    except VmfsStubError as exc:
        log.warning("%s: %s", what, exc)
