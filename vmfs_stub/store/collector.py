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
   delete what they still do not need, then the lists.

A collector that stops anywhere leaves things that the next one takes up; one that wakes up late deletes only names that
are never used again.  The list of another one stays until every name on it is gone, needed or not: as long as that one
may be about to delete a name, no backup may begin to need it.  (If a collector died, and something it had condemned was
needed after all, that is stored afresh by later backups, and the list goes with the last restore point that needs it.)
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from vmfs_stub.core.errors import (
    CorruptStoreObject,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreError,
    UnknownFormat,
)
from vmfs_stub.core.ids import PackId, PointId, SegmentId, VmId, WriterId
from vmfs_stub.store.claims import outdated_claims
from vmfs_stub.store.condemned import LIST_MAX, Condemned, decode_condemned, encode_condemned
from vmfs_stub.store.format import DOCUMENT_SIZE_MAX, INDEX_SIZE_MAX
from vmfs_stub.store.index_objects import decode_index, encode_index
from vmfs_stub.store.keys import (
    CONDEMNED,
    DEAD,
    FORGOTTEN,
    INDEX,
    LEASES,
    MANIFESTS,
    MOVED,
    PACKS,
    PENDING_SUFFIX,
    PINS,
    QUARANTINED,
    SEGMENTS,
    UNPINNED,
    dead_key,
    forgotten_key,
    is_id,
    is_segment_id,
    is_writer_id,
    lease_key,
    manifest_key,
    pack_key,
    segment_key,
    writer_of,
)
from vmfs_stub.store.leases import LEASE_DEAD_S, decode_lease
from vmfs_stub.store.manifest import encode_void
from vmfs_stub.store.objects import ObjectStore, exists, put_mark
from vmfs_stub.store.probe import probe
from vmfs_stub.store.reachability import Reachability, committed_name
from vmfs_stub.store.replica_mark import refuse_replica

log = logging.getLogger(__name__)

Point = tuple[VmId, PointId]


