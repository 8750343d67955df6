"""How a logical file is cut into chunks, and where a stored chunk lies.

A chunk is a slice of fixed size at an aligned offset; the last one of a file may be shorter.  This module knows
arithmetic only: no store, no file.
"""

from __future__ import annotations

from typing import NamedTuple

from vmfs_stub.core.ids import ChunkId, PackId

BLOCK_SIZE = 4096
"""Unit of residency, in bytes: the smallest write that guests and page caches make."""

CHUNK_SIZE_MIN = 64 * 1024
CHUNK_SIZE_MAX = 1024 * 1024


class FrameRef(NamedTuple):
    """Where one stored chunk lies and what it must decode to.

    ``offset`` and ``length`` (bytes) are those of the frame in its pack; ``raw_length`` is the chunk's length;
    ``checksum`` is the xxh3-128 of the chunk's raw bytes (16 bytes, big-endian).
    """

    chunk_id: ChunkId
    pack_id: PackId
    offset: int
    length: int
    raw_length: int
    checksum: bytes

    @property
    def end(self) -> int:
        """First byte in the pack after this frame."""
        return self.offset + self.length


def chunk_count(size: int, chunk_size: int) -> int:
    """Number of chunks of a file of ``size`` bytes."""
    return -(-size // chunk_size)


def chunk_length(index: int, size: int, chunk_size: int) -> int:
    """Length in bytes of chunk ``index`` of a file of ``size`` bytes."""
    return max(0, min(chunk_size, size - index * chunk_size))
