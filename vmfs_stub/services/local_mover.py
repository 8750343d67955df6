"""A mover in this process: the mover's own process uses it, and tests that run the services in theirs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import replace

import trio

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import StoreError
from vmfs_stub.core.ids import PointId, SegmentId, VmId
from vmfs_stub.primary.files import FileCalls
from vmfs_stub.services.copying import BatchTurns, Copier, open_copier
from vmfs_stub.services.mover import FETCHES_AT_ONCE, PointFile, PointOrder
from vmfs_stub.services.replication import replicate
from vmfs_stub.services.single_error import single_error
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.backup_writer import BackupWriter, WriterCounts
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.leases import LEASE_INTERVAL_S
from vmfs_stub.store.manifest import StoredFile
from vmfs_stub.store.objects import Buffer
from vmfs_stub.store.replica import Replication
from vmfs_stub.store.store import Store


class LocalMover:
    """Implements mover.Mover; ``workers`` is how many batches are encoded at once.

    With a replica, what comes back is read from ``reading``, and ``begin_replication`` makes runs.
    """

    def __init__(
        self,
        *,
        files: FileCalls,
        threads: Threads,
        store: Store,
        chunk_index: ChunkIndex,
        workers: int,
        reading: Store | None = None,
        begin_replication: Callable[[], Replication] | None = None,
    ) -> None:
        self._files = files
        self._threads = threads
        self._store = store
        self._chunk_index = chunk_index
        self._turns = BatchTurns(workers)
        self._reading = reading or store
        self._begin_replication = begin_replication
        self._fetches = trio.Semaphore(FETCHES_AT_ONCE)
        self._abandoned: list[BackupWriter] = []

    @asynccontextmanager
    async def backup(self) -> AsyncIterator[LocalBackup]:
        """See mover.Mover."""
        writer = await self._threads.transfer(self._store.begin_backup, index=self._chunk_index)
        backup = LocalBackup(self._files, self._threads, self._store, writer, self._turns)
        try:
            with single_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_lease, writer)
                    yield backup
                    nursery.cancel_scope.cancel()
        finally:
            if not backup.is_committed:
                writer.abandon()
                self._abandoned.append(writer)

    async def end_leases(self) -> None:
        """End those of backups that were given up: not part of their end, for which a guest may be waiting."""
        abandoned, self._abandoned = self._abandoned, []
        for writer in abandoned:
            with suppress(StoreError):  # it will be found dead
                await self._threads.store(writer.end_lease)

    async def _keep_lease(self, writer: BackupWriter) -> None:
        while True:
            await trio.sleep(LEASE_INTERVAL_S)
            with suppress(StoreError):  # a store that hangs; the next call may get through
                await self._threads.store(writer.renew_lease)

    def hurried(self) -> AbstractContextManager[None]:
        """See mover.Mover; this process knows no hurry."""
        return nullcontext()

    async def wait_earlier_gone(self) -> None:
        """See mover.Mover; this process is not lost without whoever asks."""

    async def replicate(self, vm_id: VmId, points: Sequence[PointId], progress: Callable[[int], None]) -> None:
        """See mover.Mover."""
        assert self._begin_replication is not None, "there is no replica"
        await replicate(self._threads, self._begin_replication(), vm_id, points, progress)

    @asynccontextmanager
    async def fetch(self, frames: Sequence[FrameRef]) -> AsyncIterator[Sequence[Buffer]]:
        """See mover.Mover."""
        async with self._fetches:
            yield await self._threads.background(self._reading.fetch, frames)


class LocalBackup:
    """Implements mover.Backup."""

    def __init__(
        self, files: FileCalls, threads: Threads, store: Store, writer: BackupWriter, turns: BatchTurns
    ) -> None:
        self._files = files
        self._threads = threads
        self._store = store
        self._writer = writer
        self._turns = turns
        self._copies: list[tuple[SegmentId | None, ...]] = []
        self.is_committed = False

    @asynccontextmanager
    async def copying(self, *, verify: bool) -> AsyncIterator[Copier]:
        """See mover.Backup."""
        async with open_copier(
            files=self._files,
            threads=self._threads,
            store=self._store,
            writer=self._writer,
            turns=self._turns,
            verify=verify,
        ) as copier:
            self._copies = copier.copies
            yield copier

    async def commit(self, order: PointOrder, files: Sequence[PointFile]) -> WriterCounts:
        """See mover.Backup."""
        await self._threads.transfer(
            self._writer.commit,
            vm_id=order.vm_id,
            point_id=order.point_id,
            vm_name=order.vm_name,
            host=order.host,
            files=[self._with_segments(file) for file in files],
            metadata=order.metadata,
            top=order.top,
            pins=order.pins,
        )
        self.is_committed = True
        return self._writer.counts

    def _with_segments(self, file: PointFile) -> StoredFile:
        return file.stored if file.copy is None else replace(file.stored, segments=self._copies[file.copy])
