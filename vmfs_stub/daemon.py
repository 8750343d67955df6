"""The daemon of one datastore: wires everything together, and holds the only `trio.run`.

Order at start: lock the datastore (one daemon, no late thread of a dead one, no other host) → store → look at every
placeholder → catalog and chunk index → mount → go on with what was unfinished, in the background → control socket.  The
end goes backwards, and leaves every disk at a point where nothing is unsynced; the lock is held until the process is
gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import trio

from vmfs_stub import paced_io
from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.jobs import open_jobs
from vmfs_stub.control.metrics import Metrics
from vmfs_stub.control.server import open_control
from vmfs_stub.core.errors import (
    CorruptStoreObject,
    PrimaryError,
    PrimaryIOError,
    StoreError,
    UnknownFormat,
)
from vmfs_stub.datastore import Datastore
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.mount.filesystem import Filesystem
from vmfs_stub.mount.serving import Mount, open_mount
from vmfs_stub.mount.settings import MountSettings
from vmfs_stub.mover.client import open_mover
from vmfs_stub.mover.lock import MoverLock
from vmfs_stub.mover.messages import MoverSettings
from vmfs_stub.primary.files import FileCalls, sync_directory, write_fully
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.primary.serving_mark import PACE, Machine, OwnCalls, Pace, ServingMark
from vmfs_stub.services import memory
from vmfs_stub.services.archive import ArchiveSettings
from vmfs_stub.services.datastore_lock import end_at_once, take_lock
from vmfs_stub.services.disk_services import DiskServices, ServiceSettings, connect_services
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.file_reads import FileReads, open_ring
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.guest_activity import GuestActivity
from vmfs_stub.services.hydration import STEPS_AT_ONCE, STEPS_AT_ONCE_FAR
from vmfs_stub.services.placeholder_index import PlaceholderIndex
from vmfs_stub.services.recovery import Recovered, Recovery
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.resumption import resume
from vmfs_stub.services.single_error import single_error
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.fallback import ReplicatedStore
from vmfs_stub.store.key_sources import source_of
from vmfs_stub.store.keyring import decode_seen, look_at
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)


class Closable(Protocol):
    """What has to be closed."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)

FETCH_BYTES_MAX = 4 << 20
"""Raw bytes of one range read: larger ones do not get faster, and a guest waits for the whole of it."""
TRANSFER_TIMEOUT_FACTOR = 6
"""A pack is some hundred times a chunk; its transfer may take this many times a short call's limit."""


def run(config: Config, *, machine: Machine | None = None, pace: Pace = PACE) -> None:
    """Serve the datastore until it is unmounted or told to end by a signal.

    ``machine`` and ``pace`` are what others see of this host, for tests.  Raises DatastoreLocked, StoreError,
    PrimaryError, CorruptRecord, UnknownFormat, Refused and ConfigError when it cannot start.
    """
    with single_error():
        trio.run(_main, config, machine or Machine.this(), pace, strict_exception_groups=True)


async def _main(config: Config, machine: Machine, pace: Pace) -> None:
    memory.limit_arenas()
    paced_io.pace.reads_in_steps = False
    # The kernel tells of a lease that somebody wants broken by this signal, which would end the process; the lease
    # is asked for instead.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    # Never closed: a thread that was abandoned because the store hangs may outlive all else here, and no other daemon
    # may begin before it is gone.
    backing = config.datastore.backing
    take_lock(config.lock_path, backing=backing)
    mark = ServingMark.take(backing, config.private_dir, machine=machine, pace=pace)
    with mark.kept(end_at_once):
        async with _open_datastore(config, OwnCalls(mark)) as stop:
            await stop.wait()


def look_at_placeholders(
    config: Config, files: FileCalls, placeholders: PlaceholderIndex
) -> tuple[PrivateState, Recovered]:
    """The private state, and what start-up found in it; fills ``placeholders``.

    Raises PrimaryIOError; CorruptRecord, UnknownFormat: which datastore this is cannot be told.
    """
    datastore = config.datastore
    try:
        private = PrivateState.at(datastore.backing, datastore.runtime_dir, files=files)
        recovery = Recovery(files=files, backing=datastore.backing, private=private, placeholders=placeholders)
        return private, recovery.run()
    except OSError as exc:
        where = exc.filename or datastore.backing
        raise PrimaryIOError(
            f"cannot look at the placeholders of {datastore.backing}: {os.fsdecode(where)}: {exc.strerror}; check that "
            "the filesystems of [datastore] backing and runtime_dir are mounted, writable and whole, and be root"
        ) from exc


