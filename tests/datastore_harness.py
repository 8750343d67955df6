"""A datastore without FUSE: the services wired as the daemon wires them, on a directory that can lose power.

`Rig` is what outlives a daemon: backing directory and the medium below it, runtime directory, store, current boot.
`Rig.running` is one life of a daemon in it, which ends cleanly, by a kill (objects dropped, nothing laid down) or by a
power loss (what was not synced is old or new, see `medium`).  `RigFiles` is the seam: it fails or kills at a named
call, and tells the medium; it does not really sync, which is what makes many lives a second possible.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, Protocol, TypeVar

import trio

from tests.medium import ALL_SYNCS, SYNCS, Key, Medium
from tests.medium import BLOCK as BLOCK
from tests.site_tags import ROOT
from tests.sited_hypervisor import SitedHypervisor
from tests.store_fakes import FakeObjects, SitedObjects
from tests.store_places import Place, in_fake
from vmfs_stub.core.names import PLACEHOLDER_XATTR, PRIVATE_DIR
from vmfs_stub.core.sites import PLAIN
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.vm import Vm
from vmfs_stub.mount.entries import Entry
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.identity import BootIdentity
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.primary.tree import open_beneath, reopen
from vmfs_stub.services.backup_report import ArchiveSettings, BackupReport
from vmfs_stub.services.bandwidth import Bandwidth
from vmfs_stub.services.datastore_lock import take_lock
from vmfs_stub.services.disk import Caller, Disk
from vmfs_stub.services.disk_services import DiskServices, ServiceSettings, connect_services
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.file_reads import FileReads, open_ring
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.guest_activity import GuestActivity
from vmfs_stub.services.hydration import STEPS_AT_ONCE
from vmfs_stub.services.hypervisor import WatchedHypervisor
from vmfs_stub.services.local_mover import LocalMover
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.placeholder_index import PlaceholderIndex
from vmfs_stub.services.recovery import Recovered, Recovery
from vmfs_stub.services.resumption import resume
from vmfs_stub.services.running_backup import Freezer
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.fallback import Fallback, ReplicatedStore
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.read_back import ReadBack
from vmfs_stub.store.replica import Replication, make_replica
from vmfs_stub.store.store import Store

P = ParamSpec("P")
T = TypeVar("T")

CHUNK = 64 * 1024
DEADLINE_S = 30.0
CALLER = Caller(pid=1, uid=0, executable=None, cgroup=None)


class Killed(BaseException):
    """The daemon was killed here; nothing of it runs on."""


# What fails


@dataclass(slots=True)
class Fault:
    """What goes wrong at a call: it raises ``error``, instead of being made or ``late`` (after it took effect), or
    what it returns is changed; ``for_good`` also all later ones of the site, until `RigFiles.repair`.
    """

    error: BaseException | None = None
    late: bool = False
    change: Callable[[Any], Any] | None = None
    for_good: bool = False


class LateCall(Protocol):
    """A call that was in progress when the daemon was killed; it has a descriptor of its own."""

    @property
    def fd(self) -> int: ...

    def happen(self) -> None: ...

    def drop(self) -> None: ...


class RigFiles(FileCalls):
    """Makes file calls, and those on the store, of one life; a plan says which of them go wrong."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.counts: Counter[str] = Counter()
        self.places: dict[tuple[str, str], int] = {}
        """The number of the first call of each site from each place in the source, when ``watches_places``."""
        self.watches_places = False
        self.dead = False
        self.spoiled: set[str] = set()
        """Sites whose calls went wrong."""
        self._plan: dict[str, tuple[int, Fault]] = {}
        self._lock = threading.Lock()
        self.instead: dict[str, Callable[..., Any]] = {}
        """Site → what is called instead of the function, with the function first."""
        self.late: list[LateCall] = []
        """Calls that were in progress when the daemon was killed: its threads end when these are over."""

    def fail(self, site: str, number: int, error: BaseException) -> None:
        """The ``number``-th call (from 1, counted from now) at ``site`` raises ``error`` instead of being made."""
        self.spoil(site, number, Fault(error))

    def spoil(self, site: str, number: int, fault: Fault) -> None:
        """The ``number``-th call (from 1, counted from now) at ``site`` goes wrong."""
        self._plan[site] = (self.counts[site] + number, fault)

    def repair(self) -> None:
        """From now on nothing goes wrong."""
        self._plan.clear()

    def check_alive(self) -> None:
        if self.dead:
            raise Killed

    def kill(self) -> None:
        self.dead = True

    def call(self, site: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.check_alive()
        fault = self._counted(site)
        if fault is not None and not fault.late and fault.error is not None:
            if isinstance(fault.error, Killed):
                self.kill()
            raise fault.error
        change = self.medium.calling(function, args, kwargs)
        if function in SYNCS:
            # What is written while it runs need not become durable by it.
            self.medium.called(function, args, change)
        if site in self.instead:
            done: T = self.instead[site](function, *args, **kwargs)
        elif function in ALL_SYNCS:
            done = None  # type: ignore[assignment]
        else:
            done = function(*args, **kwargs)
        if function not in SYNCS:
            self.medium.called(function, args, change)
        if fault is not None and fault.error is not None:
            _give_back(function, done)
            raise fault.error
        return fault.change(done) if fault is not None and fault.change is not None else done

    def _counted(self, site: str) -> Fault | None:
        with self._lock:
            self.counts[site] += 1
            if self.watches_places:
                self.places.setdefault((site, calling_place()), self.counts[site])
            number, fault = self._plan.get(site, (0, None))
            if fault is None or self.counts[site] < number or (self.counts[site] > number and not fault.for_good):
                return None
            self.spoiled.add(site)
            return fault


def _give_back(function: object, done: Any) -> None:
    """Close what a call opened whose caller is told that it failed."""
    if function in (os.open, open_beneath, reopen):
        os.close(done)
    elif hasattr(done, "close"):
        done.close()
    for entry in done if isinstance(done, list) else [done]:
        if isinstance(entry, Entry):
            os.close(entry.fd)


def calling_place() -> str:
    """Where in the program a call comes from that reached the harness; empty when a test made it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(str(ROOT)):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"


class RigThreads(Threads):
    """Threads that do nothing more once the daemon was killed; ``inline`` does without threads, which is faster."""

    def __init__(self, life: RigFiles, *, inline: bool = False, store_timeout_s: float = 60) -> None:
        super().__init__(
            files_max=4,
            store_max=4,
            compute_max=2,
            store_timeout_s=store_timeout_s,
            transfer_timeout_s=store_timeout_s,
        )
        self._life = life
        self._inline = inline

    def be_patient(self) -> None:
        """From now on no call on the store takes too long."""
        self._store_timeout_s = self._transfer_timeout_s = 60

    async def files(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._life.check_alive()
        if self._inline:
            await trio.lowlevel.checkpoint()
            return function(*args, **kwargs)
        return await super().files(function, *args, **kwargs)

    async def store(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._life.check_alive()
        if self._inline:
            await trio.lowlevel.checkpoint()
            return function(*args, **kwargs)
        return await super().store(function, *args, **kwargs)

    async def background(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._life.check_alive()
        if self._inline:
            await trio.lowlevel.checkpoint()
            return function(*args, **kwargs)
        return await super().background(function, *args, **kwargs)

    async def transfer(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._life.check_alive()
        if self._inline:
            await trio.lowlevel.checkpoint()
            return function(*args, **kwargs)
        return await super().transfer(function, *args, **kwargs)

    async def step(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._life.check_alive()
        if self._inline:
            await trio.lowlevel.checkpoint()
            return function(*args, **kwargs)
        return await super().step(function, *args, **kwargs)

    def ask_store(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._life.check_alive()
        return function(*args, **kwargs) if self._inline else super().ask_store(function, *args, **kwargs)

    async def replica(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._life.check_alive()
        if self._inline:
            await trio.lowlevel.checkpoint()
            return function(*args, **kwargs)
        return await super().replica(function, *args, **kwargs)

    async def compute(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._inline:
            await trio.lowlevel.checkpoint()
            return function(*args, **kwargs)
        return await super().compute(function, *args, **kwargs)


# The datastore


@dataclass
class Services:
    """One life of a daemon."""

    rig: Rig
    files: RigFiles
    threads: RigThreads
    recovered: Recovered
    private: PrivateState
    connected: DiskServices
    findings: Findings
    store: Store
    replicated: ReplicatedStore | None

    def __post_init__(self) -> None:
        self.claims = self.connected.claims
        self.recall = self.connected.recall
        self.ender = self.connected.ender
        self.disks = self.connected.disks
        self.hydration = self.connected.hydration
        self.archiver = self.connected.archiver
        self.adopter = self.connected.adopter
        self.chains = self.connected.chains
        self.groups = self.connected.groups

    async def open(self, path: str) -> Disk:
        """Open as a guest does; owes one `disks.release`."""
        with self.rig.path_fd(path) as fd:
            return await self.disks.open(fd, writable=True, caller=CALLER)

    async def archive(self, name: str, *, archive: bool = True) -> BackupReport:
        """One backup job of a VM; as in the daemon, it ends what hydrates in the background first."""
        vm = self.rig.vm(name, files=self.files)
        for file in vm.files:
            await self.hydration.stop(file.ino)
        return await self.archiver.run(vm, archive=archive, progress=lambda count: None)

    async def back_up_in_use(
        self, name: str, *, progress: Callable[[int], None] = lambda count: None, freezer: Freezer | None = None
    ) -> BackupReport:
        """A backup of a VM that guests may have open."""
        vm = self.rig.vm(name, files=self.files)
        for file in vm.files:
            await self.hydration.stop(file.ino)
        return await self.archiver.run_in_use(vm, progress=progress, freezer=freezer)

    async def wait_hydrated(self) -> None:
        """Return when nothing comes back in the background any more."""
        for course in list(self.hydration._courses.values()):
            await course.ended.wait()

    async def bring_back(self, path: str) -> None:
        with self.rig.path_fd(path) as fd:
            await self.hydration.bring_back(fd, progress=lambda count: None)

    def mtime_ns(self, path: str) -> int:
        """What stat through the mount would report."""
        st = (self.rig.backing / path).stat()
        override = self.disks.stat_override(st)
        return st.st_mtime_ns if override is None else override.mtime_ns


class Rig:
    """What outlives a daemon.  ``head`` and ``tail`` are the bytes that stay resident at the ends of a disk.

    The store is made in ``objects``; with a ``source`` it is encrypted; `add_replica` lets it have a replica.
    """

    def __init__(
        self, base: Path, objects: FakeObjects, *, head: int = 0, tail: int = 0, source: KeySource | None = None
    ) -> None:
        self.base = base
        self.backing = base / "backing"
        self.runtime = base / "run"
        self.backing.mkdir(mode=0o700)
        self.objects = objects
        self.store = Store.create(self.objects, chunk_size=CHUNK, source=source)
        self.replica_objects: FakeObjects | None = None
        self.medium = Medium(self.backing)
        self.inline = False
        """Whether lives do without threads."""
        self.store_timeout_s = 60.0
        self.boot = _new_boot()
        self.dying: list[tuple[RigFiles, int]] = []
        """Killed lives of which threads are still in a call, and the lock that they hold until then."""
        self.settings = ArchiveSettings(
            resident_head_bytes=head,
            resident_tail_bytes=tail,
            placeholder_bytes_min=1,
            host="host1",
            datastore="vms",
        )
        self.bandwidth = Bandwidth()
        self.hypervisor: WatchedHypervisor | None = None
        """What tells of domains in later lives."""
        self.mountpoint = base / "mount"
        """Where the datastore would be mounted, for what names files there."""
        self.memory_dir: str | None = None
        """Where at the top later lives know the memory of saved guests."""

    @property
    def managed_save(self) -> ManagedSave:
        """Where the hypervisor saves memory, as later lives know it."""
        place = self.memory_dir or "/nowhere"
        return ManagedSave(self.mountpoint / place, self.mountpoint, place)

    def add_replica(self) -> None:
        """From now on the store has a replica, and nothing is released that is not in it."""
        self.replica_objects = FakeObjects()
        make_replica(self.store, self.replica_objects)
        self.settings = replace(self.settings, min_copies=2)

    def replica(self) -> Store | None:
        """The replica as whoever has nothing else reads it."""
        if self.replica_objects is None:
            return None
        return Store(self.replica_objects, self.store.description, self.store.key)

    def make_disk(self, path: str, content: bytes) -> None:
        """A plain file that is on the medium."""
        full = self.backing / path
        full.parent.mkdir(exist_ok=True)
        full.write_bytes(content)
        self.medium.note(full)

    def vm(self, name: str, *, files: FileCalls = PLAIN) -> Vm:
        return DirectoryInventory(self.backing, files=files, memory_dir=self.memory_dir).find(name)

    @contextlib.contextmanager
    def path_fd(self, path: str) -> Iterator[int]:
        fd = os.open(self.backing / path, os.O_PATH | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)

    def is_placeholder(self, path: str) -> bool:
        return PLACEHOLDER_XATTR in os.listxattr(self.backing / path)

    def maps(self) -> list[Path]:
        maps = self.backing / PRIVATE_DIR / "maps"
        return sorted(maps.iterdir()) if maps.exists() else []

    def pins(self) -> list[str]:
        return [key for key in self.objects.contents if key.startswith("pins/")]

    def lose_power(self, chosen: random.Random) -> dict[Key, Key]:
        """Between two lives: what was not synced is old or new, and another boot begins.

        Returns what inodes are now that had to be made again.
        """
        self._drop_dying()
        renumbered = self.medium.lose_power(chosen)
        self.reboot()
        if chosen.random() < 0.5:
            shutil.rmtree(self.runtime, ignore_errors=True)  # a start that failed has not made it
        return renumbered

    def close(self) -> None:
        """Give back what is held for lives that are not quite over, and for files that are not quite gone."""
        self._drop_dying()
        self.medium.close()

    def finish_dying(self) -> None:
        """The last threads of killed daemons do what they were at, and are gone."""
        while self.dying:
            life, lock_fd = self.dying.pop(0)
            for call in life.late:
                call.happen()
            os.close(lock_fd)

    def _drop_dying(self) -> None:
        while self.dying:
            life, lock_fd = self.dying.pop(0)
            for call in life.late:
                call.drop()
            os.close(lock_fd)

    def _lock(self) -> int:
        """The lock as the daemon takes it.  Raises DatastoreLocked while a thread of another one is there."""
        return take_lock(self.backing / PRIVATE_DIR / "lock", backing=self.backing)

    def lose_host(self) -> None:
        """Between two lives: the host and all that it had is gone, and another takes its place; the store stays."""
        self.close()
        for directory in (self.backing, self.runtime):
            shutil.rmtree(directory)
        self.backing.mkdir(mode=0o700)
        self.reboot()

    def reboot(self) -> None:
        self.boot = _new_boot()

    @contextlib.asynccontextmanager
    async def running(
        self, *, files: RigFiles | None = None, hydrates: bool = False, goes_on: bool = True
    ) -> AsyncIterator[Services]:
        """One life of a daemon.  It ends cleanly, or as a killed one when `Killed` is raised in it or its files.

        Raises DatastoreLocked while threads of a killed one are not gone.
        """
        life, lock_fd = files or RigFiles(self.medium), self._lock()
        try:
            async with self._unlocked(life, hydrates=hydrates, goes_on=goes_on) as services:
                yield services
        finally:
            if life.late:
                self.dying.append((life, lock_fd))
            else:
                os.close(lock_fd)

    @contextlib.asynccontextmanager
    async def _unlocked(self, life: RigFiles, *, hydrates: bool, goes_on: bool) -> AsyncIterator[Services]:
        private = replace(PrivateState.at(self.backing, self.runtime, files=life), boot=self.boot)
        placeholders = PlaceholderIndex()
        recovered = Recovery(files=life, backing=self.backing, private=private, placeholders=placeholders).run()
        threads = RigThreads(life, inline=self.inline, store_timeout_s=self.store_timeout_s)
        reads = FileReads(files=life, threads=threads, ring=open_ring())
        services: Services | None = None
        try:
            async with trio.open_nursery() as nursery:
                services = self._connected(
                    nursery, life, threads, reads, private, placeholders, recovered, hydrates=hydrates
                )
                try:
                    if goes_on:
                        await resume(recovered, self.backing, services.connected)
                    yield services
                finally:
                    nursery.cancel_scope.cancel()
                    if not life.dead:
                        with trio.CancelScope(shield=True):
                            await services.disks.close_all()
        finally:
            if services is not None:
                _drop(services.disks)
            if life.dead:
                late = [call.fd for each in (life, *(dying for dying, _ in self.dying)) for call in each.late]
                _close_below(private.maps, but={*self.medium.held(), *late})
            reads.close()
            threads.close()

    def _connected(
        self,
        nursery: trio.Nursery,
        files: RigFiles,
        threads: RigThreads,
        reads: FileReads,
        private: PrivateState,
        placeholders: PlaceholderIndex,
        recovered: Recovered,
        *,
        hydrates: bool,
    ) -> Services:
        findings = Findings()
        settings = ServiceSettings(
            recall_deadline_s=DEADLINE_S,
            recall_concurrency=3,
            recall_queue_max=64,
            fetch_bytes_max=4 * CHUNK,
            hydration_enabled=hydrates,
            hydration_bytes_per_s_max=0,
            hydration_steps=STEPS_AT_ONCE,
            free_floor_percent=0,
            archive=self.settings,
        )
        store = Store(SitedObjects(self.objects, files), self.store.description, self.store.key)
        replicated: ReplicatedStore | None = None
        if self.replica_objects is not None:
            replica = SitedObjects(self.replica_objects, files, "replica")
            replicated = ReplicatedStore(
                store,
                Store(replica, self.store.description, self.store.key),
                Fallback(patience_s=self.store_timeout_s),
            )
        connected = connect_services(
            nursery,
            settings,
            backing=self.backing,
            files=files,
            threads=threads,
            reads=reads,
            private=private,
            store=store,
            reading=replicated or store,
            mover=LocalMover(
                files=files,
                threads=threads,
                store=store,
                chunk_index=ChunkIndex(None, self.store.id),
                workers=2,
                reading=replicated,
                begin_replication=None if replicated is None else partial(_replication, replicated),
            ),
            guests=GuestActivity(),
            placeholders=placeholders,
            changes_left=recovered.changes,
            findings=findings,
            bandwidth=self.bandwidth,
            mountpoint=self.mountpoint,
            hypervisor=None if self.hypervisor is None else SitedHypervisor(self.hypervisor, files),
            managed_save=self.managed_save,
        )
        return Services(self, files, threads, recovered, private, connected, findings, store, replicated)


def _replication(store: ReplicatedStore) -> Replication:
    return Replication(store.plain, store.replica, ReadBack(None, store.id, "replica"))


def _drop(disks: Disks) -> None:
    """What the kernel does for a process that is gone: descriptors closed, mappings unmapped, nothing else."""
    reserved = [reservation.disk for reservation in disks._reservations.values()]
    for disk in [*disks._open.values(), *reserved]:
        placeholder = disk.placeholder
        if placeholder is not None and not placeholder.ended:
            placeholder.ended = True
            placeholder.maps.live.close(discard=False)
            placeholder.maps.durable.close()
        disk.changes.drop()
        with contextlib.suppress(OSError):
            os.close(disk.fd)
    disks._open.clear()
    disks._reservations.clear()


def _close_below(maps: Path, *, but: Collection[int]) -> None:
    """Close the maps that a killed daemon had open; nothing else knows their descriptors any more."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if int(link.name) not in but and link.readlink().is_relative_to(maps):
                os.close(int(link.name))


def _new_boot() -> BootIdentity:
    return BootIdentity(secrets.token_hex(16), 1)


@contextlib.contextmanager
def temporary_rig(
    *,
    head: int = 0,
    tail: int = 0,
    parent: Path | None = None,
    source: KeySource | None = None,
    place: Place = in_fake,
    seed: int = 0,
) -> Iterator[Rig]:
    """A rig in a directory of its own (in ``parent``, by default where temporary files are), removed at the end.

    Its store is at a ``place``, whose troubles ``seed`` decides.  The kernel tells of a lease that somebody wants
    broken by SIGIO, which would end the process.
    """
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    base = Path(tempfile.mkdtemp(prefix="vmfs-stub-rig-", dir=parent)).resolve()
    try:
        with place(base, seed) as objects:
            rig = Rig(base, objects, head=head, tail=tail, source=source)
            try:
                yield rig
            finally:
                rig.close()
    finally:
        signal.signal(signal.SIGIO, before)
        shutil.rmtree(base)


@contextlib.contextmanager
def survives_kill() -> Iterator[None]:
    """Swallow the end of a killed daemon, and nothing else."""
    try:
        yield
    except Killed:
        pass
    except BaseExceptionGroup as group:
        _, rest = group.split(Killed)
        if rest is not None:
            _, errors = rest.split(trio.Cancelled)
            if errors is not None:
                raise errors from None
