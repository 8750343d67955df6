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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from vmfs_stub import paced_io
from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.jobs import Jobs, open_jobs
from vmfs_stub.control.metrics import Metrics
from vmfs_stub.control.metrics_port import MetricsPort
from vmfs_stub.control.readiness import tell_ready
from vmfs_stub.control.server import open_control
from vmfs_stub.core.errors import (
    CorruptStoreObject,
    PrimaryError,
    PrimaryIOError,
    Refused,
    StoreError,
    UnknownFormat,
)
from vmfs_stub.daemon_reload import follow, reload_on_hangup
from vmfs_stub.daemon_settings import (
    libvirt_settings,
    make_threads,
    mount_settings,
    mover_settings,
    service_settings,
    store_at,
    store_places,
)
from vmfs_stub.datastore import Datastore
from vmfs_stub.datastore_metrics import make_metrics
from vmfs_stub.datastore_rebuild import Rebuild
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.mount.filesystem import Filesystem
from vmfs_stub.mount.serving import Mount, open_mount
from vmfs_stub.mover.client import ProcessMover, open_mover
from vmfs_stub.mover.lock import MoverLock
from vmfs_stub.primary.files import FileCalls, sync_directory, write_fully
from vmfs_stub.primary.placeholder import PrivateState
from vmfs_stub.primary.serving_mark import PACE, Machine, OwnCalls, Pace, ServingMark
from vmfs_stub.services import memory
from vmfs_stub.services.bandwidth import Bandwidth
from vmfs_stub.services.datastore_lock import end_at_once, take_lock
from vmfs_stub.services.disk_services import DiskServices, connect_services
from vmfs_stub.services.disks import Disks
from vmfs_stub.services.file_reads import FileReads, open_ring
from vmfs_stub.services.findings import Findings
from vmfs_stub.services.guest_activity import GuestActivity
from vmfs_stub.services.hypervisor import NoHypervisor, WatchedHypervisor
from vmfs_stub.services.libvirt_hypervisor import open_libvirt
from vmfs_stub.services.managed_save import ManagedSave
from vmfs_stub.services.mount_usage import MountUsage
from vmfs_stub.services.placeholder_index import PlaceholderIndex
from vmfs_stub.services.recovery import Recovered, Recovery
from vmfs_stub.services.replication import ReplicaService
from vmfs_stub.services.resumption import resume
from vmfs_stub.services.single_error import single_error
from vmfs_stub.services.threads import Threads
from vmfs_stub.settings import Settings
from vmfs_stub.store.clients import StoreClients
from vmfs_stub.store.fallback import ReplicatedStore
from vmfs_stub.store.key_sources import source_of
from vmfs_stub.store.keyring import decode_seen, look_at
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.objects_url import open_objects
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)


class Closable(Protocol):
    """What has to be closed."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


def run(config: Config, *, config_path: Path | None = None, machine: Machine | None = None, pace: Pace = PACE) -> None:
    """Serve the datastore until it is unmounted or told to end by a signal.

    The configuration came from ``config_path``, which `reload` reads again; without, it cannot be reloaded.
    ``machine`` and ``pace`` are what others see of this host, for tests.  Raises DatastoreLocked, StoreError,
    PrimaryError, CorruptRecord, UnknownFormat, Refused and ConfigError when it cannot start.
    """
    with single_error():
        main = partial(_main, Settings(config, config_path), machine or Machine.this(), pace)
        trio.run(main, strict_exception_groups=True)


async def _main(settings: Settings, machine: Machine, pace: Pace) -> None:
    memory.limit_arenas()
    paced_io.pace.reads_in_steps = False
    with trio.open_signal_receiver(signal.SIGHUP) as hangups:  # from now on: its default would end the daemon
        await _serve(settings, machine, pace, hangups)


async def _serve(settings: Settings, machine: Machine, pace: Pace, hangups: AsyncIterator[int]) -> None:
    config = settings.current
    # The kernel tells of a lease that somebody wants broken by this signal, which would end the process; the lease
    # is asked for instead.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    # Never closed: a thread that was abandoned because the store hangs may outlive all else here, and no other daemon
    # may begin before it is gone.
    backing = config.datastore.backing
    take_lock(config.lock_path, backing=backing)
    mark = ServingMark.take(backing, config.private_dir, machine=machine, pace=pace)
    with mark.kept(end_at_once):
        async with _open_datastore(settings, OwnCalls(mark), hangups) as stop:
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


@dataclass(frozen=True, slots=True)
class _Found:
    """What is known before anything is opened: the store and its replica, and what start-up found on primary."""

    clients: StoreClients
    store: Store
    replicated: ReplicatedStore | None
    placeholders: PlaceholderIndex
    findings: Findings
    private: PrivateState
    recovered: Recovered
    managed_save: ManagedSave
    is_first_start: bool
    """Whether no daemon has been here before."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What serves disks, without the mount; what goes on beside it runs in ``background``."""

    background: trio.Nursery
    threads: Threads
    catalog: Catalog
    mover: ProcessMover
    hypervisor: WatchedHypervisor
    bandwidth: Bandwidth
    services: DiskServices


