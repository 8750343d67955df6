"""Garbage collection: removes from a store what no restore point and no running backup needs.

It runs beside backups of any host, and beside other collectors.  Nothing here compares clocks; ``lag`` is how long a
listing may miss what was put.  The order, and why it is safe:

1. Look at leases, pins, forgotten marks and claims; wait; look again.  A lease whose counter stood still is dead, and a
   mark says so from then on: whatever its writer puts again, it will not commit.  Claims that two newer ones of their
   VM followed in both looks are deleted: whoever takes such a number again finds the newer ones.
2. What a dead writer has pending is deleted, after a void manifest is put where the committed one would be: either that
   or the writer's comes first, and the other one fails.
3. A forgotten point without a pin in either look is deleted.  Whoever pins an old point looks for the mark after that.
   This comes after 2, so that no void manifest takes the place of one that others know.
4. Whatever no manifest needs, committed or pending, and no living writer has put, is condemned: its name is on a list.
5. Wait.  A backup reads the lists after its pending manifest is there, so that it sees the list, or is seen:
6. look at all manifests again, twice with the lag between, since one that is committed moves from one name to another;
   delete what they still do not need; then what is noted of packs that neither look needed, as far as it was there
   before the list; then the list (`condemning.py`).
7. Packs that are mostly garbage are retired in the same way, some at a time (`retirement.py`).
8. Lists of others that are of no use any more are deleted.

A collector that stops anywhere leaves things that the next one takes up; one that wakes up late deletes only names that
are never used again.  The list of another one stays until every name on it is gone, needed or not: as long as that one
may be about to delete a name, or what is noted of it, no backup may begin to need it.  (If a collector died, and
something it had condemned was needed after all, that is stored afresh by later backups, read from the store where it is
nowhere else, and the list goes with the last restore point that needs it.)
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

from vmfs_stub.core.errors import (
    CorruptStoreObject,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    UnknownFormat,
)
from vmfs_stub.core.ids import PackId, PointId, SegmentId, VmId, WriterId
from vmfs_stub.store.claims import outdated_claims
from vmfs_stub.store.condemned import Condemned, decode_condemned, list_keys
from vmfs_stub.store.condemning import Condemning
from vmfs_stub.store.format import DOCUMENT_SIZE_MAX
from vmfs_stub.store.keys import (
    DEAD,
    FORGOTTEN,
    LEASES,
    MOVED,
    PACKS,
    PENDING_SUFFIX,
    PINS,
    QUARANTINED,
    SEGMENTS,
    UNPINNED,
    committed_name,
    dead_key,
    forgotten_key,
    is_id,
    is_segment_id,
    is_writer_id,
    lease_key,
    manifest_key,
    noted_pack,
    pack_key,
    pending_writer,
    point_of,
    quarantine_key,
    segment_key,
    writer_of,
)
from vmfs_stub.store.leases import LEASE_DEAD_S, decode_lease
from vmfs_stub.store.manifest import encode_void
from vmfs_stub.store.objects import ObjectStore, exists, put_mark
from vmfs_stub.store.probe import probe
from vmfs_stub.store.reachability import Reachability
from vmfs_stub.store.repacking import Repacking
from vmfs_stub.store.replica_mark import refuse_replica
from vmfs_stub.store.retirement import Retired, Retirement

log = logging.getLogger(__name__)

Point = tuple[VmId, PointId]


@dataclass(slots=True)
class Collected:
    """What was removed, or would be; ``bytes`` are those of packs and segments.

    ``waiting_points`` are forgotten, but a placeholder depends on them.  Of the packs ``repacked`` were needed in part:
    ``copied_bytes`` were stored for them.
    """

    points: int = 0
    waiting_points: int = 0
    packs: int = 0
    segments: int = 0
    bytes: int = 0
    pending: int = 0
    leases: int = 0
    pins: int = 0
    claims: int = 0
    repacked: int = 0
    copied_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Look:
    """What decides who is alive and which points stay: leases with their counters, keys of pins that are void."""

    leases: dict[WriterId, int]
    void: frozenset[str]
    pinned: frozenset[Point]
    forgotten: frozenset[Point]
    points: frozenset[Point]
    pending: frozenset[str]
    outdated: frozenset[str]
    """Keys of claims."""


@dataclass(frozen=True, slots=True)
class _Doomed:
    """Names that nothing needs, with their sizes in bytes."""

    packs: dict[PackId, int] = field(default_factory=dict)
    segments: dict[SegmentId, int] = field(default_factory=dict)
    notes: dict[PackId, list[str]] = field(default_factory=dict)
    """The marks and documents that there are about these packs, and about others that are gone already."""

    def names(self) -> Condemned:
        """What is to be on a list."""
        return Condemned(frozenset(self.packs.keys() | self.notes.keys()), frozenset(self.segments))


class Collector:
    """One run; ``sleep`` gets seconds, ``say`` gets what to tell whoever waits."""

    def __init__(
        self,
        objects: ObjectStore,
        reachability: Reachability,
        *,
        lag_s: float,
        sleep: Callable[[float], None],
        say: Callable[[str], None] = log.info,
        workers: int = 16,
        repacking: Repacking | None = None,
    ) -> None:
        """Without ``repacking`` packs stay as long as anything in them is needed."""
        self._objects = objects
        self._reachability = reachability
        self._lag_s = lag_s
        self._condemning = Condemning(objects, reachability, lag_s=lag_s, sleep=sleep, say=say, workers=workers)
        self._retirement = None if repacking is None else Retirement(self._condemning, repacking)
        self._collected = Collected()

    def survey(self) -> Collected:
        """What a run would remove, as far as one look can tell; changes nothing.  Raises as `run`."""
        look = self._look()
        going = (look.forgotten & look.points) - look.pinned
        keys = [key for key in self._condemning.manifests() if point_of(key) not in going]
        self._collected.points = len(going)
        self._collected.waiting_points = len(look.forgotten & look.pinned)
        self._count(self._unneeded(keys, set(look.leases), lag_s=0))
        if self._retirement is not None:
            self._count_retired(self._retirement.survey())
        return self._collected

    def run(self) -> Collected:
        """Remove what nothing needs.

        Raises: IntegrityError kinds, UnknownFormat, ObjectMissing when a manifest or a segment that a restore point
        needs cannot be read: nothing it may need is deleted then; StoreDenied when this host may not delete;
        StoreUnavailable; Refused in a replica.
        """
        refuse_replica(self._objects)
        if not probe(self._objects):
            msg = "this host may not delete from the store; run garbage collection on one that may"
            raise StoreDenied(msg)
        alive = self._settle()
        earlier = set(list_keys(self._objects))
        keys = set(self._condemning.manifests())
        doomed = self._unneeded(keys, alive, lag_s=self._lag_s)
        lists, keys = self._condemning.condemn(doomed.names(), keys)
        doomed = self._still(doomed)
        self._condemning.delete([segment_key(name) for name in doomed.segments])
        # Those that were retired before, too: a replica has them yet if that was by a host that does not know of it.
        self._condemning.delete([pack_key(name) for name in doomed.packs.keys() | doomed.notes.keys()])
        keys |= self._condemning.clear_index(doomed.packs.keys())
        self._count(doomed)
        self._condemning.delete([key for notes in doomed.notes.values() for key in notes])
        self._condemning.delete(lists)
        if self._retirement is not None:
            retired = self._retirement.run(earlier)
            self._count_retired(retired)
            keys |= retired.kept
        self._unlist(earlier)
        self._reachability.forget_all_but(keys)
        return self._collected

    # Who is alive, and which points stay

    def _settle(self) -> set[WriterId]:
        """Steps 1 to 3; returns who is writing."""
        first = self._look()
        self._condemning.wait(
            max(2 * self._lag_s, LEASE_DEAD_S if first.leases else 0), "to see which backups of other hosts are alive"
        )
        second = self._look()
        dead = {writer for writer, counter in first.leases.items() if second.leases.get(writer) == counter}
        dead |= {WriterId(info.key.removeprefix(DEAD)) for info in self._objects.list(DEAD)}
        alive = set(second.leases) - dead
        ended = sorted(dead & set(second.leases))
        self._delete_void_pins(first.void)
        self._mark_dead(ended, second.pending)
        self._delete_pending(first.pending & second.pending, alive)
        self._delete_forgotten((first.forgotten & second.forgotten) - first.pinned - second.pinned, second.points)
        self._collected.waiting_points = len(second.forgotten & second.pinned)
        self._delete_claims(first.outdated & second.outdated)
        self._delete_leases(ended)
        return alive

    def _delete_void_pins(self, pins: Set[str]) -> None:
        for pin in sorted(pins):
            self._objects.delete(pin)
            self._objects.delete(UNPINNED + pin.removeprefix(PINS))
            self._collected.pins += 1

    def _mark_dead(self, writers: Sequence[WriterId], pending: Set[str]) -> None:
        # One that has committed does nothing more; a host that may not delete leaves its lease all the same.
        over = {pending_writer(key) for key in pending if exists(self._objects, committed_name(key))}
        for writer in writers:
            if writer not in over:
                put_mark(self._objects, dead_key(writer))

    def _delete_pending(self, pending: Set[str], alive: Set[WriterId]) -> None:
        for key in sorted(pending):
            if pending_writer(key) not in alive:
                with suppress(ObjectExists):  # it was committed
                    self._objects.put(committed_name(key), encode_void(secrets.token_hex(16)))
                self._objects.delete(key)
                self._collected.pending += 1

    def _delete_forgotten(self, points: Set[Point], listed: Set[Point]) -> None:
        for vm_id, point_id in sorted(points):
            self._objects.delete(manifest_key(vm_id, point_id))
            self._objects.delete(forgotten_key(vm_id, point_id))
            self._collected.points += (vm_id, point_id) in listed

    def _delete_claims(self, claims: Set[str]) -> None:
        for claim in sorted(claims):
            self._objects.delete(claim)
            self._collected.claims += 1

    def _delete_leases(self, writers: Sequence[WriterId]) -> None:
        for writer in writers:
            self._objects.delete(lease_key(writer))
            self._collected.leases += 1

    def _look(self) -> _Look:
        leases: dict[WriterId, int] = {}
        for info in self._objects.list(LEASES):
            writer = WriterId(info.key.removeprefix(LEASES))
            if is_writer_id(writer):
                counter = self._counter(info.key)
                if counter is not None:
                    leases[writer] = counter
        void = frozenset(PINS + info.key.removeprefix(UNPINNED) for info in self._objects.list(UNPINNED))
        manifests = list(self._condemning.manifests())
        return _Look(
            leases,
            void,
            frozenset(point_of(info.key) for info in self._objects.list(PINS) if info.key not in void),
            frozenset(point_of(info.key) for info in self._objects.list(FORGOTTEN)),
            frozenset(point_of(key) for key in manifests if not key.endswith(PENDING_SUFFIX)),
            frozenset(key for key in manifests if key.endswith(PENDING_SUFFIX)),
            outdated_claims(self._objects),
        )

    def _counter(self, key: str) -> int | None:
        try:
            return decode_lease(self._objects.get(key, size_max=DOCUMENT_SIZE_MAX), key).counter
        except ObjectMissing:
            return None
        except (CorruptStoreObject, UnknownFormat) as exc:
            log.warning("a lease that cannot be read counts as one that stands still: %s", exc)
            return -1

    # What nothing needs

    def _unneeded(self, keys: Collection[str], alive: set[WriterId], *, lag_s: float) -> _Doomed:
        """What nothing needs, and no living writer has put."""
        needs = self._reachability
        needs.look(keys)
        packs = {
            PackId(name): size for name, size in self._stored(PACKS) if is_id(name) and not needs.has_pack(PackId(name))
        }
        segments = {
            SegmentId(name): size
            for name, size in self._stored(SEGMENTS)
            if is_segment_id(name) and not needs.has_segment(SegmentId(name))
        }
        notes: dict[PackId, list[str]] = {}
        for pack_id, key in self._noted():
            if is_id(pack_id) and not needs.has_pack(pack_id):
                notes.setdefault(pack_id, []).append(key)
        # So long after the listing: whoever has put one of these had a lease before.
        self._condemning.wait(lag_s, "for leases of backups that have just begun")
        alive = alive | {WriterId(info.key.removeprefix(LEASES)) for info in self._objects.list(LEASES)}
        doomed = {name: size for name, size in packs.items() if writer_of(name) not in alive}
        return _Doomed(
            doomed,
            {name: size for name, size in segments.items() if writer_of(name) not in alive},
            {
                name: keys
                for name, keys in notes.items()
                if name in doomed or (name not in packs and self._condemning.is_gone(name))
            },
        )

    def _still(self, doomed: _Doomed) -> _Doomed:
        """Of these, what was not needed in the last look either."""
        needs = self._reachability
        return _Doomed(
            {name: size for name, size in doomed.packs.items() if not needs.has_pack(name)},
            {name: size for name, size in doomed.segments.items() if not needs.has_segment(name)},
            {name: keys for name, keys in doomed.notes.items() if not needs.has_pack(name)},
        )

    def _stored(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((info.key.rpartition("/")[2], info.size) for info in self._objects.list(prefix))

    def _count(self, doomed: _Doomed) -> None:
        collected = self._collected
        collected.packs, collected.segments = len(doomed.packs), len(doomed.segments)
        collected.bytes = sum(doomed.packs.values()) + sum(doomed.segments.values())

    def _count_retired(self, retired: Retired) -> None:
        collected = self._collected
        collected.packs += retired.packs
        collected.bytes += retired.bytes
        collected.repacked, collected.copied_bytes = retired.packs, retired.copied_bytes

    def _noted(self) -> Iterator[tuple[PackId, str]]:
        """Marks of quarantine, and moved documents, each with the pack that it is about."""
        listed = chain(self._objects.list(QUARANTINED), self._objects.list(MOVED))
        return ((noted_pack(info.key), info.key) for info in listed)

    def _unlist(self, lists: set[str]) -> None:
        """Delete those of earlier lists of which every name is gone, and the notes that go after a name."""
        for key in sorted(lists):
            try:
                listed = decode_condemned(self._objects.get(key, size_max=DOCUMENT_SIZE_MAX), key)
            except ObjectMissing:
                continue
            except (CorruptStoreObject, UnknownFormat) as exc:
                log.warning(
                    "a list of garbage collection cannot be read, and fails backups until it is deleted: %s", exc
                )
                continue
            names = [*map(pack_key, sorted(listed.packs | listed.retired)), *map(segment_key, sorted(listed.segments))]
            is_over = not any(exists(self._objects, name) for name in names)
            if is_over and not any(pack_id in listed.packs for pack_id, _ in self._noted()):
                self._condemning.delete([quarantine_key(pack_id) for pack_id in sorted(listed.retired)])
                self._objects.delete(key)
