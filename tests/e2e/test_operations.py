"""Ten thousand operations on a half-absent disk and on a plain file, with the daemon killed in between.

The plain file is the model: after every acknowledged operation both are the same.  A kill that meets an operation may
leave either outcome of that operation, byte by byte, and nothing else; the model then takes over what was found.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from live_datastore import BLOCK, CHUNK, MIB, QUIET, SMALL_ENDS, LiveDatastore, MakeDatastore, image, merged

SIZE_MAX = 40 * MIB
OPERATIONS = 10_000
WINDOW = 4 * CHUNK
GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV}
"""What an operation may fail with when the daemon dies under it."""


def aligned(size: int) -> mmap.mmap:
    """Memory that O_DIRECT accepts."""
    return mmap.mmap(-1, size)


@dataclass
class Pair:
    """The disk under test and the plain file, open at the same time."""

    disk: Path
    plain: Path
    fds: tuple[int, int] = (-1, -1)
    direct_fd: int = -1
    counts: dict[str, int] = field(default_factory=dict)

    def open(self) -> None:
        disk_fd = os.open(self.disk, os.O_RDWR)
        os.posix_fadvise(disk_fd, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel's read-ahead would recall it all
        self.fds = (disk_fd, os.open(self.plain, os.O_RDWR))
        self.direct_fd = os.open(self.disk, os.O_RDWR | os.O_DIRECT)

    def close(self) -> None:
        for fd in (*self.fds, self.direct_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):  # a mount whose daemon was killed cannot be told
                    os.close(fd)
        self.fds, self.direct_fd = (-1, -1), -1

    @property
    def size(self) -> int:
        """Size of the model, bytes."""
        return os.fstat(self.fds[1]).st_size


class Interrupted(Exception):
    """The daemon died under an operation; ``settle`` finds out what became of it, once there is a daemon again."""

    def __init__(self, settle: Callable[[], None]) -> None:
        super().__init__("the daemon was killed")
        self.settle = settle


class Operations:
    """Random operations on a pair, in an order that the seed decides.

    They spread over the disk window by window, so that there are absent parts until the end.
    """

    def __init__(self, pair: Pair, rng: random.Random) -> None:
        self.pair = pair
        self.rng = rng
        self.done = 0
        self._windows = list(range(0, pair.plain.stat().st_size, WINDOW))
        rng.shuffle(self._windows)
        weighted = {
            self.write: 30,
            self.write_blocks: 12,
            self.write_directly: 8,
            self.write_by_mapping: 2,
            self.read: 24,
            self.read_directly: 8,
            self.read_by_mapping: 6,
            self.sync: 3,
            self.reopen: 3,
            self.cut: 1,
            self.extend: 1,
            self.write_behind_end: 1,
        }
        self._kinds, self._weights = list(weighted), list(weighted.values())

    def step(self) -> None:
        """One operation.  Raises Interrupted when the daemon died under it."""
        self.done += 1
        (kind,) = self.rng.choices(self._kinds, self._weights)
        self.pair.counts[kind.__name__] = self.pair.counts.get(kind.__name__, 0) + 1
        kind()

    # Places

    def _length(self) -> int:
        limit = self.rng.choice((16, 600, BLOCK, 3 * BLOCK, CHUNK, 3 * CHUNK))
        return self.rng.randrange(1, limit + 1)

    def _place(self) -> tuple[int, int]:
        length = self._length()
        return min(self._start(), self.pair.size - length), length

    def _start(self) -> int:
        seen = 1 + len(self._windows) * self.done // (2 * OPERATIONS)
        return self.rng.choice(self._windows[:seen]) + self.rng.randrange(WINDOW)

    def _blocks(self) -> tuple[int, int]:
        length = BLOCK * self.rng.choice((1, 1, 2, 8, 16, 33))
        return min(self._start(), self.pair.size - length) // BLOCK * BLOCK, length

    # Changes

    def write(self) -> None:
        offset, length = self._place()
        self._write(offset, self.rng.randbytes(length))

    def write_blocks(self) -> None:
        offset, length = self._blocks()
        self._write(offset, self.rng.randbytes(length) if self.rng.random() < 0.8 else bytes(length))

    def write_behind_end(self) -> None:
        if self.pair.size + 3 * CHUNK < SIZE_MAX:
            self._write(self.pair.size + self.rng.choice((0, 1, BLOCK, CHUNK)), self.rng.randbytes(self._length()))

    def write_directly(self) -> None:
        offset, length = self._blocks()
        buffer = aligned(length)
        buffer[:] = self.rng.randbytes(length)
        self._write(offset, bytes(buffer), lambda: os.pwritev(self.pair.direct_fd, [buffer], offset))

    def write_by_mapping(self) -> None:
        offset, length = self._place()
        data, start = self.rng.randbytes(length), offset // BLOCK * BLOCK

        def change() -> int:
            with mmap.mmap(self.pair.fds[0], offset + length - start, offset=start) as memory:
                memory.madvise(mmap.MADV_RANDOM)
                memory[offset - start : offset - start + length] = data
                memory.flush()
            return length

        with kills.held_back():
            self._write(offset, data, change)

    def _write(self, offset: int, data: bytes, change: Callable[[], int] | None = None) -> None:
        disk_fd, plain_fd = self.pair.fds
        with self._may_be_interrupted(lambda: self._settle_write(offset, data, 0)):
            written = change() if change else os.pwrite(disk_fd, data, offset)
            if written != len(data):
                assert kills.died, f"{written} of {len(data)} bytes written"
                raise Interrupted(lambda: self._settle_write(offset, data, written))
        assert os.pwrite(plain_fd, data, offset) == len(data)

    def _settle_write(self, offset: int, data: bytes, acknowledged: int) -> None:
        """Acknowledged bytes are there, every other one is the old or the new one; the end may be anywhere between."""
        disk_fd, plain_fd = self.pair.fds
        size, old = os.fstat(disk_fd).st_size, os.pread(plain_fd, len(data), offset)
        assert self.pair.size <= size <= max(self.pair.size, offset + len(data))
        found = os.pread(disk_fd, len(data), offset)
        assert found[:acknowledged] == data[:acknowledged]
        for at, byte in enumerate(found):
            assert byte == data[at] or byte == (old[at] if at < len(old) else 0), f"wrong byte at {offset + at}"
        os.ftruncate(plain_fd, size)
        os.pwrite(plain_fd, found, offset)

    def cut(self) -> None:
        size = max(8 * MIB, self.pair.size - self.rng.choice((1, 700, BLOCK, 2 * CHUNK + 5)))
        self._truncate(min(size, self.pair.size))

    def extend(self) -> None:
        self._truncate(min(SIZE_MAX, self.pair.size + self.rng.choice((1, 700, BLOCK, 2 * CHUNK + 5))))

    def _truncate(self, size: int) -> None:
        before = self.pair.size
        by_path = self.rng.random() < 0.5
        with self._may_be_interrupted(lambda: self._settle_truncate(before, size)):
            if by_path:
                os.truncate(self.pair.disk, size)
            else:
                os.ftruncate(self.pair.fds[0], size)
        os.ftruncate(self.pair.fds[1], size)

    def _settle_truncate(self, before: int, size: int) -> None:
        found = os.fstat(self.pair.fds[0]).st_size
        assert found in (before, size)
        os.ftruncate(self.pair.fds[1], found)

    # Reads

    def read(self) -> None:
        offset, length = self._place()
        self._compare(offset, length, lambda: os.pread(self.pair.fds[0], length, offset))

    def read_directly(self) -> None:
        offset, length = self._blocks()
        buffer = aligned(length)
        self._compare(offset, length, lambda: buffer[: os.preadv(self.pair.direct_fd, [buffer], offset)])

    def read_by_mapping(self) -> None:
        offset, length = self._place()
        start = offset // BLOCK * BLOCK

        def by_mapping() -> bytes:
            with mmap.mmap(self.pair.fds[0], offset + length - start, prot=mmap.PROT_READ, offset=start) as memory:
                memory.madvise(mmap.MADV_RANDOM)
                return memory[offset - start :]

        with kills.held_back():
            self._compare(offset, length, by_mapping)

    def _compare(self, offset: int, length: int, read: Callable[[], bytes]) -> None:
        with self._may_be_interrupted(lambda: None):
            found = read()
            wanted = os.pread(self.pair.fds[1], length, offset)
            if kills.died and len(found) < len(wanted) and wanted.startswith(found):
                raise Interrupted(lambda: None)  # the kernel gives out the pages that it had
            assert found == wanted, f"{length} bytes at {offset} differ from byte {first_difference(found, wanted)} on"

    # The rest

    def sync(self) -> None:
        function = self.rng.choice((os.fsync, os.fdatasync))
        with self._may_be_interrupted(lambda: None):
            function(self.pair.fds[0])

    def reopen(self) -> None:
        self.pair.close()
        with self._may_be_interrupted(lambda: None):
            self.pair.open()

    @contextlib.contextmanager
    def _may_be_interrupted(self, settle: Callable[[], None]) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            if exc.errno not in GONE or not kills.died:
                raise
            raise Interrupted(settle) from exc


class Kills:
    """Kills the daemon from a thread of its own, so that an operation may be under way."""

    def __init__(self) -> None:
        self.died = False
        self.thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """No kill within the block: a page fault without a daemon is a SIGBUS.  Raises Interrupted after a kill."""
        with self._lock:
            if self.died:
                raise Interrupted(lambda: None)
            yield

    def plan(self, datastore: LiveDatastore, delay_s: float) -> None:
        """Kill the daemon ``delay_s`` from now."""
        self.died = False

        def kill() -> None:
            with self._lock:
                self.died = True
                datastore.kill()

        self.thread = threading.Timer(delay_s, kill)
        self.thread.start()

    def join(self) -> None:
        """Wait until it is dead; no kill is planned any more."""
        if self.thread is not None:
            self.thread.join()
            self.thread, self.died = None, False


kills = Kills()


def first_difference(one: bytes, other: bytes) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def run(datastore: LiveDatastore, operations: Operations, *, kills_count: int, between: Callable[[int], None]) -> int:
    """All operations; the number of kills that met one under way.  ``between`` is called before each."""
    pair, rng = operations.pair, operations.rng
    moments = set(rng.sample(range(200, OPERATIONS - 200), kills_count))
    met = 0
    for number in range(OPERATIONS):
        between(number)
        if number in moments:
            kills.plan(datastore, rng.random() * 0.2)
            settle: Callable[[], None] | None = None
            while not kills.died:
                try:
                    operations.step()
                except Interrupted as interrupted:
                    settle = interrupted.settle
                    met += 1
                    break
            kills.join()
            pair.close()
            datastore.start()
            pair.open()
            if settle is not None:
                settle()
        operations.step()
    return met


def make_pair(datastore: LiveDatastore, *, size: int, seed: int) -> Pair:
    content = image(size, seed=seed)
    disk = datastore.add_vm("vm", content)
    plain = datastore.base / "plain.raw"
    plain.write_bytes(content)
    return Pair(disk, plain)


def assert_same(pair: Pair, found: Path) -> None:
    wanted, got = pair.plain.read_bytes(), found.read_bytes()
    assert len(got) == len(wanted)
    if got != wanted:  # no `assert`: pytest would look for the smallest difference of megabytes
        raise AssertionError(f"differs from byte {first_difference(got, wanted)} on")


def finish(datastore: LiveDatastore, pair: Pair) -> None:
    """Recall it all: nothing differs, and nothing of ours is left."""
    assert_same(pair, pair.disk)
    pair.close()
    datastore.cli("recall", "vm", check=0)
    backing = datastore.backing_of(pair.disk)
    datastore.assert_nothing_left(backing)
    assert_same(pair, backing)
    datastore.cli("status", check=0)
    datastore.restart()
    assert_same(pair, pair.disk)
    assert "Traceback" not in datastore.log()


@pytest.mark.parametrize("seed", [1, 2])
def test_half_absent_disk_behaves_as_a_plain_file(make_datastore: MakeDatastore, seed: int) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    pair = make_pair(datastore, size=32 * MIB + 700 * seed, seed=seed)
    datastore.archive("vm")
    pair.open()
    operations = Operations(pair, random.Random(seed))
    try:
        met = run(datastore, operations, kills_count=6, between=lambda number: None)
        assert met, "no kill met an operation: the test does not test that"
        assert len(pair.counts) == 12, pair.counts
        assert datastore.state("vm") == "placeholder"
        finish(datastore, pair)
    finally:
        kills.join()
        pair.close()


@pytest.mark.parametrize("seed", [3])
def test_hydrating_and_archived_again_in_between(make_datastore: MakeDatastore, seed: int) -> None:
    datastore = make_datastore(merged(SMALL_ENDS, {"hydration": {"bytes_per_s_max": "2 MiB"}}))
    datastore.start()
    pair = make_pair(datastore, size=32 * MIB - 100, seed=seed)
    datastore.archive("vm")
    pair.open()
    operations = Operations(pair, random.Random(seed))
    states = set()

    def between(number: int) -> None:
        if number % 500 == 0:
            states.add(datastore.state("vm"))
        if number % 2500 == 1250:
            pair.close()
            archived = datastore.cli("archive", "vm", check=0)
            assert "archived" in archived.out
            assert len(datastore.durable_maps()) == len(datastore.pins()) == 1
            assert_same(pair, pair.disk) if number == 1250 else None
            pair.open()

    try:
        run(datastore, operations, kills_count=4, between=between)
        assert "recalling" in states
        datastore.configure({"hydration": {"bytes_per_s_max": 0}})
        finish(datastore, pair)
        datastore.cli("verify", check=0)
    finally:
        kills.join()
        pair.close()


def test_a_wrong_byte_would_be_found(make_datastore: MakeDatastore) -> None:
    datastore = make_datastore(QUIET)
    datastore.start()
    pair = make_pair(datastore, size=8 * MIB, seed=4)
    datastore.archive("vm")
    pair.open()
    try:
        for offset in range(0, 8 * MIB, CHUNK):
            os.pwrite(pair.fds[1], b"\xff", offset + 5)
        with pytest.raises(AssertionError, match="differ from byte"):
            run(datastore, Operations(pair, random.Random(4)), kills_count=0, between=lambda number: None)
        with pytest.raises(AssertionError, match="differs from byte 5 on"):
            assert_same(pair, pair.disk)
    finally:
        pair.close()
