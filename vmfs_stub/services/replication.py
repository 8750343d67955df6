"""Bringing restore points into the replica: in which order, how much at once, and what is still to come.

`replicate` is one run over some points: the mover does it, and the command `replicate` in a process of its own.
`ReplicaService` is the daemon's: it knows which points of this datastore's VMs the replica lacks, has them brought
there after each backup and after the start, and tells while that cannot be done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import trio

from vmfs_stub.core.batches import batched
from vmfs_stub.core.errors import DAMAGE, PointNotFound, StoreUnavailable, VmfsStubError
from vmfs_stub.core.ids import PointId, SegmentId, VmId
from vmfs_stub.services.mover import Mover
from vmfs_stub.services.single_error import single_error
from vmfs_stub.services.threads import Threads
from vmfs_stub.store.fallback import ReplicatedStore
from vmfs_stub.store.replica import Replication, check_replica, lacking

log = logging.getLogger(__name__)

PACKS_AT_ONCE: Final = 3
"""Packs on their way to the replica; each is in memory twice while it is read back."""
NAMES_AT_ONCE: Final = 64
"""Segments that are looked for in one call, which has a time limit."""
PROBE_INTERVAL_S: Final = 15.0
"""How often the replica is asked whether it is there."""
RETRY_INTERVAL_S: Final = 60.0
"""How long a replica that did not answer is left alone."""
FAILED_INTERVAL_S: Final = 3600.0
"""What could not be copied is tried again after so long in which nothing came: `scrub` may have repaired it."""
DAMAGE_TOLD_S: Final = 3600.0
"""How long after the last read that met damage in the store it is told of."""


async def replicate(
    threads: Threads,
    replication: Replication,
    vm_id: VmId,
    points: Sequence[PointId],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Bring points of one VM into the replica, in this order.

    ``progress`` gets numbers of bytes copied.  Raises StoreError, IntegrityError, UnknownFormat: what was copied stays,
    and a point that is damaged in the store, or is no more (PointNotFound), holds up no other.
    """
    await threads.replica(replication.begin)
    first: VmfsStubError | None = None
    for point_id in points:
        try:
            await _replicate_point(threads, replication, vm_id, point_id, progress)
        except (*DAMAGE, PointNotFound) as exc:
            first = first if first is not None and not isinstance(first, PointNotFound) else exc
    if first is not None:
        raise first


@dataclass(slots=True)
class CaughtUp:
    """What a run over all VMs copied; ``failures`` are VMs with a point that could not be, and why."""

    points: int = 0
    bytes: int = 0
    failures: dict[VmId, VmfsStubError] = field(default_factory=dict)


async def catch_up(threads: Threads, replication: Replication) -> CaughtUp:
    """Bring over whatever the replica lacks of any VM.

    Raises StoreUnavailable, StoreDenied, StoreFull, WrongStore: what was copied stays.
    """
    done = CaughtUp()

    def progress(size: int) -> None:
        done.bytes += size

    await threads.replica(replication.begin)
    for vm_id in await threads.replica(replication.vms):
        points = await threads.replica(replication.lacking, vm_id)
        if not points:
            continue
        try:
            await replicate(threads, replication, vm_id, points, progress)
        except PointNotFound:
            continue
        except DAMAGE as exc:
            done.failures[vm_id] = exc
        else:
            done.points += len(points)
    return done


async def _replicate_point(
    threads: Threads, replication: Replication, vm_id: VmId, point_id: PointId, progress: Callable[[int], None]
) -> None:
    manifest, segments = await threads.replica(replication.look, vm_id, point_id)
    for part in batched(segments, NAMES_AT_ONCE):
        for segment_id in await threads.replica(replication.missing, part):
            await _replicate_segment(threads, replication, segment_id, progress)
    await threads.replica(replication.put_manifest, vm_id, point_id, manifest)


async def _replicate_segment(
    threads: Threads, replication: Replication, segment_id: SegmentId, progress: Callable[[int], None]
) -> None:
    copy = await threads.replica(replication.read, segment_id)
    packs = iter(replication.lacks(copy.segment.packs))

    async def copy_packs() -> None:
        for pack_id in packs:
            progress(await threads.replica(replication.copy_pack, pack_id))

    with single_error():
        async with trio.open_nursery() as nursery:
            for _ in range(PACKS_AT_ONCE):
                nursery.start_soon(copy_packs)
    await threads.replica(replication.put_segment, copy)