@asynccontextmanager
async def _open_datastore(config: Config, files: FileCalls) -> AsyncIterator[trio.Event]:
    """Everything of one datastore; yields the event that is set when it is to end."""
    backing = config.datastore.backing
    store = open_store(config)
    replicated = ReplicatedStore.at(store, _store_at(config).replica(config.replica))
    placeholders, findings, guests, stop = PlaceholderIndex(), Findings(), GuestActivity(), trio.Event()
    private, recovered = look_at_placeholders(config, files, placeholders)
    for subject, error in recovered.findings:
        findings.add(subject, error)
    private.reserve.fill(files)
    with (
        _closing(_threads(config)) as threads,
        _closing(FileReads(files=files, threads=threads, ring=open_ring())) as reads,
        _closing(open_catalog(config, findings)) as catalog,
        _closing(MoverLock(config.mover_lock_path)) as mover_lock,
    ):
        async with (
            open_mover(_mover_settings(config, store), guests, _index_told(findings), lock=mover_lock) as mover,
            trio.open_nursery() as background,
        ):
            services = connect_services(
                background,
                _service_settings(config),
                backing=backing,
                files=files,
                threads=threads,
                reads=reads,
                private=private,
                store=store,
                reading=replicated or store,
                mover=mover,
                guests=guests,
                placeholders=placeholders,
                changes_left=recovered.changes,
                findings=findings,
            )
            async with (
                _laid_down(background, services.disks),
                _open_filesystem(config, files, threads, services.disks) as filesystem,
                open_mount(
                    filesystem, mountpoint=config.datastore.mountpoint, settings=_mount_settings(config)
                ) as mount,
                open_jobs(catalog, running_max=config.control.jobs_running_max, kept=config.control.jobs_kept) as jobs,
            ):
                services.disks.attributes_changed = mount.attributes_changed
                services.adopter.appeared = lambda name: mount.name_appeared(os.fsencode(name))
                datastore = Datastore(
                    config=config,
                    threads=threads,
                    inventory=DirectoryInventory(backing, files=files),
                    catalog=catalog,
                    store=store,
                    replica=None
                    if replicated is None
                    else ReplicaService(threads=threads, store=replicated, mover=mover),
                    services=services,
                    findings=findings,
                    jobs=jobs,
                    mount=mount,
                    reserve=partial(private.reserve.fill, files),
                    stop=stop,
                )
                background.start_soon(datastore.health.watch_store)
                background.start_soon(datastore.replicate)
                background.start_soon(datastore.listing.record_accesses)
                background.start_soon(services.ender.run)
                background.start_soon(services.claims.run)
                background.start_soon(_sync_regularly, services.disks, config.primary.sync_interval_s)
                background.start_soon(_end_on_signal, stop)
                background.start_soon(_end_with_mount, mount, stop)
                background.start_soon(resume, recovered, backing, services)
                await mover.wait_started()
                with _closing(datastore):
                    async with open_control(
                        datastore,
                        _metrics(services, mount),
                        backing=backing,
                        socket_path=config.socket_path,
                        connections_max=config.control.connections_max,
                    ):
                        memory.settle()
                        log.info("%s is served at %s", backing, config.datastore.mountpoint)
                        yield stop


@asynccontextmanager
async def _laid_down(background: trio.Nursery, disks: Disks) -> AsyncIterator[None]:
    """At the end stop background work, then lay down every disk that is still open."""
    try:
        yield
    finally:
        background.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await disks.close_all()


@asynccontextmanager
async def _open_filesystem(
    config: Config, files: FileCalls, threads: Threads, disks: Disks
) -> AsyncIterator[Filesystem]:
    filesystem = Filesystem(
        config.datastore.backing, disks=disks, threads=threads, files=files, settings=_mount_settings(config)
    )
    try:
        yield filesystem
    finally:
        with trio.CancelScope(shield=True):
            await filesystem.aclose()


def open_store(config: Config) -> Store:
    """The configured store; one that is away is taken for what it was when it was last seen.

    Resident disks need no store, so a host must start without it.  Raises StoreError when it was never seen,
    StoreKeyError, ConfigError, UnknownFormat, CorruptStoreObject.
    """
    objects, source = open_objects(_store_at(config)), source_of(config.store)
    try:
        seen = look_at(objects)
    except StoreError as exc:
        try:
            kept = config.store_copy_path.read_bytes()
        except FileNotFoundError:
            raise exc from None
        try:
            seen = decode_seen(kept)
        except (CorruptStoreObject, UnknownFormat) as damage:
            raise type(damage)(
                f"the store is away ({exc}), and {config.store_copy_path}, which would stand in for its description, "
                f"cannot be used ({damage}); start again when the store is back"
            ) from exc
        log.warning("the store is away (%s): starting without it; recalls fail until it is back", exc)
        return Store(objects, seen.description, seen.unlock(source))
    store = Store(objects, seen.description, seen.unlock(source))
    _keep_copy(config, seen.encode())
    return store


