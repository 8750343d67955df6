"""One file of a mount under random operations, compared with a bytearray after each of them.

All decisions come from the given randomness and from the model, never from what the file answered, so that a seed takes
the same decisions again.  Every failure is a `Mismatch`, which tells the last operations before it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from scripts.lab.content import BLOCK, difference, random_content
from scripts.lab.failure import LabError

_MIB: Final = 1 << 20
_TRANSFERS: Final = (1, 16, 600, BLOCK, 3 * BLOCK, 64 << 10, 200 << 10)
"""Upper bounds that the length of an operation is drawn below."""
_HOT_BYTES: Final = 256 << 10
"""Most operations fall into a region of this size for a while, so that they meet each other."""
_HOT_OPERATIONS: Final = 60
_LOG_LENGTH: Final = 40

_KEEP_SIZE, _PUNCH_HOLE, _COLLAPSE_RANGE, _ZERO_RANGE, _INSERT_RANGE = 0x01, 0x02, 0x08, 0x10, 0x20
_FALLOCATE_MODES: Final = (0, _KEEP_SIZE, _PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE, _COLLAPSE_RANGE, _INSERT_RANGE)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_HANDLES: Final = {
    "one": os.O_RDWR,
    "two": os.O_RDWR,
    "reader": os.O_RDONLY,
    "direct": os.O_RDWR | os.O_DIRECT,
    "append": os.O_RDWR | os.O_APPEND,
}


class Mismatch(LabError):
    """The file is not what the model says, or an operation failed."""


class FilePlay:
    """A file, the handles it is open by, and the ``model`` that it has to equal.

    ``path`` is where the mount shows it, ``backing`` where it lies; ``counts`` tells how often each of ``kinds`` ran.
    """

    def __init__(self, path: Path, *, backing: Path, chance: random.Random, size: int) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.model = bytearray()
        self.backing = backing
        self._chance = chance
        self._size_wanted = size
        self._size_max = size + size // 4
        self._hot = 0
        self._fds: dict[str, int] = {}
        self._log: deque[str] = deque(maxlen=_LOG_LENGTH)
        self._done = 0
        weighted: dict[Callable[[], None], int] = {
            self._pread: 14,
            self._pwrite: 14,
            self._read: 5,
            self._write: 5,
            self._write_blocks: 8,
            self._write_vector: 3,
            self._read_directly: 6,
            self._write_directly: 6,
            self._append: 3,
            self._read_mapping: 5,
            self._write_mapping: 5,
            self._truncate_down: 2,
            self._truncate_up: 2,
            self._write_beyond_end: 2,
            self._copy_within: 3,
            self._sync: 4,
            self._reopen: 2,
            self._allocate: 3,
            self._invalidate: 6,
            self._look_at_status: 2,
            self._seek_holes: 2,
        }
        self.kinds, self._weights = list(weighted), list(weighted.values())

    # What a soak calls

    def create(self) -> None:
        """Make the file, full of content, and leave it open."""
        self.path.parent.mkdir(exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        self.open()
        self.refill()

    def open(self) -> None:
        """Open it by every handle."""
        for name in _HANDLES:
            self._open(name)

    def close(self) -> None:
        """Close every handle."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def forget_all(self) -> None:
        """Have the kernel drop all its pages of the file."""
        self._note("forget all pages")
        self._guarded("forget", lambda: self._forget(0, 0))

    def step(self) -> str:
        """One random operation; says which.  Raises Mismatch."""
        if self._done % _HOT_OPERATIONS == 0:
            self._hot = self._chance.randrange(self._size_max)
        self._done += 1
        (kind,) = self._chance.choices(self.kinds, self._weights)
        name = kind.__name__.removeprefix("_")
        self.counts[name] += 1
        self._guarded(name, kind)
        self._guarded(name, self._compare_size)
        return f"{name} of {self.path.name}"

    def refill(self) -> None:
        """Write fresh content behind what is there until the file is as large as it began, or nearly."""
        while len(self.model) < self._size_wanted - 1:
            count = min(_MIB, self._size_wanted - self._chance.randrange(2) - len(self.model))
            content, offset = self._content(count), len(self.model)
            self._guarded("refill", lambda c=content, o=offset: self._put("one", o, c))  # type: ignore[misc]

    def verify(self) -> None:
        """Compare all of it, with nothing cached.  Raises Mismatch."""
        self._note("compare everything")
        self._guarded("verify", self._verify)

    def verify_backing(self) -> None:
        """Compare the backing file of a resident disk.  Raises Mismatch."""
        found = self.backing.read_bytes()
        self._compare(found, 0, len(self.model))
        if len(found) != len(self.model):
            raise self._wrong(f"the backing file has {len(found)} bytes, not {len(self.model)}")

    # Judging

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as exc:
            raise self._wrong(f"{name} failed: {exc}") from exc

    def _note(self, what: str) -> None:
        self._log.append(f"{self._done}: {what}")

    def _wrong(self, what: str) -> Mismatch:
        return Mismatch("\n  ".join((f"{self.path}: {what}; the last operations:", *self._log)))

    def _compare(self, found: bytes, offset: int, length: int) -> None:
        if wrong := difference(found, self.model[offset : offset + length], offset):
            raise self._wrong(wrong)

    def _compare_size(self) -> None:
        size = os.fstat(self._fds[self._any_handle()]).st_size
        if size != len(self.model):
            raise self._wrong(f"st_size is {size} instead of {len(self.model)}")

    def _verify(self) -> None:
        self._forget(0, 0)
        for offset in range(0, len(self.model), _MIB):
            self._compare(os.pread(self._fds["one"], _MIB, offset), offset, _MIB)

    def _look_again(self, offset: int, length: int) -> None:
        """Read a changed range by another handle, sometimes with what lies around it and from the daemon itself."""
        slack = self._chance.choice((0, 0, 0, 1, BLOCK + 1))
        start, end = max(0, offset - slack), min(offset + length + slack, len(self.model))
        if self._chance.random() < 0.4:
            self._forget(start, end - start)
        handle = self._chance.choice(("one", "two", "reader", "append"))
        self._compare(os.pread(self._fds[handle], end - start, start), start, end - start)

    # Deciding

    def _any_handle(self) -> str:
        return self._chance.choice(list(_HANDLES))

    def _length(self) -> int:
        return self._chance.randint(1, self._chance.choice(_TRANSFERS))

    def _offset(self) -> int:
        """Anywhere within the file: mostly where it is hot, sometimes near the end."""
        size, kind = len(self.model), self._chance.random()
        if kind < 0.65:
            offset = self._hot + self._chance.randrange(_HOT_BYTES)
        elif kind < 0.85:
            offset = self._chance.randrange(self._size_max)
        else:
            offset = max(0, size - self._chance.randrange(1, _HOT_BYTES))
        return offset % max(1, size)

    def _place(self, *, unit: int = 1) -> tuple[int, int]:
        """Offset and length of a range that may reach beyond the end, in multiples of ``unit``."""
        length = -(-self._length() // unit) * unit
        offset = self._offset() // unit * unit
        return offset, max(0, min(length, (self._size_max - offset) // unit * unit))

    def _content(self, length: int) -> bytes:
        return random_content(self._chance, length)

    # Doing

    def _open(self, name: str) -> None:
        self._fds[name] = os.open(self.path, _HANDLES[name])
        if name == "one":  # the kernel does not read ahead here, so that there is something absent for longer
            os.posix_fadvise(self._fds[name], 0, 0, os.POSIX_FADV_RANDOM)

    def _forget(self, offset: int, length: int) -> None:
        """Have the kernel drop its pages of the mount's file and of the backing file; 0, 0 is all."""
        os.posix_fadvise(self._fds["one"], offset, length, os.POSIX_FADV_DONTNEED)
        fd = os.open(self.backing, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def _is_written(self, count: int, offset: int, content: bytes) -> None:
        if count != len(content):
            raise self._wrong(f"{count} bytes were written instead of {len(content)}")
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + count] = content

    def _put(self, handle: str, offset: int, content: bytes) -> None:
        self._note(f"pwrite by {handle}: {len(content)} at {offset}")
        self._is_written(os.pwrite(self._fds[handle], content, offset), offset, content)

    def _pread(self) -> None:
        (offset, length), handle = self._place(), self._chance.choice(("one", "two", "reader", "append"))
        self._note(f"pread by {handle}: {length} at {offset}")
        self._compare(os.pread(self._fds[handle], length, offset), offset, length)

    def _pwrite(self) -> None:
        (offset, length), handle = self._place(), self._chance.choice(("one", "two"))
        self._put(handle, offset, self._content(length))
        self._look_again(offset, length)

    def _write_blocks(self) -> None:
        offset, length = self._place(unit=BLOCK)
        self._put("two", offset, self._content(length))
        self._look_again(offset, length)

    def _read(self) -> None:
        (offset, length), handle = self._place(), self._chance.choice(("one", "reader"))
        self._note(f"seek and read by {handle}: {length} at {offset}")
        os.lseek(self._fds[handle], offset, os.SEEK_SET)
        for at in (offset, offset + length):
            self._compare(os.read(self._fds[handle], length), at, length)

    def _write(self) -> None:
        offset, length = self._place()
        content = self._content(length)
        self._note(f"seek and write by two: {length} at {offset}")
        os.lseek(self._fds["two"], offset, os.SEEK_SET)
        self._is_written(os.write(self._fds["two"], content), offset, content)
        self._look_again(offset, length)

    def _write_vector(self) -> None:
        offset, length = self._place()
        content = self._content(length)
        parts = [content[: length // 3], content[length // 3 : length // 2], content[length // 2 :]]
        self._note(f"pwritev by one: {[len(part) for part in parts]} at {offset}")
        self._is_written(os.pwritev(self._fds["one"], parts, offset), offset, content)
        self._look_again(offset, length)

    def _read_directly(self) -> None:
        offset, length = self._place(unit=BLOCK)
        self._note(f"O_DIRECT read: {length} at {offset}")
        if length:
            with mmap.mmap(-1, length) as memory:
                count = os.preadv(self._fds["direct"], [memory], offset)
                self._compare(memory[:count], offset, length)

    def _write_directly(self) -> None:
        offset, length = self._place(unit=BLOCK)
        content = self._content(length)
        self._note(f"O_DIRECT write: {length} at {offset}")
        if length:
            with mmap.mmap(-1, length) as memory:
                memory[:] = content
                self._is_written(os.pwritev(self._fds["direct"], [memory], offset), offset, content)
        self._look_again(offset, length)

    def _append(self) -> None:
        offset = len(self.model)
        content = self._content(min(self._length(), self._size_max - offset))
        self._note(f"O_APPEND write: {len(content)} (at {offset})")
        self._is_written(os.write(self._fds["append"], content), offset, content)
        self._look_again(offset, len(content))

    def _mapping(self, *, writable: bool) -> tuple[mmap.mmap, int, int, int] | None:
        """A mapping of part of the file, where it begins in the file, and a range within it; None of an empty file."""
        offset, length = self._place()
        length = min(length, len(self.model) - offset)
        if length <= 0:
            return None
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        size, handle = offset + length - start, "two" if writable else "reader"
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        return mmap.mmap(self._fds[handle], size, access=access, offset=start), start, offset - start, length

    def _read_mapping(self) -> None:
        if (found := self._mapping(writable=False)) is None:
            return
        mapping, start, at, length = found
        with mapping:
            self._note(f"mmap read: {length} at {start + at}")
            self._compare(mapping[at : at + length], start + at, length)

    def _write_mapping(self) -> None:
        if (found := self._mapping(writable=True)) is None:
            return
        mapping, start, at, length = found
        content, flush = self._content(length), self._chance.random() < 0.6
        with mapping:
            self._note(f"mmap write{' and msync' if flush else ''}: {length} at {start + at}")
            mapping[at : at + length] = content
            self._is_written(length, start + at, content)
            if flush:
                mapping.flush()
            if self._chance.random() < 0.5:  # while it is still mapped, and perhaps dirty
                self._look_again(start + at, length)
        self._look_again(start + at, length)

    def _truncate(self, size: int) -> None:
        if self._chance.random() < 0.5:
            self._note(f"ftruncate from {len(self.model)} to {size}")
            os.ftruncate(self._fds["two"], size)
        else:
            self._note(f"truncate from {len(self.model)} to {size}")
            os.truncate(self.path, size)
        if size < len(self.model):
            del self.model[size:]
        else:
            self.model.extend(bytes(size - len(self.model)))

    def _truncate_down(self) -> None:
        """Mostly a little, or there would soon be nothing left that is absent."""
        size, kind = len(self.model), self._chance.random()
        if kind < 0.01:
            self._note(f"open with O_TRUNC, from {size}")
            os.close(os.open(self.path, os.O_WRONLY | os.O_TRUNC))
            self.model.clear()
        elif kind < 0.06:
            self._truncate(self._chance.randint(0, size))
        else:
            self._truncate(max(0, size - self._chance.randint(1, self._chance.choice(_TRANSFERS))))

    def _truncate_up(self) -> None:
        size = len(self.model)
        grown = min(self._size_max, size + self._chance.randint(1, self._chance.choice(_TRANSFERS)))
        self._truncate(grown)
        self._look_again(size, grown - size)

    def _write_beyond_end(self) -> None:
        size = len(self.model)
        offset = min(self._size_max, size + self._chance.randint(1, self._chance.choice(_TRANSFERS)))
        content = self._content(min(self._length(), self._size_max - offset))
        if content:
            self._put("one", offset, content)
        self._look_again(size, len(self.model) - size)

    def _copy_within(self) -> None:
        (source, length), target = self._place(), self._offset()
        length = min(length, len(self.model) - source, self._size_max - target, abs(source - target))
        if length <= 0:
            return
        fd = self._fds["two"]
        content = bytes(self.model[source : source + length])
        if self._chance.random() < 0.5:
            self._note(f"copy by read and write: {length} from {source} to {target}")
            self._is_written(os.pwrite(fd, os.pread(fd, length, source), target), target, content)
        else:
            self._note(f"copy_file_range: {length} from {source} to {target}")
            done = 0
            while done < length:
                count = os.copy_file_range(fd, fd, length - done, source + done, target + done)
                if count == 0:
                    raise self._wrong("copy_file_range makes no progress")
                done += count
            self._is_written(done, target, content)
        self._look_again(target, length)

    def _sync(self) -> None:
        function = self._chance.choice((os.fsync, os.fdatasync))
        handle = self._any_handle()
        self._note(f"{function.__name__} by {handle}")
        function(self._fds[handle])

    def _reopen(self) -> None:
        name = self._any_handle()
        self._note(f"close and open {name}")
        os.close(self._fds.pop(name))
        self._open(name)

    def _allocate(self) -> None:
        """The mount has no fallocate: it says so, and nothing changes."""
        (offset, length), mode = self._place(unit=BLOCK), self._chance.choice(_FALLOCATE_MODES)
        self._note(f"fallocate, mode {mode:#x}: {length} at {offset}")
        if length == 0:
            return
        if _libc.fallocate(self._fds["two"], mode, offset, length) == 0:
            raise self._wrong("fallocate succeeded")
        if ctypes.get_errno() != errno.EOPNOTSUPP:
            raise self._wrong(f"fallocate gave {errno.errorcode[ctypes.get_errno()]}")
        self._look_again(offset, length)

    def _invalidate(self) -> None:
        offset, length = (0, 0) if self._chance.random() < 0.3 else self._place()
        self._note(f"forget pages: {length} at {offset}")
        self._forget(offset, length)

    def _look_at_status(self) -> None:
        self._note("stat by all handles and by name")
        found = [self.path.stat(), *(os.fstat(fd) for fd in self._fds.values())]
        if {st.st_size for st in found} != {len(self.model)} or len({st.st_ino for st in found}) != 1:
            raise self._wrong(f"stat tells {sorted({(st.st_ino, st.st_size) for st in found})}, not {len(self.model)}")

    def _seek_holes(self) -> None:
        """What is called a hole reads as zeros; where data is said to begin and end lies within the file."""
        offset, fd, size = self._offset(), self._fds["reader"], len(self.model)
        self._note(f"SEEK_HOLE and SEEK_DATA from {offset}")
        if size == 0:
            return
        hole = os.lseek(fd, offset, os.SEEK_HOLE)
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            data = size
        if not offset <= hole <= size or not offset <= data <= size:
            raise self._wrong(f"SEEK_HOLE gave {hole} and SEEK_DATA {data}")
        if any(self.model[offset:data]) or (hole < size and self.model[hole]):
            raise self._wrong(f"a hole is announced where there is data: SEEK_HOLE {hole}, SEEK_DATA {data}")
