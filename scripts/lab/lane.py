"""Part of a disk that one thread writes, reads and compares while others do the same beside it, until a kill.

A lane knows what its bytes must be, and which change was under way when the daemon died.  What may be there then:
- what a write was acknowledged to have written, with or without a sync;
- of a write that was not acknowledged, each block old or new; of a store to mapped memory, each byte;
- the size before or after a change, or, of a write behind the end, one that whole blocks of it make.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from scripts.lab.content import BLOCK, difference, random_content
from scripts.lab.failure import LabError

_TRANSFERS: Final = (16, 600, BLOCK, 3 * BLOCK, 64 << 10, 200 << 10)
"""Upper bounds that the length of an operation is drawn below."""
_LOG_LENGTH: Final = 12
_READ_BYTES: Final = 1 << 20
GONE: Final = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV, errno.EFAULT}
"""What an operation may fail with when the daemon dies under it."""


class Opener(Protocol):
    """The disk that a lane is part of; its name may change while it is open."""

    def open(self, flags: int) -> int | None:
        """A new descriptor; None when the disk has no name any more."""

    def truncate(self, size: int) -> bool:
        """Cut or extend it by its name; false when it has none any more."""

    def forget(self, fd: int, offset: int, length: int) -> None:
        """Have the kernel drop its pages of a range, of the mount's file and of the backing file."""


@dataclass(slots=True)
class Change:
    """What is being done to a lane: ``content`` written at ``offset`` of the disk, or, without, its end moved there.

    Of the content the first ``acknowledged`` bytes are there for certain, of the rest each ``unit`` is old or new.
    """

    what: str
    offset: int
    content: bytes | None = None
    unit: int = BLOCK
    acknowledged: int = 0


