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
4. What is needed of packs that are mostly garbage is copied elsewhere, and moved documents tell readers where
   (`repacking.py`).
5. Whatever no manifest needs, committed or pending, and no living writer has put, is condemned: its name is on a list.
   So are the packs of step 4, as retired: a backup may go on to need of them what was moved, and nothing else.
6. Wait.  A backup reads the lists after its pending manifest is there, so that it sees the list, or is seen:
7. look at all manifests again, twice with the lag between, since one that is committed moves from one name to another;
   delete what they still do not need, and the packs of step 4 if all that they need of them was moved; then what was
   noted of packs that were gone before, and that are not needed in either look; then the lists.

A collector that stops anywhere leaves things that the next one takes up; one that wakes up late deletes only names that
are never used again.  The list of another one stays until every name on it is gone, needed or not: as long as that one
may be about to delete a name, no backup may begin to need it.  (If a collector died, and something it had condemned was
needed after all, that is stored afresh by later backups, and the list goes with the last restore point that needs it.)
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from itertools import chain, islice
from typing import Final

from xxhash import xxh3_64_digest

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    CorruptStoreObject,
    IntegrityError,
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
from vmfs_stub.store.quarantine import quarantined_packs
from vmfs_stub.store.reachability import Reachability, committed_name
from vmfs_stub.store.repacking import Moved, Repacking
from vmfs_stub.store.replica_mark import refuse_replica

log = logging.getLogger(__name__)

Point = tuple[VmId, PointId]

REPACKED_BELOW: Final = 0.5
"""Share of a pack's bytes: what less is needed of is copied elsewhere."""
PACKS_REPACKED_MAX: Final = 512
"""In one run; bounds the frames that are held in memory."""


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
    noted: frozenset[PackId] = frozenset()
    """Packs that are gone already, and of which there are notes."""


