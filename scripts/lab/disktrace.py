"""The reads and writes that a guest made on its disk, recorded by QEMU, and read again at full speed.

Under emulation a boot is dominated by the guest's processor, so that the time to a marker hides what the storage
costs; reading the same extents in the same order without the guest shows it.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PIECE_SIZE = 1 << 20
_LINE = re.compile(
    r"@(?P<at_s>\d+\.\d+):blk_co_p(?P<kind>read|write)v .* offset (?P<offset>\d+) bytes (?P<size>\d+)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Extent:
    """A half-open range of bytes of a disk."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class DiskTrace:
    """What a guest read and wrote, each in order."""

    reads: tuple[Extent, ...]
    writes: tuple[Extent, ...]


def read_trace(path: Path, *, until_s: float = float("inf")) -> DiskTrace:
    """Parse QEMU's log of blk_co_preadv and blk_co_pwritev; ``until_s`` (seconds since the epoch) ends it early."""
    reads: list[Extent] = []
    writes: list[Extent] = []
    with path.open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            found = _LINE.search(line)
            if found is None or float(found["at_s"]) > until_s:
                continue
            start, size = int(found["offset"]), int(found["size"])
            (reads if found["kind"] == "read" else writes).append(Extent(start, start + size))
    return DiskTrace(tuple(reads), tuple(writes))


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The same bytes as ascending extents that neither overlap nor touch; empty ones are left out."""
    result: list[Extent] = []
    for extent in sorted(extents, key=lambda item: item.start):
        if result and extent.start <= result[-1].end:
            result[-1] = Extent(result[-1].start, max(result[-1].end, extent.end))
        elif extent.size:
            result.append(extent)
    return result


def unique_bytes(extents: Iterable[Extent]) -> int:
    """How many different bytes the extents cover."""
    return sum(extent.size for extent in merged(extents))


def replay(path: Path, reads: Sequence[Extent]) -> float:
    """Read the extents in order, as a guest without a host page cache does; returns the seconds it took.

    Raises OSError where the file gives an error, ValueError where a read is shorter than the extent.
    """
    with mmap.mmap(-1, max((extent.size for extent in reads), default=mmap.PAGESIZE)) as room:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        view = memoryview(room)
        try:
            started_s = time.perf_counter()
            for extent in reads:
                if os.preadv(descriptor, [view[: extent.size]], extent.start) != extent.size:
                    raise ValueError(f"{path}: a read at {extent.start} was short")
            return time.perf_counter() - started_s
        finally:
            view.release()
            os.close(descriptor)


def differing(left: Path, right: Path, *, but_for: Sequence[Extent] = ()) -> Extent | None:
    """The first differing piece (at most 1 MiB) of two files, leaving out the bytes of ``but_for``; None if none.

    Files of different sizes differ from the end of the shorter one.  What is a hole in both is not read.
    """
    skip, next_skip = merged(but_for), 0
    with left.open("rb") as ours, right.open("rb") as theirs:
        sizes = [os.fstat(file.fileno()).st_size for file in (ours, theirs)]
        if sizes[0] != sizes[1]:
            return Extent(min(sizes), max(sizes))
        for piece in _pieces(merged([*_data_extents(ours.fileno()), *_data_extents(theirs.fileno())])):
            while next_skip < len(skip) and skip[next_skip].end <= piece.start:
                next_skip += 1
            a = os.pread(ours.fileno(), piece.size, piece.start)
            b = os.pread(theirs.fileno(), piece.size, piece.start)
            if len(a) != piece.size or (a != b and not _same_outside(a, b, piece, skip[next_skip:])):
                return piece
    return None


def _data_extents(descriptor: int) -> Iterator[Extent]:
    """Where the file has data; all of it on a filesystem that cannot tell."""
    end, size = 0, os.fstat(descriptor).st_size
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield Extent(start, end)


def _pieces(extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        for start in range(extent.start, extent.end, _PIECE_SIZE):
            yield Extent(start, min(start + _PIECE_SIZE, extent.end))


def _same_outside(ours: bytes, theirs: bytes, piece: Extent, skip: Sequence[Extent]) -> bool:
    at = piece.start
    for extent in [*skip, Extent(piece.end, piece.end)]:
        until = min(max(at, extent.start), piece.end) - piece.start
        if ours[at - piece.start : until] != theirs[at - piece.start : until]:
            return False
        at = max(at, extent.end)
        if at >= piece.end:
            break
    return True
