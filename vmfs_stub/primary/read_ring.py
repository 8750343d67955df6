"""Reads from files that the kernel completes by itself: an io_uring, of which only reading is used.

A read that has to wait for the disk costs no thread: it is handed to the kernel, and the ring's descriptor can be
polled for what is done.  Knows nothing of who waits.  Layouts and numbers: linux/io_uring.h.

The two ends share memory, of which this side reads an index and then what lies there.  On x86-64 that needs no
barrier, and Python has none to offer, so other processors do without a ring.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from typing import Final, NamedTuple

_SYS_SETUP: Final = 425
_SYS_ENTER: Final = 426
_SETUP_COOP_TASKRUN: Final = 1 << 8
"""What is done is noted when this process enters the kernel anyway, not by interrupting it.  Kernel 5.19."""
_ENTER_GETEVENTS: Final = 1
_OP_READ: Final = 22
_MMAP_OFFSET_ENTRIES: Final = 0x10000000
_PARAMS: Final = struct.Struct("=2I I 7I 7I I Q 7I I Q")
"""Sizes of both queues, flags, others; then where in the mapped memory the parts of either queue lie."""
_FLAGS_AT: Final = 8
_ENTRY: Final = struct.Struct("=BBHiQQIIQ24x")
"""Operation, flags, priority, descriptor, offset, address, length, flags of the read, number."""
_DONE: Final = struct.Struct("=QiI")
"""Number, result, flags."""
_INDEX_MASK: Final = 0xFFFFFFFF

# Keeps the GIL, which this thread would else have to wait for: to begin a read takes some microseconds.
_libc_brief = ctypes.PyDLL(None, use_errno=True)
_libc = ctypes.CDLL(None, use_errno=True)


class Done(NamedTuple):
    """A read that is over: the number of bytes, or an errno with a minus sign."""

    number: int
    result: int


class ReadRing:
    """Hands reads to the kernel and tells which are done.  Used by one thread only.

    ``fd`` is readable while there is something to tell.
    """

    def __init__(self, entries: int) -> None:
        """Have ``entries`` (a power of two) reads at once at most.  Raises OSError where there is no io_uring."""
        if platform.machine() != "x86_64":
            raise OSError(errno.ENOSYS, f"not used on {platform.machine()}")
        params = (ctypes.c_char * _PARAMS.size)()
        struct.pack_into("=I", params, _FLAGS_AT, _SETUP_COOP_TASKRUN)
        self.fd: Final = _libc.syscall(_SYS_SETUP, entries, params)
        if self.fd < 0:
            raise _failure()
        fields: tuple[int, ...] = _PARAMS.unpack(params)
        size, done_size = fields[:2]
        head, tail, *_, array = fields[10:17]
        done_head, done_tail, _, _, _, done_at, _ = fields[19:26]
        try:
            self._memory = mmap.mmap(self.fd, max(array + 4 * size, done_at + _DONE.size * done_size))
            self._entries = mmap.mmap(self.fd, _ENTRY.size * size, offset=_MMAP_OFFSET_ENTRIES)
        except BaseException:
            os.close(self.fd)
            raise
        self._words = memoryview(self._memory).cast("I")
        self._head, self._tail = head // 4, tail // 4
        self._done_head, self._done_tail, self._done_at = done_head // 4, done_tail // 4, done_at
        self._mask, self._done_mask = size - 1, done_size - 1
        self._numbers = 0
        self._buffers: dict[int, ctypes.c_char] = {}
        """What the kernel writes to, by number of the read: kept, and kept from being moved, until that is done."""
        for index in range(size):
            self._words[array // 4 + index] = index

    @property
    def is_full(self) -> bool:
        """Whether no other read may begin now: the queue of what is done would have no room for it."""
        return len(self._buffers) > self._mask

    def begin(self, fd: int, buffer: bytearray, offset: int) -> int:
        """Have ``buffer`` filled with what lies at ``offset`` (bytes); the number by which `done` will tell of it.

        Nothing else may be done with the buffer until then, and the ring must not be full.  Raises OSError; nothing
        was begun then.
        """
        assert not self.is_full
        self._numbers += 1
        number, words = self._numbers, self._words
        pinned = ctypes.c_char.from_buffer(buffer)
        index = words[self._tail]
        at = _ENTRY.size * (index & self._mask)
        address = ctypes.addressof(pinned)
        _ENTRY.pack_into(self._entries, at, _OP_READ, 0, 0, fd, offset, address, len(buffer), 0, number)
        self._buffers[number] = pinned
        words[self._tail] = (index + 1) & _INDEX_MASK
        begun = _libc_brief.syscall(_SYS_ENTER, self.fd, 1, 0, 0, None, 0)
        if begun != 1 and words[self._head] == index:  # else it was taken all the same
            words[self._tail] = index
            del self._buffers[number]
            raise _failure()
        return number

    def done(self) -> list[Done]:
        """The reads that are over, each told of once.  Does not wait."""
        words, told = self._words, []
        head, tail = words[self._done_head], words[self._done_tail]
        while head != tail:
            number, result, _ = _DONE.unpack_from(self._memory, self._done_at + _DONE.size * (head & self._done_mask))
            told.append(Done(number, result))
            head = (head + 1) & _INDEX_MASK
        for number, _ in told:
            del self._buffers[number]
        words[self._done_head] = head
        return told

    def close(self) -> None:
        """Give the ring back, when the reads that are under way are over: they write to this process's memory.

        Raises OSError where they cannot be waited for; the ring is still there then.
        """
        while self._buffers:
            if _libc.syscall(_SYS_ENTER, self.fd, 0, 1, _ENTER_GETEVENTS, None, 0) < 0:
                failure = _failure()
                if failure.errno != errno.EINTR:
                    raise failure
            self.done()
        self._words.release()
        self._memory.close()
        self._entries.close()
        os.close(self.fd)


def _failure() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
