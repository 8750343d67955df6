"""The replica: a second store that holds the same restore points, byte for byte, under the same names.

It has the description, the key documents, packs, segments, committed manifests and, where packs were damaged or
repacked, moved documents; so whatever reads restore points reads them there as well.  It has nothing that hosts tell
each other by: no pins, leases, claims or lists.  So it takes no backups, and no garbage is collected in it: a mark says
that it is one (`replica_mark.py`).

Order, which makes what is there say what was done before (must = a copy is counted that is none):
- must: a segment is put when every pack that it names was read back from the replica, whole; of one that may go though
  it is needed, since it is retired in the store, what the segment needs was read where documents say;
- must: the manifest is put when all its segments are there; it is read back like everything that is put.
So a run that is cut short goes on where it was, a point whose segments are there needs no look at its packs, and
nothing is known of a replica that is not in it.

What is put is what is sound in the store: a pack by its footer and the checksum of each frame, a segment by its name,
a document by its checksum.  A damaged copy in the replica is replaced by that.  A pack that is damaged in the store is
copied as it is, with what was repaired of it, if every frame that the segment needs can then be read from the replica.
Blocking.  This module must not know when anything is copied, nor by how many threads.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    DAMAGE,
    CorruptFrame,
    CorruptPack,
    IntegrityError,
    ObjectExists,
    ObjectMissing,
    PointNotFound,
    StoreUnavailable,
    WrongStore,
)
from vmfs_stub.core.ids import PackId, PointId, SegmentId, VmId
from vmfs_stub.store.condemned import read_condemned
from vmfs_stub.store.format import (
    DOCUMENT_SIZE_MAX,
    MANIFEST_SIZE_MAX,
    PACK_SIZE_MAX,
    SEGMENT_SIZE_MAX,
    StoreDescription,
    decode_description,
)
from vmfs_stub.store.key_documents import decode_key_document
from vmfs_stub.store.keys import (
    KEYS,
    MANIFESTS,
    MOVED,
    PACKS,
    REPLICA_KEY,
    SEGMENTS,
    STORE_KEY,
    damage,
    is_id,
    manifest_key,
    manifests_of,
    pack_key,
    segment_key,
)
from vmfs_stub.store.manifest import decode_manifest
from vmfs_stub.store.moved import HOPS_MAX, Documents, decode_moved, read_documents
from vmfs_stub.store.objects import OBJECT_SIZE_MAX, ObjectStore, absent, drop_cache, exists
from vmfs_stub.store.packs import check_pack
from vmfs_stub.store.probe import probe
from vmfs_stub.store.read_back import ReadBack
from vmfs_stub.store.replica_mark import mark_replica
from vmfs_stub.store.segments import Segment
from vmfs_stub.store.store import Store
from vmfs_stub.store.versions import raise_version, version_of

log = logging.getLogger(__name__)

REPLICATED: Final = (PACKS, SEGMENTS, MANIFESTS, MOVED)
"""Kinds of objects of which a replica has copies, beside what opens it."""
NAMES_KEPT: Final = 100_000
"""Packs and segments that one run knows to be in the replica: more than one VM's restore points share."""


def check_replica(objects: ObjectStore, description: StoreDescription) -> None:
    """See that the replica of that store is where it is expected, and not the store itself, or one that became it.

    Raises: StoreUnavailable, also when there is none; WrongStore; CorruptStoreObject, UnknownFormat, StoreDenied.
    """
    try:
        found = decode_description(objects.get(STORE_KEY, size_max=DOCUMENT_SIZE_MAX))
    except ObjectMissing as exc:
        raise StoreUnavailable(
            "there is no replica where [replica] url leads; is what belongs there mounted? `vmfs-stub replicate "
            "--create` makes one"
        ) from exc
    if found != description:
        raise WrongStore(
            f"store {found.store_id} lies where the replica of {description.store_id} is expected; correct [replica] "
            "url, or mount what belongs there"
        )
    if not exists(objects, REPLICA_KEY):
        raise WrongStore(
            f"what lies where [replica] url leads has no mark of a replica: it is store {description.store_id} itself, "
            "or a replica that became the store; correct both urls"
        )


