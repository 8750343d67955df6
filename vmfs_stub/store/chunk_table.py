"""What a restore point's files consist of, chunk by chunk, loaded piece by piece.

Purpose: a recall asks where some chunks of a 100 GiB disk lie; only the segments it needs are read, and a bounded
number of them is kept, shared by all open restore points of a store.  Thread-safe.

This module must not know what is done with the chunks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from typing import Final

from vmfs_stub.core.chunking import FrameRef, chunk_count, chunk_length
from vmfs_stub.core.errors import CorruptSegment
from vmfs_stub.core.ids import ChunkId, PackId, SegmentId
from vmfs_stub.store.format import SEGMENT_CHUNKS
from vmfs_stub.store.keys import segment_key
from vmfs_stub.store.manifest import Manifest, StoredFile
from vmfs_stub.store.segments import Entry, Segment

SEGMENTS_COMPARED_MAX: Final = 16
"""Of two restore points: small files are stored afresh by each backup, and a guest may wait for the answer."""
SEGMENTS_KEPT: Final = 32
"""Segments kept in memory per store: 32 of at most 340 KiB."""


class SegmentCache:
    """Keeps the last used of the segments that ``read`` gives; thread-safe."""

    def __init__(self, read: Callable[[SegmentId], Segment], *, kept_max: int = SEGMENTS_KEPT) -> None:
        self._read = read
        self._kept_max = kept_max
        self._kept: OrderedDict[SegmentId, Segment] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, segment_id: SegmentId) -> Segment:
        """The segment of that id.

        Raises: ObjectMissing, CorruptSegment, UnknownFormat, StoreUnavailable.
        """
        with self._lock:
            kept = self._kept.get(segment_id)
            if kept is not None:
                self._kept.move_to_end(segment_id)
                return kept
        segment = self._read(segment_id)
        with self._lock:
            self._kept[segment_id] = segment
            while len(self._kept) > self._kept_max:
                self._kept.popitem(last=False)
        return segment


class ChunkTable:
    """The chunks of one stored file; thread-safe.  ``size`` and ``chunk_size`` in bytes."""

    def __init__(self, stored: StoredFile, chunk_size: int, segments: SegmentCache) -> None:
        self.size = stored.size
        self.chunk_size = chunk_size
        self.chunk_count = chunk_count(stored.size, chunk_size)
        self._ids = stored.segments
        self._segments = segments

    def locate(self, first: int, end: int) -> list[FrameRef | None]:
        """Where chunks ``first`` to ``end`` (half-open) lie; None for a chunk of zeros.

        Raises: ObjectMissing, CorruptSegment, UnknownFormat, StoreUnavailable.
        """
        found: list[FrameRef | None] = []
        for number, slots in self._pieces(first, end):
            segment_id, segment = self.segment(number)
            if segment_id is None or segment is None:
                found += [None] * len(slots)
            else:
                base = number * SEGMENT_CHUNKS
                found += [self._checked(segment.ref(slot), base + slot, segment_id) for slot in slots]
        return found

    def entries(self, first: int, end: int) -> list[Entry | None]:
        """The same as segments have it, for another table.

        Raises: as `locate`.
        """
        found: list[Entry | None] = []
        for number, slots in self._pieces(first, end):
            _, segment = self.segment(number)
            found += [None] * len(slots) if segment is None else segment.entries(slots.start, slots.stop)
        return found

    def _pieces(self, first: int, end: int) -> Iterator[tuple[int, range]]:
        """The segments that chunks ``first`` to ``end`` are in, and their slots there."""
        if not 0 <= first <= end <= self.chunk_count:
            msg = f"chunks {first} to {end} of a file that has {self.chunk_count}"
            raise ValueError(msg)
        while first < end:
            number, slot = divmod(first, SEGMENT_CHUNKS)
            count = min(end - first, SEGMENT_CHUNKS - slot)
            yield number, range(slot, slot + count)
            first += count

    def segment(self, number: int) -> tuple[SegmentId | None, Segment | None]:
        """Segment ``number`` of the file as a whole, seen to fit it; None for one of zeros.

        Raises: as `locate`.
        """
        segment_id = self._ids[number]
        return segment_id, None if segment_id is None else self._load(segment_id, number)

    def refers_to(self, packs: Set[PackId]) -> bool:
        """Whether a chunk lies in one of ``packs``; reads all segments, unless there are none to look for.

        Raises: as `locate`.
        """
        segments = (self.segment(number)[1] for number in range(len(self._ids) if packs else 0))
        return any(segment is not None and not packs.isdisjoint(segment.packs) for segment in segments)

    def _load(self, segment_id: SegmentId, number: int) -> Segment:
        segment = self._segments.load(segment_id)
        expected = min(SEGMENT_CHUNKS, self.chunk_count - number * SEGMENT_CHUNKS)
        if segment.slot_count != expected or segment.chunk_size != self.chunk_size:
            msg = f"{segment_key(segment_id)}: does not fit the file that refers to it"
            raise CorruptSegment(msg)
        return segment

    def _checked(self, ref: FrameRef | None, index: int, segment_id: SegmentId) -> FrameRef | None:
        if ref is not None and ref.raw_length != chunk_length(index, self.size, self.chunk_size):
            msg = f"{segment_key(segment_id)}: chunk {index} has the wrong length for the file that refers to it"
            raise CorruptSegment(msg)
        return ref


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """A committed restore point, open for reading; thread-safe."""

    manifest: Manifest
    segments: SegmentCache

    def chunks(self, file_index: int) -> ChunkTable:
        """The chunks of file number ``file_index`` of the manifest."""
        return ChunkTable(self.manifest.files[file_index], self.manifest.chunk_size, self.segments)


def holds_same(one: RestorePoint, other: RestorePoint) -> bool:
    """Whether two restore points of a VM hold the same names, attributes and bytes; times of access do not count.

    Where many segments differ in their names the bytes are not compared, and taken to differ.
    Raises: as `ChunkTable.locate`.
    """
    numbers, others = ({f.path: at for at, f in enumerate(point.manifest.files)} for point in (one, other))
    if numbers.keys() != others.keys() or _bare(one.manifest.top) != _bare(other.manifest.top):
        return False
    pairs = [(number, others[path]) for path, number in numbers.items()]
    files, other_files = one.manifest.files, other.manifest.files
    if any(_bare(files[number]) != _bare(other_files[at]) for number, at in pairs):
        return False
    looks = 0
    for number, at in pairs:
        for segment, names in enumerate(zip(files[number].segments, other_files[at].segments, strict=True)):
            if names[0] != names[1]:
                looks += 1
                if looks > SEGMENTS_COMPARED_MAX or _ids(one, number, segment) != _ids(other, at, segment):
                    return False
    return True


def _bare(stored: StoredFile | None) -> StoredFile | None:
    return None if stored is None else replace(stored, atime_ns=0, segments=())


def _ids(point: RestorePoint, file_index: int, segment: int) -> list[ChunkId | None]:
    table, first = point.chunks(file_index), segment * SEGMENT_CHUNKS
    refs = table.locate(first, min(table.chunk_count, first + SEGMENT_CHUNKS))
    return [None if ref is None else ref.chunk_id for ref in refs]
