"""Which chunks of a file may differ from those of a restore point: what an incremental backup has to read.

One bit per chunk of the stored file, 1 = perhaps changed, least significant bit first.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmfs_stub.core.chunking import chunk_count
from vmfs_stub.core.extents import Extent
from vmfs_stub.core.origin import Origin
from vmfs_stub.core.residency import clear_runs

BITS_SIZE_MAX = 16 << 20
"""Bytes, of a file of 8 TiB in chunks of 64 KiB; larger files are read as a whole by every backup."""


def bits_size(origin: Origin) -> int:
    """Bytes that the bits of this file take."""
    return -(-chunk_count(origin.size, origin.chunk_size) // 8)


def chunks_touched(origin: Origin, offset: int, length: int) -> Extent:
    """The chunks of the stored file of which ``length`` bytes at ``offset`` touch at least one; perhaps none."""
    count = chunk_count(origin.size, origin.chunk_size)
    first = min(count, offset // origin.chunk_size)
    return Extent(first, max(first, min(count, chunk_count(offset + length, origin.chunk_size))))


@dataclass(frozen=True, slots=True)
class Changed:
    """A file since the restore point that ``origin`` names."""

    origin: Origin
    bits: bytes

    @classmethod
    def nothing(cls, origin: Origin) -> Changed:
        """The file as it was copied."""
        return cls(origin, bytes(bits_size(origin)))

    def unchanged(self, first: int, *, size: int) -> Extent:
        """The next run, from chunk ``first`` on, of chunks that are as stored; empty at the file's end if none is.

        ``size`` is the file's size now: a last chunk of another length differs, and so does what lies beyond.
        """
        chunk_size = self.origin.chunk_size
        end = chunk_count(size, chunk_size)
        same_end = end if size == self.origin.size else min(size, self.origin.size) // chunk_size
        return next(clear_runs(self.bits, first, same_end), Extent(end, end))
