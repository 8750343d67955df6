"""Repacking: what is still needed of packs that are mostly garbage is copied into new ones.

Packs and segments never change, so the segments go on naming the old pack, and moved documents say where each needed
frame is now (`moved.py`).  Copies of a run that was cut short count, when they are whole.  Blocking.  This module must
not know which packs these are, nor delete anything: that is for `retirement.py`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Final, TypeAlias

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import IntegrityError, ObjectMissing, StoreConflict, StoreError
from vmfs_stub.core.ids import PackId
from vmfs_stub.core.recall_plan import plan_fetches
from vmfs_stub.store import frames
from vmfs_stub.store.keys import pack_key
from vmfs_stub.store.moved import Documents, Move, offsets_of
from vmfs_stub.store.moving import Moving, moving
from vmfs_stub.store.objects import drop_cache
from vmfs_stub.store.quarantine import quarantined_packs
from vmfs_stub.store.standing import standing_documents
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)

Needed: TypeAlias = Mapping[int, FrameRef]
"""The frames that are needed of one pack, by their offsets there in bytes."""
Mirror: TypeAlias = Callable[[PackId, Documents], None]
"""Sees to it that the replica has documents about a pack and the packs that they name, or raises a StoreError."""

READ_BYTES: Final = 8 * 1024 * 1024
"""Raw bytes of frames that are read together."""
GAP_BYTES: Final = 256 * 1024
"""Bytes that are read in vain rather than making one more request."""


class Repacking:
    """Moves frames within a store; ``copied_bytes`` are those that it has put, as they are stored."""

    def __init__(
        self,
        store: Store,
        *,
        mirror: Mirror | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``mirror`` is there when the store has a replica; ``clock`` tells when the lease is to be renewed."""
        self._store = store
        self._mirror = mirror
        self._clock = clock
        self.copied_bytes = 0

    def move(self, needed: Mapping[PackId, Needed], *, stuck: Set[PackId] = frozenset()) -> dict[PackId, Documents]:
        """Copy these frames of each pack, if that was not done before, and tell readers; returns what tells them.

        A pack of which a frame is damaged is left out, and so are those of which anything was copied when this job was
        taken for dead, and those that cannot be mirrored.  Of those of ``stuck`` whatever is sound is moved.
        Raises: CorruptStoreObject, UnknownFormat (of a list), StoreUnavailable, StoreDenied, StoreFull.
        """
        told = self._moved_before(needed)
        left = {
            pack_id: rest
            for pack_id, refs in needed.items()
            if (rest := [refs[at] for at in sorted(refs.keys() - offsets_of(told[pack_id]))])
        }
        for pack_id, documents in (self._copy(left, stuck) if left else {}).items():
            told[pack_id] |= documents
        return self._mirrored(
            {pack_id: found for pack_id, found in told.items() if needed[pack_id].keys() <= offsets_of(found)}
        )

    def standing(self, told: Mapping[PackId, Documents]) -> dict[PackId, set[int]]:
        """Of each pack the frames, by offset, for which these documents can be counted on now, here and in the replica.

        Raises: as `move`.
        """
        found = self._standing(told.keys())
        kept = {
            pack_id: {key: sorted(set(moves).intersection(found[pack_id].get(key, ()))) for key, moves in each.items()}
            for pack_id, each in told.items()
        }
        return {pack_id: offsets_of(documents) for pack_id, documents in self._mirrored(kept).items()}

    def _mirrored(self, told: Mapping[PackId, Documents]) -> dict[PackId, Documents]:
        """Those packs of which the replica has all of these; when it does not answer, none of the rest."""
        done: dict[PackId, Documents] = {}
        for pack_id, documents in told.items():
            try:
                if self._mirror is not None:
                    self._mirror(pack_id, documents)
            except (StoreError, IntegrityError) as exc:
                log.warning("pack %s stays, the replica does not have what was moved of it: %s", pack_id, exc)
                if not isinstance(exc, (IntegrityError, ObjectMissing)):
                    break
            else:
                done[pack_id] = documents
        return done

    def _moved_before(self, needed: Mapping[PackId, Needed]) -> dict[PackId, Documents]:
        """What an earlier run has copied that was cut short, or could not delete the pack, and is whole."""
        standing = self._standing(needed.keys())
        return {
            pack_id: {
                key: kept
                for key, moves in standing[pack_id].items()
                if (kept := self._whole([move for move in moves if move.old_offset in refs], refs))
            }
            for pack_id, refs in needed.items()
        }

    def _standing(self, packs: Set[PackId]) -> Mapping[PackId, Documents]:
        """What can be counted on, and is not known to be damaged: a pack is never given up for a copy that is."""
        objects = self._store.objects
        return standing_documents(objects, packs, but=quarantined_packs(objects)).documents

    def _whole(self, moves: Sequence[Move], refs: Needed) -> list[Move]:
        """Those that lead to the frames that segments refer to, on the medium."""
        places = [move.applied_to(refs[move.old_offset]) for move in moves]
        for pack_id in {place.pack_id for place in places}:
            drop_cache(self._store.objects, pack_key(pack_id))
        whole: list[Move] = []
        for numbers, run in _fetches(places):
            try:
                _read_whole(self._store, run)
            except (IntegrityError, ObjectMissing) as exc:
                log.warning("what was moved is moved again: %s", exc)
            else:
                whole += [moves[number] for number in numbers]
        return whole

    def _copy(self, left: Mapping[PackId, Sequence[FrameRef]], stuck: Set[PackId]) -> dict[PackId, Documents]:
        with moving(self._store, clock=self._clock) as job:
            try:
                copied = {
                    pack_id: self._copy_pack(job, pack_id, refs, is_stuck=pack_id in stuck)
                    for pack_id, refs in left.items()
                }
                return job.finish({pack_id: moves for pack_id, moves in copied.items() if moves})
            except StoreConflict as exc:
                log.warning("packs that are mostly garbage stay as they are: %s", exc)
                return {}
            finally:
                self.copied_bytes += job.stored_bytes

    def _copy_pack(self, job: Moving, pack_id: PackId, refs: Sequence[FrameRef], *, is_stuck: bool) -> list[Move]:
        """Copy these frames of one pack up to those that are read together with a damaged one, or all but that.

        What was copied is told all the same, or each run would copy it once more, and meet the same damage.
        """
        moves: list[Move] = []
        runs = deque(run for _, run in _fetches(refs))
        while runs:
            job.stay_alive()
            run = runs.popleft()
            try:
                raws = _read_whole(self._store, run)
                moves += [job.write(ref, raw) for ref, raw in zip(run, raws, strict=True)]
            except ObjectMissing:
                log.info("pack %s is gone: another collector was quicker", pack_id)
                break
            except IntegrityError as exc:
                log.warning("pack %s is not repacked; run scrub: %s", pack_id, exc)
                if not is_stuck:
                    break
                runs.extendleft([ref] for ref in reversed(run if len(run) > 1 else ()))
        return moves


def _fetches(refs: Sequence[FrameRef]) -> Iterator[tuple[Sequence[int], Sequence[FrameRef]]]:
    """Frames that are read together, with their numbers."""
    for fetch in plan_fetches(enumerate(refs), fetch_bytes_max=READ_BYTES, gap_bytes_max=GAP_BYTES):
        yield fetch.chunks, fetch.frames


def _read_whole(store: Store, refs: Sequence[FrameRef]) -> list[bytes]:
    """The raw bytes of frames, from where the references say, checked by identity.

    Raises: as `Store.fetch_in_place`.
    """
    found = store.fetch_in_place(refs)
    for ref, raw in zip(refs, found, strict=True):
        frames.check_identity(raw, ref, store.sealing)
    return found