def make_replica(store: Store, objects: ObjectStore) -> bool:
    """Make the replica of ``store`` where there is none; False where it is already.

    Raises: WrongStore when another store is there; Unsupported; StoreUnavailable, StoreDenied, StoreFull.
    """
    if exists(objects, STORE_KEY):
        check_replica(objects, store.description)
        return False
    probe(objects)
    mark_replica(objects)
    _copy_keys(store.stored, objects)  # first: there never is a replica that nobody can open
    with suppress(ObjectExists):
        objects.put(STORE_KEY, store.stored.get(STORE_KEY, size_max=DOCUMENT_SIZE_MAX))
    check_replica(objects, store.description)
    return True


def copy_keys(store: Store, replica: Store) -> None:
    """Raise the replica to the store's version, and let what opens an encrypted store open it, and nothing else.

    A key document is removed from the replica when the store, which is there, does not have it; never the last one.
    Raises: as `check_replica`, of either.
    """
    check_replica(replica.stored, store.description)
    store.check_there()
    raise_version(replica.stored, store.description, version_of(store.stored, store.description))
    if store.key is None:
        return
    left = _copy_keys(store.stored, replica.stored)
    for key in sorted(_key_names(replica.stored) - left):
        if left and not exists(store.stored, key):
            replica.stored.delete(key)


def _copy_keys(objects: ObjectStore, replica: ObjectStore) -> set[str]:
    """Returns the names of the key documents of the store; those that are damaged are not copied."""
    names = _key_names(objects)
    for key in sorted(names):
        try:
            data = objects.get(key, size_max=DOCUMENT_SIZE_MAX)
            decode_key_document(data, key)
        except DAMAGE as exc:
            log.warning("%s is not copied to the replica: %s", key, exc)
            continue
        if _read(replica, key) != data:
            _put(replica, key, data)
    return names


def _key_names(objects: ObjectStore) -> set[str]:
    return {info.key for info in objects.list(KEYS) if is_id(info.key.removeprefix(KEYS))}


@dataclass(frozen=True, slots=True)
class SegmentCopy:
    """A segment of the store that the replica is to have; ``data`` as it is stored."""

    segment: Segment
    segment_id: SegmentId
    data: bytes