@asynccontextmanager
async def _open_datastore(
    settings: Settings, files: FileCalls, hangups: AsyncIterator[int]
) -> AsyncIterator[trio.Event]:
    """Everything of one datastore; yields the event that is set when it is to end."""
    config = settings.current
    found = _look(config, files)
    usage, stop = MountUsage(config.usage.hypervisors), trio.Event()
    async with (
        _open_parts(config, files, found) as parts,
        _open_filesystem(config, files, parts.threads, parts.services.disks, usage) as filesystem,
        open_mount(filesystem, mountpoint=config.datastore.mountpoint, settings=mount_settings(config)) as mount,
        open_jobs(parts.catalog, running_max=config.control.jobs_running_max, kept=config.control.jobs_kept) as jobs,
    ):
        background, services, mover = parts.background, parts.services, parts.mover
        services.disks.attributes_changed = mount.attributes_changed
        services.adopter.appeared = lambda name: mount.name_appeared(os.fsencode(name))
        datastore = _make_datastore(settings, files, found, parts, mount, jobs, usage, stop)
        follow(
            settings,
            services=services,
            jobs=jobs,
            clients=found.clients,
            store=found.store,
            mover=mover,
            findings=found.findings,
            bandwidth=parts.bandwidth,
            datastore=datastore,
        )
        metrics = make_metrics(datastore, services, mount, jobs, found.clients, mover)
        _start_datastore(background, datastore)
        _start_services(background, services, settings)
        background.start_soon(_rebuild(found, parts, datastore).run)
        background.start_soon(reload_on_hangup, settings, hangups, found.findings)
        if config.monitoring.address is not None:
            background.start_soon(_metrics_port(config, metrics, found.findings).run)
        background.start_soon(_end_on_signal, stop)
        background.start_soon(_end_with_mount, mount, stop)
        background.start_soon(resume, found.recovered, config.datastore.backing, services)
        await mover.wait_started()
        with _closing(datastore):
            async with open_control(
                datastore,
                metrics,
                backing=config.datastore.backing,
                socket_path=config.socket_path,
                connections_max=config.control.connections_max,
            ):
                memory.settle()
                log.info("%s is served at %s", config.datastore.backing, config.datastore.mountpoint)
                tell_ready()
                yield stop


def _look(config: Config, files: FileCalls) -> _Found:
    is_first_start = not config.store_copy_path.exists()
    clients = StoreClients(*store_places(config))
    store = open_store(config, clients.store)
    replicated = ReplicatedStore.at(store, store_at(config).replica(config.replica), objects=clients.replica)
    placeholders, findings = PlaceholderIndex(), Findings()
    private, recovered = look_at_placeholders(config, files, placeholders)
    for subject, error in recovered.findings:
        findings.add(subject, error)
    private.reserve.fill(files)
    backing, mountpoint = config.datastore.backing, config.datastore.mountpoint
    managed_save = ManagedSave.at(config.libvirt.save_dir, backing=backing, mountpoint=mountpoint, files=files)
    return _Found(clients, store, replicated, placeholders, findings, private, recovered, managed_save, is_first_start)


@asynccontextmanager
async def _open_parts(config: Config, files: FileCalls, found: _Found) -> AsyncIterator[_Parts]:
    """At the end all background work is over, and every disk laid down."""
    guests, bandwidth = GuestActivity(), Bandwidth(config.jobs.bandwidth)
    with (
        _closing(make_threads(config)) as threads,
        _closing(FileReads(files=files, threads=threads, ring=open_ring())) as reads,
        _closing(open_catalog(config, found.findings)) as catalog,
        _closing(MoverLock(config.mover_lock_path)) as mover_lock,
    ):
        async with (
            open_mover(
                mover_settings(config, found.store), guests, _index_told(found.findings), lock=mover_lock
            ) as mover,
            _open_hypervisor(config, catalog, found.private) as hypervisor,
            trio.open_nursery() as background,
        ):
            services = connect_services(
                background,
                service_settings(config),
                backing=config.datastore.backing,
                files=files,
                threads=threads,
                reads=reads,
                private=found.private,
                store=found.store,
                reading=found.replicated or found.store,
                mover=mover,
                guests=guests,
                placeholders=found.placeholders,
                changes_left=found.recovered.changes,
                findings=found.findings,
                bandwidth=bandwidth,
                mountpoint=config.datastore.mountpoint,
                hypervisor=hypervisor,
                managed_save=found.managed_save,
            )
            async with _laid_down(background, services.disks):
                yield _Parts(background, threads, catalog, mover, hypervisor, bandwidth, services)


