"""Reading from the replica what the store does not give.

Purpose: a recall has a deadline, and a store that is away, or hangs, must not use it up.  So the store is asked with
little patience, then the replica; and for a while after the store did not answer the replica is asked first, by all
but one, who sees whether it is back.  Only what never changes is read so: packs, segments, manifests, moved documents.
What hosts tell each other (pins, marks, listings) is in the store alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import DAMAGE, StoreDenied, StoreUnavailable, VmfsStubError
from vmfs_stub.core.ids import PointId, SegmentId, VmId
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.impatience import Impatience
from vmfs_stub.store.manifest import Manifest
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.objects_url import StoreAt, open_objects
from vmfs_stub.store.segments import Segment
from vmfs_stub.store.store import Store

T = TypeVar("T")
log = logging.getLogger(__name__)

AVOIDED_S: Final = 15.0
"""How long the replica is asked first, after the store did not answer."""
TOLD_EACH_S: Final = 60.0
"""One line in the log for so long: a store without its packs makes thousands of reads fail."""
_AWAY: Final = (StoreUnavailable, StoreDenied)
_FAILED: Final = (*_AWAY, *DAMAGE)


@dataclass(slots=True)
class FallbackCounts:
    """Reads that the replica answered; ``damaged`` of them since the store has not what it should have."""

    reads: int = 0
    damaged: int = 0
    last_damage: str = ""
    last_damage_s: float | None = None
    """By the clock of the Fallback."""


class Fallback:
    """Decides whom to ask; thread-safe.  ``patience_s`` is how long a read of the store is waited for."""

    def __init__(self, *, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._impatience = Impatience(patience_s)
        self._clock = clock
        self._lock = threading.Lock()
        self._avoided_until_s: float | None = None
        self._is_tried = False
        """Somebody is seeing whether the store is back."""
        self._told_s: float | None = None
        self.counts = FallbackCounts()

    def read(self, here: Callable[[], T], there: Callable[[], T]) -> T:
        """What the store (``here``) or the replica (``there``) gives; the store's error when neither does."""
        if self._is_avoided():
            try:
                found = there()
            except _FAILED:
                return self._from_store(here)
            with self._lock:
                self.counts.reads += 1
            return found
        try:
            return self._from_store(here)
        except _FAILED as exc:
            error = exc
        try:
            found = there()
        except VmfsStubError as exc:
            raise error from exc
        self._count(error)
        return found

    def is_recent(self, moment_s: float | None, within_s: float) -> bool:
        """Whether that moment of this clock is so near."""
        return moment_s is not None and self._clock() < moment_s + within_s

    def _is_avoided(self) -> bool:
        with self._lock:
            if self._avoided_until_s is None:
                return False
            if self._is_tried or self._clock() < self._avoided_until_s:
                return True
            self._is_tried = True
            return False

    def _from_store(self, here: Callable[[], T]) -> T:
        try:
            found = self._impatience.call(here)
        except _AWAY:
            with self._lock:
                self._avoided_until_s, self._is_tried = self._clock() + AVOIDED_S, False
            raise
        except BaseException:
            self._answered()
            raise
        self._answered()
        return found

    def _answered(self) -> None:
        with self._lock:
            self._avoided_until_s, self._is_tried = None, False

    def _count(self, error: VmfsStubError) -> None:
        now = self._clock()
        with self._lock:
            self.counts.reads += 1
            if not isinstance(error, _AWAY):
                self.counts.damaged += 1
                self.counts.last_damage, self.counts.last_damage_s = str(error), now
            is_told = self._told_s is not None and now < self._told_s + TOLD_EACH_S
            if not is_told:
                self._told_s = now
        if not is_told:
            log.warning("the replica gives what the store does not: %s", error)


class ReplicatedStore(Store):
    """A store whose restore points are read from its replica where it does not give them.

    Everything else is as in ``plain``, the same store without.  What a backup refers to, and what proves that a copy is
    there, has to be in the store itself, so backups are those of ``plain``.
    """

    @classmethod
    def at(
        cls,
        plain: Store,
        place: StoreAt | None,
        *,
        patience_s: float | None = None,
        objects: ObjectStore | None = None,
    ) -> ReplicatedStore | None:
        """With the replica at that place, by way of ``objects`` if given; None where there is none.

        Without ``patience_s`` the store has half the time of a short call, so that the replica has the other half.
        """
        if place is None:
            return None
        replica = Store(objects or open_objects(place), plain.description, plain.key)
        return cls(plain, replica, Fallback(patience_s=place.timeout_s / 2 if patience_s is None else patience_s))

    def __init__(self, plain: Store, replica: Store, fallback: Fallback) -> None:
        super().__init__(plain.stored, plain.description, plain.key)
        self.plain = plain
        self.replica = replica
        self.fallback = fallback

    def read_manifest(self, vm_id: VmId, point_id: PointId) -> Manifest:
        """See Store."""
        return self.fallback.read(
            lambda: self.plain.read_manifest(vm_id, point_id), lambda: self.replica.read_manifest(vm_id, point_id)
        )

    def read_segment(self, segment_id: SegmentId) -> Segment:
        """See Store."""
        return self.fallback.read(
            lambda: self.plain.read_segment(segment_id), lambda: self.replica.read_segment(segment_id)
        )

    def fetch(self, refs: Sequence[FrameRef]) -> list[bytes]:
        """See Store."""
        return self.fallback.read(lambda: self.plain.fetch(refs), lambda: self.replica.fetch(refs))

    def begin_backup(self, *, index: ChunkIndex) -> BackupWriter:
        """See Store."""
        return self.plain.begin_backup(index=index)

    def begin_moves(self, *, index: ChunkIndex, clock: Callable[[], float] = time.monotonic) -> BackupWriter:
        """See Store."""
        return self.plain.begin_moves(index=index, clock=clock)