class Lane:
    """A range of a disk from ``start`` on; its end moves, below ``size_max``, when that is given.

    ``model`` is what it holds.  ``version`` is odd while a change is under way, which ``change`` then is; ``touched``
    are the ranges that were changed since that was last cleared.  One thread changes all this.
    """

    def __init__(self, disk: Opener, *, start: int, model: bytearray, size_max: int | None = None) -> None:
        self.start = start
        self.model = model
        self.version = 0
        self.change: Change | None = None
        self.touched: list[tuple[int, int]] = []
        self.doing = ""
        self.log: deque[str] = deque(maxlen=_LOG_LENGTH)
        self.counts: Counter[str] = Counter()
        self._disk = disk
        self._size_max = size_max
        self._fd = self._direct = -1
        weighted: dict[Callable[[random.Random], None], int] = {
            self._read: 14,
            self._read_directly: 5,
            self._read_mapping: 3,
            self._write: 20,
            self._write_blocks: 14,
            self._write_directly: 12,
            self._write_mapping: 5,
            self._sync: 6,
            self._forget: 6,
            self._reopen: 2,
        }
        if size_max is not None:
            weighted |= {self._write_behind_end: 5, self._cut: 4, self._extend: 3}
        self._kinds, self._weights = list(weighted), list(weighted.values())

    @property
    def end(self) -> int:
        """Where it ends in the disk."""
        return self.start + len(self.model)

    def play(self, chance: random.Random, *, stop: threading.Event, doom: threading.Event) -> None:
        """Do one thing after the other until ``stop``, or the daemon's death, of which ``doom`` tells beforehand.

        Raises LabError.
        """
        try:
            self._open()
            while not stop.is_set() and self._direct >= 0:  # else it had lost its name before
                (kind,) = chance.choices(self._kinds, self._weights)
                self.doing = kind.__name__.removeprefix("_")
                kind(chance)
                self.counts[self.doing] += 1
            self.doing = ""
        except OSError as exc:
            if not (doom.is_set() and exc.errno in GONE):
                raise LabError(f"{self.doing or 'open'} failed: {exc}") from exc
        finally:
            self._close()

    # After a kill

    def settle(self, fd: int) -> None:
        """Find out what became of the change under way, and take it over.  Raises LabError if it is none of both."""
        change, self.change, self.doing = self.change, None, ""
        self.version += self.version % 2
        if change is None:
            return
        size, end = os.fstat(fd).st_size, change.offset + len(change.content or b"")
        if change.content is None:
            if size not in (self.end, end):
                raise LabError(f"{change.what}: cut short it made {size} bytes of {self.end}")
            self._resize(size)
            return
        if end > self.end:
            partial = size % change.unit == 0 and max(self.end, change.offset + change.acknowledged) <= size <= end
            if size not in (self.end, end) and not partial:
                raise LabError(f"{change.what}: cut short it made {size} bytes of {self.end}")
            self._resize(max(size, self.end))
        self._settle_content(fd, change)

    def _settle_content(self, fd: int, change: Change) -> None:
        content, offset = change.content or b"", change.offset
        end = min(offset + len(content), self.end)
        if end <= offset:
            return
        found, at = os.pread(fd, end - offset, offset), offset - self.start
        old = self.model[at : at + len(found)]
        if len(found) != end - offset:
            raise LabError(
                f"{change.what}: {len(found)} of {end - offset} bytes can be read; the size is {os.fstat(fd).st_size}"
            )
        if found[: change.acknowledged] != content[: change.acknowledged]:
            raise LabError(f"{change.what}: the {change.acknowledged} bytes that it acknowledged are not there")
        for unit in range(offset // change.unit * change.unit, end, change.unit):
            low, high = max(unit - offset, change.acknowledged), min(unit + change.unit, end) - offset
            if low < high and found[low:high] not in (content[low:high], old[low:high]):
                wrong = difference(found[low:high], old[low:high], offset + low)
                raise LabError(f"{change.what}: cut short it left what is neither old nor new: {wrong}")
        self.model[at : at + len(found)] = found
        self.touched.append((offset, len(found)))

    def compare(self, fd: int, *, whole: bool) -> None:
        """Compare all of it, or what was changed since ``touched`` was cleared.  Raises LabError."""
        ranges = [(self.start, len(self.model))] if whole else self.touched
        for first, length in ranges:
            for offset in range(first, min(first + length, self.end), _READ_BYTES):
                self._compare(fd, offset, min(_READ_BYTES, first + length - offset))

    def compare_if_quiet(self, fd: int, offset: int, length: int) -> bool:
        """Compare a range from another thread; false when it was changed meanwhile.  Raises LabError, OSError."""
        version, at = self.version, offset - self.start
        wanted = bytes(self.model[at : at + length])
        found = os.pread(fd, len(wanted), offset)
        if version % 2 or self.version != version:
            return False
        _judge(found, wanted, offset)
        return True

    # Judging and remembering

    def _compare(self, fd: int, offset: int, length: int) -> None:
        wanted = self._wanted(offset, length)
        _judge(os.pread(fd, len(wanted), offset), wanted, offset)

    def _wanted(self, offset: int, length: int) -> bytearray:
        return self.model[offset - self.start : offset - self.start + length]

    def _note(self, what: str) -> None:
        self.log.append(what)

    def _resize(self, end: int) -> None:
        size = end - self.start
        if size < len(self.model):
            del self.model[size:]
        else:
            self.touched.append((self.end, end - self.end))
            self.model.extend(bytes(end - self.end))

    def _make(self, change: Change, act: Callable[[], int]) -> None:
        """Make a change by ``act``, which returns how many bytes it wrote; OSError leaves it under way."""
        self._note(change.what)
        self.version += 1
        self.change = change
        done, content = act(), change.content
        if content is None:
            self._resize(change.offset)
        else:
            change.acknowledged = done
            if done != len(content):
                raise OSError(errno.EIO, f"{done} of {len(content)} bytes were written")
            self._resize(max(self.end, change.offset + done))
            at = change.offset - self.start
            self.model[at : at + done] = content
            self.touched.append((change.offset, done))
        self.change = None
        self.version += 1

    # Deciding

    def _length(self, chance: random.Random) -> int:
        return chance.randint(1, chance.choice(_TRANSFERS))

    def _place(self, chance: random.Random) -> tuple[int, int]:
        length = min(self._length(chance), len(self.model))
        return self.start + chance.randrange(len(self.model) - length + 1), length

    def _blocks(self, chance: random.Random) -> tuple[int, int]:
        """Whole blocks that no other lane has a part in; there are always some."""
        first, end = -(-self.start // BLOCK), self.end // BLOCK
        count = min(-(-self._length(chance) // BLOCK), end - first)
        return chance.randint(first, end - count) * BLOCK, count * BLOCK

    # Doing

    def _open(self) -> None:
        for name, flags in (("_fd", os.O_RDWR), ("_direct", os.O_RDWR | os.O_DIRECT)):
            fd = self._disk.open(flags)
            if fd is None:
                return
            before = getattr(self, name)
            setattr(self, name, fd)
            if before >= 0:
                os.close(before)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)  # read ahead, all would soon be back

    def _close(self) -> None:
        for name in ("_fd", "_direct"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                with suppress(OSError):  # a mount whose daemon was killed cannot be told
                    os.close(fd)

    def _reopen(self, chance: random.Random) -> None:
        self._note("open again")
        self._open()

    def _read(self, chance: random.Random) -> None:
        offset, length = self._place(chance)
        self._note(f"pread {length} at {offset}")
        self._compare(self._fd, offset, length)

    def _read_directly(self, chance: random.Random) -> None:
        offset, length = self._blocks(chance)
        self._note(f"O_DIRECT read {length} at {offset}")
        with mmap.mmap(-1, length) as memory:
            count = os.preadv(self._direct, [memory], offset)
            _judge(memory[:count], self._wanted(offset, length), offset)

    def _read_mapping(self, chance: random.Random) -> None:
        offset, length = self._blocks(chance)
        self._note(f"mmap read {length} at {offset}")
        with mmap.mmap(self._fd, length, access=mmap.ACCESS_READ, offset=offset) as memory:
            _judge(loaded(memory), self._wanted(offset, length), offset)

    def _write(self, chance: random.Random) -> None:
        self._put(*self._place(chance), chance)

    def _write_blocks(self, chance: random.Random) -> None:
        self._put(*self._blocks(chance), chance)

    def _put(self, offset: int, length: int, chance: random.Random) -> None:
        content = random_content(chance, length)
        change = Change(f"pwrite {length} at {offset}", offset, content)
        self._make(change, lambda: os.pwrite(self._fd, content, offset))

    def _write_directly(self, chance: random.Random) -> None:
        offset, length = self._blocks(chance)
        content = random_content(chance, length)
        with mmap.mmap(-1, length) as memory:
            memory[:] = content
            change = Change(f"O_DIRECT write {length} at {offset}", offset, content)
            self._make(change, lambda: os.pwritev(self._direct, [memory], offset))

    def _write_mapping(self, chance: random.Random) -> None:
        offset, length = self._blocks(chance)
        start = chance.randrange(length)
        content = random_content(chance, length - start)

        def store() -> int:
            store_to(memory, start, content)
            memory.flush()
            return len(content)

        with mmap.mmap(self._fd, length, offset=offset) as memory:
            what = f"mmap write and msync {len(content)} at {offset + start}"
            self._make(Change(what, offset + start, content, unit=1), store)

    def _sync(self, chance: random.Random) -> None:
        function = chance.choice((os.fsync, os.fdatasync))
        self._note(function.__name__)
        function(self._fd)

    def _forget(self, chance: random.Random) -> None:
        offset, length = (0, 0) if chance.random() < 0.3 else self._place(chance)
        self._note(f"forget pages {length} at {offset}")
        self._disk.forget(self._fd, offset, length)

    # The end of the disk

    def _write_behind_end(self, chance: random.Random) -> None:
        assert self._size_max is not None
        offset = self.end + chance.choice((0, 0, 1, BLOCK, 70_000))
        if (length := min(self._length(chance), self._size_max - offset)) > 0:
            self._put(offset, length, chance)

    def _cut(self, chance: random.Random) -> None:
        least = self.start + 4 * BLOCK
        self._move_end(max(least, self.end - chance.choice((1, 700, BLOCK, 70_000, 300_000))), chance)

    def _extend(self, chance: random.Random) -> None:
        assert self._size_max is not None
        self._move_end(min(self._size_max, self.end + chance.choice((1, 700, BLOCK, 70_000))), chance)

    def _move_end(self, end: int, chance: random.Random) -> None:
        by_name = chance.random() < 0.5

        def act() -> int:
            if not (by_name and self._disk.truncate(end)):
                os.ftruncate(self._fd, end)
            return 0

        self._make(Change(f"{'truncate' if by_name else 'ftruncate'} from {self.end} to {end}", end), act)


def _judge(found: bytes, wanted: bytes | bytearray, offset: int) -> None:
    """Raises OSError of a short read, which a dying daemon may cause, and LabError of wrong bytes."""
    if len(found) < len(wanted):
        raise OSError(errno.EIO, f"{len(found)} of {len(wanted)} bytes were read at {offset}")
    if wrong := difference(found, wanted, offset):
        raise LabError(wrong)


def loaded(memory: mmap.mmap) -> bytes:
    """What mapped memory holds.

    The kernel copies it: without a daemon that is an error, where this process's own touch would be a SIGBUS.
    """
    copy = os.memfd_create("loaded")
    try:
        os.pwritev(copy, [memory], 0)
        return os.pread(copy, len(memory), 0)
    finally:
        os.close(copy)


def store_to(memory: mmap.mmap, start: int, content: bytes) -> None:
    """Put content into mapped memory, in the same way."""
    copy = os.memfd_create("stored")
    try:
        os.pwrite(copy, content, 0)
        with memoryview(memory) as whole, whole[start:] as part:
            done = os.preadv(copy, [part], 0)
    finally:
        os.close(copy)
    if done != len(content):
        raise OSError(errno.EFAULT, f"{done} of {len(content)} bytes were stored")
