"""Memory that the daemon and its mover share: slots, in each of which the mover puts the bytes of one fetch.

A slot is the mover's from the request to the answer, and the daemon's from then on until it has used the bytes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from vmfs_stub.store.objects import Buffer


class SharedSlots:
    """``count`` slots of at least ``size`` bytes, in the memory of ``fd``, which is not needed afterwards."""

    def __init__(self, fd: int, *, count: int, size: int) -> None:
        self._size = _whole_pages(size)
        self._memory = mmap.mmap(fd, count * self._size)
        self._view = memoryview(self._memory)

    @classmethod
    def create(cls, *, count: int, size: int) -> tuple[SharedSlots, int]:
        """Make the memory; also returns its descriptor, for the other process to map.  Raises OSError."""
        fd = os.memfd_create("vmfs-stub-slots", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, count * _whole_pages(size))
            return cls(fd, count=count, size=size), fd
        except BaseException:
            os.close(fd)
            raise

    def write(self, slot: int, raws: Sequence[Buffer]) -> None:
        """Lay buffers into a slot, one after the other; together they must fit."""
        at, end = slot * self._size, (slot + 1) * self._size
        for raw in raws:
            if at + len(raw) > end:
                raise ValueError(f"more than the {self._size} bytes of a slot")
            self._view[at : at + len(raw)] = raw
            at += len(raw)

    def give_back(self, slot: int) -> None:
        """Return the memory of a slot that is not in use to the system, until it is used again."""
        self._memory.madvise(mmap.MADV_REMOVE, slot * self._size, self._size)

    def read(self, slot: int, lengths: Sequence[int]) -> list[memoryview]:
        """The buffers that were laid into a slot, in place."""
        at, found = slot * self._size, []
        for length in lengths:
            found.append(self._view[at : at + length])
            at += length
        return found


def _whole_pages(size: int) -> int:
    """Slots begin at pages, so that the memory of one can be given back alone."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