@dataclass(frozen=True, slots=True)
class _Retiring:
    """Packs that are mostly garbage, with their sizes in bytes, and where what is needed of them was moved.

    ``looked_into`` are the segments that refer to nothing else in them.
    """

    sizes: dict[PackId, int] = field(default_factory=dict)
    moved: dict[PackId, Moved] = field(default_factory=dict)
    looked_into: frozenset[SegmentId] = frozenset()


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
        self._sleep = sleep
        self._say = say
        self._workers = workers
        self._repacking = repacking
        self._collected = Collected()

    def survey(self) -> Collected:
        """What a run would remove, as far as one look can tell; changes nothing.  Raises as `run`."""
        look = self._look()
        going = (look.forgotten & look.points) - look.pinned
        keys = [key for key in self._manifests() if _point_of(key) not in going]
        doomed, half_empty = self._unneeded(keys, set(look.leases), lag_s=0)
        _, needed = self._needed_of(half_empty)
        self._collected.points = len(going)
        self._count(doomed, {pack_id: half_empty[pack_id] for pack_id in needed}, look)
        self._collected.copied_bytes = sum(ref.length for refs in needed.values() for ref in refs)
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
        doomed, half_empty = self._unneeded(keys, alive, lag_s=self._lag_s)
        retiring = self._repack(half_empty)
        lists: list[str] = []
        try:
            self._condemn(doomed, retiring, lists)
            if lists:
                keys = self._look_again()
            retired = self._to_retire(retiring)
        except BaseException:
            with suppress(StoreError):  # nothing will be deleted, so backups may need all of it
                self._each(self._objects.delete, lists)
            raise
        doomed = self._still(doomed)
        self._delete(doomed, retired)
        indexes = self._clear_index(doomed.packs.keys() | retired.keys())
        self._count(doomed, retired, None)
        self._each(self._objects.delete, self._notes(doomed.noted | doomed.packs.keys()))
        self._each(self._objects.delete, lists)
        self._unlist(earlier)
        self._reachability.forget_all_but(keys | indexes)
        return self._collected

    def _look_again(self) -> set[str]:
        """Steps 6 and 7; returns the manifests that are there."""
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

    def _unneeded(
        self, keys: Collection[str], alive: set[WriterId], *, lag_s: float
    ) -> tuple[_Doomed, dict[PackId, int]]:
        """What nothing needs, and some packs of which little may be needed; of no living writer."""
        needs = self._reachability
        needs.look(keys)
        packs: dict[PackId, int] = {}
        half_empty = _Sample(PACKS_REPACKED_MAX)
        for name, size in self._stored(PACKS):
            if is_id(name):
                used = needs.least_use(PackId(name))
                if used is None:
                    packs[PackId(name)] = size
                elif used < size * REPACKED_BELOW:
                    half_empty.add(PackId(name), size)
        segments = {
            SegmentId(name): size
            for name, size in self._stored(SEGMENTS)
            if is_segment_id(name) and not needs.has_segment(SegmentId(name))
        }
        noted = frozenset(
            pack_id
            for pack_id in {PackId(key.split("/")[1]) for key in self._noted()}
            if is_id(pack_id) and pack_id not in packs and self._is_gone(pack_id)
        )
        # So long after the listing: whoever has put one of these had a lease before.
        self._wait(lag_s, "for leases of backups that have just begun")
        alive = alive | {WriterId(info.key.removeprefix(LEASES)) for info in self._objects.list(LEASES)}
        doomed = _Doomed(
            {name: size for name, size in packs.items() if writer_of(name) not in alive},
            {name: size for name, size in segments.items() if writer_of(name) not in alive},
            noted,
        )
        return doomed, {name: size for name, size in half_empty.chosen() if writer_of(name) not in alive}

    def _still(self, doomed: _Doomed) -> _Doomed:
        """Of these, what was not needed in the last look either."""
        needs = self._reachability
        return _Doomed(
            {name: size for name, size in doomed.packs.items() if not needs.has_pack(name)},
            {name: size for name, size in doomed.segments.items() if not needs.has_segment(name)},
            frozenset(name for name in doomed.noted if not needs.has_pack(name)),
        )

    def _stored(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((info.key.rpartition("/")[2], info.size) for info in self._objects.list(prefix))

    def _count(self, doomed: _Doomed, retired: dict[PackId, int], look: _Look | None) -> None:
        collected = self._collected
        collected.packs, collected.segments = len(doomed.packs | retired), len(doomed.segments)
        collected.bytes = sum((doomed.packs | retired).values()) + sum(doomed.segments.values())
        collected.repacked = len(retired)
        if look is not None:
            collected.waiting_points = len(look.forgotten & look.pinned)

    # What is mostly garbage

    def _needed_of(self, half_empty: dict[PackId, int]) -> tuple[frozenset[SegmentId], dict[PackId, list[FrameRef]]]:
        """What is needed of those of which it is little indeed, and the segments that this was found in."""
        if self._repacking is None or not half_empty:
            return frozenset(), {}
        packs = half_empty.keys() - quarantined_packs(self._objects)
        found: dict[PackId, dict[int, FrameRef]] = {pack_id: {} for pack_id in sorted(packs)}
        segments = set()
        for segment_id, refs in self._reachability.references(packs):
            segments.add(segment_id)
            for ref in refs:
                if ref.pack_id in found:
                    found[ref.pack_id][ref.offset] = ref
            for pack_id in {ref.pack_id for ref in refs} & found.keys():
                if sum(ref.length for ref in found[pack_id].values()) >= half_empty[pack_id] * REPACKED_BELOW:
                    del found[pack_id]  # more than one segment refers to it, each to something else
        return frozenset(segments), {
            pack_id: [refs[offset] for offset in sorted(refs)] for pack_id, refs in found.items()
        }

    def _repack(self, half_empty: dict[PackId, int]) -> _Retiring:
        """Step 4.  What cannot be read or stored now is left as it is."""
        if self._repacking is None:
            return _Retiring()
        try:
            segments, needed = self._needed_of(half_empty)
            if not needed:
                return _Retiring()
            self._say(f"copying what is needed of {len(needed)} packs that are mostly garbage")
            moved = self._repacking.move(needed)
        except (StoreError, IntegrityError) as exc:
            log.warning("packs that are mostly garbage stay as they are: %s", exc)
            return _Retiring()
        self._collected.copied_bytes = self._repacking.copied_bytes
        return _Retiring({pack_id: half_empty[pack_id] for pack_id in moved}, moved, segments)

    def _to_retire(self, retiring: _Retiring) -> dict[PackId, int]:
        """Those of which no more was needed in the last look than was moved, with their sizes."""
        copies = {pack_id for moved in retiring.moved.values() for pack_id in moved.values()}
        there = {pack_id for pack_id in copies if self._reachability.has_pack(pack_id)}
        moved, sizes = retiring.moved, retiring.sizes
        left = {pack_id: size for pack_id, size in sizes.items() if there.issuperset(moved[pack_id].values())}
        if not left:
            return left
        try:
            for _, refs in self._reachability.references(sizes.keys(), but=retiring.looked_into):
                for ref in refs:
                    if ref.offset not in moved[ref.pack_id]:
                        left.pop(ref.pack_id, None)
        except (ObjectMissing, IntegrityError) as exc:  # another collector has deleted it since, perhaps
            log.warning("packs that were repacked stay for this time: %s", exc)
            return {}
        return left

    # Condemn and delete

    def _condemn(self, doomed: _Doomed, retiring: _Retiring, lists: list[str]) -> None:
        """Put lists; ``lists`` gets their keys, also when that fails."""
        names: Iterator[tuple[str, str]] = chain(
            (("pack", name) for name in sorted(doomed.packs.keys() | doomed.noted)),
            (("segment", name) for name in sorted(doomed.segments)),
            (("retired", name) for name in sorted(retiring.sizes)),
        )
        while part := list(islice(names, LIST_MAX)):
            condemned = Condemned(
                frozenset(PackId(name) for kind, name in part if kind == "pack"),
                frozenset(SegmentId(name) for kind, name in part if kind == "segment"),
                frozenset(PackId(name) for kind, name in part if kind == "retired"),
            )
            nonce = secrets.token_hex(16)
            lists.append(f"{CONDEMNED}{nonce}")
            self._objects.put(lists[-1], encode_condemned(condemned, nonce))

    def _delete(self, doomed: _Doomed, retired: dict[PackId, int]) -> None:
        self._each(self._objects.delete, [segment_key(name) for name in doomed.segments])
        self._each(self._objects.delete, [pack_key(name) for name in doomed.packs.keys() | retired.keys()])

    def _clear_index(self, deleted: Collection[PackId]) -> set[str]:
        """Index objects that name what is gone are written again without, or hosts would go on referring to it.

        What an earlier collector has deleted counts, too, which may have died before it came to this.  Returns the keys
        of the others.
        """
        keys = {info.key for info in self._objects.list(INDEX)}
        for key, packs in self._reachability.packs_of_index(keys):
            gone = {pack_id for pack_id in packs if pack_id in deleted or self._is_missing(pack_id)}
            if gone:
                self._write_index_without(key, gone)
                keys.remove(key)
        return keys

    def _is_missing(self, pack_id: PackId) -> bool:
        """Whether a pack is not there, and not needed, or retired."""
        is_retired = self._reachability.is_moved(pack_id) and not exists(self._objects, pack_key(pack_id))
        return is_retired or self._is_gone(pack_id)

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

    def _noted(self) -> Iterator[str]:
        """Marks of quarantine, and moved documents."""
        return (info.key for info in (*self._objects.list(QUARANTINED), *self._objects.list(MOVED)))

    def _notes(self, packs: Set[PackId]) -> list[str]:
        """Those about these packs."""
        return [key for key in self._noted() if PackId(key.split("/")[1]) in packs]

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
            names = [*map(pack_key, sorted(listed.packs | listed.retired)), *map(segment_key, sorted(listed.segments))]
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


class _Sample:
    """At most so many packs of all that are added, each with the same chance.

    A run looks into some; another one, into others: what turns out to be needed must not be in the way of the rest.
    """

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._salt = secrets.token_hex(8)
        self._kept: list[tuple[bytes, PackId, int]] = []

    def add(self, pack_id: PackId, size: int) -> None:
        lot = xxh3_64_digest((self._salt + pack_id).encode())
        if len(self._kept) < self._count_max:
            heappush(self._kept, (lot, pack_id, size))
        else:
            heappushpop(self._kept, (lot, pack_id, size))

    def chosen(self) -> Iterator[tuple[PackId, int]]:
        return ((pack_id, size) for _, pack_id, size in self._kept)


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