class Replication:
    """One run: what it has seen to be in the replica it does not ask for again.  Thread-safe.

    With ``again`` nothing counts that was done before it: all that the replica has is read back, and what is damaged
    there is replaced.
    The calls for a restore point: `look` → for the segments that are `missing`: `read` → `copy_pack` for the packs of
    each (several at once) → `put_segment` → `put_manifest`.
    """

    def __init__(self, store: Store, replica: Store, read_back: ReadBack, *, again: bool = False) -> None:
        self._store = store
        self._replica = replica
        self._read_back = read_back
        self._again = again
        self._known: OrderedDict[str, None] = OrderedDict()
        self._damaged: set[PackId] = set()
        """Packs that are damaged in the store, and have no whole copy."""
        self._lock = threading.Lock()

    def begin(self) -> None:
        """See that both are what they should be, and that the same keys open them.  Raises: as `copy_keys`."""
        copy_keys(self._store, self._replica)

    def vms(self) -> list[VmId]:
        """All VMs that have restore points in the store.  Raises: StoreUnavailable, StoreDenied."""
        return sorted(self._store.point_counts())

    def lacking(self, vm_id: VmId) -> list[PointId]:
        """As the function of that name; with ``again`` all points of the VM."""
        if self._again:
            return [point.point_id for point in reversed(self._store.points(vm_id, with_damaged=True))]
        return lacking(self._store, self._replica, vm_id)

    def look(self, vm_id: VmId, point_id: PointId) -> tuple[bytes, list[SegmentId]]:
        """The manifest of a point, as it is stored, and its segments.

        Raises: PointNotFound when there is no such point, or none any more; CorruptManifest, UnknownFormat,
        StoreUnavailable.
        """
        key = manifest_key(vm_id, point_id)
        try:
            data = self._store.stored.get(key)
        except ObjectMissing as exc:
            self._store.check_there()
            raise PointNotFound(f"VM {vm_id} has no restore point {point_id} in this store") from exc
        manifest = decode_manifest(self._store.sealing.open(data, key), key)
        return data, sorted({one for stored in manifest.files for one in stored.segments if one is not None})

    def missing(self, segments: Iterable[SegmentId]) -> list[SegmentId]:
        """Those that the replica does not have, or that were not dealt with in this run if it does all ``again``."""
        if self._again:
            return [one for one in segments if not self._is_known(segment_key(one))]
        return [one for one in segments if not self._is_there(segment_key(one))]

    def read(self, segment_id: SegmentId) -> SegmentCopy:
        """A segment from the store.  Raises: ObjectMissing, CorruptSegment, UnknownFormat, StoreUnavailable."""
        data = self._store.stored.get(segment_key(segment_id), size_max=SEGMENT_SIZE_MAX)
        return SegmentCopy(Segment(data, segment_id, self._store.sealing), segment_id, data)

    def lacks(self, packs: Iterable[PackId]) -> list[PackId]:
        """Those that `copy_pack` has not dealt with in this run."""
        return [pack_id for pack_id in packs if not self._is_known(pack_key(pack_id))]

    def copy_pack(self, pack_id: PackId) -> int:
        """See that the replica has a pack, read back; returns how many bytes were copied.

        One that is damaged in the store is remembered for `put_segment`.
        Raises: CorruptPack when the replica does not keep what is put; StoreUnavailable, StoreDenied, StoreFull.
        """
        return self._copy_pack(pack_id, HOPS_MAX)

    def copy_moves(self, pack_id: PackId, documents: Documents) -> None:
        """See that the replica has these documents about a pack of the store, and the packs that they name, whole.

        They are asked for by name: a listing may not show yet what was just put.
        Raises: as `copy_pack` and `check_replica`; CorruptPack when it does not have all of it then; ObjectMissing when
        the store does not have a document any more.
        """
        check_replica(self._replica.stored, self._store.description)
        saved = {move.pack_id for moves in documents.values() for move in moves}
        for saved_id in sorted(saved):
            self._copy_pack(saved_id, HOPS_MAX)
        with self._lock:
            lacking = self._damaged & saved
        if lacking:
            raise CorruptPack(f"{pack_key(min(lacking))} is damaged, and has no whole copy")
        for key in sorted(documents):
            self._copy_document(key)
        self._replica.moved.look_again()
        check_replica(self._replica.stored, self._store.description)  # or else it went to another place

    def put_segment(self, copy: SegmentCopy) -> None:
        """All its packs were dealt with: put it.

        Raises: CorruptPack when a frame that it needs can be read neither in the store nor in the replica;
        CorruptStoreObject, UnknownFormat (of a list).
        """
        packs = frozenset(copy.segment.packs)
        retired = self._retired(packs)
        for pack_id in sorted(retired):
            self._copy_moved(pack_id, HOPS_MAX)
        with self._lock:
            damaged = self._damaged & packs
        self._check_frames(copy.segment, damaged, retired)
        key = segment_key(copy.segment_id)
        _put(self._replica.stored, key, copy.data)
        self._remember(key)

    def put_manifest(self, vm_id: VmId, point_id: PointId, data: bytes) -> None:
        """All its segments are there: from now on the replica has the point.

        Raises: PointNotFound when garbage collection has removed it meanwhile.
        """
        key = manifest_key(vm_id, point_id)
        _put(self._replica.stored, key, data)
        # A collector deletes it in the store, then here: it finds this one, or this finds out.
        if not exists(self._store.stored, key):
            self._store.check_there()
            self._replica.stored.delete(key)
            raise PointNotFound(f"VM {vm_id} has no restore point {point_id} any more")

    def _copy_pack(self, pack_id: PackId, hops: int) -> int:
        key = pack_key(pack_id)
        if not self._again and self._read_back.has(pack_id) and exists(self._replica.stored, key):
            self._remember(key)
            return 0
        there = _read(self._replica.stored, key, size_max=PACK_SIZE_MAX)
        if self._is_whole(there, pack_id):
            self._has_whole(pack_id)
            return 0
        here = _read(self._store.stored, key, size_max=PACK_SIZE_MAX)
        if self._is_whole(here, pack_id):
            assert here is not None
            _put(self._replica.stored, key, here)
            self._has_whole(pack_id)
            return len(here)
        if here is not None and there is None:
            _put(self._replica.stored, key, here)
        self._copy_moved(pack_id, hops)
        with self._lock:
            self._damaged.add(pack_id)
        self._remember(key)
        return 0 if here is None else len(here)

    def _is_whole(self, data: bytes | None, pack_id: PackId) -> bool:
        try:
            check_pack(data or b"", pack_id, self._store.sealing)
        except IntegrityError:
            return False
        return True

    def _has_whole(self, pack_id: PackId) -> None:
        self._read_back.add(pack_id)
        self._remember(pack_key(pack_id))

    def _copy_moved(self, pack_id: PackId, hops: int) -> None:
        """Documents about a pack that is damaged or retired, and before them the packs that they name."""
        for key, moves in (read_documents(self._store.objects, pack_id) if hops else {}).items():
            for saved in sorted({move.pack_id for move in moves}):
                self._copy_pack(saved, hops - 1)
            try:
                self._copy_document(key)
            except DAMAGE as exc:
                log.warning("%s is not copied to the replica: %s", key, exc)
        self._store.moved.look_again()
        self._replica.moved.look_again()

    def _copy_document(self, key: str) -> None:
        data = self._store.stored.get(key, size_max=OBJECT_SIZE_MAX)
        decode_moved(self._store.sealing.open(data, key), key)
        _put(self._replica.stored, key, data)

    def _retired(self, packs: Set[PackId]) -> Set[PackId]:
        """Packs that may go from the replica though this point needs them, whatever was seen of them before.

        They have gone from the store, or are on a list as retired.  Of any other one a collector that has yet to look
        sees that the point needs it.  The lists come first: one that goes has its packs deleted before.
        """
        listed = packs & read_condemned(self._store.objects).retired
        return listed | absent(self._store.objects, packs - listed, pack_key)

    def _check_frames(self, segment: Segment, damaged: Set[PackId], retired: Set[PackId]) -> None:
        for ref in segment.refs_to(damaged | retired):
            try:
                if ref.pack_id not in retired or not self._is_moved(ref):
                    self._replica.fetch([ref])
            except (ObjectMissing, IntegrityError) as exc:
                raise CorruptPack(
                    f"pack {ref.pack_id} is damaged in the store, so that the replica cannot have what restore "
                    f"points need of it ({exc}); run `vmfs-stub scrub`"
                ) from exc

    def _is_moved(self, ref: FrameRef) -> bool:
        """Whether a frame can be read where the replica's documents say: what is in its old place may go.

        Raises: CorruptFrame when it can be read so in the store alone.
        """
        if self._replica.moved.fetch(ref) is not None:
            return True
        if self._store.moved.fetch(ref) is None:
            return False
        raise CorruptFrame(f"{pack_key(ref.pack_id)}: what was moved of it is not in the replica")

    def _is_there(self, key: str) -> bool:
        if self._is_known(key):
            return True
        if not exists(self._replica.stored, key):
            return False
        self._remember(key)
        return True

    def _is_known(self, key: str) -> bool:
        with self._lock:
            return key in self._known

    def _remember(self, key: str) -> None:
        with self._lock:
            self._known[key] = None
            self._known.move_to_end(key)
            while len(self._known) > NAMES_KEPT:
                self._known.popitem(last=False)


