"""Repair of damaged frames from other copies.

Copies there are in a replica, where there is one, and in the store itself: hosts that back up at the same time do not
see each other's chunks, and what is in quarantine is stored afresh by the next backup that has it on primary, so a
scrub after that backup repairs the older points.  Frames that are whole in a pack that is not (its footer is damaged)
are copied, too: nothing else would list them.  Every copy is checked by identity before it is used, and read back
before readers are told of it.
Blocking.  This module must not know how damage was found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import (
    CorruptFrame,
    CorruptManifest,
    CorruptStoreObject,
    IntegrityError,
    ObjectMissing,
    Refused,
    StoreConflict,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
    UnknownFormat,
)
from vmfs_stub.core.ids import ChunkId, PackId
from vmfs_stub.store import frames
from vmfs_stub.store.format import INDEX_SIZE_MAX
from vmfs_stub.store.index_objects import decode_index
from vmfs_stub.store.keys import INDEX, PACKS, is_id, manifest_key, pack_key
from vmfs_stub.store.manifest import decode_manifest
from vmfs_stub.store.moved import Move
from vmfs_stub.store.moving import Moving, moving
from vmfs_stub.store.objects import drop_cache, exists
from vmfs_stub.store.packs import read_footer
from vmfs_stub.store.replica import check_replica
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

COPIES_MAX: Final = 8
"""Copies of a chunk that are tried."""
Frame = tuple[PackId, int]
"""A frame by its pack and its offset there in bytes."""


def repair(store: Store, damaged: Mapping[Frame, FrameRef], replica: Store | None = None) -> frozenset[Frame]:
    """Make frames readable that are not, or that are in a damaged pack; returns those that are readable elsewhere.

    The store's own copies are used first, then those of the ``replica``, then what only a look at all footers finds.

    Where this host may not write, the store is full, or is a replica, nothing is repaired, and the log says so.
    Raises: UnknownFormat, StoreUnavailable.
    """
    store.moved.look_again()
    left = {frame: ref for frame, ref in damaged.items() if not was_moved(store, ref)}
    earlier = frozenset(damaged) - frozenset(left)
    if not left:
        return earlier
    try:
        with moving(store) as job:
            return earlier | _repaired(store, job, left, replica)
    except (Refused, StoreConflict, StoreDenied, StoreFull) as exc:
        log.warning("nothing could be repaired: %s", exc)
        return earlier


def replace_damaged(store: Store, replica: Store, key: str, check: Callable[[bytes], object]) -> bool:
    """Put the replica's copy of an object that never changes in the place of one that is damaged; whether that is done.

    ``check`` raises when its bytes, as they are stored, are not what they should be.  Never fails.
    """
    try:
        data = replica.stored.get(key)
        check(data)
        store.stored.put(key, data, if_absent=False)
        drop_cache(store.stored, key)
        check(store.stored.get(key))
    except (StoreError, IntegrityError, UnknownFormat) as exc:
        log.warning("%s could not be replaced by the replica's copy: %s", key, exc)
        return False
    log.warning("%s was damaged, and is replaced by the replica's copy", key)
    return True


def replace_manifest(store: Store, replica: Store, key: str) -> bool:
    """The same of the manifest of a restore point, which garbage collection may delete meanwhile; never fails.

    It deletes it in the store, then in the replica.  One that is put after that names what is gone, and goes again.
    """
    try:
        if not exists(store.stored, key) or not replace_damaged(
            store, replica, key, partial(_check_manifest, store, key)
        ):
            return False
        if exists(replica.stored, key):
            return True
        check_replica(replica.stored, store.description)  # or else it is the replica that has gone
        store.stored.delete(key)
    except (StoreError, IntegrityError, UnknownFormat) as exc:
        log.warning("whether %s was deleted meanwhile cannot be told: %s", key, exc)
    return False


def _check_manifest(store: Store, key: str, data: bytes) -> None:
    manifest = decode_manifest(store.sealing.open(data, key), key)
    if manifest_key(manifest.vm_id, manifest.point_id) != key:
        raise CorruptManifest(f"{key}: is the manifest of another restore point")


def was_moved(store: Store, ref: FrameRef) -> bool:
    """Whether a frame can be read where documents say that it is.  Raises: StoreUnavailable, StoreDenied."""
    try:
        raw = store.moved.fetch(ref)
        if raw is not None:
            frames.check_identity(raw, ref, store.sealing)
    except IntegrityError:
        return False
    return raw is not None


def _repaired(store: Store, job: Moving, left: dict[Frame, FrameRef], replica: Store | None) -> frozenset[Frame]:
    run = _Repair(store, job)
    run.copy(left, ((ref.chunk_id, ref) for ref in list(left.values())), store)
    if left and replica is not None:
        run.copy(left, ((ref.chunk_id, ref) for ref in list(left.values())), replica)
    for listed in (run.listed_in_index, run.listed_in_footers):
        if left:
            run.copy(left, run.copies_of(left, listed()), store)
    run.finish()
    return run.done


class _Repair:
    """``done`` are the frames that were copied."""

    def __init__(self, store: Store, job: Moving) -> None:
        self._store = store
        self._job = job
        self._moves: dict[PackId, list[Move]] = {}

    @property
    def done(self) -> frozenset[Frame]:
        return frozenset((pack_id, move.old_offset) for pack_id, moves in self._moves.items() for move in moves)

    def copy(self, left: dict[Frame, FrameRef], copies: Iterable[tuple[ChunkId, FrameRef]], place: Store) -> None:
        """Copy those of ``left`` of which one of ``copies`` in ``place`` is whole, and take them out of it."""
        by_chunk: dict[ChunkId, list[FrameRef]] = {}
        for chunk_id, ref in copies:
            known = by_chunk.setdefault(chunk_id, [])
            if len(known) < COPIES_MAX and ref not in known:
                known.append(ref)
        for frame, ref in list(left.items()):
            raw = self._whole(by_chunk.get(ref.chunk_id, ()), place)
            if raw is not None and self._write(ref, raw):
                del left[frame]

    def copies_of(
        self, left: Mapping[Frame, FrameRef], listed: Iterable[FrameRef]
    ) -> Iterator[tuple[ChunkId, FrameRef]]:
        """Those frames that are said to hold a wanted chunk."""
        wanted = {ref.chunk_id for ref in left.values()}
        return ((ref.chunk_id, ref) for ref in listed if ref.chunk_id in wanted)

    def listed_in_index(self) -> Iterator[FrameRef]:
        for info in list(self._store.objects.list(INDEX)):
            self._job.stay_alive()
            try:
                packs = decode_index(self._store.objects.get(info.key, size_max=INDEX_SIZE_MAX), info.key)
            except (ObjectMissing, CorruptStoreObject):
                continue
            for _, refs in packs:
                yield from refs

    def listed_in_footers(self) -> Iterator[FrameRef]:
        """Slow, but it also finds what was never published."""
        for info in self._store.objects.list(PACKS):
            self._job.stay_alive()
            pack_id = PackId(info.key.rpartition("/")[2])
            try:
                yield from read_footer(self._store.objects, pack_id, self._store.sealing) if is_id(pack_id) else ()
            except (ObjectMissing, IntegrityError):
                continue

    def finish(self) -> None:
        """Put what was copied, and tell readers."""
        if self._moves:
            self._job.finish(self._moves)

    def _whole(self, copies: Iterable[FrameRef], place: Store) -> bytes | None:
        for ref in copies:
            drop_cache(place.objects, pack_key(ref.pack_id))
            try:
                # What has moved in the store was tried before; the replica may have nothing but what has moved there.
                (raw,) = place.fetch_in_place([ref]) if place is self._store else place.fetch([ref])
                frames.check_identity(raw, ref, place.sealing)
            except (ObjectMissing, IntegrityError):
                continue
            except (StoreUnavailable, StoreDenied) as exc:
                if place is self._store:
                    raise
                log.warning("the replica does not give %s: %s", pack_key(ref.pack_id), exc)
                continue
            return raw
        return None

    def _write(self, old: FrameRef, raw: bytes) -> bool:
        try:
            move = self._job.write(old, raw)
        except CorruptFrame:
            return False
        self._moves.setdefault(old.pack_id, []).append(move)
        return True