def _keep_copy(config: Config, seen: bytes) -> None:
    """Replace the copy of what opens the store when it is not that; the store is here, so failing is no harm yet."""
    path = config.store_copy_path
    new = path.with_suffix(".new")
    try:
        if path.exists() and path.read_bytes() == seen:
            return
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            write_fully(fd, seen, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        new.replace(path)
        sync_directory(path.parent)
    except OSError as exc:
        log.warning(
            "the store's description could not be kept in %s (%s): the next start needs the store", path, exc.strerror
        )


def open_catalog(config: Config, findings: Findings) -> Catalog:
    """The catalog; history that cannot be kept is a finding, never a failed start.  Raises UnknownFormat."""
    try:
        return Catalog.open(config.catalog_path)
    except PrimaryError as exc:
        log.warning("%s; until the next start it is kept in memory only", exc)
        findings.add("catalog", exc)
        return Catalog.in_memory()


def _index_told(findings: Findings) -> Callable[[PrimaryError | None], None]:
    """What the mover says of its chunk index: while its file cannot be used, that is a finding."""
    lost: list[PrimaryError] = []

    def tell(error: PrimaryError | None) -> None:
        if error is not None:
            log.warning("%s; until it can be used, less is deduplicated", error)
            lost.append(error)
            findings.add("index", error, stays=False)
            return
        log.info("the chunk index can be used again")
        while lost:
            findings.settle("index", type(lost.pop()))

    return tell


async def _sync_regularly(disks: Disks, interval_s: float) -> None:
    while True:
        await trio.sleep(interval_s)
        await disks.sync_dirty()


async def _end_on_signal(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.warning("ending on %s", signal.Signals(number).name)
            stop.set()


async def _end_with_mount(mount: Mount, stop: trio.Event) -> None:
    await mount.wait_over()
    log.warning("the mount has ended")
    stop.set()


@contextmanager
def _closing(thing: C) -> Iterator[C]:
    try:
        yield thing
    finally:
        thing.close()


def _store_at(config: Config) -> StoreAt:
    timeout_s = config.recall.store_timeout_s
    transfer_timeout_s = timeout_s * TRANSFER_TIMEOUT_FACTOR
    return replace(StoreAt.of(config.store), timeout_s=timeout_s, transfer_timeout_s=transfer_timeout_s)


def _threads(config: Config) -> Threads:
    at = _store_at(config)
    return Threads(
        files_max=config.primary.threads,
        store_max=config.store.threads,
        compute_max=config.archive.workers,
        store_timeout_s=at.timeout_s,
        transfer_timeout_s=at.transfer_timeout_s,
    )


def _mover_settings(config: Config, store: Store) -> MoverSettings:
    return MoverSettings(
        store=_store_at(config),
        store_description=store.description,
        store_key=store.key,
        index_path=config.index_path,
        workers=config.archive.workers,
        files_threads=config.primary.threads,
        store_threads=config.store.threads,
        slot_bytes=max(_fetch_bytes_max(config), store.chunk_size),
        replica=_store_at(config).replica(config.replica),
        read_back_path=config.read_back_path,
    )


def _fetch_bytes_max(config: Config) -> int:
    recall = config.recall
    return min(FETCH_BYTES_MAX, max(1, recall.recall_bytes_max // recall.recall_concurrency))


def _service_settings(config: Config) -> ServiceSettings:
    recall, archive = config.recall, config.archive
    return ServiceSettings(
        recall_deadline_s=recall.recall_deadline_s,
        recall_concurrency=recall.recall_concurrency,
        recall_queue_max=recall.recall_queue_max,
        fetch_bytes_max=_fetch_bytes_max(config),
        hydration_enabled=config.hydration.enabled,
        hydration_bytes_per_s_max=config.hydration.bytes_per_s_max,
        hydration_steps=STEPS_AT_ONCE_FAR if _store_at(config).is_far else STEPS_AT_ONCE,
        free_floor_percent=config.primary.free_floor_percent,
        archive=ArchiveSettings(
            resident_head_bytes=archive.resident_head_bytes,
            resident_tail_bytes=archive.resident_tail_bytes,
            placeholder_bytes_min=archive.placeholder_bytes_min,
            host=socket.gethostname(),
            datastore=config.datastore.name,
            min_copies=config.min_copies,
            set_aside_bytes_max=config.jobs.set_aside_bytes_max,
            free_floor_percent=config.primary.free_floor_percent,
        ),
    )


def _mount_settings(config: Config) -> MountSettings:
    return MountSettings(
        name=config.datastore.name,
        allow_other=config.mount.allow_other,
        attr_timeout_s=config.mount.attr_timeout_s,
        max_background=config.mount.max_background,
        # At the end, reads that wait for a recall get their answer.
        shutdown_grace_s=config.recall.recall_deadline_s + 1,
    )


def _metrics(services: DiskServices, mount: Mount) -> Metrics:
    metrics, counters, disks = Metrics(), services.recall.counters, services.disks
    metrics.total("recalled_on_demand_bytes", "Raw bytes recalled for guests.", lambda: counters.demand_bytes)
    metrics.total("recalled_in_background_bytes", "Raw bytes hydrated.", lambda: counters.background_bytes)
    metrics.total("recall_failures", "Recalls that failed.", lambda: counters.failures)
    metrics.gauge("recalls_waiting", "Reads that wait for a recall now.", lambda: counters.waiting)
    metrics.gauge("placeholders", "Placeholders of this datastore.", lambda: len(disks.placeholders))
    metrics.gauge("open_disks", "Disks that guests have open.", lambda: len(disks.open_disks()))
    metrics.total("request_errors", "Requests that were answered with an error.", mount.faults.errors.total)
    metrics.total("request_bugs", "Requests that met a programming error.", mount.faults.bugs.total)
    return metrics
