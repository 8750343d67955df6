"""Which blocks of a placeholder are valid on primary, and what an access still needs.

Residency is one bit per block, 1 = valid on primary, least significant bit first.  The functions work on any
buffer of such bits and know nothing of where it lies.  Ranges of blocks are half-open.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmfs_stub.core.chunking import BLOCK_SIZE
from vmfs_stub.core.extents import Extent

Bits = bytes | bytearray | memoryview
_STEP_BYTES = 4096
"""How much of a map is looked at as one integer: large enough to be quick, small enough to stay linear."""


def block_count(size: int) -> int:
    """Blocks of a file of ``size`` bytes; the last may be partial."""
    return -(-size // BLOCK_SIZE)


def blocks_touched(offset: int, length: int) -> Extent:
    """The blocks of which ``length`` bytes at ``offset`` touch at least one byte."""
    if length <= 0:
        return Extent(offset // BLOCK_SIZE, offset // BLOCK_SIZE)
    return Extent(offset // BLOCK_SIZE, block_count(offset + length))


def blocks_replaced(offset: int, length: int, *, size: int) -> Extent:
    """The blocks that a write replaces wholly, so that nothing of them need be known before.

    ``size`` is the file's size before the write: a write that reaches it replaces the last block also when it ends
    inside that block.
    """
    end = offset + length
    first = block_count(offset)
    last = block_count(end) if end >= size else end // BLOCK_SIZE
    return Extent(first, max(first, last))


def blocks_merged(offset: int, length: int, *, size: int) -> list[int]:
    """The blocks (at most two) that a write covers only partly, and which must be resident before it."""
    touched = blocks_touched(offset, length)
    replaced = blocks_replaced(offset, length, size=size)
    if replaced.length == 0:
        return list(range(touched.start, touched.end))
    return [*range(touched.start, replaced.start), *range(replaced.end, touched.end)]


def all_set(bits: Bits, first: int, end: int) -> bool:
    """Whether every block in [first, end) is resident."""
    if end - first > _STEP_BYTES:
        return next(clear_runs(bits, first, end), None) is None
    # The common case, one request of a guest: a single comparison of integers.
    wanted = ((1 << (end - first)) - 1) << (first & 7)
    return int.from_bytes(bits[first >> 3 : (end + 7) >> 3], "little") & wanted == wanted


def set_range(bits: bytearray | memoryview, first: int, end: int) -> None:
    """Mark the blocks in [first, end) resident."""
    while first < end and first & 7:
        bits[first >> 3] |= 1 << (first & 7)
        first += 1
    while first < end and end & 7:
        end -= 1
        bits[end >> 3] |= 1 << (end & 7)
    if first < end:
        bits[first >> 3 : end >> 3] = b"\xff" * ((end - first) >> 3)


def clear_runs(bits: Bits, first: int, end: int) -> Iterator[Extent]:
    """The maximal runs of absent blocks in [first, end), ascending."""
    pending: Extent | None = None
    for run in _runs_by_step(bits, first, end):
        if pending is None:
            pending = run
        elif pending.end == run.start:
            pending = Extent(pending.start, run.end)
        else:
            yield pending
            pending = run
    if pending is not None:
        yield pending


def _runs_by_step(bits: Bits, first: int, end: int) -> Iterator[Extent]:
    at = first
    while at < end:
        step_end = min(end, (at // 8 + _STEP_BYTES) * 8)
        base = at & ~7
        value = int.from_bytes(bits[at >> 3 : (step_end + 7) >> 3], "little")
        absent = ~value & ((1 << (step_end - base)) - 1)
        absent = absent >> (at - base) << (at - base)
        while absent:
            start = (absent & -absent).bit_length() - 1
            rest = absent >> start
            length = (~rest & (rest + 1)).bit_length() - 1
            yield Extent(base + start, base + start + length)
            absent = rest >> length << (start + length)
        at = step_end
