"""The end of a job that has put packs: its restore point becomes one that exists, or moved frames are told of.

Ordering invariants (must = data loss otherwise); all packs and segments are durable before:
- must: pins are durable before the pending manifest, which is durable before ``condemned/`` is read;
- must: after that all that is used is seen to stay (`uses.py`), and then this job not to have been taken for dead,
  before the manifest is committed: what a dead one puts again may be deleted at any time;
- must: the committed manifest is put where none is: a collector that took this job for dead has put a void one there,
  before it deleted the pending one and stopped counting what that names;
- must: when what was pending is gone by then, all that is used is seen to be there once more: the manifest may have
  been put twice, and the point forgotten and deleted in between;
- must: a moved document has a name of its own in each try to put it, for the same reason: others count on it at once.

Blocking.  This module must not know how packs come about.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from vmfs_stub.core.errors import ObjectExists, StoreConflict, StoreDenied, StoreError
from vmfs_stub.core.ids import PackId, WriterId
from vmfs_stub.store.chunk_index import ChunkIndex
from vmfs_stub.store.forgotten import Forgotten, put_forgotten
from vmfs_stub.store.keys import dead_key, manifest_key, pending_key, pin_key
from vmfs_stub.store.manifest import Manifest, encode_checked
from vmfs_stub.store.moved import Documents, Move, new_moved
from vmfs_stub.store.objects import ObjectStore, exists, put_anew
from vmfs_stub.store.pins import Pin, encode_pin, remove_pin
from vmfs_stub.store.sealing import Sealing
from vmfs_stub.store.uses import Uses
from vmfs_stub.store.versions import NEWER, is_known


class Committing:
    """Of one job, which has put what ``uses`` says, and goes on adding to it until the commit."""

    def __init__(
        self,
        objects: ObjectStore,
        writer_id: WriterId,
        uses: Uses,
        *,
        index: ChunkIndex,
        sealing: Sealing,
        clock: Callable[[], float],
    ) -> None:
        self._objects = objects
        self._writer_id = writer_id
        self._uses = uses
        self._index = index
        self._sealing = sealing
        self._clock = clock

    def point(self, manifest: Manifest, pins: Sequence[Pin]) -> None:
        """Make the restore point one that exists.

        Raises: CorruptManifest when no reader would accept it, and nothing is written; StoreConflict when something
        that is used goes, and no pins are left; StoreUnavailable: it may or may not exist then, its pins stay.
        """
        key = manifest_key(manifest.vm_id, manifest.point_id)
        data = encode_checked(manifest, key)
        for pin in pins:
            pinned = encode_pin(pin, manifest.vm_id, manifest.point_id)
            self._objects.put(pin_key(manifest.vm_id, manifest.point_id, pin.placeholder_id), pinned)
        pending = pending_key(manifest.vm_id, manifest.point_id, self._writer_id)
        self._objects.put(pending, data)
        try:
            self._check_used()
            self._put_manifest(key, data)
            if not exists(self._objects, pending):
                self._check_stands(manifest)
        except StoreConflict:
            with suppress(StoreError):  # garbage collection takes what is pending of a dead job
                self._objects.delete(pending)
            self.withdraw_pins(manifest, pins)
            raise
        with suppress(StoreDenied):  # a host that may not delete leaves that to garbage collection
            self._objects.delete(pending)

    def moves(
        self, moves: Mapping[PackId, Sequence[Move]], *, before_each: Callable[[], None]
    ) -> dict[PackId, Documents]:
        """Tell readers where frames of these packs are now; returns what tells it, a document for each.

        Raises: StoreConflict when this job was taken for dead, so that its packs may go; StoreUnavailable,
        StoreDenied, StoreFull.
        """
        documents: dict[PackId, Documents] = {}
        for pack_id, moved in sorted(moves.items()):
            before_each()
            # A late try under the same name would put again what collectors have deleted, or are about to.
            key = put_anew(self._objects, partial(new_moved, moved, pack_id))
            documents[pack_id] = {key: list(moved)}
        self._check_used()
        return documents

    def check_not_dead(self) -> None:
        """See that no collector has taken this job for dead.  Raises: StoreConflict, StoreUnavailable, StoreDenied."""
        if exists(self._objects, dead_key(self._writer_id)):
            raise _taken_for_dead()

    def withdraw_pins(self, manifest: Manifest, pins: Sequence[Pin]) -> None:
        """Remove the pins of a point that is not to have any; never fails."""
        with suppress(StoreError):
            for pin in pins:
                remove_pin(self._objects, manifest.vm_id, manifest.point_id, pin.placeholder_id)

    def _check_used(self) -> None:
        """See that nothing this job uses is condemned, gone, or found damaged meanwhile."""
        lost = self._uses.lost(self._objects, self._sealing)
        self.check_not_dead()
        if not is_known(self._objects):
            raise StoreConflict(f"the store was raised to a version that this program does not know; {NEWER}")
        self._index.forget_packs(lost.packs)
        if lost:
            msg = (
                f"{len(lost.packs)} packs and {len(lost.segments)} segments that this job refers to were found "
                "damaged, or are being removed by garbage collection; run the job again"
            )
            raise StoreConflict(msg)

    def _put_manifest(self, key: str, data: bytes) -> None:
        try:
            self._objects.put(key, data)
        except ObjectExists as exc:
            raise _taken_for_dead() from exc

    def _check_stands(self, manifest: Manifest) -> None:
        """See that nothing is gone of a point of which garbage collection has dealt with what was pending.

        So it was committed when this job was taken for dead.  If it was forgotten and collected since, a late try has
        put the manifest again: it is to go, since collectors refuse to run where one names what is gone.
        """
        try:
            self._check_used()
        except StoreConflict:
            why = "the backup stood still as it ended"
            mark = Forgotten(manifest.host, self._clock(), why, secrets.token_hex(8))
            put_forgotten(self._objects, mark, manifest.vm_id, manifest.point_id)
            raise


def _taken_for_dead() -> StoreConflict:
    return StoreConflict("this job stood still, and was taken for dead by garbage collection; run it again")
