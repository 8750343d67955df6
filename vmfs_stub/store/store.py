"""One secondary store: its description, VMs, restore points, pins, forgotten marks and frames.

Purpose: the facade that services use.  Thread-safe and blocking; all state that matters is in the objects, what is
kept in memory is bounded and immutable.  This module must not know primary storage, nor when anything is done.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    AlreadyExists,
    CorruptManifest,
    CorruptStoreObject,
    ObjectExists,
    ObjectMissing,
    PointNotFound,
    PointPinned,
    StoreUnavailable,
    UnknownFormat,
    WrongStore,
)
from vmfs_stub.core.ids import PackId, PlaceholderId, PointId, SegmentId, StoreId, VmId
from vmfs_stub.core.recall_plan import plan_fetches
from vmfs_stub.store import frames
from vmfs_stub.store.backup_writer import BackupWriter
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.chunk_table import RestorePoint, SegmentCache
from vmfs_stub.store.forgotten import Forgotten, decode_forgotten, put_forgotten
from vmfs_stub.store.format import (
    DEFAULT_CHUNK_SIZE,
    DOCUMENT_SIZE_MAX,
    MANIFEST_SIZE_MAX,
    PACK_SIZE_MAX,
    StoreDescription,
    check_chunk_size,
    decode_description,
    encode_description,
)
from vmfs_stub.store.key_sources import KeySource
from vmfs_stub.store.keyring import look_at, new_store_key, put_key, withdraw_key
from vmfs_stub.store.keys import (
    FORGOTTEN,
    PINS,
    STORE_KEY,
    forgotten_key,
    manifest_key,
    pack_key,
    pin_key,
    pins_of,
    writer_of,
)
from vmfs_stub.store.manifest import Manifest, decode_manifest
from vmfs_stub.store.moved import UNREADABLE, MovedFrames
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.pins import Pin, decode_pin, encode_pin, remove_pin, valid_pins
from vmfs_stub.store.points import PointListing, PointSummary, StoredVm, points_named
from vmfs_stub.store.quarantine import quarantined_packs
from vmfs_stub.store.replica_mark import refuse_replica
from vmfs_stub.store.sealing import StoreKey, sealing_of
from vmfs_stub.store.segments import Segment, read_segment
from vmfs_stub.store.versions import version_of


class Store:
    """Thread-safe facade over one secondary store.

    Attributes: ``objects`` are in the clear (but for packs and segments), ``stored`` the same as they lie there;
    ``key`` is that of an encrypted store.
    """

    def __init__(self, objects: ObjectStore, description: StoreDescription, key: StoreKey | None = None) -> None:
        """Take a store for what was found out of it before.  Raises: KeyMissing."""
        self.key = key
        self.sealing = sealing_of(description, key)
        self.stored = objects
        self.objects = self.sealing.around(objects)
        self.description = description
        self.id: StoreId = description.store_id
        self.chunk_size = description.chunk_size
        self.segments = SegmentCache(self.read_segment)
        self.moved = MovedFrames(self.objects, self.fetch_in_place)
        self._listing = PointListing(self.objects, self._manifest)

    @classmethod
    def create(
        cls, objects: ObjectStore, *, chunk_size: int = DEFAULT_CHUNK_SIZE, source: KeySource | None = None
    ) -> Store:
        """Make a store where there is none; an encrypted one when there is a ``source`` to open it with.

        Raises: AlreadyExists, ConfigError, StoreUnavailable, StoreDenied, StoreFull.
        """
        check_chunk_size(chunk_size)
        description = StoreDescription(StoreId(secrets.token_hex(16)), chunk_size, is_encrypted=source is not None)
        key = None if source is None else new_store_key()
        # The key before the description: there never is a store that nobody can open.
        wrapped = None if source is None or key is None else put_key(objects, description, key, source)
        try:
            objects.put(STORE_KEY, encode_description(description))
        except ObjectExists as exc:
            if wrapped is not None:
                withdraw_key(objects, wrapped)
            msg = "there is a vmfs-stub store at this place already; use it, or choose another place"
            raise AlreadyExists(msg) from exc
        return cls(objects, description, key)

    @classmethod
    def open(cls, objects: ObjectStore, source: KeySource | None = None) -> Store:
        """Open an existing store, an encrypted one with ``source``.

        Raises: ObjectMissing when there is none; UnknownFormat, CorruptStoreObject, StoreUnavailable, StoreDenied,
        KeyMissing, WrongKey.
        """
        seen = look_at(objects)
        return cls(objects, seen.description, seen.unlock(source))

    @classmethod
    def open_or_create(
        cls, objects: ObjectStore, *, chunk_size: int = DEFAULT_CHUNK_SIZE, source: KeySource | None = None
    ) -> Store:
        """Open the store, or make it; two hosts that do so at once get the same one.  Raises: as `open`, `create`."""
        try:
            return cls.open(objects, source)
        except ObjectMissing:
            try:
                return cls.create(objects, chunk_size=chunk_size, source=source)
            except AlreadyExists:
                return cls.open(objects, source)

    def check(self) -> None:
        """See that this store is where it is expected, is itself, and is at a version that this program knows.

        Raises: ObjectMissing, CorruptStoreObject, UnknownFormat, StoreUnavailable, StoreDenied; WrongStore when another
        store is in its place.
        """
        found = decode_description(self.objects.get(STORE_KEY, size_max=DOCUMENT_SIZE_MAX))
        if found != self.description:
            msg = (
                f"store {found.store_id} lies where {self.id} is expected; mount what belongs there, or correct "
                "[store] url and start the daemon again"
            )
            raise WrongStore(msg)
        version_of(self.objects, self.description)

    def check_there(self) -> None:
        """The same, where a place that has no store is one that is away (a mount that is missing): StoreUnavailable."""
        try:
            self.check()
        except ObjectMissing as exc:
            raise _away() from exc

    def vms(self) -> list[StoredVm]:
        """See PointListing."""
        return self._listing.vms()

    def vm(self, vm_id: VmId, *, known: PointId | None = None) -> StoredVm | None:
        """See PointListing."""
        return self._listing.vm(vm_id, known=known)

    def points(self, vm_id: VmId, *, with_damaged: bool = False, but: Collection[PointId] = ()) -> list[PointSummary]:
        """See PointListing."""
        return self._listing.points(vm_id, with_damaged=with_damaged, but=but)

    def point_counts(self) -> dict[VmId, int]:
        """See PointListing."""
        return self._listing.point_counts()

    def stored_points(self) -> list[tuple[VmId, PointId]]:
        """See PointListing."""
        return self._listing.stored_points()

    def open_point(self, vm_id: VmId, point_id: PointId) -> RestorePoint:
        """Open a committed restore point; also one that is forgotten, which placeholders may depend on.

        Raises: PointNotFound, CorruptManifest, UnknownFormat, StoreUnavailable.
        """
        return RestorePoint(self._manifest(vm_id, point_id), self.segments)

    def read_segment(self, segment_id: SegmentId) -> Segment:
        """A segment as it is in the store now.

        Raises: ObjectMissing, CorruptSegment, UnknownFormat, StoreUnavailable.
        """
        return read_segment(self.objects, segment_id, self.sealing)

    def fetch(self, refs: Sequence[FrameRef]) -> list[bytes]:
        """The verified raw bytes of frames of one pack, by one range read; one by one where some have moved.

        Order of ``refs`` and errors: as `fetch_in_place`, when what is damaged or missing is nowhere else either.
        """
        try:
            return self.fetch_in_place(refs)
        except UNREADABLE as exc:
            if not self.moved.has_moves(refs[0].pack_id):
                raise
            together = self._fetch_together(refs) if isinstance(exc, ObjectMissing) else {}
            return [together[at] if at in together else self._fetch_moved(ref) for at, ref in enumerate(refs)]

    def _fetch_together(self, refs: Sequence[FrameRef]) -> dict[int, bytes]:
        """Frames of a pack that is gone, by their numbers: those that can be read where documents say.

        Where they lie together they are read together: a recall is to take no longer for garbage collection.
        """
        places = [(at, self.moved.place(ref)) for at, ref in enumerate(refs)]
        known = [(at, place) for at, place in places if place is not None]
        found: dict[int, bytes] = {}
        for fetch in plan_fetches(known, fetch_bytes_max=PACK_SIZE_MAX):
            with suppress(*UNREADABLE):
                found.update(zip(fetch.chunks, self.fetch_in_place(fetch.frames), strict=True))
        return found

    def _fetch_moved(self, ref: FrameRef) -> bytes:
        try:
            return self.fetch_in_place([ref])[0]
        except UNREADABLE:
            raw = self.moved.fetch(ref)
            if raw is None:
                raise
            return raw

    def fetch_in_place(self, refs: Sequence[FrameRef]) -> list[bytes]:
        """The same from this very pack.

        ``refs`` ascend in the pack and lie next to each other or nearly so: what lies between is read too.
        Raises: ObjectMissing, CorruptPack, CorruptFrame, StoreUnavailable.
        """
        if not refs:
            return []
        pack_id = refs[0].pack_id
        start = refs[0].offset
        length = refs[-1].end - start
        if not 0 < length <= PACK_SIZE_MAX:
            msg = f"frames of pack {pack_id} are not in ascending order"
            raise ValueError(msg)
        view = memoryview(self.objects.get_range(pack_key(pack_id), offset=start, length=length))
        seal = self.sealing.frame_seal(writer_of(pack_id))
        found = []
        for ref in refs:
            if ref.pack_id != pack_id or ref.offset < start:
                msg = "frames of several packs, or not ascending, in one fetch"
                raise ValueError(msg)
            found.append(frames.decode(view[ref.offset - start : ref.end - start], ref, seal))
        return found

    def pin(self, vm_id: VmId, point_id: PointId, pins: Sequence[Pin]) -> None:
        """Have placeholders that are about to be made depend on a restore point that exists.

        Whatever this raises, its pins may be there: whoever does without then removes them.
        Raises: PointNotFound when the point is forgotten or gone; as `open_point`; StoreDenied, StoreFull.
        """
        for pin in pins:
            self.objects.put(pin_key(vm_id, point_id, pin.placeholder_id), encode_pin(pin, vm_id, point_id))
        # In this order: garbage collection looks for pins after the mark, and removes the mark after the manifest.
        if self._listing.is_forgotten(vm_id, point_id):
            msg = f"restore point {point_id} of VM {vm_id} was forgotten meanwhile"
            raise PointNotFound(msg)
        self._manifest(vm_id, point_id)

    def remove_pin(self, vm_id: VmId, point_id: PointId, placeholder_id: PlaceholderId) -> None:
        """Take a pin away; a missing one is fine.

        Only when the placeholder's end (unlink, graduation, supersession, or an archive that did not commit) is
        certain.
        """
        remove_pin(self.objects, vm_id, point_id, placeholder_id)

    def pins(self, vm_id: VmId, point_id: PointId) -> list[Pin]:
        """All pins of a restore point.

        Raises: CorruptStoreObject, UnknownFormat: an unreadable pin is not an absent one.
        """
        found = []
        for info in valid_pins(self.objects, pins_of(vm_id, point_id)):
            try:
                found.append(decode_pin(self.objects.get(info.key, size_max=DOCUMENT_SIZE_MAX), info.key))
            except ObjectMissing:
                continue  # removed since the listing
        return found

    def pin_counts(self) -> dict[tuple[VmId, PointId], int]:
        """Number of pins of each restore point that has any, from the names alone.  Raises: StoreUnavailable."""
        return dict(Counter(points_named(valid_pins(self.objects, PINS))))

    def check_unpinned(self, vm_id: VmId, point_id: PointId) -> None:
        """See that no placeholder depends on a restore point.

        Raises: PointPinned, which says where they are; as `pins`.
        """
        if pins := self.pins(vm_id, point_id):
            places = Counter((pin.host, pin.datastore) for pin in pins)
            where = ", ".join(
                f"{count} {'placeholder' if count == 1 else 'placeholders'} in datastore {datastore} of host {host}"
                for (host, datastore), count in sorted(places.items())
            )
            msg = f"restore point {point_id} is needed by {where}; it can be forgotten when `vmfs-stub recall` is done"
            raise PointPinned(msg)

    def forget(self, vm_id: VmId, point_id: PointId, *, host: str, why: str) -> None:
        """Mark a restore point as not wanted any more; one that is marked already is fine.

        From then on listings leave it out.  The mark is never taken back, and removes nothing: garbage collection
        deletes a marked point once it has no pin, after waiting of its own.  So a pin that is put between the look at
        the pins and the mark is raised as PointPinned, too, the mark stays, and the point does as long as the pin does.
        Raises: as `check_unpinned`; StoreUnavailable, StoreDenied, StoreFull.
        """
        self.check_unpinned(vm_id, point_id)
        mark = Forgotten(host, time.time(), why, nonce=secrets.token_hex(8))
        if not put_forgotten(self.objects, mark, vm_id, point_id):
            return  # for whoever marked it first this was said already
        try:
            self.check_unpinned(vm_id, point_id)
        except PointPinned as exc:
            raise PointPinned(f"{exc}; it is marked as forgotten by now, and stays until then") from exc

    def forgotten(self) -> list[tuple[VmId, PointId, Forgotten | None]]:
        """All forgotten points with their marks; None for one that cannot be read, which counts as well.

        Raises: StoreUnavailable, StoreDenied.
        """
        found: list[tuple[VmId, PointId, Forgotten | None]] = []
        for vm_id, point_id in points_named(self.objects.list(FORGOTTEN)):
            key = forgotten_key(vm_id, point_id)
            try:
                mark = decode_forgotten(self.objects.get(key, size_max=DOCUMENT_SIZE_MAX), key)
            except ObjectMissing:
                continue  # removed since the listing
            except (CorruptStoreObject, UnknownFormat):
                mark = None
            found.append((vm_id, point_id, mark))
        return found

    def begin_backup(self, *, index: ChunkIndex) -> BackupWriter:
        """Start a backup job of one VM; brings ``index`` up to date first.

        Raises: as `check`; Refused in a replica.
        """
        self.check()
        refuse_replica(self.objects)
        quarantined = index.sync(self.objects).quarantined
        return self._writer(self.fetch, index, quarantined)

    def begin_moves(self, *, index: ChunkIndex, clock: Callable[[], float] = time.monotonic) -> BackupWriter:
        """Start to move frames, of packs that are damaged or mostly garbage; an empty ``index`` knows no copies.

        The job renews its lease by itself, see `BackupWriter.stay_alive`; ``clock`` gives seconds.
        Raises: as `begin_backup`.
        """
        self.check()
        refuse_replica(self.objects)
        return self._writer(self.fetch_in_place, index, quarantined_packs(self.objects), clock)

    def _writer(
        self,
        fetch: Callable[[Sequence[FrameRef]], list[bytes]],
        index: ChunkIndex,
        quarantined: frozenset[PackId],
        lease_clock: Callable[[], float] | None = None,
    ) -> BackupWriter:
        return BackupWriter(
            self.objects,
            fetch,
            index,
            chunk_size=self.chunk_size,
            sealing=self.sealing,
            clock=time.time,
            quarantined=quarantined,
            lease_clock=lease_clock,
        )

    def _check_present(self) -> None:
        """Tell a store that is away (a mount that is missing) from an object that is.  Raises StoreUnavailable.

        By one name, not as `check_there` does: that another store lies there is for whoever begins a job to find.
        """
        try:
            self.objects.size(STORE_KEY)
        except ObjectMissing as exc:
            raise _away() from exc

    def _manifest(self, vm_id: VmId, point_id: PointId) -> Manifest:
        try:
            return self.read_manifest(vm_id, point_id)
        except ObjectMissing as exc:
            self._check_present()
            msg = f"VM {vm_id} has no restore point {point_id} in this store"
            raise PointNotFound(msg) from exc

    def read_manifest(self, vm_id: VmId, point_id: PointId) -> Manifest:
        """The manifest of a committed restore point.

        Raises: ObjectMissing; PointNotFound for a void one; CorruptManifest, UnknownFormat, StoreUnavailable.
        """
        key = manifest_key(vm_id, point_id)
        manifest = decode_manifest(self.objects.get(key, size_max=MANIFEST_SIZE_MAX), key)
        if (manifest.vm_id, manifest.point_id, manifest.chunk_size) != (vm_id, point_id, self.chunk_size):
            msg = f"{key}: is the manifest of another restore point or store"
            raise CorruptManifest(msg)
        return manifest


def _away() -> StoreUnavailable:
    return StoreUnavailable(
        f"there is no {STORE_KEY} where the store should be: see that what belongs there is mounted"
    )
