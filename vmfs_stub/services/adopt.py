"""Adopting a VM of the store: placeholders here of a restore point that another host made, or this one before it was
lost.

Order, and what a crash between any two steps leaves:
1. the VM is not here, its name is free, its newest state may be taken (`adoption_choice`);
2. the VM is claimed here, if that is still so;                  — crash: it is adopted here again without more ado
3. all files are made in a folder of the private directory (`adoption`): small ones with their bytes, for each of the
   others a sparse file and its durable map, *prepared*;            — crash: folder and maps are removed at start-up
4. the pins; then the point is neither forgotten nor gone;         — crash: they are removed with the maps
5. records, and the VM's identity, which is the one it had; all of it durable;
6. one rename into the backing directory: the commit point;        — crash: all is here, or nothing is
7. the directory synced, the maps *punched*;                       — crash: start-up sees to both
8. the claim is set free at this point, if any placeholder was made: nothing else is kept from use elsewhere.
What fails before 6 is undone, and the claim set free at the point that it had. One VM at a time.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from vmfs_stub.core.errors import (
    AlreadyExists,
    NoSpace,
    NotFound,
    PointNotFound,
    PrimaryIOError,
    Refused,
    VmfsStubError,
)
from vmfs_stub.core.ids import PointId, VmId
from vmfs_stub.core.names import printable
from vmfs_stub.inventory.directory import NO_VMS, DirectoryInventory
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services.adoption import Absent, Adoption, needed_bytes, top_of
from vmfs_stub.services.adoption_choice import Told, chosen_point
from vmfs_stub.services.backup_report import ArchiveSettings
from vmfs_stub.services.claims import Claims, kept_for
from vmfs_stub.services.disk_name import disk_label
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.placeholder_ender import Ended, PlaceholderEnder
from vmfs_stub.services.placeholder_index import KnownPlaceholder
from vmfs_stub.services.stored_vms import LATEST, find_named, split_name
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.chunk_table import RestorePoint
from vmfs_stub.store.claims import Claim, ClaimState
from vmfs_stub.store.manifest import Manifest, StoredFile
from vmfs_stub.store.pins import Pin, new_pin
from vmfs_stub.store.points import StoredVm
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A VM of the store that is to be adopted, and how its restore point is named."""

    vm: StoredVm
    named: str

    @property
    def name(self) -> str:
        """How it is told of."""
        return self.vm.name or self.vm.vm_id

    @property
    def size_bytes(self) -> int:
        """Of its newest restore point."""
        return self.vm.points[-1].size_bytes


@dataclass(frozen=True, slots=True)
class Missed:
    """A name that leads to no VM, or to several, and why."""

    name: str
    error: VmfsStubError


@dataclass(frozen=True, slots=True)
class AdoptReport:
    """What is here now: paths of ``placeholders``, and ``warnings`` of what an operator should know."""

    point_id: PointId
    created_s: float
    placeholders: list[str]
    warnings: list[str]


