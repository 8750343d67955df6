"""Segments: pieces of a file's chunk table, 4,096 chunks each, named by the BLAKE3 of their bytes and their writer.

A segment says for each of its chunks where the frame lies and what it must decode to, so that a recall needs no
index.  Chunks of zeros take two bytes; a segment of nothing but zeros is not stored at all (None in the manifest).
Equal chunks share an entry.  Restore points share segments by taking over those of the point before.  A name is never
used again: a collector that was stopped for long before it deletes cannot meet another segment of that name.  In an
encrypted store the bytes that are stored, and name it, are sealed.

Entries are taken apart when asked for, not when read: a recall's first read must not wait for 4,096 objects.
Layout: docs/FORMAT.md.  This module must not know how segments are transported.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from blake3 import blake3

from vmfs_stub.core.chunking import FrameRef
from vmfs_stub.core.errors import CorruptSegment, UnknownFormat
from vmfs_stub.core.ids import ChunkId, PackId, SegmentId, WriterId
from vmfs_stub.store.format import (
    FRAME_HEADER,
    FRAME_LENGTH_MAX,
    PACK_SIZE_MAX,
    SEGMENT_CHUNKS,
    SEGMENT_ENTRY,
    SEGMENT_ENTRY_WITH_PLACE,
    SEGMENT_HEADER,
    SEGMENT_MAGIC,
    SEGMENT_PLACE,
    SEGMENT_SIZE_MAX,
    SEGMENT_SLOT_ZERO,
    SEGMENT_VERSION,
)
from vmfs_stub.store.keys import SEGMENTS, segment_digest, segment_id_of, segment_key
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.sealing import PLAIN, Sealing


class Entry(NamedTuple):
    """A chunk as segments have it, to be copied from one to another: ``place`` is not taken apart."""

    chunk_id: ChunkId
    pack_id: PackId
    place: bytes

    @property
    def ref(self) -> FrameRef:
        """Where the frame lies."""
        return FrameRef(self.chunk_id, self.pack_id, *SEGMENT_PLACE.unpack(self.place))


def entries_of(refs: Iterable[FrameRef | None]) -> list[Entry | None]:
    """What segments say of these frames; None is zeros."""
    return [None if ref is None else Entry(ref.chunk_id, ref.pack_id, SEGMENT_PLACE.pack(*ref[2:])) for ref in refs]


@dataclass(frozen=True, slots=True)
class SealedSegment:
    """A segment ready to be put; ``packs`` are those that it refers to."""

    segment_id: SegmentId
    data: bytes
    packs: frozenset[PackId]


def seal_segment(
    entries: Sequence[Entry | None], chunk_size: int, writer_id: WriterId, sealing: Sealing = PLAIN
) -> SealedSegment | None:
    """Make the segment of up to 4,096 chunks in file order; None when all of them are zeros."""
    assert 0 < len(entries) <= SEGMENT_CHUNKS
    numbers: dict[Entry, int] = {}
    slots = [SEGMENT_SLOT_ZERO if entry is None else numbers.setdefault(entry, len(numbers)) for entry in entries]
    if not numbers:
        return None
    packs: dict[PackId, int] = {}
    rows = [
        SEGMENT_ENTRY_WITH_PLACE.pack(chunk_id, packs.setdefault(pack_id, len(packs)), place)
        for chunk_id, pack_id, place in numbers
    ]
    header = SEGMENT_HEADER.pack(SEGMENT_MAGIC, SEGMENT_VERSION, 0, chunk_size, len(slots), len(rows), len(packs))
    table = b"".join(bytes.fromhex(pack_id) for pack_id in packs)
    data = sealing.seal(b"".join((header, table, struct.pack(f"<{len(slots)}H", *slots), *rows)), SEGMENTS)
    return SealedSegment(segment_id_of(blake3(data).hexdigest(), writer_id), data, frozenset(packs))


class SegmentTable:
    """Collects one file's chunk entries and cuts them into segments.  Not thread-safe.

    ``ids`` are the segments so far, in order; every SealedSegment handed out must be put.
    """

    def __init__(self, chunk_size: int, writer_id: WriterId, sealing: Sealing = PLAIN) -> None:
        self.ids: list[SegmentId | None] = []
        self._chunk_size = chunk_size
        self._writer_id = writer_id
        self._sealing = sealing
        self._open: list[Entry | None] = []

    def extend(self, entries: Iterable[Entry | None]) -> list[SealedSegment]:
        """Take the next chunks in file order; returns the segments that are full."""
        self._open.extend(entries)
        sealed = []
        while len(self._open) >= SEGMENT_CHUNKS:
            sealed.extend(self._seal(self._open[:SEGMENT_CHUNKS]))
            del self._open[:SEGMENT_CHUNKS]
        return sealed

    def take_over(self, segment_id: SegmentId | None) -> None:
        """The next chunks are those of a segment of another restore point; only where a segment begins."""
        assert not self._open
        self.ids.append(segment_id)

    def close(self) -> list[SealedSegment]:
        """The file is complete; returns its last segment, if there is one to put."""
        rest, self._open = self._open, []
        return self._seal(rest) if rest else []

    def _seal(self, entries: list[Entry | None]) -> list[SealedSegment]:
        segment = seal_segment(entries, self._chunk_size, self._writer_id, self._sealing)
        self.ids.append(None if segment is None else segment.segment_id)
        return [] if segment is None else [segment]


class Segment:
    """A segment that was read and proven to be the one that was asked for.  Immutable, so thread-safe.

    Attributes: ``slot_count`` chunks are described; ``packs`` is the pack table.
    """

    __slots__ = ("_data", "_entries_at", "_entry_count", "_key", "_slots", "chunk_size", "packs", "slot_count")

    def __init__(self, data: bytes, segment_id: SegmentId, sealing: Sealing = PLAIN) -> None:
        """Check name, seal, header and sizes of the stored bytes.

        Raises: CorruptSegment; UnknownFormat.
        """
        self._key = segment_key(segment_id)
        if len(data) > SEGMENT_SIZE_MAX or blake3(data).hexdigest() != segment_digest(segment_id):
            raise self._corrupt("does not match its name")
        data = sealing.open(data, self._key)
        if len(data) < SEGMENT_HEADER.size:
            raise self._corrupt("is too short")
        magic, version, zero, chunk_size, slots, entries, packs = SEGMENT_HEADER.unpack_from(data)
        if magic != SEGMENT_MAGIC or version != SEGMENT_VERSION or zero:
            msg = f"{self._key}: segment version {version} is not known to this version; use a newer vmfs-stub"
            raise UnknownFormat(msg)
        slots_at = SEGMENT_HEADER.size + packs * 16
        entries_at = slots_at + slots * 2
        if (
            slots > SEGMENT_CHUNKS
            or entries > slots
            or packs > entries
            or len(data) != entries_at + entries * SEGMENT_ENTRY.size
        ):
            raise self._corrupt("has sizes that do not fit together")
        self._data = data
        self._entries_at = entries_at
        self._entry_count = entries
        self._slots: tuple[int, ...] = struct.unpack_from(f"<{slots}H", data, slots_at)
        self.chunk_size: int = chunk_size
        self.slot_count: int = slots
        table = data[SEGMENT_HEADER.size : slots_at].hex()
        self.packs = tuple(PackId(table[at : at + 32]) for at in range(0, len(table), 32))

    def ref(self, slot: int) -> FrameRef | None:
        """Where the chunk in ``slot`` lies; None for a chunk of zeros.

        Raises: CorruptSegment.
        """
        row = self._slots[slot]
        if row == SEGMENT_SLOT_ZERO:
            return None
        if row >= self._entry_count:
            raise self._corrupt(f"has no entry for its chunk {slot}")
        return self._frame(SEGMENT_ENTRY.unpack_from(self._data, self._entries_at + row * SEGMENT_ENTRY.size))

    def refs_to(self, packs: Set[PackId]) -> list[FrameRef]:
        """All frames of these packs that it refers to, each once.

        Raises: CorruptSegment.
        """
        numbers = {number for number, pack_id in enumerate(self.packs) if pack_id in packs}
        return [self._frame(row) for row in self._rows() if row[1] in numbers] if numbers else []

    def use(self, *, parts: int, part_size: int) -> dict[PackId, tuple[int, int]]:
        """Of each of its packs, how many bytes the frames have that it refers to, and in which parts they begin.

        A bit for each of so many parts of ``part_size`` bytes; what lies behind them is in the last.
        """
        bytes_used, begins = [0] * len(self.packs), [0] * len(self.packs)
        for _, pack, offset, length, _, _ in self._rows():
            if pack < len(self.packs):
                bytes_used[pack] += length
                begins[pack] |= 1 << min(offset // part_size, parts - 1)
        return dict(zip(self.packs, zip(bytes_used, begins, strict=True), strict=True))

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        return SEGMENT_ENTRY.iter_unpack(memoryview(self._data)[self._entries_at :])

    def _frame(self, row: tuple[Any, ...]) -> FrameRef:
        chunk_id, pack, offset, length, raw_length, checksum = row
        if (
            pack >= len(self.packs)
            or not FRAME_HEADER.size < length <= FRAME_LENGTH_MAX
            or offset + length > PACK_SIZE_MAX
            or not 0 < raw_length <= self.chunk_size
        ):
            raise self._corrupt("has an entry that is impossible")
        return FrameRef(ChunkId(chunk_id), self.packs[pack], offset, length, raw_length, checksum)

    def entries(self, first: int, end: int) -> list[Entry | None]:
        """Chunks in slots ``first`` to ``end`` (half-open), for another segment; None for a chunk of zeros.

        Only that the segment is whole in itself was seen; what entries say is checked by whoever reads the frames.
        Raises: CorruptSegment.
        """
        slots = self._slots[first:end]
        rows = set(slots) - {SEGMENT_SLOT_ZERO}
        if not rows:
            return [None] * len(slots)
        low, high = min(rows), max(rows) + 1
        if high > self._entry_count:
            raise self._corrupt("has no entry for one of its chunks")
        size = SEGMENT_ENTRY.size
        found = self._data[self._entries_at + low * size : self._entries_at + high * size]
        packs = self.packs
        try:
            known = [
                Entry(chunk_id, packs[pack], place)
                for chunk_id, pack, place in SEGMENT_ENTRY_WITH_PLACE.iter_unpack(found)
            ]
        except IndexError:
            raise self._corrupt("has an entry of no pack") from None
        return [None if row == SEGMENT_SLOT_ZERO else known[row - low] for row in slots]

    def _corrupt(self, problem: str) -> CorruptSegment:
        return CorruptSegment(f"{self._key}: {problem}")


def read_segment(objects: ObjectStore, segment_id: SegmentId, sealing: Sealing) -> Segment:
    """A stored segment.

    Raises: ObjectMissing, CorruptSegment, UnknownFormat, StoreUnavailable.
    """
    return Segment(objects.get(segment_key(segment_id), size_max=SEGMENT_SIZE_MAX), segment_id, sealing)
