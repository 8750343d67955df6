"""Reading and writing in small steps: for what no guest waits for.

A disk serves what it has been given, in its own order.  A read of a guest that comes when the kernel has just asked it
for 8 MiB of read-ahead, or to write back a pack of 64 MiB, waits for all of that: tens of milliseconds, where it takes
a tenth of one otherwise.  So such data is asked for in steps, each of which is over before the next begins, and
nothing is read ahead.  The disk is still kept busy: while one job's step is under way, others' are.  Beside guests
that use their disks the steps are small, and the mover makes one at a time on each disk: a guest's read waits for all
that the disk was given before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

STEP_BYTES = 1 << 20
STEP_BESIDE_GUESTS_BYTES = 32 << 10

TURN_S_MAX = 0.1
"""Whoever has waited so long for its turn goes on: one step that hangs must not hold up all others."""

_BUFFERS_MAX = 1024
"""As many as the kernel takes in one call."""
_WRITE_AND_WAIT = 0x1 | 0x2 | 0x4
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE, _WAIT_AFTER."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@dataclass(slots=True)
class Pace:
    """How large the steps of this process are: whether there are guests that use their disks now.

    It ``reads_in_steps`` everywhere but in the daemon, where a guest waits for what is read, and ``takes_turns`` in the
    mover, where nobody does.
    """

    beside_guests: bool = True
    reads_in_steps: bool = True
    takes_turns: bool = False
    _turns: dict[int, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))
    """By the number of the device."""

    @property
    def step_bytes(self) -> int:
        """Bytes of one step."""
        return STEP_BESIDE_GUESTS_BYTES if self.beside_guests else STEP_BYTES

    @contextmanager
    def step(self, fd: int) -> Iterator[None]:
        """A step on this file: beside guests, and where turns are taken, the only one on its device."""
        if not (self.takes_turns and self.beside_guests):
            yield
            return
        turn = self._turns[os.fstat(fd).st_dev]
        has_turn = turn.acquire(timeout=TURN_S_MAX)
        try:
            yield
        finally:
            if has_turn:
                turn.release()


pace: Final = Pace()


class WriteBackFailed(OSError):
    """What was written did not reach the disk; no later sync of this opening of the file tells of it again."""


def stop_read_ahead(fd: int) -> None:
    """Let the kernel read what is asked for, and no more, for everybody who uses this opening of the file."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def resume_read_ahead(fd: int) -> None:
    """Undo `stop_read_ahead`."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)


def read_into(fd: int, buffer: bytearray, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on; the number of bytes, fewer only at end of file.  Raises OSError.

    Nothing is read ahead only after `stop_read_ahead`.
    """
    view, done = memoryview(buffer), 0
    while done < len(view):
        end = done + pace.step_bytes if pace.reads_in_steps else len(view)
        with pace.step(fd):
            count = os.preadv(fd, [view[done:end]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_buffers(fd: int, parts: Sequence[bytes | memoryview], offset: int, *, paced: bool = True) -> None:
    """Write buffers one after the other from ``offset`` on; a prefix may have been written when it raises OSError.

    ``paced`` also waits until the disk has taken them (they are not durable yet), which raises WriteBackFailed when
    it took these or earlier writes badly.  Without, it takes as few calls as possible.
    """
    for some in _steps(parts, pace.step_bytes if paced else sum(map(len, parts))):
        if paced:
            with pace.step(fd):
                offset += _write_and_wait(fd, some, offset)
        else:
            offset += _write_some(fd, some, offset)


def _steps(parts: Sequence[bytes | memoryview], size: int) -> Iterator[list[memoryview]]:
    """The same bytes in groups of ``size`` at most."""
    group: list[memoryview] = []
    room = size
    for part in parts:
        rest = memoryview(part)
        while rest:
            group.append(rest[:room])
            room -= len(group[-1])
            rest = rest[len(group[-1]) :]
            if room == 0 or len(group) == _BUFFERS_MAX:
                yield group
                group, room = [], size
    if group:
        yield group


def _write_and_wait(fd: int, parts: Sequence[memoryview], offset: int) -> int:
    written = _write_some(fd, parts, offset)
    if _libc.sync_file_range(fd, offset, written, _WRITE_AND_WAIT) != 0:
        code = ctypes.get_errno()
        raise WriteBackFailed(code, os.strerror(code))
    return written


def _write_some(fd: int, parts: Sequence[memoryview], offset: int) -> int:
    """Write all of them; the number of bytes."""
    total, done = sum(map(len, parts)), os.pwritev(fd, parts, offset)
    if done < total:  # a signal, or the last of the room
        rest = memoryview(b"".join(parts))
        while done < total:
            count = os.pwrite(fd, rest[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "write made no progress")
            done += count
    return total