def lacking(store: Store, replica: Store, vm_id: VmId) -> list[PointId]:
    """Restore points of a VM that the replica does not have, the newest first; forgotten ones do not count.

    Raises: StoreUnavailable, StoreDenied.
    """
    there = {PointId(info.key.rpartition("/")[2]) for info in replica.stored.list(manifests_of(vm_id))}
    return [point.point_id for point in reversed(store.points(vm_id, with_damaged=True, but=there))]


def _put(objects: ObjectStore, key: str, data: bytes) -> None:
    """Put what is sound into the replica and read it back; a copy that is not the same is damaged, and replaced.

    Raises: the integrity error of the key when it is not read back as it was put.
    """
    try:
        objects.put(key, data)
    except ObjectExists:
        if _read(objects, key) == data:
            return
        log.warning("%s: is damaged in the replica, and replaced by what the store has", key)
        objects.put(key, data, if_absent=False)
    if _read(objects, key) != data:
        raise damage(key)(f"{key}: the replica does not return what was put there; check its medium")


def _read(objects: ObjectStore, key: str, *, size_max: int = MANIFEST_SIZE_MAX) -> bytes | None:
    """What the medium has of an object; None when there is none, or one that is too large to be ours."""
    drop_cache(objects, key)
    try:
        return objects.get(key, size_max=size_max)
    except (ObjectMissing, IntegrityError):
        return None
