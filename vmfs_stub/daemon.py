"""The daemon of one datastore: wires everything together, and holds the only `trio.run`.

Order at start: lock the datastore (one daemon, and no late thread of a dead one) → store and catalog → look at every
placeholder → mount → control socket → go on with what was unfinished.  The end goes backwards, and leaves every disk
at a point where nothing is unsynced.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.jobs import open_jobs
from vmfs_stub.control.metrics import Metrics
from vmfs_stub.control.server import open_control
from vmfs_stub.core.errors import DatastoreLocked, PrimaryIOError, StoreError, VmfsStubError
from vmfs_stub.datastore import Datastore
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.mount.filesystem import Filesystem
from vmfs_stub.mount.serving import Mount, open_mount
from vmfs_stub.mount.settings import MountSettings
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.primary.tree import open_beneath
from vmfs_stub.services import memory
from vmfs_stub.services.archive import Archiver, ArchiveSettings
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.groups import single_error
from vmfs_stub.services.hydration import HydrationService
from vmfs_stub.services.placeholder import Placeholder
from vmfs_stub.services.placeholder_index import PlaceholderIndex
from vmfs_stub.services.recall import RecallService
from vmfs_stub.services.recovery import Recovered, Recovery
from vmfs_stub.services.retirement import Retirement
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.format import decode_description, encode_description
from vmfs_stub.store.objects_url import open_objects
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
DESCRIPTORS_WANTED = 1 << 20
"""One per file that the kernel remembers, of which there may be as many as the directory has."""


def run(config: Config) -> None:
    """Serve the datastore until it is unmounted or told to end by a signal.

    Raises DatastoreLocked, StoreError, PrimaryError, Refused and ConfigError when it cannot start.
    """
    with single_error():
        trio.run(_main, config, strict_exception_groups=True)


async def _main(config: Config) -> None:
    memory.limit_arenas()
    _raise_descriptor_limit()
    # The kernel tells of a lease that somebody wants broken by this signal, which would end the process; the lease
    # is asked for instead.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    with locked(config):
        async with _open_datastore(config) as stop:
            await stop.wait()


@contextmanager
def locked(config: Config) -> Iterator[None]:
    """Hold the datastore's lock.  Raises DatastoreLocked, PrimaryIOError."""
    path = config.lock_path
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise PrimaryIOError(f"cannot open the datastore's lock {path}: {exc.strerror}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(fd, f"{os.getpid()}\n".encode().ljust(16), 0)
        yield
    except BlockingIOError as exc:
        holder = os.pread(fd, 16, 0).decode("ascii", "replace").strip()
        raise DatastoreLocked(
            f"another daemon (pid {holder or 'unknown'}) serves {config.datastore.backing}; `vmfs-stub unmount` ends it"
        ) from exc
    finally:
        os.close(fd)


@asynccontextmanager
async def _open_datastore(config: Config) -> AsyncIterator[trio.Event]:
    """Everything of one datastore; yields the event that is set when it is to end."""
    backing, files = config.datastore.backing, FileCalls()
    private = PrivateState.at(backing, config.datastore.runtime_dir)
    store = open_store(config)
    threads = Threads(
        files_max=config.primary.threads,
        store_max=config.store.threads,
        compute_max=config.archive.workers,
        store_timeout_s=config.recall.store_timeout_s,
        transfer_timeout_s=config.recall.store_timeout_s * TRANSFER_TIMEOUT_FACTOR,
    )
    index = PlaceholderIndex()
    recovered = Recovery(files=files, backing=backing, private=private, index=index).run()
    stop = trio.Event()
    with (
        _closing(threads),
        _closing(Catalog.open(config.catalog_path)) as catalog,
        _closing(ChunkIndex(config.index_path, store.id)) as chunk_index,
    ):
        async with trio.open_nursery() as nursery:
            # The state of the datastore is wanted by services that it is made of itself.
            told: list[Datastore] = []

            def recall_failed(placeholder: Placeholder, error: VmfsStubError) -> None:
                for datastore in told:
                    datastore.recall_failed(placeholder, error)

            recall = RecallService(
                nursery=nursery,
                store=store,
                threads=threads,
                deadline_s=config.recall.recall_deadline_s,
                concurrency_max=config.recall.recall_concurrency,
                waiting_max=config.recall.recall_queue_max,
                fetch_bytes_max=min(
                    FETCH_BYTES_MAX, max(1, config.recall.recall_bytes_max // config.recall.recall_concurrency)
                ),
                on_failure=recall_failed,
            )
            retirement = Retirement(files=files, threads=threads, store=store, private=private)
            disks = Disks(
                files=files,
                threads=threads,
                recall=recall,
                retirement=retirement,
                private=private,
                backing=backing,
                index=index,
            )
            hydration = HydrationService(
                nursery=nursery,
                threads=threads,
                disks=disks,
                recall=recall,
                backing=backing,
                enabled=config.hydration.enabled,
                bytes_per_s_max=config.hydration.bytes_per_s_max,
                free_floor_percent=config.primary.free_floor_percent,
            )
            disks.on_recall = hydration.after_access
            archiver = Archiver(
                files=files,
                threads=threads,
                recall=recall,
                retirement=retirement,
                disks=disks,
                store=store,
                index=chunk_index,
                private=private,
                backing=backing,
                settings=_archive_settings(config),
            )
            filesystem = Filesystem(
                backing, disks=disks, threads=threads, files=files, settings=_mount_settings(config)
            )
            try:
                async with (
                    open_mount(
                        filesystem, mountpoint=config.datastore.mountpoint, settings=_mount_settings(config)
                    ) as mount,
                    open_jobs(
                        catalog, running_max=config.control.jobs_running_max, kept=config.control.jobs_kept
                    ) as jobs,
                ):
                    datastore = Datastore(
                        config=config,
                        threads=threads,
                        inventory=DirectoryInventory(backing),
                        catalog=catalog,
                        store=store,
                        disks=disks,
                        recall=recall,
                        hydration=hydration,
                        archiver=archiver,
                        jobs=jobs,
                        mount=mount,
                        stop=stop,
                    )
                    told.append(datastore)
                    disks.attributes_changed = mount.attributes_changed
                    disks.on_damage = datastore.found
                    with _closing(datastore):
                        async with open_control(
                            datastore,
                            _metrics(recall, disks, mount),
                            socket_path=config.socket_path,
                            connections_max=config.control.connections_max,
                        ):
                            for subject, error in recovered.findings:
                                datastore.found(subject, error)
                            nursery.start_soon(datastore.watch_store)
                            nursery.start_soon(datastore.record_accesses)
                            nursery.start_soon(retirement.run)
                            nursery.start_soon(_sync_regularly, disks, config.primary.sync_interval_s)
                            nursery.start_soon(_end_on_signal, stop)
                            nursery.start_soon(_end_with_mount, mount.ended, stop)
                            nursery.start_soon(_go_on, recovered, backing, disks, hydration, retirement)
                            log.info("%s is served at %s", backing, config.datastore.mountpoint)
                            yield stop
            finally:
                with trio.CancelScope(shield=True):
                    await filesystem.aclose()
                    await _leave(nursery, disks)


async def _leave(nursery: trio.Nursery, disks: Disks) -> None:
    """Stop background work, then lay down every disk that is still open."""
    nursery.cancel_scope.cancel()
    await disks.close_all()


def open_store(config: Config) -> Store:
    """The configured store; one that is away is taken for what it was when it was last seen.

    Resident disks need no store, so a host must start without it.  Raises StoreError when it was never seen,
    UnknownFormat, CorruptStoreObject.
    """
    objects = open_objects(config.store.url, retries_max=config.store.retries_max)
    try:
        store = Store.open(objects)
    except StoreError as exc:
        try:
            kept = config.store_copy_path.read_bytes()
        except FileNotFoundError:
            raise exc from None
        log.warning("the store is away (%s): starting without it; recalls fail until it is back", exc)
        return Store(objects, decode_description(kept))
    config.store_copy_path.write_bytes(encode_description(store.description))
    return store


async def _go_on(
    recovered: Recovered, backing: Path, disks: Disks, hydration: HydrationService, retirement: Retirement
) -> None:
    """Finish what a crash or the last end left: ended placeholders, punching, graduation, hydration."""
    for ended in recovered.ended:
        await retirement.retire(ended)
    backing_fd = os.open(backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in dict.fromkeys([*recovered.punch, *recovered.graduate, *recovered.hydrate]):
            try:
                await _go_on_with(path, backing_fd, recovered, disks, hydration)
            except (VmfsStubError, OSError) as exc:
                log.warning("%s: could not be gone on with: %s", path, exc)
    finally:
        os.close(backing_fd)


async def _go_on_with(
    path: str, backing_fd: int, recovered: Recovered, disks: Disks, hydration: HydrationService
) -> None:
    path_fd = open_beneath(backing_fd, path)
    try:
        # Opening and closing graduates what is wholly resident.
        disk = await disks.keep(path_fd)
        try:
            if path in recovered.punch and disk.placeholder is not None:
                await disk.placeholder.punch_absent()
        finally:
            await disks.let_go(disk)
        if path in recovered.hydrate:
            await hydration.resume(path_fd)
    finally:
        os.close(path_fd)


async def _sync_regularly(disks: Disks, interval_s: float) -> None:
    while True:
        await trio.sleep(interval_s)
        await disks.sync_dirty()


async def _end_on_signal(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.warning("ending on %s", signal.Signals(number).name)
            stop.set()


async def _end_with_mount(ended: trio.Event, stop: trio.Event) -> None:
    await ended.wait()
    log.warning("the mount has ended")
    stop.set()


@contextmanager
def _closing(thing: C) -> Iterator[C]:
    try:
        yield thing
    finally:
        thing.close()


def _archive_settings(config: Config) -> ArchiveSettings:
    return ArchiveSettings(
        resident_head_bytes=config.archive.resident_head_bytes,
        resident_tail_bytes=config.archive.resident_tail_bytes,
        placeholder_bytes_min=config.archive.placeholder_bytes_min,
        workers=config.archive.workers,
        host=socket.gethostname(),
        datastore=config.datastore.name,
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


def _metrics(recall: RecallService, disks: Disks, mount: Mount) -> Metrics:
    metrics, counters = Metrics(), recall.counters
    metrics.total("recalled_on_demand_bytes", "Raw bytes recalled for guests.", lambda: counters.demand_bytes)
    metrics.total("recalled_in_background_bytes", "Raw bytes hydrated.", lambda: counters.background_bytes)
    metrics.total("recall_failures", "Recalls that failed.", lambda: counters.failures)
    metrics.gauge("recalls_waiting", "Reads that wait for a recall now.", lambda: counters.waiting)
    metrics.gauge("placeholders", "Placeholders of this datastore.", lambda: len(disks.index))
    metrics.gauge("open_disks", "Disks that guests have open.", lambda: len(disks.open_disks()))
    metrics.total("request_errors", "Requests that were answered with an error.", mount.faults.errors.total)
    metrics.total("request_bugs", "Requests that met a programming error.", mount.faults.bugs.total)
    return metrics


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (DESCRIPTORS_WANTED, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
        except (OSError, ValueError):
            continue
        return