class Adopter:
    """Adopts single VMs; see the module for the order of steps.

    What comes with its bytes is read from ``reading``: the store, or the store with its replica.
    ``appeared`` is called with a name at the top that is there from now on; the mount sets it.  ``memory_dir``: see
    DirectoryInventory.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        ender: PlaceholderEnder,
        disks: Disks,
        store: Store,
        reading: Store,
        claims: Claims,
        private: PrivateState,
        backing: Path,
        settings: ArchiveSettings,
        memory_dir: str | None = None,
    ) -> None:
        self._files = files
        self._threads = threads
        self._ender = ender
        self._disks = disks
        self._store = store
        self._reading = reading
        self._claims = claims
        self._private = private
        self._backing = backing
        self.settings = settings
        self._inventory = DirectoryInventory(backing, files=files, memory_dir=memory_dir)
        self._turn = trio.Lock()
        self.appeared: Callable[[str], Awaitable[None]] = _nobody_looks

    # Which VMs

    async def find(self, names: Sequence[str], *, everything: bool) -> tuple[list[Wanted], list[Missed]]:
        """The VMs that are named as ``VM[@POINT]``, or with ``everything`` all of the store that are not here.

        Raises StoreError, PrimaryError.
        """
        await self._threads.files(self._inventory.scan)  # gives those here their ids, by which all others are told
        vms = await self._stored(names, everything=everything)
        if everything:
            here = await self._threads.files(self._inventory.ids)
            return [Wanted(vm, LATEST) for vm in vms if vm.vm_id not in here], []
        found: list[Wanted] = []
        missed: list[Missed] = []
        for name in dict.fromkeys(names):
            try:
                found.append(Wanted(*find_named(vms, name)))
            except NotFound as exc:
                missed.append(Missed(name, exc))
        return found, missed

    async def _stored(self, names: Sequence[str], *, everything: bool) -> list[StoredVm]:
        """VMs of the store, by name: all, unless the ids of some are all that is named."""
        ids = set(await self._threads.background(self._store.point_counts))
        named = {VmId(split_name(name)[0]) for name in names}
        vms = []
        # One by one: each is a call with a time limit of its own, and manifests may be many.
        for vm_id in sorted(ids if everything or named - ids else named):
            vm = await self._threads.background(self._store.vm, vm_id)
            if vm is not None:
                vms.append(vm)
        return sorted(vms, key=lambda vm: (vm.name, vm.vm_id))

    # Adopting

    async def run(self, wanted: Wanted, *, told: Told, progress: Callable[[int], None]) -> AdoptReport:
        """Adopt a VM; ``progress`` gets the number of bytes that were dealt with since it was last called.

        Raises AlreadyExists, Refused, ClaimedElsewhere, NotFound, StoreError, IntegrityError, PrimaryError: nothing is
        here then, unless the message says so.
        """
        async with self._turn:
            vm, datastore_id = wanted.vm, self._private.datastore_id
            if vm.vm_id in await self._threads.files(self._inventory.ids):
                raise AlreadyExists(
                    f"VM {wanted.name} (id {vm.vm_id}) is here already; if its newest state is not here (`backup` says "
                    "so), remove what is here of it, then adopt again"
                )
            claim = await self._claims.newest(vm.vm_id)
            # After the claim: what that names may be newer than the list of VMs.
            named = None if claim is None else claim.point_id
            stored = await self._threads.background(self._store.vm, vm.vm_id, known=named)
            if stored is None:
                raise PointNotFound(f"VM {wanted.name} has no restore points any more")
            summary = chosen_point(stored, wanted.named, claim, here=datastore_id, told=told, now_s=time.time())
            point = await self._threads.background(self._reading.open_point, vm.vm_id, summary.point_id)
            top = top_of(point.manifest)
            await self._threads.files(self._check_place, top, point.manifest)
            return await self._claimed(claim, wanted.name, point, top, progress)

    async def _claimed(
        self, before: Claim | None, name: str, point: RestorePoint, top: StoredFile, progress: Callable[[int], None]
    ) -> AdoptReport:
        """Claim the VM, of which ``before`` is the newest claim, and make it; then it is free, unless it is used."""
        vm_id, point_id = point.manifest.vm_id, point.manifest.point_id
        free_at: PointId | None = None
        if await self._claims.take(vm_id, point_id, seen=before):
            free_at = (None if before is None else before.point_id) or point_id
        moved = self._disks.placeholders.moved_out(vm_id, (), point_id)
        still_held = kept_for(moved)
        try:
            report = await self._make(name, point, top, progress)
            free_at = point_id if report.placeholders and not moved else None
        finally:
            if free_at is not None:
                with trio.CancelScope(shield=True):
                    still_held = await self._claims.set_free(vm_id, free_at)
        report.warnings.extend(filter(None, (self._taken_from(before), still_held)))
        return report

    def _taken_from(self, before: Claim | None) -> str:
        """What to say of the datastore that had the VM, if another one had."""
        if before is None or before.state is ClaimState.FREE or before.datastore_id == self._private.datastore_id:
            return ""
        return (
            f"taken from datastore {before.datastore} of host {before.host}: see that it does not run there, since "
            "that host finds out only when it asks the store"
        )

    def _check_place(self, top: StoredFile, manifest: Manifest) -> None:
        """See that there is room, and no other VM of that name.

        Raises AlreadyExists, Refused, NoSpace, PrimaryIOError.
        """
        name = printable(top.path)
        if top.path in NO_VMS:
            raise Refused(f"{name} is no name for a VM; write it out with `vmfs-stub restore`")
        try:
            if self._files.call("adopt.look", os.path.lexists, self._backing / top.path):
                raise AlreadyExists(f"{name} is the name of another VM here; rename that one, then adopt again")
            vfs = self._files.call("adopt.space", os.statvfs, self._backing)
        except OSError as exc:
            raise PrimaryIOError(f"{self._backing} cannot be looked at: {exc.strerror}") from exc
        needed = needed_bytes(manifest, bytes_min=self.settings.placeholder_bytes_min)
        free = vfs.f_bavail * vfs.f_frsize
        if needed > free:
            raise NoSpace(f"{name}: its small files, and maps, need {needed >> 20} MiB, and {free >> 20} MiB are free")

    async def _make(
        self, name: str, point: RestorePoint, top: StoredFile, progress: Callable[[int], None]
    ) -> AdoptReport:
        manifest = point.manifest
        try:
            adoption = await self._threads.step(
                Adoption,
                self._reading,
                point,
                top,
                files=self._files,
                private=self._private,
                backing=self._backing,
                placeholder_bytes_min=self.settings.placeholder_bytes_min,
                progress=progress,
                ask=self._threads.ask_store,
            )
            try:
                for index in adoption.order:
                    await self._threads.step(adoption.make, index)
                await self._pin(manifest, adoption.absent)
                await self._threads.step(adoption.seal)
                await self._move_in(adoption, top)
            finally:
                with trio.CancelScope(shield=True):
                    await self._end(manifest, adoption)
        except OSError as exc:
            raise _primary_error(name, exc) from exc
        for absent in adoption.absent:
            await self._finish(absent)
        log.info("VM %s: is here now, as restore point %s", name, manifest.point_id)
        placeholders = [absent.path for absent in adoption.absent]
        return AdoptReport(manifest.point_id, manifest.created_s, placeholders, list(adoption.warnings))

    async def _pin(self, manifest: Manifest, absent: Sequence[Absent]) -> None:
        host, datastore = self.settings.host, self.settings.datastore
        pins = [new_pin(each.record.placeholder_id, host=host, datastore=datastore) for each in absent]
        given_up = threading.Event()
        try:
            await self._threads.background(self._put_pins, manifest, pins, given_up)
        except BaseException:
            given_up.set()
            raise

    def _put_pins(self, manifest: Manifest, pins: Sequence[Pin], given_up: threading.Event) -> None:
        """Whoever gives up waiting removes these pins, perhaps before they are made: then they are removed here."""
        try:
            self._store.pin(manifest.vm_id, manifest.point_id, pins)
        finally:
            if given_up.is_set():
                for pin in pins:
                    self._store.remove_pin(manifest.vm_id, manifest.point_id, pin.placeholder_id)

    async def _move_in(self, adoption: Adoption, top: StoredFile) -> None:
        for absent in adoption.absent:
            # Before it can be seen: stat and open must know.
            record = absent.record
            known = KnownPlaceholder(record, disk_label(absent.path), record.mtime_ns)
            self._disks.placeholders.add(record.ino, known)
        try:
            await self._threads.step(adoption.move_in)
        except OSError as exc:
            if adoption.is_moved:
                raise PrimaryIOError(
                    f"{printable(top.path)} may be here now, and may be gone after a power loss, since the backing "
                    f"filesystem failed ({exc.strerror}); check it, and start the daemon again"
                ) from exc
            raise
        finally:
            if adoption.is_moved:
                await self.appeared(top.path)

    async def _end(self, manifest: Manifest, adoption: Adoption) -> None:
        absent = [] if adoption.is_moved else adoption.absent
        for each in absent:
            self._disks.placeholders.remove(each.record.ino)
        await self._threads.step(adoption.close)
        ended = [
            Ended(each.record.placeholder_id, manifest.vm_id, manifest.point_id, was_made=False) for each in absent
        ]
        await self._ender.end(*ended)

    async def _finish(self, absent: Absent) -> None:
        """Note that the space of all absent blocks is free, which it always was; what fails, the next start does."""
        try:
            path_fd = await self._threads.files(self._open, absent.path)
            try:
                disk = await self._disks.keep(path_fd)
            finally:
                os.close(path_fd)
            try:
                if disk.placeholder is not None:
                    await disk.placeholder.punch_absent()
            finally:
                await self._disks.let_go(disk)
        except (OSError, VmfsStubError) as exc:
            log.warning("%s: is here, but the next start has to go on with it: %s", disk_label(absent.path), exc)

    def _open(self, path: str) -> int:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        backing = self._files.call("adopt.open", os.open, self._backing, flags)
        try:
            return self._files.call("adopt.open", open_beneath, backing, path)
        finally:
            os.close(backing)


async def _nobody_looks(_name: str) -> None:
    pass


def _primary_error(name: str, exc: OSError) -> VmfsStubError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(f"VM {name}: no room left on the backing filesystem ({exc.strerror})")
    if exc.errno == errno.EEXIST:
        return AlreadyExists(
            f"VM {name}: {printable(os.fsdecode(exc.filename or name))} is the name of another VM by now"
        )
    return PrimaryIOError(f"VM {name}: cannot be made here: {exc.strerror}")