@dataclass(slots=True)
class Collected:
    """What was removed, or would be; ``bytes`` are those of packs and segments.

    ``waiting_points`` are forgotten, but a placeholder depends on them.
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
    ) -> None:
        self._objects = objects
        self._reachability = reachability
        self._lag_s = lag_s
        self._sleep = sleep
        self._say = say
        self._workers = workers
        self._collected = Collected()

    def survey(self) -> Collected:
        """What a run would remove, as far as one look can tell; changes nothing.  Raises as `run`."""
        look = self._look()
        going = (look.forgotten & look.points) - look.pinned
        keys = [key for key in self._manifests() if _point_of(key) not in going]
        doomed = self._unneeded(keys, set(look.leases), lag_s=0)
        self._collected.points = len(going)
        self._count(doomed, look)
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
        alive = self._clear_dead()
        earlier = {info.key for info in self._objects.list(CONDEMNED)}
        keys = set(self._manifests())
        doomed = self._unneeded(keys, alive, lag_s=self._lag_s)
        lists: list[str] = []
        try:
            self._condemn(doomed, lists)
            if lists:
                keys = self._look_again()
        except BaseException:
            with suppress(StoreError):  # nothing will be deleted, so backups may need all of it
                self._each(self._objects.delete, lists)
            raise
        doomed = self._still(doomed.packs.items(), doomed.segments.items())
        self._delete(doomed)
        indexes = self._clear_index(doomed.packs.keys())
        self._count(doomed, None)
        self._each(self._objects.delete, lists)
        self._unlist(earlier)
        self._delete_notes()
        self._reachability.forget_all_but(keys | indexes)
        return self._collected

    def _look_again(self) -> set[str]:
        """Steps 5 and 6; returns the manifests that are there."""
        self._wait(2 * self._lag_s, "for backups that are about to finish")
        keys = set(self._manifests())
        # What is committed between two pages of a listing, or within the lag, is in neither of its places.
        self._wait(self._lag_s, "for what they commit now")
        keys |= set(self._manifests())
        self._reachability.look(keys)
        return keys

    # Who is alive, and which points stay

    def _clear_dead(self) -> set[WriterId]:
        """Steps 1 to 3; returns who is writing."""
        first = self._look()
        self._wait(
            max(2 * self._lag_s, LEASE_DEAD_S if first.leases else 0), "to see which backups of other hosts are alive"
        )
        second = self._look()
        dead = {writer for writer, counter in first.leases.items() if second.leases.get(writer) == counter}
        dead |= {WriterId(info.key.removeprefix(DEAD)) for info in self._objects.list(DEAD)}
        alive = set(second.leases) - dead
        for pin in sorted(first.void):
            self._objects.delete(pin)
            self._objects.delete(UNPINNED + pin.removeprefix(PINS))
            self._collected.pins += 1
        # One that has committed does nothing more; a host that may not delete leaves its lease all the same.
        over = {_pending_writer(key) for key in second.pending if exists(self._objects, committed_name(key))}
        for writer in sorted((dead & set(second.leases)) - over):
            put_mark(self._objects, dead_key(writer))
        for key in sorted(first.pending & second.pending):
            if _pending_writer(key) not in alive:
                with suppress(ObjectExists):  # it was committed
                    self._objects.put(committed_name(key), encode_void(secrets.token_hex(16)))
                self._objects.delete(key)
                self._collected.pending += 1
        for vm_id, point_id in sorted((first.forgotten & second.forgotten) - first.pinned - second.pinned):
            self._objects.delete(manifest_key(vm_id, point_id))
            self._objects.delete(forgotten_key(vm_id, point_id))
            self._collected.points += (vm_id, point_id) in second.points
        self._collected.waiting_points = len(second.forgotten & second.pinned)
        for claim in sorted(first.outdated & second.outdated):
            self._objects.delete(claim)
            self._collected.claims += 1
        for writer in sorted(dead & set(second.leases)):
            self._objects.delete(lease_key(writer))
            self._collected.leases += 1
        return alive

    def _look(self) -> _Look:
        leases: dict[WriterId, int] = {}
        for info in self._objects.list(LEASES):
            writer = WriterId(info.key.removeprefix(LEASES))
            if is_writer_id(writer):
                counter = self._counter(info.key)
                if counter is not None:
                    leases[writer] = counter
        void = frozenset(PINS + info.key.removeprefix(UNPINNED) for info in self._objects.list(UNPINNED))
        manifests = list(self._manifests())
        return _Look(
            leases,
            void,
            frozenset(_point_of(info.key) for info in self._objects.list(PINS) if info.key not in void),
            frozenset(_point_of(info.key) for info in self._objects.list(FORGOTTEN)),
            frozenset(_point_of(key) for key in manifests if not key.endswith(PENDING_SUFFIX)),
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

    def _manifests(self) -> Iterator[str]:
        return (info.key for info in self._objects.list(MANIFESTS) if _is_manifest(info.key))

    def _unneeded(self, keys: Collection[str], alive: set[WriterId], *, lag_s: float) -> _Doomed:
        self._reachability.look(keys)
        packs = ((PackId(name), size) for name, size in self._stored(PACKS) if is_id(name))
        segments = ((SegmentId(name), size) for name, size in self._stored(SEGMENTS) if is_segment_id(name))
        doomed = self._still(packs, segments)
        # So long after the listing: whoever has put one of these had a lease before.
        self._wait(lag_s, "for leases of backups that have just begun")
        alive = alive | {WriterId(info.key.removeprefix(LEASES)) for info in self._objects.list(LEASES)}
        return _Doomed(
            {name: size for name, size in doomed.packs.items() if writer_of(name) not in alive},
            {name: size for name, size in doomed.segments.items() if writer_of(name) not in alive},
        )

    def _still(self, packs: Iterable[tuple[PackId, int]], segments: Iterable[tuple[SegmentId, int]]) -> _Doomed:
        """Those that were not needed in the last look."""
        needs = self._reachability
        return _Doomed(
            {name: size for name, size in packs if not needs.has_pack(name)},
            {name: size for name, size in segments if not needs.has_segment(name)},
        )

    def _stored(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((info.key.rpartition("/")[2], info.size) for info in self._objects.list(prefix))

    def _count(self, doomed: _Doomed, look: _Look | None) -> None:
        collected = self._collected
        collected.packs, collected.segments = len(doomed.packs), len(doomed.segments)
        collected.bytes = sum(doomed.packs.values()) + sum(doomed.segments.values())
        if look is not None:
            collected.waiting_points = len(look.forgotten & look.pinned)

    # Condemn and delete

    def _condemn(self, doomed: _Doomed, lists: list[str]) -> None:
        """Put lists; ``lists`` gets their keys, also when that fails."""
        names = iter([*((True, name) for name in doomed.packs), *((False, name) for name in doomed.segments)])
        while part := list(islice(names, LIST_MAX)):
            condemned = Condemned(
                frozenset(PackId(name) for is_pack, name in part if is_pack),
                frozenset(SegmentId(name) for is_pack, name in part if not is_pack),
            )
            nonce = secrets.token_hex(16)
            lists.append(f"{CONDEMNED}{nonce}")
            self._objects.put(lists[-1], encode_condemned(condemned, nonce))

    def _delete(self, doomed: _Doomed) -> None:
        self._each(self._objects.delete, [segment_key(name) for name in doomed.segments])
        self._each(self._objects.delete, [pack_key(name) for name in doomed.packs])

    def _clear_index(self, deleted: Collection[PackId]) -> set[str]:
        """Index objects that name what is gone are written again without, or hosts would go on referring to it.

        What an earlier collector has deleted counts, too, which may have died before it came to this.  Returns the keys
        of the others.
        """
        keys = {info.key for info in self._objects.list(INDEX)}
        for key, packs in self._reachability.packs_of_index(keys):
            gone = {pack_id for pack_id in packs if pack_id in deleted or self._is_gone(pack_id)}
            if gone:
                self._write_index_without(key, gone)
                keys.remove(key)
        return keys

    def _is_gone(self, pack_id: PackId) -> bool:
        """Whether a pack is not there, and nothing needs it."""
        return not self._reachability.has_pack(pack_id) and not exists(self._objects, pack_key(pack_id))

    def _write_index_without(self, key: str, gone: set[PackId]) -> None:
        try:
            packs = decode_index(self._objects.get(key, size_max=INDEX_SIZE_MAX), key)
        except (ObjectMissing, CorruptStoreObject, UnknownFormat):
            return  # another collector was quicker, or it is of no use, and no harm
        left = [(pack_id, refs) for pack_id, refs in packs if pack_id not in gone]
        if left:
            self._objects.put(f"{INDEX}{secrets.token_hex(16)}", encode_index(left))
        self._objects.delete(key)

    def _delete_notes(self) -> None:
        """Delete what was noted of damaged packs that are gone, and that nothing needs."""
        gone = [
            info.key
            for info in (*self._objects.list(QUARANTINED), *self._objects.list(MOVED))
            if is_id(pack_id := info.key.split("/")[1]) and self._is_gone(PackId(pack_id))
        ]
        self._each(self._objects.delete, gone)

    def _unlist(self, lists: set[str]) -> None:
        """Delete those of earlier lists of which every name is gone."""
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
            names = [*map(pack_key, sorted(listed.packs)), *map(segment_key, sorted(listed.segments))]
            if not any(exists(self._objects, name) for name in names):
                self._objects.delete(key)

    def _each(self, call: Callable[[str], None], keys: list[str]) -> None:
        if self._workers == 1:
            for key in keys:
                call(key)
            return
        with ThreadPoolExecutor(self._workers) as executor:
            for _ in executor.map(call, keys):
                pass

    def _wait(self, seconds: float, why: str) -> None:
        if seconds >= 1:
            self._say(f"waiting {seconds:.0f} s {why}")
        if seconds:
            self._sleep(seconds)


def _point_of(key: str) -> Point:
    """Of a manifest, a pin or a mark: ``kind/vm id/point id…``."""
    _, vm_id, point_id = (*key.split("/"), "", "")[:3]
    return VmId(vm_id), PointId(point_id.partition(".")[0])


def _is_manifest(key: str) -> bool:
    """Whether it is one of ours, committed or pending: anything else is left alone."""
    _, vm_id, name = (*key.split("/"), "", "")[:3]
    point_id, _, rest = name.partition(".")
    is_ours = not rest or (rest.endswith(PENDING_SUFFIX) and is_writer_id(rest.removesuffix(PENDING_SUFFIX)))
    return key.count("/") == 2 and is_id(vm_id) and is_id(point_id) and is_ours and name.count(".") in (0, 2)


def _pending_writer(key: str) -> WriterId:
    return WriterId(key.removesuffix(PENDING_SUFFIX).rpartition(".")[2])
