"""What a job refers to, packs and segments, and the proof before it commits that all of it stays.

The order of the questions is the proof (must = data loss otherwise):
- must: the lists in ``condemned/`` are read first: what is not on one then is deleted by no collector that has not seen
  the job's pending manifest;
- must: then each pack and each segment is seen to be there;
- of packs that are gone, or about to go, what the job needs is seen to be kept elsewhere (`standing.py`), frame by
  frame; of those that were in quarantine when the job began, that some of it is: there was no other copy.
Blocking.  This module must not know what the job writes.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from vmfs_stub.core.batches import batched
from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import IntegrityError, ObjectMissing
from vmfs_stub.core.ids import PackId, SegmentId
from vmfs_stub.store.condemned import read_condemned
from vmfs_stub.store.keys import pack_key, quarantine_key, segment_key
from vmfs_stub.store.objects import ObjectStore, absent, asked
from vmfs_stub.store.quarantine import quarantined_packs
from vmfs_stub.store.sealing import Sealing
from vmfs_stub.store.segments import read_segment
from vmfs_stub.store.standing import Standing, standing_documents

SEGMENTS_AT_ONCE: Final = 64
"""Segments of which the frames in packs that are gone are held in memory together."""


@dataclass(frozen=True, slots=True)
class Lost:
    """What a job cannot count on."""

    packs: frozenset[PackId]
    segments: frozenset[SegmentId]

    def __bool__(self) -> bool:
        return bool(self.packs or self.segments)


@dataclass(slots=True)
class Uses:
    """Of one job: ``packs`` that it refers to, of which it has put its ``own``; ``segments`` with the packs they name.

    ``quarantined`` are packs that were so when the job began.
    """

    quarantined: frozenset[PackId]
    packs: set[PackId] = field(default_factory=set)
    own: set[PackId] = field(default_factory=set)
    segments: dict[SegmentId, frozenset[PackId]] = field(default_factory=dict)

    def add_segment(self, segment_id: SegmentId, packs: frozenset[PackId]) -> None:
        """Refer to a segment, and to all packs that it names."""
        self.segments[segment_id] = packs
        self.packs |= packs

    def lost(self, objects: ObjectStore, sealing: Sealing) -> Lost:
        """What is condemned, gone, or was found damaged meanwhile.

        Raises: CorruptStoreObject, UnknownFormat (of a list), StoreUnavailable, StoreDenied.
        """
        condemned = read_condemned(objects)
        unusable = condemned.packs | (condemned.retired & self.own)
        unusable |= quarantined_packs(objects) - self.quarantined
        going = self.packs & condemned.retired - unusable
        gone = going | absent(objects, self.packs - unusable - going, pack_key)
        saved = gone & self.quarantined - condemned.retired
        saved -= absent(objects, saved, quarantine_key)  # a listing may show marks yet that are gone
        packs, segments = self._in_doubt(objects, sealing, gone, saved) if gone else (set(), set())
        packs |= self.packs & unusable
        segments |= self.segments.keys() & condemned.segments
        segments |= absent(objects, self.segments.keys() - segments, segment_key)
        return Lost(frozenset(packs), frozenset(segments))

    def _in_doubt(
        self, objects: ObjectStore, sealing: Sealing, packs: Set[PackId], saved: Set[PackId]
    ) -> tuple[set[PackId], set[SegmentId]]:
        """Of packs that are gone, or about to go, those of which more is needed than is kept elsewhere.

        Also segments that cannot be read to tell.  Of ``saved`` there is perhaps no more than what was repaired.
        """
        naming = sorted(segment_id for segment_id, named in self.segments.items() if not named.isdisjoint(packs))
        lost = set(packs).difference(*(self.segments[segment_id] for segment_id in naming))
        lost_segments: set[SegmentId] = set()
        refs_of = partial(_refs_of, objects, sealing, packs)
        for part in batched(naming, SEGMENTS_AT_ONCE):
            needed: dict[PackId, set[int]] = {}
            for segment_id, refs in zip(part, asked(refs_of, part), strict=True):
                if refs is None:
                    lost_segments.add(segment_id)
                for ref in refs or ():
                    needed.setdefault(ref.pack_id, set()).add(ref.offset)
            standing = standing_documents(objects, needed.keys())
            lost |= {pack_id for pack_id, offsets in needed.items() if not _is_kept(pack_id, offsets, standing, saved)}
        return lost, lost_segments


def _refs_of(
    objects: ObjectStore, sealing: Sealing, packs: Set[PackId], segment_id: SegmentId
) -> list[FrameRef] | None:
    try:
        return read_segment(objects, segment_id, sealing).refs_to(packs)
    except (ObjectMissing, IntegrityError):
        return None


def _is_kept(pack_id: PackId, offsets: Set[int], standing: Standing, saved: Set[PackId]) -> bool:
    """Whether these frames are elsewhere, as long as they are needed; of one of ``saved``, whether any are.

    Such a pack was in quarantine before it was lost.  One that was retired is no more in quarantine when its list goes.
    """
    if pack_id in standing.condemned.packs:
        return False
    moved = standing.offsets(pack_id)
    if pack_id in saved - standing.condemned.retired:
        return bool(moved) and pack_id not in standing.leads_to_condemned
    return offsets <= moved