def _make_datastore(
    settings: Settings,
    files: FileCalls,
    found: _Found,
    parts: _Parts,
    mount: Mount,
    jobs: Jobs,
    usage: MountUsage,
    stop: trio.Event,
) -> Datastore:
    backing, managed_save = settings.current.datastore.backing, found.managed_save
    threads, replicated = parts.threads, found.replicated
    replica = None if replicated is None else ReplicaService(threads=threads, store=replicated, mover=parts.mover)
    return Datastore(
        settings=settings,
        threads=threads,
        private=found.private,
        inventory=DirectoryInventory(backing, files=files, memory_dir=managed_save.memory_dir),
        catalog=parts.catalog,
        store=found.store,
        replica=replica,
        services=parts.services,
        hypervisor=parts.hypervisor,
        mount_usage=usage,
        managed_save=managed_save,
        findings=found.findings,
        jobs=jobs,
        mount=mount,
        reserve=partial(found.private.reserve.fill, files),
        stop=stop,
    )


def _rebuild(found: _Found, parts: _Parts, datastore: Datastore) -> Rebuild:
    return Rebuild(
        catalog=parts.catalog,
        listing=datastore.listing,
        threads=parts.threads,
        store=found.store,
        findings=found.findings,
        was_lost=parts.catalog.is_new and not found.is_first_start,
        on_done=datastore.monitoring.stir,
    )


def _start_datastore(background: trio.Nursery, datastore: Datastore) -> None:
    background.start_soon(datastore.health.watch_store)
    background.start_soon(datastore.monitoring.run)
    background.start_soon(datastore.replicate)
    background.start_soon(datastore.listing.record_accesses)
    background.start_soon(datastore.usage.sampler.run)
    background.start_soon(datastore.backups.watch_guests)
    background.start_soon(datastore.notes.run)


def _start_services(background: trio.Nursery, services: DiskServices, settings: Settings) -> None:
    background.start_soon(services.ender.run)
    background.start_soon(services.claims.run)
    background.start_soon(_sync_regularly, services.disks, settings)


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
    config: Config, files: FileCalls, threads: Threads, disks: Disks, usage: MountUsage
) -> AsyncIterator[Filesystem]:
    filesystem = Filesystem(
        config.datastore.backing,
        disks=disks,
        threads=threads,
        files=files,
        settings=mount_settings(config),
        usage=usage,
    )
    try:
        yield filesystem
    finally:
        with trio.CancelScope(shield=True):
            await filesystem.aclose()


@asynccontextmanager
async def _open_hypervisor(config: Config, catalog: Catalog, private: PrivateState) -> AsyncIterator[WatchedHypervisor]:
    """What runs VMs on this host; one that does not answer keeps nothing here from being served."""
    if config.libvirt.enabled is False:
        yield NoHypervisor()
        return
    met_before = has_met_domains(catalog, private)
    async with open_libvirt(libvirt_settings(config, met_before=met_before)) as hypervisor:
        yield hypervisor


def has_met_domains(catalog: Catalog, private: PrivateState) -> bool:
    """Whether an earlier daemon knew domains, which may run, or has left a guest to be started again or thawed."""
    if private.stopped.all() or private.thaws.all():
        return True
    try:
        return bool(catalog.readings())
    except PrimaryError as exc:
        log.warning("%s; libvirt counts as away until it answers", exc)
        return True


def open_store(config: Config, objects: ObjectStore | None = None) -> Store:
    """The configured store; one that is away is taken for what it was when it was last seen.

    It is asked by way of ``objects``, if given.  Resident disks need no store, so a host must start without it.  Raises
    StoreError when it was never seen, StoreKeyError, ConfigError, UnknownFormat, CorruptStoreObject.
    """
    objects, source = objects or open_objects(store_at(config)), source_of(config.store)
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


async def _sync_regularly(disks: Disks, settings: Settings) -> None:
    while True:
        await trio.sleep(settings.current.primary.sync_interval_s)
        await disks.sync_dirty()


def _metrics_port(config: Config, metrics: Metrics, findings: Findings) -> MetricsPort:
    monitoring = config.monitoring
    assert monitoring.address is not None

    def tell(error: OSError | None) -> None:
        if error is None:
            log.info("metrics are served at http://%s/metrics", monitoring.listen)
            findings.settle("metrics", Refused)
            return
        why = error.strerror or str(error)
        told = f"[monitoring] listen = {monitoring.listen} cannot be listened on ({why}): no metrics there until it can"
        if not any(isinstance(finding.error, Refused) and finding.subject == "metrics" for finding in findings.all()):
            log.error("%s", told)
        findings.add("metrics", Refused(told), stays=False, severity="warning")

    return MetricsPort(metrics, monitoring.address, connections_max=monitoring.connections_max, tell=tell)


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