class ReplicaService:
    """What this datastore's daemon does for the replica.

    Attributes: ``lag`` is the number of restore points of each VM that the replica is known to lack; ``away`` is why
    the replica could not be used when it was last asked, ``trouble`` why the last copy came to nothing; ``failures``
    are VMs with a point that cannot be copied, and why.
    """

    def __init__(self, *, threads: Threads, store: ReplicatedStore, mover: Mover) -> None:
        self._threads = threads
        self._store = store
        self._mover = mover
        self._due: dict[VmId, None] = {}
        self._wake = trio.Event()
        self.lag: dict[VmId, int] = {}
        self.away: VmfsStubError | None = None
        self.trouble: VmfsStubError | None = None
        self.failures: dict[VmId, VmfsStubError] = {}

    def due(self, vms: Iterable[VmId]) -> None:
        """Restore points of these VMs may be missing in the replica: see to that soon."""
        self._due.update(dict.fromkeys(vms))
        self._wake.set()

    @property
    def reads(self) -> int:
        """Reads of this process that the replica answered instead of the store."""
        return self._store.fallback.counts.reads

    def problems(self) -> Iterator[tuple[bool, str]]:
        """What an operator should know of it, each with whether he has to act."""
        behind = sum(self.lag.values())
        if self.away is not None:
            yield True, f"{self.away}; meanwhile nothing new is in it"
        elif self.trouble is not None:
            yield False, f"{behind} restore points are not in it yet, and are tried again: {self.trouble}"
        for vm_id, error in self.failures.items():
            yield True, f"restore points of VM {vm_id} cannot be copied to it: {error}"
        counts, is_recent = self._store.fallback.counts, self._store.fallback.is_recent
        if is_recent(counts.last_damage_s, DAMAGE_TOLD_S):
            yield (
                True,
                f"it gave {counts.damaged} reads for which the store is damaged; run scrub ({counts.last_damage})",
            )

    async def check(self) -> None:
        """Ask the replica whether it is there, for `status`."""
        try:
            await self._threads.replica(check_replica, self._store.replica.stored, self._store.description)
        except VmfsStubError as exc:
            self.away = exc
        else:
            self.away = None

    async def watch(self) -> None:
        """Ask it now and then, for ever."""
        while True:
            await self.check()
            await trio.sleep(PROBE_INTERVAL_S)

    async def run(self) -> None:
        """Bring over what is due, for ever; after a replica that does not answer, a pause."""
        while True:
            with trio.move_on_after(FAILED_INTERVAL_S) as scope:
                await self._wake.wait()
            self._wake = trio.Event()
            if scope.cancelled_caught:
                self._due.update(dict.fromkeys(self.failures))
            while self._due:
                vm_id = next(iter(self._due))
                try:
                    await self._catch_up(vm_id)
                except DAMAGE as exc:
                    self._fail(vm_id, exc)
                except VmfsStubError as exc:
                    if self.trouble is None:
                        log.warning("restore points are not in the replica yet: %s", exc)
                    self.trouble = exc
                    await trio.sleep(RETRY_INTERVAL_S)
                except Exception as exc:  # of one VM: whatever it is, the others have their turn
                    log.exception("replicating VM %s met a programming error", vm_id)
                    self._fail(vm_id, VmfsStubError(f"unexpected {type(exc).__name__}; the log has the traceback"))

    async def _catch_up(self, vm_id: VmId) -> None:
        """Bring over what the replica lacks of one VM, which is due no more then.  Raises as `replicate`, MoverLost."""
        await self.check()
        if self.away is not None:
            raise StoreUnavailable(str(self.away)) from self.away
        await self._threads.background(self._store.plain.check_there)  # one that is away is no damage of this VM
        del self._due[vm_id]  # what becomes due while this runs is due again
        try:
            points = await self._threads.replica(lacking, self._store.plain, self._store.replica, vm_id)
            self.lag[vm_id] = len(points)
            if points:
                with suppress(PointNotFound):  # since it was listed, garbage collection has removed it
                    await self._mover.replicate(vm_id, points, lambda count: None)
        except BaseException:
            self._due[vm_id] = None
            raise
        self.trouble = None
        self.lag.pop(vm_id)
        self.failures.pop(vm_id, None)

    def _fail(self, vm_id: VmId, error: VmfsStubError) -> None:
        if vm_id not in self.failures:
            log.warning("restore points of VM %s cannot be copied to the replica: %s", vm_id, error)
        self.failures[vm_id] = error
        self.trouble = None  # of this VM, not of the replica
        del self._due[vm_id]
